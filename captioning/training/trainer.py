"""The trainer: optimiser and schedule, the steps of an epoch, validation, and what a stop or a resume keeps."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType, TracebackType
from typing import Any

import torch
from tqdm import tqdm

from captioning.data.batches import (
    Batch,
    caption_batches,
    captions_of_epoch,
    length_grouped_batches,
    packed_length,
)
from captioning.data.tokenizer import Tokenizer
from captioning.device import autocast, product_dtype, ran_out_of_memory
from captioning.distributed import ALONE, Processes
from captioning.inference.captions import caption_features
from captioning.models.captioner import Captioner
from captioning.scoring import evaluator
from captioning.timing import Timer
from captioning.training.config import TrainConfig
from captioning.training.loading import LoadedBatch, Loader, Split
from captioning.training.run_folder import Progress, RunFolder, State
from decoder import cast_frozen, merged_copies

log = logging.getLogger(__name__)

SEED_STRIDE = 10_000_019  # between the seeds of processes: each draws its own dropout


def make_optimizer(captioner: Captioner, config: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimiser: every trained parameter is in one group, as ``learning_rates`` orders them."""
    trainable, rates = captioner.trainable(), learning_rates(config)
    groups: list[dict[str, Any]] = [{"params": [], "lr": rate} for rate in rates]
    for name, parameter in trainable.items():
        of_lora = 2 if len(rates) > 2 and name.endswith("lora_B") else 0
        groups[1 if name.startswith("projector.") else of_lora]["params"].append(parameter)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    decay = {"weight_decay": config.weight_decay} if config.optimizer == "adamw" else {}
    # A kernel for all tensors; on a CPU its numbers would not be those of a run that began without it.
    return kind(groups, **decay, fused=True if captioner.device.type == "cuda" else None)


def learning_rates(config: TrainConfig) -> list[float]:
    """Return the rates of LoRA, of the projector, and where they differ from LoRA's other ones those of its B."""
    plus = [config.lr * config.lora_plus] if config.lora_plus != 1 else []
    return [config.lr, config.projector_lr, *plus]


def schedule_factor(step: int, steps: int, config: TrainConfig) -> float:
    """Return what the learning rates are multiplied by at ``step`` of ``steps``."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


def steps_per_epoch(config: TrainConfig, captions: Sequence[Sequence[Any]]) -> int:
    """Return how many optimiser steps an epoch over ``captions[image][caption]`` takes."""
    shown = [min(len(group), config.captions_per_image or len(group)) for group in captions]
    batches = math.ceil((len(shown) if config.batch_by == "images" else sum(shown)) / config.batch_size)
    return math.ceil(batches / config.accumulate)


class StoppedEarly(KeyboardInterrupt):
    """SIGTERM has come while a training was prepared."""


@contextlib.contextmanager
def stopped_early() -> Iterator[None]:
    """Within, SIGTERM raises `StoppedEarly`, as Ctrl-C a KeyboardInterrupt: what cleans up does so.

    Outside of the main thread, where Python sets no handlers, nothing changes.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise StoppedEarly

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class StopSignals:
    """While entered, the first SIGTERM or SIGINT sets ``requested`` and does nothing else; the second acts as usual.

    Outside of the main thread, where Python sets no handlers, nothing changes.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()
        log.warning("%s: stopping after this step; signal again to stop immediately", signal.Signals(number).name)


class Trainer:
    """Trains one captioner on one split, validates it on another, and keeps the run folder.

    Several processes hold a copy each and split every batch: the sum of their gradients is that of the full batch, so
    all take the same step. The first one keeps the run folder.
    """

    def __init__(
        self,
        captioner: Captioner,
        tokenizer: Tokenizer,
        train: Split,
        val: Split,
        config: TrainConfig,
        folder: RunFolder,
        processes: Processes = ALONE,
    ) -> None:
        self.captioner, self.tokenizer, self.config, self.folder = captioner, tokenizer, config, folder
        self.processes, self.device = processes, captioner.device
        self.train_split, self.val_split = train, val
        self.train_loader, self.val_loader = (
            Loader(split, tokenizer.eos_id, self.device, processes) for split in (train, val)
        )
        self.optimizer = make_optimizer(captioner, config)
        cast_frozen(captioner.decoder, product_dtype(self.device, config.precision))
        self.steps_per_epoch = steps_per_epoch(config, train.captions)
        self.steps = self.steps_per_epoch * config.epochs
        self.progress = Progress()
        self.gradients: dict[str, torch.Tensor] = {}  # summed over all steps, where they are never cleared
        self.random_state: dict[str, torch.Tensor] = {}  # of a run that is resumed in the middle of an epoch
        self.stop = StopSignals()
        self.stopping = False  # whether any process was asked to stop
        self.listeners: list[Callable[[dict[str, Any]], None]] = []  # get what metrics.jsonl gets
        self.started = time.time()

    def run(self) -> dict[str, Any]:
        """Train what is left of the epochs, or until a signal asks to stop; return the last line of metrics.

        Raises:
            ValueError: memory ran out, or too many steps in a row had no finite loss and gradient.
        """
        record: dict[str, Any] = {}
        progress = self.progress
        hidden = not (self.processes.first and sys.stderr.isatty())
        bar = tqdm(total=self.steps, initial=progress.step, desc="train", disable=hidden)
        try:
            with bar, self.stop:
                self.sanity_check()
                while not self.finished and not self.asked_to_stop():
                    loss = self.train_epoch(bar)
                    if progress.position < self.steps_per_epoch:  # stopped
                        break
                    progress.end_epoch()
                    record = {"kind": "epoch", "epoch": progress.epoch, "step": progress.step, "train_loss": loss}
                    record |= self.validate()
                    self.keep(record)
                if self.stopping and not (progress.epoch or progress.position):  # before the first step
                    self.save_state()
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            raise ValueError(memory_advice(self.config, self.device)) from error
        if self.out_of_patience:
            log.info("stopped after epoch %d: none of the last %d was better", progress.epoch, progress.stale)
            self.write_metrics({"kind": "stopped", "epoch": progress.epoch, "step": progress.step})
        return record

    def asked_to_stop(self) -> bool:
        """Whether a signal has come to any of the processes; the answer, the same in all, is kept in ``stopping``."""
        self.stopping = self.processes.any(self.stop.requested)
        return self.stopping

    @property
    def out_of_patience(self) -> bool:
        """Whether the last ``patience`` epochs were no better than one before."""
        return 0 < self.config.patience <= self.progress.stale

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or patience is over; False after ``run`` means that a signal stopped it."""
        return self.progress.epoch >= self.config.epochs or self.out_of_patience

    def sanity_check(self) -> None:
        """Take two validation batches through loss and search: a bad path fails in seconds, not after an epoch."""
        self.captioner.eval()
        count = min(len(self.val_split.samples), 2 * self.config.batch_size)
        self.val_loss(count)
        self.captions(min(count, 2))

    def batches(self) -> list[Batch]:
        """Return this epoch's batches."""
        epoch, config = self.progress.epoch, self.config
        shown = captions_of_epoch(self.train_split.captions, config.captions_per_image, config.seed, epoch)
        if config.batch_by == "captions":
            return caption_batches(shown, config.batch_size, config.seed, epoch)
        lengths = list(map(packed_length, shown))
        batches = length_grouped_batches(lengths, config.batch_size, config.seed, epoch)
        return [Batch(images, [shown[image] for image in images]) for images in batches]

    def train_epoch(self, bar: Any) -> float:
        """Train what is left of an epoch, or until a signal asks to stop, and return its mean loss."""
        config, progress = self.config, self.progress
        self.seed_epoch()
        self.captioner.train()
        batches = self.batches()
        groups = [batches[start : start + config.accumulate] for start in range(0, len(batches), config.accumulate)]
        timer, first = Timer("train"), progress.position
        for loaded in self.train_loader.steps(groups[progress.position :]):
            loss = self.train_step(loaded)
            progress.position += 1
            self.count(loss)
            bar.update()
            bar.set_postfix(epoch=progress.epoch + 1, loss=f"{loss:.3f}")
            if math.isfinite(loss) and (progress.step % config.log_every == 0 or progress.step == 1):
                lr = self.optimizer.param_groups[0]["lr"]
                self.write_metrics({"kind": "step", "step": progress.step, "loss": loss, "lr": lr})
            if self.asked_to_stop() or progress.step % config.save_every == 0:
                self.save_state()
            if self.stopping:
                break
        timer.report(log, progress.position - first, "epoch %d: %d steps", progress.epoch + 1)
        if not progress.losses and not self.stopping:
            raise ValueError(f"no step of epoch {progress.epoch + 1} had a finite loss; lower --lr, or set --clip 1")
        return sum(progress.losses) / max(1, len(progress.losses))

    def seed_epoch(self) -> None:
        """Seed the dropout of this epoch, in every process by another number; a resumed epoch continues where it was.

        A process, or a kind of device, that the run did not have when it was stopped begins with the epoch's seed.
        """
        rank = self.processes.rank
        torch.manual_seed(self.config.seed * 1000 + self.progress.epoch + SEED_STRIDE * rank)
        cpu, cuda = (self.random_state.get(random_name(rank, kind)) for kind in ("cpu", "cuda"))
        if cpu is not None:
            torch.set_rng_state(cpu)
        if cuda is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(cuda, self.device)
        self.random_state = {}

    def count(self, loss: float) -> None:
        """Keep the loss of a step, or count the step as skipped; too many in a row end the run."""
        progress = self.progress
        if math.isfinite(loss):
            progress.losses.append(loss)
            progress.skipped_in_a_row = 0
            return
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        if self.processes.first:
            skipped = "step %d skipped: its loss or gradient is not finite (%d so far)"
            log.warning(skipped, progress.step, progress.skipped)
        self.write_metrics({"kind": "skipped", "step": progress.step, "skipped": progress.skipped})
        if progress.skipped_in_a_row >= self.config.max_skipped:
            raise ValueError(
                f"the loss or the gradient was not finite in {progress.skipped_in_a_row} steps in a row, up to step "
                f"{progress.step}; lower --lr, set --clip 1, or raise --max-skipped; what was saved before is in "
                f"{self.folder.path}"
            )

    def train_step(self, batches: list[LoadedBatch]) -> float:
        """Take one optimiser step over ``batches`` and return their mean loss.

        Where it or the gradient is not finite, NaN is returned and nothing but the count of steps has changed. All
        processes look at the sums over all, so they take the same step or none.
        """
        config, losses = self.config, []
        for group, lr in zip(self.optimizer.param_groups, learning_rates(config), strict=True):
            group["lr"] = lr * schedule_factor(self.progress.step, self.steps, config)
        self.optimizer.zero_grad(set_to_none=True)
        for batch in batches:
            loss = self.batch_loss(batch) / len(batches)
            if loss.requires_grad:  # a process without an image of a small batch has nothing to differentiate
                loss.backward()
            losses.append(loss.detach())
        if self.progress.epoch < config.projector_epochs:
            for parameter in (p for group in self.optimizer.param_groups[::2] for p in group["params"]):
                parameter.grad = None  # the optimiser then leaves it, and its moments, alone
            self.processes.sum_gradients(self.optimizer.param_groups[1]["params"])
        else:
            self.processes.sum_gradients(self.captioner.trainable().values())
        trainable = self.captioner.trainable()
        for name, gradient in self.gradients.items():
            grad = trainable[name].grad
            assert grad is not None  # what had one has one in every later step
            grad += gradient
        # An infinite limit clips nothing, and the norm still shows whether the gradient is finite.
        norm = torch.nn.utils.clip_grad_norm_(list(trainable.values()), config.clip or math.inf)
        self.progress.step += 1
        *values, length = torch.stack([*losses, norm]).tolist()  # all that the host waits for in a step
        (total,) = self.processes.total(sum(values))
        if not math.isfinite(total) or not math.isfinite(length):
            return math.nan
        self.optimizer.step()
        if not config.clear_gradients:
            self.gradients = {name: p.grad for name, p in trainable.items() if p.grad is not None}
        return total

    def batch_loss(self, loaded: LoadedBatch) -> torch.Tensor:
        """Return this process's part of the loss of one batch; the parts add up to the batch's."""
        return self.part_of_loss(loaded, self.config.label_smoothing, self.config.predict_bos)

    def part_of_loss(
        self, loaded: LoadedBatch, label_smoothing: float = 0.0, predict_bos: bool = False
    ) -> torch.Tensor:
        """Return what this process's images add to the batch's mean over all tokens of its captions."""
        if not loaded.own:
            return torch.zeros((), device=self.device)
        with autocast(self.device, self.config.precision):
            loss = self.captioner.loss(*loaded.on(self.device), label_smoothing, predict_bos)
        share = count_targets(loaded.captions, predict_bos) / count_targets(loaded.batch.captions, predict_bos)
        return loss * share

    @torch.no_grad()
    def val_loss(self, count: int) -> float:
        """Return the mean loss over the first ``count`` validation images."""
        losses = []
        for start in range(0, count, self.config.batch_size):
            images = list(range(start, min(start + self.config.batch_size, count)))
            batch = Batch(images, [self.val_split.captions[image] for image in images])
            losses.append(self.part_of_loss(self.val_loader.load(batch)).item() * len(images))
        return self.processes.total(sum(losses))[0] / count

    @contextlib.contextmanager
    def searching(self) -> Iterator[None]:
        """Be the context of searches: LoRA is merged, but on a CPU, where that may take longer than it saves."""
        merged = contextlib.nullcontext() if self.device.type == "cpu" else merged_copies(self.captioner.decoder)
        with autocast(self.device, self.config.precision), merged:
            yield

    def captions(self, count: int, beam_size: int | None = None) -> dict[str, str]:
        """Caption the first ``count`` validation images, with the config's beams or as many as given."""
        predictions: dict[int, str] = {}
        beams, longest = beam_size or self.config.beam_size, self.config.max_new_tokens
        with self.searching():
            for start in range(0, count, self.config.batch_size):
                indices = self.processes.share(list(range(start, min(start + self.config.batch_size, count))))
                if not indices:
                    continue
                features = self.val_split.tokens(indices, self.device)
                texts = caption_features(self.captioner, self.tokenizer, features, beams, longest)
                predictions |= dict(zip(indices, texts, strict=True))
        for others in self.processes.gather(predictions):
            predictions |= others
        return {str(self.val_split.samples[i].path): predictions[i] for i in range(count)}

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
        references = {str(s.path): list(s.captions) for s in self.val_split.samples[: len(predictions)]}
        try:
            return {"val_cider": evaluator.cider(references, predictions)[0]}
        except (ValueError, OSError) as error:
            log.warning("no CIDEr (%s); the best epoch is chosen by validation loss instead", error)
            return {}

    def keep(self, record: dict[str, Any]) -> None:
        """Write metrics, adapters and what --resume needs."""
        seconds = round(time.time() - self.started, 1)
        record = {**record, "seconds": seconds, "best": self.progress.is_better(record)}
        if self.processes.first:
            self.captioner.save_adapter(self.folder.last)
            if record["best"]:
                self.captioner.save_adapter(self.folder.best)
        self.write_metrics(record)  # before the state: killed in between, the epoch is validated again, and not lost
        self.save_state()
        if self.processes.first:
            self.folder.plot_losses()
        log.info(
            "epoch %d: train loss %.3f, val loss %.3f, val CIDEr %s%s",
            self.progress.epoch,
            record.get("train_loss", math.nan),
            record["val_loss"],
            f"{record['val_cider']:.3f}" if "val_cider" in record else "-",
            " (best)" if record["best"] else "",
        )

    def write_metrics(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl and pass it to the listeners, in the first process."""
        if self.processes.first:
            self.folder.append_metrics(record)
            for listener in self.listeners:
                listener(record)

    def save_state(self) -> None:
        """Write all that a resumed run needs.

        Weights and moments are the same in all processes; each has its own random state.
        """
        own = {random_name(self.processes.rank, "cpu"): torch.get_rng_state()}
        if self.device.type == "cuda":
            own[random_name(self.processes.rank, "cuda")] = torch.cuda.get_rng_state(self.device)
        random = {name: state for states in self.processes.gather(own) for name, state in states.items()}
        if self.processes.first:
            optimizer = self.optimizer.state_dict()
            state = State(self.captioner.adapter_state(), optimizer, random, self.progress, self.gradients)
            self.folder.save_state(state)

    def resume(self) -> None:
        """Continue from the newest intact state of the run folder.

        Raises:
            FileNotFoundError, ValueError: there is none, or it belongs to another captioner.
        """
        state = self.processes.from_first(self.folder.load_state)
        try:
            self.captioner.load_adapter_state(state.adapter)
            for group in state.optimizer["param_groups"]:  # of a run on another kind of device, or of an older version
                group["fused"] = self.optimizer.defaults["fused"]
            self.optimizer.load_state_dict(state.optimizer)
        except (KeyError, ValueError) as error:
            raise ValueError(f"--resume: {self.folder.path} holds the state of another run ({error})") from error
        self.progress = state.progress
        self.gradients = {name: gradient.to(self.device) for name, gradient in state.gradients.items()}
        self.random_state = state.random if state.progress.position else {}
        if self.processes.first:
            self.folder.cut_metrics(state.progress)
        log.info("resumed after epoch %d, step %d", state.progress.epoch, state.progress.step)


def random_name(rank: int, kind: str) -> str:
    """Return the name of a process's random state; that of the first one is the same as without other processes."""
    return f"{kind}.{rank}" if rank else kind


def count_targets(captions: Sequence[Sequence[Sequence[int]]], bos: bool = False) -> int:
    """Count the target tokens of ``captions[image][caption]``, EOS included, and BOS where it is one."""
    return sum(len(caption) + 1 + bos for group in captions for caption in group)


def memory_advice(config: TrainConfig, device: torch.device) -> str:
    """Say which flags need less memory, and how much was in use at most."""
    peak = f" (at most {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB)" if device.type == "cuda" else ""
    if config.batch_size > 1:
        smaller = f"--batch-size {config.batch_size // 2} --accumulate {2 * config.accumulate} (the same steps), "
    else:
        smaller = "--captions-per-image 1, " if config.batch_by == "images" else ""
    precision = "" if config.precision == "bf16" else ", --precision bf16"
    return f"out of memory{peak}; start again with {smaller}a lower --lora-rank or --beam-size{precision}"
