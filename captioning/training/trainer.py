"""Training: settings, optimiser and schedule, and the trainer that keeps a run folder."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import evaluate
from captioning import cli as runtime
from captioning import tensors as checkpoints
from captioning.data import feature_cache as data
from captioning.distributed import ALONE, Processes
from captioning.inference import encode as generation
from captioning.models.captioner import Captioner, read_adapter
from decoder import LoraConfig, cast_frozen

log = logging.getLogger(__name__)

SEED_STRIDE = 10_000_019  # between the seeds of processes: each draws dropout of its own


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
    rank_stabilized: bool = False  # scale LoRA by alpha / sqrt(rank) (Kalajdzievski, arXiv 2312.03732)
    encoder_layer: int = -1  # that feeds the projector; -2 is the second to last
    projector_epochs: int = 0  # first epochs that train the projector alone
    average_last: int = 0  # epochs whose weights are averaged at the end; 0 or 1 averages nothing
    patience: int = 0  # epochs without a better one after which training stops; 0 never stops
    objective: str = "xe"  # cross-entropy, or scst: CIDEr-D as a reward (scst.py)
    draws: str = "beam"  # where an image's captions come from: a beam search, or sample, scst
    samples: int = 5  # captions an image, scst
    temperature: float = 1.0  # of samples, scst
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
        for name in ("projector_epochs", "average_last"):
            if not 0 <= getattr(self, name) <= self.epochs:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be from 0 to --epochs")
        if self.patience < 0:
            raise ValueError(f"--patience {self.patience}: must be 0 or more")
        if self.encoder_layer >= 0:
            raise ValueError(f"--encoder-layer {self.encoder_layer}: count from the end, -1 is the last layer")
        if self.samples < 2:
            raise ValueError(f"--samples {self.samples}: each is compared with the others, so at least 2")
        if self.objective == "scst" and self.label_smoothing:
            raise ValueError("--label-smoothing is of --objective xe; leave it out with scst")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"--temperature {self.temperature}: must be a positive number")
        for name in ("clip_reward", "brevity", "xe_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be 0 or more")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"--{name} {getattr(self, name)}: choose from {', '.join(choices)}")

    def lora(self) -> LoraConfig:
        """The decoder's LoRA, whose scaling is always its alpha / rank."""
        alpha = self.lora_alpha * math.sqrt(self.lora_rank) if self.rank_stabilized else self.lora_alpha
        return LoraConfig(
            rank=self.lora_rank,
            alpha=alpha,
            dropout=self.lora_dropout,
            enable_lora=self.lora_enable,
            lm_head=self.lora_lm_head,
        )


CHOICES = {
    "optimizer": ("adam", "adamw"),
    "schedule": ("cosine", "constant"),
    "precision": ("auto", "fp32", "bf16"),
    "objective": ("xe", "scst"),
    "draws": ("beam", "sample"),
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

    def batch(
        self, indices: Sequence[int], eos: int, device: torch.device, captions: Sequence[Any] | None = None
    ) -> tuple[torch.Tensor, data.PackedBatch]:
        """Return features (B, N, D) and packed captions of the samples ``indices``."""
        captions = captions if captions is not None else [self.captions[i] for i in indices]
        packed = data.pack_captions(captions, eos, pad_to_multiple=8)
        return self.features.gather(list(indices)).float().to(device), packed.to(device)


class Trainer:
    """Trains one captioner on one split, validates it on another, and keeps the run folder.

    Several processes hold a copy each and split every batch: the sum of their gradients is that of the whole batch, so
    all take the same step. The first one keeps the run folder.
    """

    # What a resumed run takes over beside adapter, optimiser and random state.
    KEPT = ("epoch", "position", "step", "losses", "skipped", "skipped_in_a_row", "best", "criterion", "stale")

    def __init__(
        self,
        captioner: Captioner,
        tokenizer: data.Tokenizer,
        train: Split,
        val: Split,
        config: TrainConfig,
        out: Path,
        processes: Processes = ALONE,
    ) -> None:
        self.captioner, self.tokenizer, self.config, self.out = captioner, tokenizer, config, out
        self.processes = processes
        self.train_split, self.val_split = train, val
        self.dataset = data.CaptionDataset(train.captions, config.captions_per_image, config.seed)
        self.optimizer = make_optimizer(captioner, config)
        self.device = captioner.device
        cast_frozen(captioner.decoder, generation.product_dtype(self.device, config.precision))
        per_epoch = math.ceil(len(train.samples) / config.batch_size)
        self.steps_per_epoch = math.ceil(per_epoch / config.accumulate)
        self.steps = self.steps_per_epoch * config.epochs
        self.epoch, self.step, self.best, self.criterion = 0, 0, -math.inf, ""
        self.position, self.losses = 0, []  # steps taken of this epoch, and their losses
        self.skipped, self.skipped_in_a_row = 0, 0
        self.random_state: dict[str, torch.Tensor] = {}  # of a state taken up in the middle of an epoch
        self.stop = checkpoints.StopSignals()
        self.stopping = False  # whether any process was asked to stop
        self.listeners: list[Callable[[dict[str, Any]], None]] = []  # get what metrics.jsonl gets
        self.stale = 0  # epochs since the best one
        self.started = time.time()

    def run(self) -> dict[str, Any]:
        """Train what is left of the epochs, or until a signal asks to stop; return the last line of metrics.

        Raises:
            ValueError: memory ran out, or too many steps in a row had no finite loss and gradient.
        """
        record: dict[str, Any] = {}
        hidden = not (self.processes.first and sys.stderr.isatty())
        bar = tqdm(total=self.steps, initial=self.step, desc="train", disable=hidden)
        try:
            self.sanity_check()
            with bar, self.stop:
                while not self.finished and not self.asked_to_stop():
                    loss = self.train_epoch(bar)
                    if self.position < self.steps_per_epoch:  # stopped
                        break
                    self.epoch, self.position, self.losses = self.epoch + 1, 0, []
                    record = {"kind": "epoch", "epoch": self.epoch, "step": self.step, "train_loss": loss}
                    record |= self.validate()
                    self.keep(record)
        except torch.OutOfMemoryError as error:
            raise ValueError(memory_advice(self.config, self.device)) from error
        if self.out_of_patience:
            log.info("stopped after epoch %d: none of the last %d was better", self.epoch, self.stale)
            self.write_metrics({"kind": "stopped", "epoch": self.epoch, "step": self.step})
        return (self.average() if self.finished else None) or record

    def asked_to_stop(self) -> bool:
        """Whether a signal has come to any of the processes; what all of them hear is kept in ``stopping``."""
        self.stopping = self.processes.any(self.stop.requested)
        return self.stopping

    @property
    def out_of_patience(self) -> bool:
        """Whether ``patience`` is at its end."""
        return 0 < self.config.patience <= self.stale

    def average(self) -> dict[str, Any]:
        """Average the last epochs' adapters; where that validates better than every epoch, it becomes the best.

        Averaged are A and B of LoRA each, as weights of one trajectory (Izmailov et al., arXiv 1803.05407).
        """
        first = self.epoch - self.config.average_last + 1
        paths = [self.out / f"epoch{epoch}.safetensors" for epoch in range(first, self.epoch + 1)]
        mean = self.processes.from_first(lambda: mean_adapter(paths))
        if not mean:
            return {}
        self.captioner.load_adapter_state(mean)
        record = {"kind": "average", "epochs": len(paths), "step": self.step, **self.validate()}
        sign = 1 if self.criterion == "val_cider" else -1
        record["best"] = sign * record.get(self.criterion, -sign * math.inf) > self.best
        if self.processes.first:
            if record["best"]:
                self.captioner.save_adapter(self.out / "best.safetensors")
            self.write_metrics(record)
            for path in paths:
                path.unlink()
        return record

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or patience is; False behind ``run`` means that a signal stopped it."""
        return self.epoch >= self.config.epochs or self.out_of_patience

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
        """Train what is left of an epoch, or until a signal asks to stop, and return its mean loss."""
        config = self.config
        if self.random_state:
            self.restore_random_state()
        else:
            self.seed_epoch()
        self.captioner.train()
        batches = list(self.batches())
        groups = [batches[start : start + config.accumulate] for start in range(0, len(batches), config.accumulate)]
        started, first = time.perf_counter(), self.position
        for group in groups[self.position :]:
            loss = self.train_step(group)
            self.position += 1
            self.count(loss)
            bar.update()
            bar.set_postfix(epoch=self.epoch + 1, loss=f"{loss:.3f}")
            if math.isfinite(loss) and (self.step % config.log_every == 0 or self.step == 1):
                lr = self.optimizer.param_groups[0]["lr"]
                self.write_metrics({"kind": "step", "step": self.step, "loss": loss, "lr": lr})
            if self.asked_to_stop() or self.step % config.save_every == 0:
                self.save_state()
            if self.stopping:
                break
        work = ("train", self.position - first, time.perf_counter() - started)  # what bench/measured.py collects
        log.info("epoch %d: %d steps in %.1f s", self.epoch + 1, *work[1:], extra={"work": work})
        if not self.losses and not self.stopping:
            raise ValueError(f"no step of epoch {self.epoch + 1} had a finite loss; lower --lr, or set --clip 1")
        return sum(self.losses) / max(1, len(self.losses))

    def seed_epoch(self) -> None:
        """Seed the dropout of this epoch, in every process by another number."""
        torch.manual_seed(self.config.seed * 1000 + self.epoch + SEED_STRIDE * self.processes.rank)

    def count(self, loss: float) -> None:
        """Keep the loss of a step, or count the step as skipped; too many in a row end the run."""
        if math.isfinite(loss):
            self.losses.append(loss)
            self.skipped_in_a_row = 0
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.processes.first:
            log.warning("step %d skipped: its loss or gradient is not finite (%d so far)", self.step, self.skipped)
        self.write_metrics({"kind": "skipped", "step": self.step, "skipped": self.skipped})
        if self.skipped_in_a_row >= self.config.max_skipped:
            raise ValueError(
                f"the loss or the gradient was not finite in {self.skipped_in_a_row} steps in a row, up to step "
                f"{self.step}; lower --lr, set --clip 1, or raise --max-skipped; what was saved before is in {self.out}"
            )

    def train_step(self, batches: list[list[int]]) -> float:
        """Take one optimiser step over ``batches`` and return their mean loss.

        Where it or the gradient is not finite, NaN is returned and nothing but the count of steps has changed. All
        processes look at the sums over all, so they take the same step or none.
        """
        config, total = self.config, 0.0
        for group, lr in zip(self.optimizer.param_groups, (config.lr, config.projector_lr), strict=True):
            group["lr"] = lr * schedule_factor(self.step, self.steps, config)
        self.optimizer.zero_grad(set_to_none=True)
        for indices in batches:
            loss = self.batch_loss(indices) / len(batches)
            if loss.requires_grad:  # a process without an image of a small batch has nothing to differentiate
                loss.backward()
            total += loss.item()
        (total,) = self.processes.total(total)
        if self.epoch < config.projector_epochs:
            for parameter in self.optimizer.param_groups[0]["params"]:
                parameter.grad = None  # the optimiser passes it over, moments and all
            self.processes.sum_gradients(self.optimizer.param_groups[1]["params"])
        else:
            self.processes.sum_gradients(self.captioner.trainable().values())
        # An infinite limit clips nothing, and the norm still tells of a gradient that is not finite.
        norm = torch.nn.utils.clip_grad_norm_(list(self.captioner.trainable().values()), config.clip or math.inf)
        self.step += 1
        if not math.isfinite(total) or not torch.isfinite(norm):
            return math.nan
        self.optimizer.step()
        return total

    def batch_loss(self, indices: list[int]) -> torch.Tensor:
        """Return this process's part of the loss of one batch of images; the parts add up to the batch's."""
        shown = [self.dataset[i][1] for i in indices]
        return self.part_of_loss(self.train_split, indices, shown, self.config.label_smoothing)

    def part_of_loss(
        self, split: Split, indices: Sequence[int], captions: Sequence[Any], label_smoothing: float = 0.0
    ) -> torch.Tensor:
        """Return what this process's images add to the batch's mean over all tokens of its captions."""
        own = self.processes.share(range(len(indices)))
        if not own:
            return torch.zeros((), device=self.device)
        mine = [captions[i] for i in own]
        features, packed = split.batch([indices[i] for i in own], self.tokenizer.eos_id, self.device, mine)
        with generation.autocast(self.device, self.config.precision):
            loss = self.captioner.loss(features, packed, label_smoothing)
        return loss * (count_targets(mine) / count_targets(captions))

    @torch.no_grad()
    def val_loss(self, count: int) -> float:
        """Return the mean loss over the first ``count`` validation images."""
        losses = []
        for start in range(0, count, self.config.batch_size):
            indices = range(start, min(start + self.config.batch_size, count))
            loss = self.part_of_loss(self.val_split, indices, [self.val_split.captions[i] for i in indices])
            losses.append(loss.item() * len(indices))
        return self.processes.total(sum(losses))[0] / count

    def captions(self, count: int, beam_size: int | None = None) -> dict[str, str]:
        """Caption the first ``count`` validation images, with the config's beams or as many as given."""
        predictions = {}
        for start in range(0, count, self.config.batch_size):
            indices = self.processes.share(list(range(start, min(start + self.config.batch_size, count))))
            if not indices:
                continue
            features = self.val_split.features.gather(indices).float().to(self.device)
            with generation.autocast(self.device, self.config.precision):
                texts = generation.caption_features(
                    self.captioner,
                    self.tokenizer,
                    features,
                    beam_size or self.config.beam_size,
                    self.config.max_new_tokens,
                )
            predictions |= dict(zip(indices, texts, strict=True))
        for others in self.processes.gather(predictions):
            predictions |= others
        return {self.val_split.samples[i].path.stem: predictions[i] for i in range(count)}

    def validate(self) -> dict[str, Any]:
        """Return loss and CIDEr of generated captions on the validation subset."""
        self.captioner.eval()
        count = min(self.config.val_images, len(self.val_split.samples))
        result: dict[str, Any] = {"val_loss": self.val_loss(count), "val_images": count}
        return result | self.measure(self.captions(count))

    def measure(self, predictions: dict[str, str]) -> dict[str, float]:
        """Return what validation captions are worth; all processes call it, with all captions."""
        return self.processes.from_first(lambda: self.score_captions(predictions))

    def score_captions(self, predictions: dict[str, str]) -> dict[str, float]:
        """Return the CIDEr of validation captions, or nothing where it cannot be computed."""
        references = {s.path.stem: list(s.captions) for s in self.val_split.samples[: len(predictions)]}
        try:
            return {"val_cider": evaluate.cider(references, predictions)[0]}
        except (ValueError, OSError) as error:
            log.warning("no CIDEr (%s); the best epoch is chosen by validation loss instead", error)
            return {}

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
        if self.processes.first:
            self.save_adapters(record["best"])
        self.write_metrics(record)  # before the state: killed in between, the epoch is validated again, and not lost
        self.save_state()
        if self.processes.first:
            plot_losses(self.out)
        log.info(
            "epoch %d: train loss %.3f, val loss %.3f, val CIDEr %s%s",
            self.epoch,
            record.get("train_loss", math.nan),
            record["val_loss"],
            f"{record['val_cider']:.3f}" if "val_cider" in record else "-",
            " (best)" if record["best"] else "",
        )

    def save_adapters(self, best: bool) -> None:
        """Write the adapter as the last one, as the best one where it is, and as one of those to be averaged."""
        self.captioner.save_adapter(self.out / "last.safetensors")
        if best:
            self.captioner.save_adapter(self.out / "best.safetensors")
        if self.config.average_last:
            self.captioner.save_adapter(self.out / f"epoch{self.epoch}.safetensors")
            (self.out / f"epoch{self.epoch - self.config.average_last}.safetensors").unlink(missing_ok=True)

    def write_metrics(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl and tell the listeners, in the first process."""
        if not self.processes.first:
            return
        with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        for listener in self.listeners:
            listener(record)

    def save_state(self) -> None:
        """Write all that a resumed run needs to one file, so that weights, optimiser and counts never disagree.

        Weights and moments are the same in all processes; each has a random state of its own.
        """
        states = self.processes.gather(self.random_states())
        if not self.processes.first:
            return
        optimizer = self.optimizer.state_dict()
        tensors = {f"adapter.{name}": tensor for name, tensor in self.captioner.adapter_state().items()}
        tensors |= {f"optimizer.{i}.{k}": v for i, state in optimizer["state"].items() for k, v in state.items()}
        for rank, state in enumerate(states):
            tensors |= {f"random.{name_for(rank, kind)}": tensor for kind, tensor in state.items()}
        values = {key: getattr(self, key) for key in self.KEPT}
        checkpoints.save_state(self.out, tensors, {**values, "groups": optimizer["param_groups"]})

    def random_states(self) -> dict[str, torch.Tensor]:
        """Return the state of the generators that dropout draws from, by kind of device."""
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def restore_random_state(self) -> None:
        """Go on drawing dropout where the state that was taken up had stopped; with another device kind, anew.

        So does a process that the run did not have when it stopped.
        """
        self.seed_epoch()
        cpu, cuda = (self.random_state.get(name_for(self.processes.rank, kind)) for kind in ("cpu", "cuda"))
        if cpu is not None:
            torch.set_rng_state(cpu)
        if cuda is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(cuda, self.device)
        self.random_state = {}

    def resume(self) -> None:
        """Take up the newest whole state of the run folder.

        Raises:
            FileNotFoundError, ValueError: there is none, or it belongs to another captioner.
        """
        tensors, values = self.processes.from_first(lambda: checkpoints.load_state(self.out))
        parts: dict[str, dict[str, torch.Tensor]] = {"adapter": {}, "optimizer": {}, "random": {}}
        try:
            for name, tensor in tensors.items():
                part, rest = name.split(".", 1)
                parts[part][rest] = tensor
            self.captioner.load_adapter_state(parts["adapter"])
            state: dict[int, dict[str, torch.Tensor]] = {}
            for name, tensor in parts["optimizer"].items():
                number, key = name.split(".")
                state.setdefault(int(number), {})[key] = tensor
            self.optimizer.load_state_dict({"state": state, "param_groups": values["groups"]})
            for key in self.KEPT:
                setattr(self, key, values[key])
        except (KeyError, ValueError) as error:
            raise ValueError(f"--resume: {self.out} holds the state of another run ({error})") from error
        self.random_state = parts["random"] if self.position else {}
        if self.processes.first:
            self.cut_metrics()
        log.info("resumed after epoch %d, step %d", self.epoch, self.step)

    def cut_metrics(self) -> None:
        """Drop the lines of steps and epochs that will be taken again, and a last line that a kill tore."""
        path, kept = self.out / "metrics.jsonl", []
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        for line in text.splitlines(keepends=True):
            try:
                record = json.loads(line)
                if record["step"] <= self.step and record.get("epoch", 0) <= self.epoch and line.endswith("\n"):
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                log.warning("%s: a damaged line is dropped", path)
        runtime.write_text(path, "".join(kept))


def name_for(rank: int, kind: str) -> str:
    """Name a process's random state; the first one's has the name that a lone process's has."""
    return f"{kind}.{rank}" if rank else kind


def count_targets(captions: Sequence[Sequence[Sequence[int]]]) -> int:
    """Count the tokens that captions are to be learned by, EOS included: ``captions[image][caption]``."""
    return sum(len(caption) + 1 for group in captions for caption in group)


def mean_adapter(paths: Sequence[Path]) -> dict[str, torch.Tensor]:
    """Return the mean of several adapters; nothing for fewer than two, or where one is missing."""
    if len(paths) < 2 or not all(path.is_file() for path in paths):
        return {}
    states = [read_adapter(path)[1] for path in paths]
    return {k: sum(s[k] for s in states) / len(states) for k in states[0]}


def memory_advice(config: TrainConfig, device: torch.device) -> str:
    """Say which flags need less memory, and how much was in use at most."""
    peak = f" (at most {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB)" if device.type == "cuda" else ""
    if config.batch_size > 1:
        smaller = f"--batch-size {config.batch_size // 2} --accumulate {2 * config.accumulate} (the same steps)"
    else:
        smaller = "--captions-per-image 1"
    precision = "" if config.precision == "bf16" else ", --precision bf16"
    return f"out of memory{peak}; start anew with {smaller}, a lower --lora-rank or --beam-size{precision}"


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
