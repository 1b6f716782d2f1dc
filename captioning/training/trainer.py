"""Training: settings, optimiser and schedule, and the trainer that keeps a run folder."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from captioning.data.annotations import Sample
from captioning.data.batches import CaptionDataset, PackedBatch, length_grouped_batches, pack_captions
from captioning.data.feature_cache import FeatureCache
from captioning.data.tokenizer import Tokenizer
from captioning.device import autocast, product_dtype
from captioning.distributed import ALONE, Processes
from captioning.files import write_text
from captioning.inference.captions import caption_features
from captioning.models.captioner import Captioner
from captioning.scoring import evaluator
from captioning.timing import Timer
from captioning.training import run_folder
from captioning.training.config import TrainConfig
from captioning.training.run_folder import StopSignals, load_state, plot_losses
from decoder import cast_frozen

log = logging.getLogger(__name__)

SEED_STRIDE = 10_000_019  # between the seeds of processes: each draws dropout of its own


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

    samples: list[Sample]
    captions: list[list[list[int]]]
    features: FeatureCache

    def batch(
        self, indices: Sequence[int], eos: int, device: torch.device, captions: Sequence[Any] | None = None
    ) -> tuple[torch.Tensor, PackedBatch]:
        """Return features (B, N, D) and packed captions of the samples ``indices``."""
        captions = captions if captions is not None else [self.captions[i] for i in indices]
        packed = pack_captions(captions, eos, pad_to_multiple=8)
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
        tokenizer: Tokenizer,
        train: Split,
        val: Split,
        config: TrainConfig,
        out: Path,
        processes: Processes = ALONE,
    ) -> None:
        self.captioner, self.tokenizer, self.config, self.out = captioner, tokenizer, config, out
        self.processes = processes
        self.train_split, self.val_split = train, val
        self.dataset = CaptionDataset(train.captions, config.captions_per_image, config.seed)
        self.optimizer = make_optimizer(captioner, config)
        self.device = captioner.device
        cast_frozen(captioner.decoder, product_dtype(self.device, config.precision))
        per_epoch = math.ceil(len(train.samples) / config.batch_size)
        self.steps_per_epoch = math.ceil(per_epoch / config.accumulate)
        self.steps = self.steps_per_epoch * config.epochs
        self.epoch, self.step, self.best, self.criterion = 0, 0, -math.inf, ""
        self.position, self.losses = 0, []  # steps taken of this epoch, and their losses
        self.skipped, self.skipped_in_a_row = 0, 0
        self.random_state: dict[str, torch.Tensor] = {}  # of a state taken up in the middle of an epoch
        self.stop = StopSignals()
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
        return record

    def asked_to_stop(self) -> bool:
        """Whether a signal has come to any of the processes; what all of them hear is kept in ``stopping``."""
        self.stopping = self.processes.any(self.stop.requested)
        return self.stopping

    @property
    def out_of_patience(self) -> bool:
        """Whether ``patience`` is at its end."""
        return 0 < self.config.patience <= self.stale

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
        yield from length_grouped_batches(self.dataset.lengths(), config.batch_size, config.seed, self.epoch)

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
        timer, first = Timer("train"), self.position
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
        timer.report(log, self.position - first, "epoch %d: %d steps", self.epoch + 1)
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
        with autocast(self.device, self.config.precision):
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
            with autocast(self.device, self.config.precision):
                texts = caption_features(
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
            return {"val_cider": evaluator.cider(references, predictions)[0]}
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
        """Write the adapter as the last one, and as the best one where it is."""
        self.captioner.save_adapter(self.out / "last.safetensors")
        if best:
            self.captioner.save_adapter(self.out / "best.safetensors")

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
        run_folder.save_state(self.out, tensors, {**values, "groups": optimizer["param_groups"]})

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
        tensors, values = self.processes.from_first(lambda: load_state(self.out))
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
        write_text(path, "".join(kept))


def name_for(rank: int, kind: str) -> str:
    """Name a process's random state; the first one's has the name that a lone process's has."""
    return f"{kind}.{rank}" if rank else kind


def count_targets(captions: Sequence[Sequence[Sequence[int]]]) -> int:
    """Count the tokens that captions are to be learned by, EOS included: ``captions[image][caption]``."""
    return sum(len(caption) + 1 for group in captions for caption in group)


def memory_advice(config: TrainConfig, device: torch.device) -> str:
    """Say which flags need less memory, and how much was in use at most."""
    peak = f" (at most {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB)" if device.type == "cuda" else ""
    if config.batch_size > 1:
        smaller = f"--batch-size {config.batch_size // 2} --accumulate {2 * config.accumulate} (the same steps)"
    else:
        smaller = "--captions-per-image 1"
    precision = "" if config.precision == "bf16" else ", --precision bf16"
    return f"out of memory{peak}; start anew with {smaller}, a lower --lora-rank or --beam-size{precision}"
