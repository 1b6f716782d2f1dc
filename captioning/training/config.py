"""How to train: every number with its limits, and the settings."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from decoder import LoraConfig


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults are the setting ``best``; see SETTINGS for the report's five."""

    epochs: int = 8
    batch_size: int = 16  # images; all their captions go with them
    accumulate: int = 1  # batches an optimiser step
    lr: float = 2e-3  # of LoRA
    projector_lr: float = 2e-3
    optimizer: str = "adamw"  # or adam
    weight_decay: float = 0.01
    schedule: str = "cosine"  # or constant
    warmup: float = 0.05  # share of all steps
    clip: float = 1.0  # largest gradient norm; 0 clips nothing
    label_smoothing: float = 0.0
    captions_per_image: int | None = None  # None is all of them
    seed: int = 0
    precision: str = "auto"  # fp32 or bf16; auto is bf16 on CUDA
    cls: bool = True
    lora_rank: int = 32
    lora_alpha: float = 32.0
    lora_dropout: float = 0.1
    lora_enable: tuple[bool, bool, bool] | None = None  # None is lora.Linear on c_attn, else MergedLinear on q, k, v
    lora_lm_head: bool = True
    max_trainable: int = 10_000_000
    val_images: int = 200  # captioned every epoch
    beam_size: int = 5
    max_new_tokens: int = 30
    log_every: int = 10  # steps
    save_every: int = 200  # steps; what a kill costs at most
    max_skipped: int = 10  # steps in a row without a finite loss and gradient
    encoder_layer: int = -1  # that feeds the projector; -2 is the second to last
    projector_epochs: int = 0  # first epochs that train the projector alone
    patience: int = 0  # epochs without a better one after which training stops; 0 never stops
    objective: str = "xe"  # cross-entropy, or scst: CIDEr-D as a reward (scst.py)
    samples: int = 5  # captions an image, scst
    clip_reward: float = 0.0  # weight of CLIPScore in the reward, scst
    brevity: float = 1.5  # exponent of the brevity penalty on the reward, scst
    xe_weight: float = 0.25  # of cross-entropy beside the rewards, scst

    def __post_init__(self) -> None:
        at_least_one = (
            "epochs",
            "batch_size",
            "accumulate",
            "beam_size",
            "max_new_tokens",
            "val_images",
            "log_every",
            "save_every",
            "max_skipped",
        )
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        for name in ("lr", "projector_lr"):
            if not 0 < getattr(self, name) < 10:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be between 0 and 10")
        for name in ("warmup", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be in [0, 1)")
        if not 0 <= self.projector_epochs <= self.epochs:
            raise ValueError(f"--projector-epochs {self.projector_epochs}: must be from 0 to --epochs")
        if self.patience < 0:
            raise ValueError(f"--patience {self.patience}: must be 0 or more")
        if self.encoder_layer >= 0:
            raise ValueError(f"--encoder-layer {self.encoder_layer}: count from the end, -1 is the last layer")
        if self.samples < 2:
            raise ValueError(f"--samples {self.samples}: each is compared with the others, so at least 2")
        if self.objective == "scst" and self.label_smoothing:
            raise ValueError("--label-smoothing is of --objective xe; leave it out with scst")
        for name in ("clip_reward", "brevity", "xe_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be 0 or more")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"--{name} {getattr(self, name)}: choose from {', '.join(choices)}")

    def lora(self) -> LoraConfig:
        """The decoder's LoRA."""
        return LoraConfig(
            rank=self.lora_rank,
            alpha=self.lora_alpha,
            dropout=self.lora_dropout,
            enable_lora=self.lora_enable,
            lm_head=self.lora_lm_head,
        )


CHOICES = {
    "optimizer": ("adam", "adamw"),
    "schedule": ("cosine", "constant"),
    "precision": ("auto", "fp32", "bf16"),
    "objective": ("xe", "scst"),
}


# The report's own: plain Adam at 5e-5, no schedule, and loralib's default lora_alpha of 1 (a scaling of 1 / rank).
_REPORT = TrainConfig(
    lr=5e-5,
    projector_lr=5e-5,
    optimizer="adam",
    weight_decay=0.0,
    schedule="constant",
    warmup=0.0,
    clip=0.0,
    lora_alpha=1.0,
    lora_dropout=0.0,
    lora_lm_head=False,
)


SETTINGS = {
    "best": TrainConfig(),
    "1": replace(_REPORT, epochs=10),
    "2": replace(_REPORT, epochs=5),
    "3": replace(_REPORT, epochs=3, lora_rank=64, max_trainable=11_000_000),  # the report's own is above 10 M
    "4": replace(_REPORT, epochs=7, lora_enable=(True, False, True), lora_dropout=0.2, lora_lm_head=True, cls=False),
    "5": replace(_REPORT, epochs=13),
}


# Rewards are noisy and start from a trained captioner: small rates, that rise slowly. Most is gained where the cosine
# ends, so patience must not end it before.
SCST_NUMBERS = {"lr": 1e-4, "schedule": "cosine", "epochs": 4, "warmup": 0.1, "patience": 4, "weight_decay": 0.0}


HELP = {
    "epochs": "passes over the training images",
    "batch_size": "images a batch, over all processes together; all their captions go with them",
    "accumulate": "batches an optimiser step",
    "lr": "learning rate of LoRA",
    "projector_lr": "learning rate of the projector",
    "optimizer": "adam or adamw",
    "weight_decay": "of adamw",
    "schedule": "cosine (to a hundredth) or constant",
    "warmup": "share of all steps in which the rate rises",
    "clip": "largest gradient norm; 0 clips nothing",
    "label_smoothing": "share of the target spread over the vocabulary",
    "captions_per_image": "captions of an image that an epoch shows (default: all)",
    "seed": "of weights, order and dropout",
    "precision": "fp32, bf16, or auto: bf16 on CUDA",
    "cls": "give the encoder's CLS token to the decoder too",
    "lora_rank": "LoRA's rank",
    "lora_alpha": "LoRA's update is scaled by alpha / rank",
    "lora_dropout": "dropout before LoRA",
    "lora_enable": "q, k, v of c_attn as MergedLinear, such as 1,0,1 (default: one lora.Linear)",
    "lora_lm_head": "LoRA on the output layer too, untied from the embeddings",
    "max_trainable": "refuse to train more parameters than this",
    "val_images": "validation images captioned and scored every epoch",
    "beam_size": "beams in validation",
    "max_new_tokens": "longest caption in validation",
    "log_every": "steps between lines of metrics.jsonl",
    "save_every": "steps between states for --resume, beside one an epoch: what a kill costs at most",
    "max_skipped": "end the run when so many steps in a row had no finite loss and gradient",
    "encoder_layer": "layer that feeds the projector, from the end: -1 is the last, -2 the one before",
    "projector_epochs": "first epochs that train the projector alone",
    "patience": "epochs without a better one after which training stops; 0 never stops",
    "objective": "xe (cross-entropy), or scst (CIDEr-D as a reward; needs --init-adapter)",
    "samples": "captions an image, all found by a beam search of that width, scst",
    "clip_reward": "weight of CLIPScore in the reward, scst",
    "brevity": "exponent of BLEU's brevity penalty on the reward, scst; 0 leaves it out",
    "xe_weight": "weight of cross-entropy beside the rewards, scst: holds captions near people's",
}
