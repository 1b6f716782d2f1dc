"""LLaVA 1.5 (Liu et al., arXiv 2304.08485 and 2310.03744) through transformers: prompts, loading, batched captions.

A CLIP tower looks at the image, a projector turns its patches into tokens of a language model, and the language model
answers a prompt. Any model of that architecture loads: the full-size and the micro one take the same path.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import logging
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence

from captioning.device import launched_precision, ran_out_of_memory, warn_of_emulation
from captioning.imports import import_guarded
from captioning.messages import first_sentence
from captioning.profiles import is_hub_id
from captioning.tensors import LinkedAttentions
from decoder import attention_weights

TEMPLATE = "USER: <image>\n{} ASSISTANT:"  # LLaVA 1.5's conversation with one turn
CAPTIONER = "gpt2"  # language model of what p2_export.py writes: a captioner, which is asked nothing
PROMPTS = {  # the report's two settings
    1: "Briefly describe this image in a sentence. Thank you.",
    2: "In one sentence, describe the key objects in the image and their state. For example, "
    "'A red apple lies on a wooden table' or 'A dog sleeps peacefully on a couch.'",
}
MAX_NEW_TOKENS = 200  # longest answer, as in the report's code; an answer that ends is none the longer for it
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
LAUNCHED_DTYPES = {"fp16": "float16", "bf16": "bfloat16"}  # what accelerate calls them
ARCHITECTURE = "LlavaForConditionalGeneration"

Past = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values (1, nh, length, hs) of each layer


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype for ``auto``, ``float16``, ``bfloat16`` or ``float32``.

    Auto is what accelerate's ``mixed_precision`` asks for, or else float16 on an accelerator and float32 on a CPU.
    """
    own = "float32" if device.type == "cpu" else "float16"
    dtype = DTYPES[LAUNCHED_DTYPES.get(launched_precision() or "", own) if name == "auto" else name]
    if dtype == torch.bfloat16:
        warn_of_emulation(device)
    return dtype


@dataclass
class Row:
    """One image with its prompt, ready for a batch: token ids (T,) and pixels (1, 3, H, W).

    ``past`` holds the language model's keys and values (1, nh, T - 1, hs) of all but the last id, by layer, once they
    have been computed; then image and prompt are not read again.
    """

    input_ids: torch.Tensor
    pixel_values: torch.Tensor
    past: Past | None = None


class Llava:
    """A LLaVA model and its processor.

    Args:
        model: a ``LlavaForConditionalGeneration`` in eval mode.
        processor: its ``LlavaProcessor``, which says how many tokens an image takes.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        config = model.config
        if processor.patch_size is None or processor.vision_feature_select_strategy is None:  # checkpoints before 2025
            processor.patch_size = config.vision_config.patch_size
            processor.vision_feature_select_strategy = config.vision_feature_select_strategy
            processor.num_additional_image_tokens = 1  # CLIP's CLS
        self.eos_ids = set(_as_list(model.generation_config.eos_token_id))
        asked = config.text_config.model_type != CAPTIONER
        self.template = TEMPLATE if asked else processor.image_token + processor.tokenizer.bos_token
        self.before_answer = " " if asked else ""  # what separates prompt and answer

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.model.device

    @property
    def image_token_id(self) -> int:
        """The id that represents each patch in the prompt."""
        return self.model.config.image_token_id

    def row(self, image: Image.Image, prompt: str) -> Row:
        """Preprocess one RGB image and wrap ``prompt`` into the conversation template; safe to call from a thread."""
        inputs = self.processor(images=image, text=self.template.format(prompt), return_tensors="pt")
        return Row(inputs["input_ids"][0], inputs["pixel_values"])

    def check_room(self, row: Row, max_new_tokens: int) -> None:
        """Raise ValueError when ``row`` and ``max_new_tokens`` more tokens exceed the language model's context."""
        context = self.model.config.text_config.max_position_embeddings
        used = len(row.input_ids)
        if used + max_new_tokens > context:
            raise ValueError(
                f"--prompt: image and prompt take {used} of the model's {context} tokens, which leaves no room for "
                f"--max-new-tokens {max_new_tokens}; shorten the prompt or the answer"
            )

    @torch.no_grad()
    def generate(
        self,
        rows: Sequence[Row],
        num_beams: int = 1,
        max_new_tokens: int = MAX_NEW_TOKENS,
        keep_past: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> list[list[int]]:
        """Return the answers' token ids, without specials, to rows of any lengths; greedy with one beam.

        ``keep_past`` leaves the prompt's keys and values in the row, if there is only one row. ``options`` are further
        ones of transformers' ``generate``.
        """
        output, start = self._generate(rows, num_beams=num_beams, max_new_tokens=max_new_tokens, **(options or {}))
        if keep_past and len(rows) == 1:
            rows[0].past = _past(output.past_key_values, start - 1)
        return [self._until_end(answer) for answer in output.sequences[:, start:].tolist()]

    @torch.no_grad()
    def ranked(
        self,
        rows: Sequence[Row],
        num_beams: int = 1,
        max_new_tokens: int = MAX_NEW_TOKENS,
        count: int = 1,
        options: Mapping[str, Any] | None = None,
    ) -> list[list[tuple[list[int], float]]]:
        """Return for each row the ``count`` best answers, of at most ``num_beams``, as (token ids, score).

        A score is the mean log-probability of an answer's tokens, its EOS included, before any of the ``options``.
        """
        sizes = {"num_beams": num_beams, "max_new_tokens": max_new_tokens, "num_return_sequences": count}
        output, start = self._generate(rows, output_logits=True, **sizes, **(options or {}))
        log_probs = self.model.compute_transition_scores(
            output.sequences, output.logits, getattr(output, "beam_indices", None), normalize_logits=True
        )
        found = []
        for answer, values in zip(output.sequences[:, start:].tolist(), log_probs.tolist(), strict=True):
            tokens = self._until_end(answer)
            counted = values[: len(tokens) + 1]  # and of EOS, where the answer ended
            found.append((tokens, sum(counted) / len(counted)))
        return [found[first : first + count] for first in range(0, len(found), count)]

    def _generate(self, rows: Sequence[Row], **options: Any) -> tuple[Any, int]:
        """Return what transformers' ``generate`` returns, and the length of the padded prompts in its sequences."""
        tokenizer = self.processor.tokenizer
        ids = [row.input_ids for row in rows]
        pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id  # the mask hides it
        input_ids = pad_sequence(ids, batch_first=True, padding_value=pad, padding_side="left")  # (B, T)
        mask = pad_sequence([torch.ones_like(i) for i in ids], batch_first=True, padding_side="left")  # (B, T)
        pixels = torch.cat([row.pixel_values for row in rows])  # (B, 3, H, W)
        output = self.model.generate(
            input_ids=input_ids.to(self.device),
            attention_mask=mask.to(self.device),
            pixel_values=pixels.to(self.device, self.model.dtype),
            generation_config=self._generation_config(pad_token_id=pad, **options),
        )
        return output, input_ids.shape[1]

    def attend(
        self, row: Row, tokens: Sequence[int], all_rows: bool = False, linked: bool = False
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Read a finished answer after its image and prompt in one pass and return where it looked.

        Image and prompt take the fused path into a cache, if they have not been read yet, and only the answer's rows
        the slow one, unless all are wanted. Where gradients are on, they flow from each row's logits to that row's
        weights, and to no other row's.

        Args:
            row: image and prompt.
            tokens: the T ids of the answer.
            all_rows: return the rows of the whole sequence of S tokens, not only the answer's.
            linked: with all rows, let gradients flow from row to row too.

        Returns:
            Attention weights (1, nh, T + 1 or S, S) of every layer of the language model, the first of the last T + 1
            rows being the position that predicts the answer's first token, and the logits (T + 1, V) of those rows.
        """
        answer = torch.tensor(list(tokens), dtype=torch.long)
        ids = torch.cat([row.input_ids, answer])[None].to(self.device)
        inputs: dict[str, Any]
        if all_rows:
            read, inputs = 0, {"pixel_values": row.pixel_values.to(self.device, self.model.dtype)}
        else:
            read, inputs = len(row.input_ids) - 1, {"past_key_values": _cache(self._read_prompt(row))}
        with _capture(self.model, LinkedAttentions() if linked else []) as attentions:
            output = self.model(
                input_ids=ids[:, read:], attention_mask=torch.ones_like(ids), logits_to_keep=len(tokens) + 1, **inputs
            )
        if len(attentions) != self.model.config.text_config.num_hidden_layers:
            raise ValueError(
                "the language model returns no attention weights: its layers do not use transformers' "
                "attention interface"
            )
        return attentions, output.logits[0]

    @property
    def layers(self) -> Any:
        """The language model's layers, each of which hands hidden states on.

        Raises:
            ValueError: they are not where Llama and GPT-2 have them.
        """
        return self._part("layers", "h")

    def read_out(self, hidden: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
        """Return what hidden states (n, C) of any layer say of ``tokens``: logits (n, T), from their vocabulary's mean.

        Raises:
            ValueError: the last norm is not where Llama and GPT-2 have it.
        """
        weight = self.model.get_output_embeddings().weight
        return self._part("norm", "ln_f")(hidden) @ (weight[list(tokens)] - weight.mean(0)).T

    def _part(self, *names: str) -> Any:
        language_model = self.model.model.language_model
        found = next((part for name in names if (part := getattr(language_model, name, None)) is not None), None)
        if found is None:
            raise ValueError(
                f"the language model, a {type(language_model).__name__}, hands out no hidden states: it has no "
                f"{' or '.join(names)}; use a method that reads attention"
            )
        return found

    @torch.no_grad()
    def image_tokens(self, row: Row) -> torch.Tensor:
        """Return the projected tokens of the row's image, (N, C)."""
        config = self.model.config
        found = self.model.model.get_image_features(
            pixel_values=row.pixel_values.to(self.device, self.model.dtype),
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            output_hidden_states=True,
        )
        return torch.cat(list(getattr(found, "pooler_output", found)))

    def ask(self, row: Row, image: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
        """Read an answer after the prompt and each of several images, given as projected tokens (B, N, C).

        Returns the logits (B, T, V) that predict the T tokens. Gradients flow from every row to the image.
        """
        ids = torch.cat([row.input_ids, torch.tensor(list(tokens[:-1]), dtype=torch.long)]).to(self.device)
        embedded = self.model.get_input_embeddings()(ids).detach()
        x = embedded.repeat(len(image), 1, 1)
        x[:, ids == self.image_token_id] = image.to(x.dtype)
        return self.model(inputs_embeds=x, use_cache=False, logits_to_keep=len(tokens)).logits

    @torch.no_grad()
    def _read_prompt(self, row: Row) -> Past:
        """Return keys and values of all but the last id of ``row``, computed once."""
        if row.past is None:
            length = len(row.input_ids) - 1
            ids = row.input_ids[None, :length].to(self.device)
            pixels = row.pixel_values.to(self.device, self.model.dtype)
            prompt = self.model(input_ids=ids, pixel_values=pixels, use_cache=True, logits_to_keep=1)
            row.past = _past(prompt.past_key_values, length)
        return row.past

    def text(self, tokens: Sequence[int]) -> str:
        """Return an answer as text: what follows its last ``ASSISTANT: ``, white space at both ends removed.

        The report's code cuts the whole conversation there. So a model that goes on to make up further turns has
        answered what it says in the last one.
        """
        answer = self.processor.tokenizer.decode(tokens, skip_special_tokens=True)
        return answer.rpartition("ASSISTANT: ")[2].strip()

    def _generation_config(self, **options: Any) -> Any:
        """The checkpoint's own settings without those of sampling, which would warn that they have no effect."""
        config = copy.deepcopy(self.model.generation_config)
        config.update(
            do_sample=False,
            **dict.fromkeys(("temperature", "top_p", "top_k", "max_length")),
            return_dict_in_generate=True,
            **options,
        )
        return config

    def _until_end(self, tokens: list[int]) -> list[int]:
        end = next((n for n, token in enumerate(tokens) if token in self.eos_ids), len(tokens))
        return tokens[:end]


def _as_list(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _past(cache: Any, length: int) -> Past:
    """Return the first ``length`` keys and values of a cache by layer; its beams share one prompt."""
    return [(layer.keys[:1, :, :length], layer.values[:1, :, :length]) for layer in cache.layers]


def _cache(past: Past) -> Any:
    """Return a cache that begins with ``past`` and grows without changing it."""
    cache = import_guarded("transformers").DynamicCache()
    for layer, (keys, values) in enumerate(past):
        cache.update(keys, values, layer)
    return cache


def check_prompt(prompt: str) -> str:
    """Return ``prompt``; ValueError when it is empty or contains an image placeholder."""
    if not prompt.strip():
        raise ValueError("--prompt is empty; say what the model shall answer")
    if "<image>" in prompt:
        raise ValueError("--prompt: leave <image> out; it is put before the text, once")
    return prompt


def load_llava(
    model: str,
    device: torch.device,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    load_in_4bit: bool = False,
) -> Llava:
    """Load a LLaVA from a hub id or a folder that ``save_pretrained`` wrote.

    Args:
        model: folder, or a hub id such as ``llava-hf/llava-1.5-7b-hf``, as ``profiles.is_hub_id`` knows one.
        device: where it runs.
        dtype: of the weights, and with 4 bits of the computation; a name is ``pick_dtype``'s.
        revision: branch, tag or commit of a hub id.
        load_in_4bit: quantise the linear layers by bitsandbytes.

    Raises:
        FileNotFoundError: no such folder, or the hub can't be reached.
        ValueError: another architecture, incomplete or damaged files, or bitsandbytes is missing.
    """
    source = _source(model, revision)
    transformers = import_guarded("transformers")
    with quiet(transformers):
        config = _check_architecture(transformers, model, source)
    backend = {"backend": "pil"} if config.text_config.model_type == CAPTIONER else {}  # as in its training
    if isinstance(dtype, str):
        dtype = pick_dtype(dtype, device)
    options: dict[str, Any] = {"dtype": dtype, **source}
    if load_in_4bit:
        options["quantization_config"] = _four_bits(transformers, dtype)
    if load_in_4bit or device.type != "cpu":
        options["device_map"] = {"": str(device)}  # weights go there one by one: no second copy in host memory
    architecture = getattr(transformers, ARCHITECTURE)
    with quiet(transformers):
        try:
            net, info = architecture.from_pretrained(model, output_loading_info=True, **options)
            processor = transformers.AutoProcessor.from_pretrained(model, **source, **backend)
        except pickle.UnpicklingError as error:  # torch's own message says how to run its code
            raise ValueError(
                f"--model {model}: its weights are a damaged pickle, or one that wants to run code, which "
                "is never done; use safetensors instead"
            ) from error
        except (OSError, EOFError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            if isinstance(error, RuntimeError) and ran_out_of_memory(error):
                remedy = f"--model {model} does not fit into the memory of {device}: use --load-in-4bit"
                raise ValueError(remedy) from error
            raise ValueError(f"--model {model}: {first_sentence(error)}; {_remedy(model)}") from error
    absent = sorted(info["missing_keys"]) + sorted(str(m) for m in info["mismatched_keys"])
    if absent:  # transformers would use random numbers there
        raise ValueError(
            f"--model {model}: {len(absent)} weights are missing or misshapen, first {absent[0]}; " + _remedy(model)
        )
    llava = Llava(net.eval().requires_grad_(False), processor)
    _check_image_tokens(llava, model)
    return llava


@torch.no_grad()
def _check_image_tokens(llava: Llava, model: str) -> None:
    """Refuse a processor that gives an image other tokens than the vision tower has for it: no batch would run."""
    config = llava.model.config
    row = llava.row(Image.new("RGB", (64, 48)), "")
    given = int((row.input_ids == llava.image_token_id).sum())
    try:
        pixels = row.pixel_values.to(llava.device, llava.model.dtype)
        tokens = llava.model.model.vision_tower(pixels).last_hidden_state.shape[1]
    except ValueError:  # pixels of another size than its own
        tokens = None
    left_out = int(config.vision_feature_select_strategy == "default")  # CLS
    if tokens is not None and given == tokens - left_out:
        return
    has = "does not take its pixels" if tokens is None else f"has {tokens - left_out} for it"
    wrong = "; ".join(_unlike_fields(llava, model, row, tokens)) or "its processor is another model's"
    raise ValueError(f"--model {model}: an image gets {given} tokens and the vision tower {has}: {wrong}")


def _unlike_fields(llava: Llava, model: str, row: Row, tokens: int | None) -> Iterator[str]:
    """Yield which fields of the processor's files are not as the model wants them."""
    processor, config = llava.processor, llava.model.config
    vision, size = config.vision_config, tuple(row.pixel_values.shape[-2:])
    more = processor.num_additional_image_tokens
    of_tower = more if tokens is None else tokens - (vision.image_size // vision.patch_size) ** 2
    pixels = "preprocessor" if (Path(model) / "preprocessor_config.json").is_file() else "processor"
    strategy = "vision_feature_select_strategy"
    for file, field, found, wanted in (
        (pixels, "crop_size", size, (vision.image_size, vision.image_size)),
        ("processor", "patch_size", processor.patch_size, vision.patch_size),
        ("processor", strategy, getattr(processor, strategy), getattr(config, strategy)),
        ("processor", "num_additional_image_tokens", more, of_tower),
        ("tokenizer", processor.image_token, processor.image_token_id, llava.image_token_id),
    ):
        if found != wanted:
            yield f"{file}_config.json: {field} is {found}, not {wanted}"


def _source(model: str, revision: str | None) -> dict[str, Any]:
    """Return where transformers may look; FileNotFoundError for a missing folder, whose name no hub may answer to."""
    if Path(model).is_dir():
        if not (Path(model) / "config.json").is_file():
            raise FileNotFoundError(f"--model {model}: the folder has no config.json; {_remedy(model)}")
        return {"local_files_only": True}  # a file in the folder may name a base model on the hub
    if not is_hub_id(model):
        raise FileNotFoundError(f"--model {model}: no such folder; {_remedy(model)}")
    return {"revision": revision}


def _check_architecture(transformers: Any, model: str, source: dict[str, Any]) -> Any:
    """Return a LLaVA's configuration; refuse what is none before its weights are read."""
    try:
        config = transformers.AutoConfig.from_pretrained(model, **source)
    except (OSError, ValueError, KeyError) as error:
        raise FileNotFoundError(f"--model {model}: {first_sentence(error)}; {_remedy(model)}") from error
    if config.model_type != "llava":
        found = ", ".join(config.architectures or [config.model_type])
        raise ValueError(f"--model {model} is a {found}; this script runs {ARCHITECTURE} (LLaVA 1.5)")
    return config


def _four_bits(transformers: Any, dtype: torch.dtype) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("--load-in-4bit needs bitsandbytes: run pip install bitsandbytes, or leave the flag out")
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype)


def _remedy(model: str) -> str:
    if Path(model).is_dir():
        return "fetch it again with `bash hw3_download.sh p1`"
    return "run `bash hw3_download.sh p1` where there is a network, or give a folder, or --profile micro"


CAPTURE = "softmax_with_captured_weights"
_captured: ContextVar[list[torch.Tensor]] = ContextVar("captured attention weights")


@contextlib.contextmanager
def _capture(model: Any, kept: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Let the language model's layers append the attention weights of the rows they compute to ``kept``, and yield it.

    transformers' own ``output_attentions`` returns nothing with SDPA.
    """
    _register_attention()
    token = _captured.set(kept)
    config = model.config.text_config
    before = config._attn_implementation
    config._attn_implementation = CAPTURE
    try:
        yield kept
    finally:
        config._attn_implementation = before
        _captured.reset(token)


@functools.cache
def _register_attention() -> None:
    transformers = import_guarded("transformers")
    transformers.AttentionInterface.register(CAPTURE, _attend)
    transformers.AttentionMaskInterface.register(CAPTURE, lambda *args, **kwargs: None)  # causal, one row: no mask


def _attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None, scaling: float, **options: Any
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers: SDPA's result (1, R, nh, hs), its weights kept (1, nh, R, S)."""
    groups = query.shape[1] // key.shape[1]  # grouped-query attention shares keys among heads
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))  # (1, nh, S, hs)
    kept = _captured.get()
    if not isinstance(kept, LinkedAttentions):
        key, value = key.detach(), value.detach()
    weights = attention_weights(query, key, None, scaling)
    kept.append(weights)
    return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Mute transformers\' own messages on missing weights and lost connections, which we report, and progress bars."""
    hub, ours = logging.getLogger("huggingface_hub"), transformers.utils.logging
    levels = hub.level, ours.get_verbosity()
    bars = ours.is_progress_bar_enabled()
    hub.setLevel(logging.CRITICAL)
    ours.set_verbosity_error()
    ours.disable_progress_bar()
    try:
        yield
    finally:
        hub.setLevel(levels[0])
        ours.set_verbosity(levels[1])
        if bars:
            ours.enable_progress_bar()
