"""How to train: every number with its default, help and limits, and the settings."""

from __future__ import annotations

import math
import operator
from argparse import ArgumentTypeError, BooleanOptionalAction
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from captioning.device import PRECISIONS
from captioning.models.captioner import ATTENTION, SEARCH_RULES
from captioning.profiles import PRESETS
from decoder import LoraConfig

T = TypeVar("T")
BOUNDS = {"at_least": operator.ge, "above": operator.gt, "below": operator.lt}


def option(default: T, text: str, **more: Any) -> T:
    """Return a field of TrainConfig with its default and help text.

    Args:
        default: of the setting ``best``; its type parses the flag's value.
        text: what ``--help`` says.
        more: ``parse`` in place of that type, ``choices``, and the bounds ``at_least``, ``above`` and ``below``.
    """
    return field(default=default, metadata={"help": text, "parse": type(default), **more})


def _triple(text: str) -> tuple[bool, ...]:
    parts = text.split(",")
    if len(parts) != 3 or not set(parts) <= {"0", "1"}:
        raise ArgumentTypeError("give three of 0 and 1 for q, k and v, such as 1,0,1")
    return tuple(part == "1" for part in parts)


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults are the setting ``best``; see SETTINGS for the report's five.

    Raises:
        ValueError: a value is out of its bounds, or two do not go together.
    """

    epochs: int = option(8, "passes over the training images", at_least=1)
    batch_by: str = option(
        "images",
        "what a batch counts: images, all of whose captions go with them, or captions, shuffled over all images",
        choices=("images", "captions"),
    )
    batch_size: int = option(
        16,
        "images or captions a batch, over all processes together; several GPUs hardly train faster below 16 for each",
        at_least=1,
    )
    accumulate: int = option(1, "batches an optimiser step", at_least=1)
    lr: float = option(1e-3, "learning rate of LoRA", above=0, below=10)
    lora_plus: float = option(
        1.0, "learning rate of LoRA's B over that of its A (LoRA+, arXiv 2402.12354)", above=0, below=1000
    )
    projector_lr: float = option(1e-3, "learning rate of the projector", above=0, below=10)
    optimizer: str = option("adamw", "adam or adamw", choices=("adam", "adamw"))
    weight_decay: float = option(0.01, "of adamw", at_least=0)
    schedule: str = option("cosine", "cosine (to a hundredth) or constant", choices=("cosine", "constant"))
    warmup: float = option(0.05, "share of all steps in which the rate rises", at_least=0, below=1)
    clip: float = option(1.0, "largest gradient norm; 0 clips nothing", at_least=0)
    label_smoothing: float = option(0.0, "share of the target spread over the vocabulary", at_least=0, below=1)
    predict_bos: bool = option(False, "teach the last image token to predict BOS too, as the report did")
    clear_gradients: bool = option(
        True,
        "forget a step's gradient after it; the report's steps took the sum of all gradients since the start "
        "(exact with --accumulate and several processes too)",
    )
    captions_per_image: int | None = option(
        None, "captions of an image that an epoch shows (default: all)", parse=int, at_least=1
    )
    seed: int = option(0, "of weights, order and dropout", at_least=0)
    precision: str = option("auto", "fp32, bf16, or auto: bf16 on a GPU that has it", choices=PRECISIONS)
    attention: str = option(
        "auto",
        "how captions after one image attend: packed, by fused kernels; mask, by torch's own; auto: packed where a "
        "check at the start finds it right, and on CUDA faster",
        choices=ATTENTION,
    )
    preprocessing: str = option(
        "own",
        "own: the encoder's; imagenet: what timm answers to a name, ImageNet's mean, deviation and crop",
        choices=("own", "imagenet"),
    )
    cls: bool = option(True, "give the encoder's CLS token to the decoder too")
    lora_rank: int = option(32, "LoRA's rank")  # LoraConfig has its bounds
    lora_alpha: float = option(32.0, "LoRA's update is scaled by alpha / rank")
    lora_dropout: float = option(0.1, "dropout before LoRA")
    lora_enable: tuple[bool, bool, bool] | None = option(
        None, "q, k, v of c_attn as MergedLinear, such as 1,0,1 (default: one lora.Linear)", parse=_triple
    )
    lora_lm_head: bool = option(True, "LoRA on the output layer too, untied from the embeddings")
    max_trainable: int = option(10_000_000, "refuse to train more parameters than this")
    val_images: int = option(200, "validation images captioned and scored every epoch", at_least=1)
    beam_size: int = option(5, "beams in validation", at_least=1)
    search_rule: str = option(
        "beam",
        "search of validation, and of p2_infer.py by the adapter; report: as the report's code, which replaces no beam "
        "that has ended",
        choices=SEARCH_RULES,
    )
    max_new_tokens: int = option(30, "longest caption in validation", at_least=1)
    log_every: int = option(10, "steps between lines of metrics.jsonl", at_least=1)
    save_every: int = option(
        200, "steps between states for --resume, beside one an epoch: what a kill costs at most", at_least=1
    )
    max_skipped: int = option(
        10, "end the run after this many steps in a row without a finite loss and gradient", at_least=1
    )
    encoder_layer: int = option(
        -1, "layer that feeds the projector, from the end: -1 is the last, -2 the one before", below=0
    )
    pool: int = option(
        1,
        "the decoder gets averages of N x N neighbouring patches, beside CLS; must divide the encoder's grid",
        at_least=1,
    )
    projector_epochs: int = option(0, "first epochs, which train the projector only", at_least=0)
    patience: int = option(0, "epochs without a better one after which training stops; 0 never stops", at_least=0)
    objective: str = option(
        "xe", "xe (cross-entropy), or scst (CIDEr-D as a reward; needs --init-adapter)", choices=("xe", "scst")
    )
    samples: int = option(
        5, "scst: captions an image, compared with each other; the width of the beam search", at_least=2
    )
    clip_reward: float = option(0.0, "scst: weight of CLIPScore in the reward", at_least=0)
    brevity: float = option(1.5, "scst: exponent of BLEU's brevity penalty on the reward; 0 leaves it out", at_least=0)
    xe_weight: float = option(
        0.25, "scst: weight of cross-entropy beside the rewards; holds captions near people's", at_least=0
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            value, limits = getattr(self, f.name), f.metadata
            if "choices" in limits and value not in limits["choices"]:
                raise ValueError(f"{flag(f.name)} {value}: choose from {', '.join(limits['choices'])}")
            for bound, holds in BOUNDS.items():
                if bound in limits and value is not None and not (holds(value, limits[bound]) and math.isfinite(value)):
                    raise ValueError(f"{flag(f.name)} {value}: must be {bound.replace('_', ' ')} {limits[bound]}")
        if self.projector_epochs > self.epochs:
            raise ValueError(f"--projector-epochs {self.projector_epochs}: must be from 0 to --epochs")
        if self.objective == "scst" and self.label_smoothing:
            raise ValueError("--label-smoothing is of --objective xe; leave it out with scst")
        if self.objective == "scst" and self.batch_by == "captions":
            raise ValueError("--batch-by captions is of --objective xe: scst compares the captions of an image")
        if self.objective == "scst" and self.predict_bos:
            raise ValueError("--predict-bos is of --objective xe; leave it out with scst")

    def lora(self) -> LoraConfig:
        """The decoder's LoRA."""
        return LoraConfig(
            rank=self.lora_rank,
            alpha=self.lora_alpha,
            dropout=self.lora_dropout,
            enable_lora=self.lora_enable,
            lm_head=self.lora_lm_head,
        )


def flag(name: str) -> str:
    """Return the flag of a field: ``--batch-size`` for ``batch_size``."""
    return "--" + name.replace("_", "-")


def as_flag(name: str, value: Any) -> str:
    """Return a field's value as it stands on the command line: ``--lr 0.002``, ``--no-cls``; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return flag(name if value else f"no_{name}")
    text = ",".join(str(int(item)) for item in value) if isinstance(value, list | tuple) else value
    return f"{flag(name)} {text}"


def add_flags(parser: Any) -> None:
    """Add a flag for every field; where it is not given its value is None, and the setting's holds."""
    for f in fields(TrainConfig):
        text = f.metadata["help"] + ("" if f.default is None else f" (default: {f.default})")
        if isinstance(f.default, bool):
            parser.add_argument(flag(f.name), action=BooleanOptionalAction, help=text)
        else:
            choices = f.metadata.get("choices")
            metavar = None if choices else "X"
            parser.add_argument(flag(f.name), type=f.metadata["parse"], choices=choices, metavar=metavar, help=text)


# The report's own: 16 captions a batch, plain Adam, no schedule, and loralib's default lora_alpha of 1 (a scaling of
# 1 / rank).
_STEPS: dict[str, Any] = {
    "batch_by": "captions",
    "batch_size": 16,
    "optimizer": "adam",
    "weight_decay": 0.0,
    "schedule": "constant",
    "warmup": 0.0,
    "clip": 0.0,
    "lora_alpha": 1.0,
}
_REPORT = TrainConfig(**_STEPS, lr=5e-5, projector_lr=5e-5, lora_dropout=0.0, lora_lm_head=False)
SETTINGS = {
    "best": TrainConfig(),
    "1": replace(_REPORT, epochs=10),
    "2": replace(_REPORT, epochs=5),
    "3": replace(_REPORT, epochs=3, lora_rank=64, max_trainable=11_000_000),  # the report's own is above 10 M
    "4": replace(_REPORT, epochs=7, lora_enable=(True, False, True), lora_dropout=0.2, lora_lm_head=True, cls=False),
    "5": replace(_REPORT, epochs=13),
    **dict.fromkeys(PRESETS, TrainConfig()),  # best with another encoder
}
# What --report-faithful changes of a setting: all that the report's code did, sound or not.
REPORT_FAITHFUL: dict[str, Any] = _STEPS | {
    "predict_bos": True,
    "clear_gradients": False,
    "search_rule": "report",
    "preprocessing": "imagenet",
    "encoder_layer": -1,
    "precision": "fp32",
}
# What --objective scst changes of a setting, and of --report-faithful. Rewards are noisy and start from a trained
# captioner: small rates that rise slowly. Most is gained where the cosine ends, so patience must not end it before.
SCST_NUMBERS: dict[str, Any] = {
    "batch_by": "images",
    "predict_bos": False,
    "clear_gradients": True,
    "lr": 1e-4,
    "schedule": "cosine",
    "epochs": 4,
    "warmup": 0.1,
    "patience": 4,
    "weight_decay": 0.0,
}
