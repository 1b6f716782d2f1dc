"""What maps cost: captioning alone against captioning and explaining, image by image, in one run.

    python -m bench.attention                        micro models: LLaVA and the captioner, beam search included
    python -m bench.attention --full-size            ViT-L/14 and GPT-2 small with random weights

The micro captioner has its pre-trained parts and an untrained adapter: its captions make no sense and are as long as
they may be, which is what time depends on.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.common import draw_scenes, in_turn, make_parser, peak_memory, report
from captioning.cli import FlagParser, command, positive_int
from captioning.data.images import load_image
from captioning.data.tokenizer import Tokenizer
from captioning.device import pick_device
from captioning.maps.attention import METHODS, MapSpec
from captioning.maps.explainers import DEFAULTS, CaptionerExplainer, Explainer, LlavaExplainer, read
from captioning.models.captioner import Captioner, CaptionerConfig
from captioning.models.llava import PROMPTS, load_llava
from captioning.profiles import PROFILES
from decoder import Decoder, DecoderConfig, LoraConfig, build_decoder

LONGEST = 30  # tokens of a caption


def build_parser() -> FlagParser:
    """Return the command line."""
    parser = make_parser("attention", __doc__, repeats=5)
    parser.add_argument("--count", type=positive_int, default=20, help="images")
    parser.add_argument("--slow", action="store_true", help="the slow methods too, which ask the model again")
    parser.add_argument("--full-size", action="store_true", help="the captioner at full size, random weights")
    return parser


def captioner(full_size: bool, device: torch.device) -> CaptionerExplainer:
    """Return the captioner with an untrained adapter."""
    profile, lora = PROFILES["full" if full_size else "micro"], LoraConfig()
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(), lora) if full_size else build_decoder(Path(profile.decoder), lora)
    weights = "random" if full_size else profile.encoder_weights
    config = CaptionerConfig(profile.encoder, profile.encoder_kwargs, weights, lora=lora)
    tokenizer = Tokenizer(PROFILES["micro"].tokenizer)  # also at full size: any ids take the same time
    return CaptionerExplainer(Captioner(config, decoder).to(device).merge(), tokenizer, 5, LONGEST)


def compare(
    explainer: Explainer, paths: list[Path], repeats: int, device: torch.device, slow: bool
) -> list[dict[str, Any]]:
    """Time captions alone, and captions with the maps of each method; ``slow``: of those that are slow too."""
    default = DEFAULTS[explainer.name]
    others = {
        name: MapSpec(name, method.layers or "all") for name, method in METHODS.items() if slow or not method.slow
    }
    others.pop(default.method, None)
    specs = {f"{default.method} (default)": default} | others

    def caption(spec: MapSpec | None) -> None:
        for path in paths:
            inputs = explainer.prepare(load_image(path))
            tokens = explainer.caption(inputs)
            if spec and explainer.text(tokens).strip():
                read(explainer, inputs, tokens, [spec]).maps(spec)

    rivals = {"captions alone": partial(caption, None)} | {name: partial(caption, s) for name, s in specs.items()}
    in_turn(rivals, 1, device)  # warm-up
    seconds = in_turn(rivals, repeats, device)
    alone = seconds["captions alone"]
    return [
        {
            "model": explainer.name,
            "maps": name,
            "ms an image": 1000 * s / len(paths),
            "times captions alone": s / alone,
            "peak memory, GB": peak_memory(device),
        }
        for name, s in seconds.items()
    ]


@command
def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    explainers: list[Explainer] = [captioner(args.full_size, device)]
    if not args.full_size:
        llava = load_llava(PROFILES["micro"].llava, device, torch.float32)
        explainers.append(LlavaExplainer(llava, PROMPTS[1], 1, LONGEST))
    with tempfile.TemporaryDirectory() as folder:
        paths = draw_scenes(Path(folder), args.count)
        rows = [row for e in explainers for row in compare(e, paths, args.repeats, device, args.slow)]
    what = "ViT-L/14 and GPT-2 small, random weights" if args.full_size else "micro models"
    report(f"What maps cost: {what}", rows, device, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
