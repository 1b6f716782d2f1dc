"""Pre-train the micro world's small models from nothing but drawings of its own.

``python -m microworld.pretrain MODEL``, or ``all``, writes into ``microworld/weights/<MODEL>/``:

* ``encoder``: an open_clip ViT, whose vision tower is P2's encoder, through timm.
* ``decoder``: a GPT-2 in the full-size decoder's file format, trained on caption text, then after the encoder's
  tokens. Its ``tokenizer`` is trained first of all.
* ``scorer``: an open_clip ResNet with other scenes and another architecture, for scores.
* ``llava``: a LLaVA with the encoder's vision tower, taught by instructions.
* ``adapter``: LoRA and projector of the captioner, trained by the suite's own script on the demo's scenes.

Weights are stored as fp16 safetensors, each beside a JSON of seed, data, steps, time and metrics.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from captioning.cli import FlagParser, command, setup_logging
from captioning.device import pick_device
from captioning.profiles import MICRO_WEIGHTS
from microworld.pretrain_adapter import train_adapter
from microworld.pretrain_clip import train_clip
from microworld.pretrain_decoder import train_decoder, train_tokenizer
from microworld.pretrain_llava import train_llava
from microworld.recipes import RECIPES, Run

TRAIN = {  # in the order in which they need each other
    "tokenizer": train_tokenizer,
    "encoder": train_clip,
    "decoder": train_decoder,
    "scorer": train_clip,
    "llava": train_llava,
    "adapter": train_adapter,
}


@command
def main(argv: list[str] | None = None) -> int:
    """Command line of the pre-training."""
    parser = FlagParser(prog="python -m microworld.pretrain", description=__doc__.split("\n\n")[0])
    parser.add_argument("model", choices=(*TRAIN, "all"), help="what to pre-train")
    parser.add_argument("--weights", type=Path, default=MICRO_WEIGHTS, help="folder of the results")
    parser.add_argument("--scenes", type=int, help="number of scenes instead of the recipe's")
    parser.add_argument("--epochs", type=int, help="epochs instead of the recipe's")
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw")
    parser.add_argument("--verbose", action="store_true", help="more log lines")
    args = parser.parse_args(argv)
    setup_logging(args.verbose)
    device = pick_device(args.device)
    for model in TRAIN if args.model == "all" else (args.model,):
        name = "decoder" if model == "tokenizer" else model
        recipe = RECIPES[name]
        recipe = replace(recipe, scenes=args.scenes or recipe.scenes, epochs=args.epochs or recipe.epochs)
        out = args.weights / name
        out.mkdir(parents=True, exist_ok=True)
        TRAIN[model](Run(name, recipe, out, device, args.workers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
