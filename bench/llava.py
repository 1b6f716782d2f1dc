"""LLaVA: this suite's batched path against plain ``model.generate``, one image at a time, as the report ran it.

    python -m bench.llava                                     the micro LLaVA on 100 micro scenes, both settings
    python -m bench.llava --full-size --dtype float16         LLaVA-1.5-7B's architecture, random weights

Tokens must be equal, image by image; a difference ends the run with exit code 1. Random weights answer with noise,
whose ties in half precision depend on the batch, so there the captions are timed and not compared.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.common import draw_scenes, in_turn, make_parser, peak_memory, report
from captioning.cli import FlagParser, command, positive_int
from captioning.data.images import load_image
from captioning.data.listing import list_images
from captioning.device import pick_device
from captioning.imports import import_guarded
from captioning.inference.batches import Entry, Job, caption_entries
from captioning.models.llava import DTYPES, PROMPTS, TEMPLATE, Llava, load_llava, pick_dtype
from captioning.profiles import PROFILES


def build_parser() -> FlagParser:
    """Return the command line."""
    parser = make_parser("llava", __doc__)
    parser.add_argument("--images", type=Path, help="folder of images (default: micro scenes, drawn)")
    parser.add_argument("--count", type=positive_int, default=100, help="how many of them")
    parser.add_argument("--batch-size", type=positive_int, default=16, help="images at once on our side")
    parser.add_argument("--max-new-tokens", type=positive_int, default=64, help="longest answer in tokens")
    parser.add_argument("--full-size", action="store_true", help="LLaVA-1.5-7B's architecture with random weights")
    parser.add_argument("--layers", type=positive_int, help="fewer layers in tower and language model, for --full-size")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="of the weights")
    return parser


def random_llava(layers: int | None, dtype: torch.dtype, device: torch.device) -> Llava:
    """Return LLaVA-1.5-7B's architecture with random weights; the micro model's processor is fitted to its sizes."""
    transformers = import_guarded("transformers")
    processor = transformers.AutoProcessor.from_pretrained(PROFILES["micro"].llava)
    config = transformers.LlavaConfig(
        image_token_index=processor.image_token_id,
        text_config=transformers.LlamaConfig(vocab_size=32064, max_position_embeddings=4096, eos_token_id=2),
    )  # the library's defaults are LLaVA-1.5-7B's
    if layers:
        config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = layers
    processor.patch_size = config.vision_config.patch_size
    size = config.vision_config.image_size
    processor.image_processor.size = {"shortest_edge": size}
    processor.image_processor.crop_size = {"height": size, "width": size}
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # 7 billion weights fit in memory once, not twice
    try:
        with device:
            model = transformers.LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default)
    model.generation_config.eos_token_id = None  # every answer runs to its full length
    return Llava(model.eval(), processor)


def plain_loop(model: Llava, paths: list[Path], prompt: str, max_new_tokens: int) -> list[list[int]]:
    """Answer one image after the other by ``model.generate``, as the model card shows it."""
    answers = []
    for path in paths:
        inputs = model.processor(images=load_image(path), text=TEMPLATE.format(prompt), return_tensors="pt")
        inputs = inputs.to(model.device, model.model.dtype)
        output = model.model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        answers.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


def ours(model: Llava, paths: list[Path], prompt: str, max_new_tokens: int, batch_size: int) -> list[list[int]]:
    """Answer as ``p1_llava_caption.py`` does: images read ahead, batches, left padding."""

    def failed(entry: Entry, error: Exception) -> None:
        raise error

    generate: Any = partial(model.generate, max_new_tokens=max_new_tokens)  # tokens, where a script's job makes texts
    job = Job(lambda image: model.row(image, prompt), generate)
    batches: Any = caption_entries(map(Entry.of, paths), job, batch_size, failed)
    return [answer for answers in batches for answer in answers.values()]


def compare(model: Llava, paths: list[Path], setting: int, args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Time both ways for one setting; return a row of the table and how many answers differ."""
    prompt, longest = PROMPTS[setting], args.max_new_tokens
    found: dict[str, list[list[int]]] = {}

    def plain() -> None:
        found["plain"] = plain_loop(model, paths, prompt, longest)

    def batched() -> None:
        found["ours"] = ours(model, paths, prompt, longest, args.batch_size)

    warm_up = paths[: args.batch_size]
    ours(model, warm_up, prompt, 4, args.batch_size)
    plain_loop(model, warm_up[:1], prompt, 4)
    seconds = in_turn({"plain": plain, "ours": batched}, args.repeats, model.device)
    ends = model.eos_ids
    trimmed = [[token for token in answer if token not in ends] for answer in found["plain"]]
    differ = sum(a != b for a, b in zip(trimmed, found["ours"], strict=True))
    row = {
        "setting": setting,
        "images": len(paths),
        "plain, images/s": len(paths) / seconds["plain"],
        f"ours (batch {args.batch_size}), images/s": len(paths) / seconds["ours"],
        "times": seconds["plain"] / seconds["ours"],
        "answers that differ": differ,
        "peak memory, GB": peak_memory(model.device),
    }
    return row, differ


@command
def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return 1 where tokens differ."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    if args.full_size:
        model = random_llava(args.layers, dtype, device)
    else:
        model = load_llava(PROFILES["micro"].llava, device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        paths = list_images(args.images)[: args.count] if args.images else draw_scenes(Path(folder), args.count)
        results = [compare(model, paths, setting, args) for setting in PROMPTS]
    what = "LLaVA-1.5-7B's architecture, random weights" if args.full_size else "micro LLaVA"
    what += f", {args.layers} layers" if args.full_size and args.layers else ""
    report(f"{what}, {str(dtype).removeprefix('torch.')}: captions a second", [r for r, _ in results], device, args.out)
    return int(not args.full_size and any(differ for _, differ in results))


if __name__ == "__main__":
    sys.exit(main())
