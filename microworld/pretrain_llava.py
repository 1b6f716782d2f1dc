"""Pre-train the micro LLaVA: the encoder's vision tower frozen, a projector and a small Llama from nothing.

Real LLaVA joins a CLIP tower and a language model that both exist already, and teaches them in two stages on
instruction data that a language model wrote. Here the tower exists (the micro encoder's), the language model does not:
projector and Llama learn together on the questions and answers of ``microworld.instructions``. All questions of a
scene share one row, ``[USER: <image> | question answer | question answer | …]``, each seeing the image and itself
alone, as if it were the first.

``python -m microworld.pretrain llava`` writes ``microworld/weights/llava/``: what ``save_pretrained`` of transformers
writes, with processor and chat template.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from captioning.data.batches import PackedBatch
from captioning.device import seed_everything
from captioning.imports import import_guarded
from captioning.models.llava import TEMPLATE
from captioning.profiles import MICRO_WEIGHTS
from microworld.composer import make_scene
from microworld.instructions import conversation
from microworld.recipes import (
    CLIP_CONFIGS,
    MEAN,
    SCENE_SEEDS,
    STD,
    VOCAB_SIZE,
    Run,
    draw_scenes,
    normalise,
    optimise,
    write_record,
)

SPECIALS = ("<pad>", "<s>", "</s>", "<image>")  # ids 0 to 3
PAD, BOS, EOS, IMAGE = range(4)
LLAMA = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}
TEXT_SCENES = 4000  # scenes whose questions and answers the tokenizer is trained on
HELD_OUT = 512  # scenes that are not trained on
# One turn after another; only the system's own form is written: LLaVA 1.5 was tuned without a system message.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'].upper() }}: "
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ ' ' if message['role'] == 'user' else eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


# --- model ----------------------------------------------------------------------------------------------------------


def build_model() -> Any:
    """Return a ``LlavaForConditionalGeneration`` with random language model, its vision tower loaded and frozen."""
    transformers = import_guarded("transformers")
    clip = CLIP_CONFIGS["encoder"]
    vision = clip["vision_cfg"]
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=vision["width"],
            intermediate_size=4 * vision["width"],
            num_hidden_layers=vision["layers"],
            num_attention_heads=vision["width"] // vision["head_width"],
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            hidden_act="gelu",
            projection_dim=clip["embed_dim"],
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=VOCAB_SIZE, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, **LLAMA
        ),
        image_token_index=IMAGE,
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
        vision_feature_layer=-1,  # the micro encoder's last layer says best what is where; real LLaVA takes -2
    )
    model = transformers.LlavaForConditionalGeneration(config)
    tower = model.model.vision_tower
    tower.load_state_dict(clip_vision_state(load_file(MICRO_WEIGHTS / "encoder" / "open_clip_model.safetensors")))
    tower.requires_grad_(False).eval()
    model.generation_config = transformers.GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    return model


def clip_vision_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename an open_clip model's vision tower for transformers' ``CLIPVisionModel``, in float32."""
    visual = {k.removeprefix("visual."): v.float() for k, v in state.items() if k.startswith("visual.")}
    renamed = {
        "embeddings.class_embedding": visual["class_embedding"],
        "embeddings.position_embedding.weight": visual["positional_embedding"],
        "embeddings.patch_embedding.weight": visual["conv1.weight"],
    }
    for ours, theirs in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")):
        renamed |= {f"{theirs}.{kind}": visual[f"{ours}.{kind}"] for kind in ("weight", "bias")}
    layers = {int(k.split(".")[2]) for k in visual if k.startswith("transformer.resblocks.")}
    parts = (
        ("ln_1", "layer_norm1"),
        ("ln_2", "layer_norm2"),
        ("mlp.c_fc", "mlp.fc1"),
        ("mlp.c_proj", "mlp.fc2"),
        ("attn.out_proj", "self_attn.out_proj"),
    )
    for n in layers:
        block, layer = f"transformer.resblocks.{n}", f"encoder.layers.{n}"
        for kind in ("weight", "bias"):
            renamed |= {f"{layer}.{theirs}.{kind}": visual[f"{block}.{ours}.{kind}"] for ours, theirs in parts}
            qkv = visual[f"{block}.attn.in_proj_{kind}"].chunk(3)
            renamed |= {f"{layer}.self_attn.{n}_proj.{kind}": v for n, v in zip("qkv", qkv, strict=True)}
    return renamed


def build_processor(texts: list[str]) -> Any:
    """Return a ``LlavaProcessor``: CLIP's preprocessing at the micro size and a byte-level BPE trained on ``texts``."""
    transformers = import_guarded("transformers")
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import TemplateProcessing

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, VOCAB_SIZE, special_tokens=list(SPECIALS), show_progress=False)
    bpe._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
    )
    vision = CLIP_CONFIGS["encoder"]["vision_cfg"]
    size = vision["image_size"]
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_mean=MEAN, image_std=STD
    )
    return transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=vision["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


# --- data -----------------------------------------------------------------------------------------------------------


def conversations(index: int, epoch: int) -> list[tuple[str, str]]:
    """Return the questions and answers of scene ``index``, in other words in every epoch."""
    scene, captions = make_scene("pretrain", SCENE_SEEDS["llava"], index)
    return conversation(scene, [c.text for c in captions], random.Random(f"llava {epoch} {index}"))


def encode_pair(tokenizer: Any, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Return the ids after ``<image>`` up to ``ASSISTANT:``, and those of the answer with its end."""
    tail = TEMPLATE.format(question).split("<image>")[1]
    ids = (tokenizer(text, add_special_tokens=False).input_ids for text in (tail, f" {answer}"))
    return next(ids), [*next(ids), EOS]


def pack_pairs(batch: list[list[tuple[list[int], list[int]]]]) -> PackedBatch:
    """Pack every image's (question, answer) ids into a row; the loss falls on the answers alone."""
    length = max(sum(len(q) + len(a) - 1 for q, a in pairs) for pairs in batch)
    inputs, positions, segments = (torch.zeros(len(batch), length, dtype=torch.long) for _ in range(3))
    targets = torch.full((len(batch), length), -100)
    for row, pairs in enumerate(batch):
        start = 0
        for number, (question, answer) in enumerate(pairs, start=1):
            sequence = torch.tensor(question + answer)
            span = slice(start, start + len(sequence) - 1)
            inputs[row, span] = sequence[:-1]
            targets[row, span.stop - len(answer) : span.stop] = sequence[-len(answer) :]
            positions[row, span] = torch.arange(len(sequence) - 1)
            segments[row, span] = number
            start = span.stop
    return PackedBatch(inputs, targets, positions, segments)


# --- training -------------------------------------------------------------------------------------------------------


def instruction_loss(model: Any, head: torch.Tensor, features: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Return the mean loss of the answers' tokens.

    Args:
        model: the LLaVA.
        head: ids before the image, ``<s>USER:`` and a space.
        features: vision tokens (B, N, D) without CLS.
        batch: questions and answers, (B, S) each.
    """
    embed = model.get_input_embeddings()
    rows = len(features)
    before = embed(head).expand(rows, -1, -1)
    patches = model.model.multi_modal_projector(features)
    x = torch.cat([before.to(patches.dtype), patches, embed(batch.inputs).to(patches.dtype)], 1)
    prefix = x.shape[1] - batch.inputs.shape[1]
    positions, mask = batch.positions_with_prefix(prefix), batch.mask_with_prefix(prefix)
    output = model.model.language_model(inputs_embeds=x, attention_mask=mask, position_ids=positions, use_cache=False)
    kept = batch.targets != -100
    hidden = output.last_hidden_state[:, prefix:][kept]
    return F.cross_entropy(model.lm_head(hidden).float(), batch.targets[kept])


@torch.no_grad()
def encode_scenes(model: Any, pixels: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return the frozen tower's patch tokens (count, N, D) in fp16, as LLaVA's projector gets them."""
    kept = []
    for k in range(0, len(pixels), 64):
        images = normalise(torch.from_numpy(pixels[k : k + 64]).to(device))
        with torch.autocast(device.type, torch.bfloat16):
            output = model.model.vision_tower(images, output_hidden_states=True)
        kept.append(output.hidden_states[model.config.vision_feature_layer][:, 1:].half().cpu())
    return torch.cat(kept)


def train_llava(run: Run) -> None:
    """Pre-train and write the folder that ``from_pretrained`` and ``AutoProcessor`` load."""
    scenes, device = run.recipe.scenes, run.device
    seed_everything(run.recipe.seed)
    texts = [f"{q} {a}" for k in range(TEXT_SCENES) for q, a in conversations(k, 0)]
    processor = build_processor([TEMPLATE.format(text) for text in texts])
    model = build_model().to(device)
    size = CLIP_CONFIGS["encoder"]["vision_cfg"]["image_size"]
    drawn = draw_scenes(SCENE_SEEDS["llava"], scenes + HELD_OUT, size, run.workers)
    features = encode_scenes(model, drawn.pixels, device)
    head = torch.tensor(processor.tokenizer(TEMPLATE.split("<image>")[0]).input_ids, device=device)

    def loss_of(batch: tuple[int, np.ndarray]) -> torch.Tensor:
        epoch, chosen = batch
        pairs = [[encode_pair(processor.tokenizer, q, a) for q, a in conversations(int(k), epoch)] for k in chosen]
        rows = features[torch.from_numpy(chosen)].to(device).float()
        return instruction_loss(model, head, rows, pack_pairs(pairs).to(device))

    training = optimise(run, model.parameters(), run.batches(), run.steps_per_epoch, loss_of)
    model.eval()
    unseen = np.arange(scenes, scenes + HELD_OUT)
    with torch.no_grad():
        loss = np.mean([loss_of((0, unseen[k : k + 32])).item() for k in range(0, HELD_OUT, 32)])
    model.half().save_pretrained(run.out)
    processor.save_pretrained(run.out)
    write_record(run, training, {"last_loss": training.last_loss, "held_out_loss": float(loss)}, model)
