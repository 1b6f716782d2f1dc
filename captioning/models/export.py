"""A trained captioner as folders for use without this suite: adapter with a card, merged GPT-2."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from captioning.files import atomic_path, write_json, write_text
from captioning.imports import import_guarded
from captioning.messages import first_sentence
from captioning.models.adapter import check_decoder, read_adapter
from captioning.models.captioner import Captioner, CaptionerConfig
from captioning.models.encoder import PREPROCESSING
from captioning.tensors import fingerprint
from decoder import Decoder, build_decoder, gpt2_state_dict, load_lora_state_dict, merge_lora

THEIR_NAMES = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}  # of a tokenizer's files, in transformers

CARD = """---
license: {license}
base_model: openai-community/gpt2
library_name: {library}
pipeline_tag: {task}
tags: [image-captioning, gpt2, lora, clip]
---

# Image captioning: {title}

{what}

| part | what |
|---|---|
| encoder (frozen) | timm `{config.encoder}`, {tokens}; fingerprint `{config.encoder_hash}` |
| decoder (frozen) | GPT-2, {decoder}; fingerprint `{config.decoder_hash}` |
| trained | LoRA {lora}, and a linear projector {projector} |
| training | {training} |
| validation | {validation} |

The captioner describes every image in the words of its training data; it has been measured only on the data above.

{use}
"""

ADAPTER_USE = """## Use

```
python p2_infer.py IMG_DIR OUT.json DECODER --adapter adapter.safetensors
```

`adapter.safetensors` holds the trained tensors, and in its header the configuration that rebuilds everything else. The
fingerprints are checked: with another encoder it does not load, and with another decoder only where
`--allow-other-decoder` is given."""

GPT2_USE = """## Use

```python
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2LMHeadModel

folder, image = ".", Image.open("image.jpg").convert("RGB")
encoder = timm.create_model({encoder}).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(encoder), is_training=False)
model, tokenizer = GPT2LMHeadModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
projector = load_file(f"{{folder}}/projector.safetensors")
with torch.inference_mode():
    pixels = transform(image)[None]
    tokens = {tokens}
    prefix = tokens @ projector["weight"].T + projector["bias"]
    begin = model.get_input_embeddings()(torch.tensor([[tokenizer.bos_token_id]]))
    embeddings = torch.cat([prefix, begin], 1)
    mask = torch.ones(embeddings.shape[:2], dtype=torch.long)
    ids = model.generate(inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=30, do_sample=False)
print(tokenizer.decode(ids[0], skip_special_tokens=True).strip())
```"""


LLAVA_USE = """## Use

```python
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

folder, image = ".", Image.open("image.jpg").convert("RGB")
model = LlavaForConditionalGeneration.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder, backend="pil")
inputs = processor(images=image, text="<image><|endoftext|>", return_tensors="pt")
ids = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
print(processor.decode(ids[0], skip_special_tokens=True).strip())
```

It answers no question: a prompt is an image and the token that begins every caption, which is also what its chat
template gives. `backend="pil"` prepares pictures exactly as in training; transformers' default, torchvision, differs by
a rounding, which changes about one caption in a hundred. {precision}"""

PRECISION = {
    True: "Load it in float32 or bfloat16: an encoder's final norm is a layer here, whose numbers float16 cannot hold.",
    False: "It runs in any precision.",
}


def load_decoder(
    adapter: Path, source: str | Path, allow_other: bool = False
) -> tuple[CaptionerConfig, Decoder, dict[str, Any]]:
    """Return the adapter's configuration, its decoder with LoRA merged, and the projector's tensors.

    The projector's ``weight`` is (decoder width, encoder width) and its ``bias`` (decoder width,). With ``allow_other``
    the decoder may be one that the adapter was not trained on; the configuration then has its fingerprint.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged, or the adapter was trained on another decoder.
    """
    config, state = read_adapter(adapter)
    decoder = build_decoder(source, config.lora)
    found = fingerprint(gpt2_state_dict(decoder))
    try:
        check_decoder(config.decoder_hash, decoder, found, allow_other)
    except ValueError as error:
        raise ValueError(f"--adapter {adapter} with --decoder {source}: {error}") from error
    config = replace(config, decoder_hash=found)
    parts: dict[str, dict[str, Any]] = {"decoder": {}, "projector": {}}
    for key, tensor in state.items():
        part, _, name = key.partition(".")
        if part not in parts:
            raise ValueError(f"--adapter {adapter}: holds {key}, which is no part of a captioner")
        parts[part][name] = tensor
    load_lora_state_dict(decoder, parts["decoder"])
    merge_lora(decoder)
    return config, decoder, parts["projector"]


def parts_of(adapter: Path, captioner: Captioner) -> tuple[CaptionerConfig, Decoder, dict[str, Any]]:
    """Return what :func:`load_decoder` does, of a captioner that ``load_captioner`` has made from ``adapter``."""
    config = replace(read_adapter(adapter)[0], decoder_hash=captioner.config.decoder_hash)
    return config, captioner.decoder, dict(captioner.projector.state_dict())


def write_gpt2(
    out: Path, decoder: Decoder, projector: dict[str, Any], tokenizer: Sequence[Path], end_id: int, end_of_text: str
) -> None:
    """Write the merged decoder, the projector and the tokenizer in Hugging Face layout.

    Args:
        out: folder to write.
        decoder: LoRA merged.
        projector: tensors.
        tokenizer: its files.
        end_id, end_of_text: the token that begins and ends every caption.
    """
    transformers = import_guarded("transformers")
    state = {
        key if key == "lm_head.weight" else f"transformer.{key}": tensor
        for key, tensor in gpt2_state_dict(decoder, untied=True).items()
    }
    config = transformers.GPT2Config(
        **asdict(decoder.config),
        tie_word_embeddings="lm_head.weight" not in state,
        bos_token_id=end_id,
        eos_token_id=end_id,
        architectures=["GPT2LMHeadModel"],
    )
    write_text(out / "config.json", config.to_json_string())
    for name, tensors in (("model", state), ("projector", projector)):
        with atomic_path(out / f"{name}.safetensors") as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), end_of_text)
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": decoder.config.n_positions}
    write_json(out / "tokenizer_config.json", settings | {"add_prefix_space": False} | special)
    for file in tokenizer:
        with atomic_path(out / THEIR_NAMES.get(file.name, file.name)) as temporary:
            shutil.copyfile(file, temporary)


def push(folder: Path, name: str) -> str:
    """Upload a folder as the new model ``OWNER/NAME`` of the hub; return its address.

    Raises:
        ValueError: such a model exists, or the hub refuses or cannot be reached.
    """
    hub = import_guarded("huggingface_hub")
    api = hub.HfApi()
    try:
        address = api.create_repo(name, exist_ok=False)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload captioner")
    except (hub.errors.HTTPError, OSError, ValueError, RuntimeError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = "exists on the hub already; choose another name" if status == 409 else first_sentence(error)
        raise ValueError(f"--push {name}: {reason}. {folder} is complete and can be uploaded later") from error
    return str(address)


def make_cards(
    config: CaptionerConfig, decoder: Decoder, projector: dict[str, Any], recorded: dict[str, str], license_: str
) -> dict[str, str]:
    """Return the model cards of all folders, by folder name; ``recorded`` fills ``training`` and ``validation``."""
    lora, shape = asdict(config.lora), decoder.config
    layer = "the last layer" if config.encoder_layer == -1 else f"layer {config.encoder_layer}"
    parts = {
        "config": config,
        "tokens": f"{'all' if config.use_cls else 'the patch'} tokens of {layer}{_averaged(config)}",
        "decoder": f"{shape.n_layer} layers of {shape.n_embd}, {shape.vocab_size:,} tokens",
        "lora": ", ".join(f"{key} {_plain(value)}" for key, value in lora.items() if value is not None),
        "projector": " to ".join(str(size) for size in reversed(projector["weight"].shape)),
        "license": license_,
        "task": "image-to-text",
        **recorded,
    }
    return {
        "adapter": CARD.format(
            library="safetensors",
            title="LoRA adapter",
            what="LoRA and projector that make a GPT-2 caption the images that a frozen CLIP encoder sees.",
            use=ADAPTER_USE,
            **parts,
        ),
        "gpt2": CARD.format(
            library="transformers",
            title="GPT-2 with LoRA merged in",
            what="A GPT-2 that continues projected image tokens with a caption. LoRA is part of its weights.",
            use=_gpt2_use(config),
            **parts,
        ),
        "llava": CARD.format(
            library="transformers",
            title="a LLaVA with GPT-2",
            what="Encoder, projector and a GPT-2 with LoRA merged in, as a LLaVA that transformers loads.",
            use=LLAVA_USE.format(precision=PRECISION[config.encoder_layer == -1]),
            **{**parts, "task": "image-text-to-text"},
        ),
    }


def _gpt2_use(config: CaptionerConfig) -> str:
    """The code to caption with the merged GPT-2, which encodes images as the captioner does."""
    overlay = {key: value for key, value in config.encoder_kwargs.items() if key in PREPROCESSING}
    kwargs = {key: value for key, value in config.encoder_kwargs.items() if key not in PREPROCESSING}
    kwargs |= {"pretrained_cfg_overlay": overlay} if overlay else {}
    call = [repr(config.encoder), "pretrained=True", "num_classes=0", *(f"{k}={v!r}" for k, v in kwargs.items())]
    encode = "encoder.forward_features(pixels)"
    if config.encoder_layer != -1:
        encode = (
            f"torch.cat(encoder.forward_intermediates(pixels, indices=[{config.encoder_layer}], norm=False, "
            'output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True)[0][::-1], 1)'
        )
    kept = ":" if config.use_cls else "encoder.num_prefix_tokens :"
    return GPT2_USE.format(encoder=", ".join(call), tokens=f"{encode}{_pooling(config.pool)}[:, {kept}]")


def _pooling(pool: int) -> str:
    """The code that averages patches, between that which encodes and the choice of tokens."""
    if pool == 1:
        return ""
    return f"""
    first, (height, width) = encoder.num_prefix_tokens, encoder.patch_embed.grid_size
    squares = tokens[:, first:].unflatten(1, (height // {pool}, {pool}, width // {pool}, {pool}))
    tokens = torch.cat([tokens[:, :first], squares.mean((2, 4)).flatten(1, 2)], 1)"""


def _averaged(config: CaptionerConfig) -> str:
    return "" if config.pool == 1 else f", of patches averages of {config.pool} x {config.pool}"


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
