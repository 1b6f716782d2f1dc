"""Training: settings, optimiser and schedule, and the trainer that keeps a run folder."""

from __future__ import annotations

import json
import logging
import math
import pickle
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import data
import evaluate
import generation
import runtime
from captioner import Captioner, read_adapter
from decoder import LoraConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults are the setting ``best``; see SETTINGS for the report's five."""

    epochs: int = 8
    batch_size: int = 16  # images; all their captions go with them
    accumulate: int = 1  # batches an optimiser step
    lr: float = 1e-3  # of LoRA
    projector_lr: float = 1e-3
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
    rank_stabilized: bool = False  # scale LoRA by alpha / sqrt(rank) (Kalajdzievski, arXiv 2312.03732)
    encoder_layer: int = -1  # that feeds the projector; -2 is the second to last
    projector_epochs: int = 0  # first epochs that train the projector alone
    average_last: int = 0  # epochs whose weights are averaged at the end; 0 or 1 averages nothing
    patience: int = 0  # epochs without a better one after which training stops; 0 never stops
    objective: str = "xe"  # cross-entropy, or scst: CIDEr-D as a reward (scst.py)
    samples: int = 5  # captions drawn an image, scst
    temperature: float = 1.0  # of the draw, scst
    clip_reward: float = 0.0  # weight of CLIPScore in the reward, scst
    xe_weight: float = 0.0  # of cross-entropy beside the rewards, scst

    def __post_init__(self) -> None:
        at_least_one = ("epochs", "batch_size", "accumulate", "beam_size", "max_new_tokens", "val_images", "log_every")
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        for name in ("lr", "projector_lr"):
            if not 0 < getattr(self, name) < 10:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be between 0 and 10")
        for name in ("warmup", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be in [0, 1)")
        for name in ("projector_epochs", "average_last"):
            if not 0 <= getattr(self, name) <= self.epochs:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be from 0 to --epochs")
        if self.patience < 0:
            raise ValueError(f"--patience {self.patience}: must be 0 or more")
        if self.encoder_layer >= 0:
            raise ValueError(f"--encoder-layer {self.encoder_layer}: count from the end, -1 is the last layer")
        if self.samples < 2:
            raise ValueError(f"--samples {self.samples}: each is compared with the others, so at least 2")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"--temperature {self.temperature}: must be a positive number")
        for name in ("clip_reward", "xe_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be 0 or more")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"--{name} {getattr(self, name)}: choose from {', '.join(choices)}")

    def lora(self) -> LoraConfig:
        """The decoder's LoRA, whose scaling is always its alpha / rank."""
        alpha = self.lora_alpha * math.sqrt(self.lora_rank) if self.rank_stabilized else self.lora_alpha
        return LoraConfig(
            rank=self.lora_rank, alpha=alpha, dropout=self.lora_dropout,
            enable_lora=self.lora_enable, lm_head=self.lora_lm_head,
        )  # fmt: skip


CHOICES = {
    "optimizer": ("adam", "adamw"), "schedule": ("cosine", "constant"), "precision": ("auto", "fp32", "bf16"),
    "objective": ("xe", "scst"),
}  # fmt: skip

# The report's own: plain Adam at 5e-5, no schedule, and loralib's default lora_alpha of 1 (a scaling of 1 / rank).
_REPORT = TrainConfig(
    lr=5e-5, projector_lr=5e-5, optimizer="adam", weight_decay=0.0, schedule="constant", warmup=0.0, clip=0.0,
    lora_alpha=1.0, lora_dropout=0.0, lora_lm_head=False,
)  # fmt: skip
SETTINGS = {
    "best": TrainConfig(),
    "1": replace(_REPORT, epochs=10),
    "2": replace(_REPORT, epochs=5),
    "3": replace(_REPORT, epochs=3, lora_rank=64, max_trainable=11_000_000),  # the report's own is above 10 M
    "4": replace(_REPORT, epochs=7, lora_enable=(True, False, True), lora_dropout=0.2, lora_lm_head=True, cls=False),
    "5": replace(_REPORT, epochs=13),
}


# Rewards are noisy and start from a trained captioner: small, constant rates.
SCST_NUMBERS = {"lr": 2e-4, "schedule": "constant", "epochs": 2, "warmup": 0.0, "patience": 2, "weight_decay": 0.0}


def make_optimizer(captioner: Captioner, config: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimiser: every trained parameter is in one of two groups, projector or LoRA."""
    trainable = captioner.trainable()
    groups = [
        {"params": [p for n, p in trainable.items() if not n.startswith("projector.")], "lr": config.lr},
        {"params": [p for n, p in trainable.items() if n.startswith("projector.")], "lr": config.projector_lr},
    ]
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    decay = {"weight_decay": config.weight_decay} if config.optimizer == "adamw" else {}
    return kind(groups, **decay)


def schedule_factor(step: int, steps: int, config: TrainConfig) -> float:
    """Return what the learning rates are multiplied by at ``step`` of ``steps``."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass
class Split:
    """One split, ready to train or validate on: samples, their caption tokens, and the encoder's tokens of each."""

    samples: list[data.Sample]
    captions: list[list[list[int]]]
    features: data.FeatureCache

    def batch(self, indices: Sequence[int], eos: int, device: torch.device,
              captions: Sequence[Any] | None = None) -> tuple[torch.Tensor, data.PackedBatch]:  # fmt: skip
        """Return features (B, N, D) and packed captions of the samples ``indices``."""
        captions = captions if captions is not None else [self.captions[i] for i in indices]
        packed = data.pack_captions(captions, eos, pad_to_multiple=8)
        return self.features.gather(list(indices)).float().to(device), packed.to(device)


class Trainer:
    """Trains one captioner on one split, validates it on another, and keeps the run folder."""

    KEPT = ("epoch", "step", "best", "criterion", "stale")  # what a resumed run takes over beside adapter and optimiser

    def __init__(self, captioner: Captioner, tokenizer: data.Tokenizer, train: Split, val: Split,
                 config: TrainConfig, out: Path) -> None:  # fmt: skip
        self.captioner, self.tokenizer, self.config, self.out = captioner, tokenizer, config, out
        self.train_split, self.val_split = train, val
        self.dataset = data.CaptionDataset(train.captions, config.captions_per_image, config.seed)
        self.optimizer = make_optimizer(captioner, config)
        self.device = captioner.device
        per_epoch = math.ceil(len(train.samples) / config.batch_size)
        self.steps_per_epoch = math.ceil(per_epoch / config.accumulate)
        self.steps = self.steps_per_epoch * config.epochs
        self.epoch, self.step, self.best, self.criterion = 0, 0, -math.inf, ""
        self.stale = 0  # epochs since the best one
        self.started = time.time()

    def run(self) -> dict[str, Any]:
        """Train what is left of the epochs and return the last line of metrics."""
        self.sanity_check()
        record: dict[str, Any] = {}
        with tqdm(total=self.steps, initial=self.step, desc="train", disable=not sys.stderr.isatty()) as bar:
            while self.epoch < self.config.epochs and not self.stopped:
                loss = self.train_epoch(bar)
                self.epoch += 1
                record = {"kind": "epoch", "epoch": self.epoch, "step": self.step, "train_loss": loss}
                record |= self.validate()
                self.keep(record)
        if self.stopped:
            log.info("stopped after epoch %d: none of the last %d was better", self.epoch, self.stale)
            self.write_metrics({"kind": "stopped", "epoch": self.epoch, "step": self.step})
        return self.average() or record

    @property
    def stopped(self) -> bool:
        """Whether ``patience`` is at its end."""
        return 0 < self.config.patience <= self.stale

    def average(self) -> dict[str, Any]:
        """Average the last epochs' adapters; where that validates better than every epoch, it becomes the best.

        Averaged are A and B of LoRA each, as weights of one trajectory (Izmailov et al., arXiv 1803.05407).
        """
        first = self.epoch - self.config.average_last + 1
        paths = [self.out / f"epoch{epoch}.safetensors" for epoch in range(first, self.epoch + 1)]
        if len(paths) < 2 or not all(path.is_file() for path in paths):
            return {}
        states = [read_adapter(path)[1] for path in paths]
        self.captioner.load_adapter_state({k: sum(s[k] for s in states) / len(states) for k in states[0]})
        record = {"kind": "average", "epochs": len(paths), "step": self.step, **self.validate()}
        sign = 1 if self.criterion == "val_cider" else -1
        record["best"] = sign * record.get(self.criterion, -sign * math.inf) > self.best
        if record["best"]:
            self.captioner.save_adapter(self.out / "best.safetensors")
        self.write_metrics(record)
        for path in paths:
            path.unlink()
        return record

    def sanity_check(self) -> None:
        """Take two validation batches through loss and search: a bad path fails in seconds, not after an epoch."""
        self.captioner.eval()
        count = min(len(self.val_split.samples), 2 * self.config.batch_size)
        self.val_loss(count)
        self.captions(min(count, 2))

    def batches(self) -> Iterator[list[int]]:
        """Yield this epoch's batches of indices."""
        self.dataset.set_epoch(self.epoch)
        config = self.config
        yield from data.length_grouped_batches(self.dataset.lengths(), config.batch_size, config.seed, self.epoch)

    def train_epoch(self, bar: Any) -> float:
        """Train one epoch and return its mean loss."""
        config, losses = self.config, []
        torch.manual_seed(config.seed * 1000 + self.epoch)  # dropout: a resumed run draws what an unbroken one draws
        self.captioner.train()
        batches = list(self.batches())
        for start in range(0, len(batches), config.accumulate):
            loss = self.train_step(batches[start : start + config.accumulate])
            losses.append(loss)
            bar.update()
            bar.set_postfix(epoch=self.epoch + 1, loss=f"{loss:.3f}")
            if self.step % config.log_every == 0 or self.step == 1:
                lr = self.optimizer.param_groups[0]["lr"]
                self.write_metrics({"kind": "step", "step": self.step, "loss": loss, "lr": lr})
        return sum(losses) / len(losses)

    def train_step(self, batches: list[list[int]]) -> float:
        """Take one optimiser step over ``batches`` and return their mean loss."""
        config, total = self.config, 0.0
        for group, lr in zip(self.optimizer.param_groups, (config.lr, config.projector_lr), strict=True):
            group["lr"] = lr * schedule_factor(self.step, self.steps, config)
        self.optimizer.zero_grad(set_to_none=True)
        for indices in batches:
            loss = self.batch_loss(indices) / len(batches)
            if not torch.isfinite(loss):
                raise ValueError(
                    f"the loss is {loss.item()} at step {self.step}; lower --lr, or set --clip 1; "
                    f"the last whole epoch, if any, is kept in {self.out}"
                )
            loss.backward()
            total += loss.item()
        if self.epoch < config.projector_epochs:
            for parameter in self.optimizer.param_groups[0]["params"]:
                parameter.grad = None  # the optimiser passes it over, moments and all
        if config.clip:
            torch.nn.utils.clip_grad_norm_(list(self.captioner.trainable().values()), config.clip)
        self.optimizer.step()
        self.step += 1
        return total

    def batch_loss(self, indices: list[int]) -> torch.Tensor:
        """Return the loss of one batch of images."""
        shown = [self.dataset[i][1] for i in indices]
        features, packed = self.train_split.batch(indices, self.tokenizer.eos_id, self.device, shown)
        with generation.autocast(self.device, self.config.precision):
            return self.captioner.loss(features, packed, self.config.label_smoothing)

    @torch.no_grad()
    def val_loss(self, count: int) -> float:
        """Return the mean loss over the first ``count`` validation images."""
        losses = []
        for start in range(0, count, self.config.batch_size):
            indices = range(start, min(start + self.config.batch_size, count))
            with generation.autocast(self.device, self.config.precision):
                loss = self.captioner.loss(*self.val_split.batch(indices, self.tokenizer.eos_id, self.device))
            losses.append(loss.item() * len(indices))
        return sum(losses) / count

    def captions(self, count: int, beam_size: int | None = None) -> dict[str, str]:
        """Caption the first ``count`` validation images, with the config's beams or as many as given."""
        predictions = {}
        for start in range(0, count, self.config.batch_size):
            indices = list(range(start, min(start + self.config.batch_size, count)))
            features = self.val_split.features.gather(indices).float().to(self.device)
            with generation.autocast(self.device, self.config.precision):
                texts = generation.caption_features(
                    self.captioner, self.tokenizer, features, beam_size or self.config.beam_size,
                    self.config.max_new_tokens,
                )  # fmt: skip
            predictions |= {self.val_split.samples[i].path.stem: t for i, t in zip(indices, texts, strict=True)}
        return predictions

    def validate(self) -> dict[str, Any]:
        """Return loss and CIDEr of generated captions on the validation subset."""
        self.captioner.eval()
        count = min(self.config.val_images, len(self.val_split.samples))
        result: dict[str, Any] = {"val_loss": self.val_loss(count), "val_images": count}
        predictions = self.captions(count)
        references = {s.path.stem: list(s.captions) for s in self.val_split.samples[:count]}
        try:
            result["val_cider"] = evaluate.cider(references, predictions)[0]
        except (ValueError, OSError) as error:
            log.warning("no CIDEr (%s); the best epoch is chosen by validation loss instead", error)
        return result

    def keep(self, record: dict[str, Any]) -> None:
        """Write metrics, adapters and what --resume needs."""
        record = {**record, "seconds": round(time.time() - self.started, 1)}
        if not self.criterion:  # chosen once, so that a CIDEr is never compared with a loss
            self.criterion = "val_cider" if "val_cider" in record else "val_loss"
        sign = 1 if self.criterion == "val_cider" else -1
        score = sign * record.get(self.criterion, -sign * math.inf)
        record["best"] = score > self.best
        self.best = max(self.best, score)
        self.stale = 0 if record["best"] else self.stale + 1
        self.captioner.save_adapter(self.out / "last.safetensors")
        if record["best"]:
            self.captioner.save_adapter(self.out / "best.safetensors")
        if self.config.average_last:
            self.captioner.save_adapter(self.out / f"epoch{self.epoch}.safetensors")
            (self.out / f"epoch{self.epoch - self.config.average_last}.safetensors").unlink(missing_ok=True)
        # The state holds the adapter too: one file, one rename, so that weights and optimiser never disagree.
        state = {key: getattr(self, key) for key in self.KEPT}
        state |= {"optimizer": self.optimizer.state_dict(), "adapter": self.captioner.adapter_state()}
        with runtime.atomic_path(self.out / "training_state.pt") as temporary:
            torch.save(state, temporary)
        self.write_metrics(record)
        plot_losses(self.out)
        log.info(
            "epoch %d: train loss %.3f, val loss %.3f, val CIDEr %s%s", self.epoch,
            record.get("train_loss", math.nan), record["val_loss"],
            f"{record['val_cider']:.3f}" if "val_cider" in record else "-", " (best)" if record["best"] else "",
        )  # fmt: skip

    def write_metrics(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def resume(self) -> None:
        """Take up the last whole epoch of the run folder."""
        path = self.out / "training_state.pt"
        if not path.is_file():
            raise FileNotFoundError(f"--resume: {path} does not exist; start without --resume")
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            self.captioner.load_adapter_state(state["adapter"])
            self.optimizer.load_state_dict(state["optimizer"])
            for key in self.KEPT:
                setattr(self, key, state[key])
        except (RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"--resume: {path} is damaged ({error}); start anew in another folder") from error
        metrics = self.out / "metrics.jsonl"  # steps behind the last whole epoch are taken again: drop their lines
        lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        runtime.write_text(metrics, "".join(line for line in lines if json.loads(line)["step"] <= self.step))
        log.info("resumed after epoch %d", self.epoch)


def plot_losses(out: Path) -> None:
    """Draw loss.png from metrics.jsonl: training and validation loss, and CIDEr where it was measured."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps, epochs = ([r for r in lines if r["kind"] == kind] for kind in ("step", "epoch"))
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axis.plot([r["step"] for r in steps], [r["loss"] for r in steps], color="#9db8d9", lw=1, label="training loss")
    at = [r["step"] for r in epochs]
    axis.plot(at, [r["val_loss"] for r in epochs], "o-", color="#1f4e8c", label="validation loss")
    axis.set(xlabel="optimiser step", ylabel="loss a token (nats)", ylim=(0, None))
    handles, labels = axis.get_legend_handles_labels()
    if any("val_cider" in r for r in epochs):
        right = axis.twinx()
        right.plot(at, [r.get("val_cider", math.nan) for r in epochs], "s--", color="#c2571a", label="validation CIDEr")
        right.set(ylabel="CIDEr", ylim=(0, None))
        more = right.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    axis.legend(handles, labels, loc="upper center", ncols=3, bbox_to_anchor=(0.5, 1.13), frameon=False)
    with runtime.atomic_path(out / "loss.png") as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    plt.close(figure)
