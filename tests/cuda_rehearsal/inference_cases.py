"""Captioning on a fake GPU: search step by step, as p2_infer.py calls it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from fake_gpu import FakeGpu, name_of  # first: it loads the hooks before torch  # isort: skip

import torch
from stage import FULL, Facts, Ids, build, described

from captioning.device import autocast, product_dtype
from captioning.inference import captions
from captioning.inference.encode import StreamEncoder
from captioning.models.inference_weights import prepare
from captioning.models.step_functions import CompiledStepFunction
from captioning.training.config import SETTINGS

IMAGES, BEAMS, LONGEST = 16, 5, 8
STEP = 5  # the one that is booked: after no step before the 8th is a check due but after the 4th


class Steps:
    """Books each step of a search, from one call of the step function to the next."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.ledger = gpu.ledger
        self.starts: list[tuple[Counter, Counter]] = []
        plain = captions.within_vocabulary
        gpu.replace(captions, "within_vocabulary", lambda step, size: self.booked(plain(step, size)))

    def booked(self, step: Callable) -> Callable:
        """Return the step function with its books kept."""

        def decode(tokens: torch.Tensor, ancestors: torch.Tensor) -> torch.Tensor:
            self.starts.append(self.ledger.snapshot())
            self.ledger.phase = "decoder"
            logits = step(tokens, ancestors)
            self.ledger.phase = "search"
            return logits

        return decode

    def facts(self) -> Facts:
        """Return what one step costs, and how often a whole search waits."""
        (kernels, waits), (before, waits_before) = self.starts[STEP], self.starts[STEP - 1]
        facts = described(kernels - before, waits - waits_before)
        whole = self.ledger.waits - self.starts[0][1]
        facts["counts"]["waits of a search"] = whole.total()
        facts["waits"] = {f"{what} at {where}": count for (what, where), count in sorted(whole.items())}
        return facts


def search(
    gpu: FakeGpu, beams: int = BEAMS, compiled: bool = False, layers: int = 2, rule: str | None = None, **options: Any
) -> Facts:
    """Caption a batch of images; ``options`` are further ones of ``caption_features``."""
    captioner = build(gpu, SETTINGS["best"], layers)
    gpu.replace(torch, "compile", lambda function, **options: in_a_graph(gpu, function))
    with gpu.rehearsed():
        captioner.merge()
        prepare(captioner, "auto", reorder=not compiled)
        encoder = StreamEncoder(captioner, "auto")
        encoded = encoder.encode([torch.zeros(3, 224, 224) for _ in range(IMAGES)])
        with autocast(captioner.device, "auto"):
            sizes = (IMAGES, captioner.n_prefix, beams, LONGEST)
            steps = CompiledStepFunction(captioner.decoder, *sizes, backend="eager") if compiled else None
            books = Steps(gpu)
            features = encoder.gather(encoded)
            captions.caption_features(
                captioner, Ids(), features, beams, LONGEST, steps=steps, search_rule=rule, **options
            )
    facts = books.facts()
    wanted = name_of(product_dtype(captioner.device, "auto"))
    facts["wrong"] += [
        f"{name} in {dtype}, not {wanted}"
        for phase, name, dtype in gpu.ledger.products
        if phase in ("decoder", "graph") and dtype != wanted
    ]
    return facts


def in_a_graph(gpu: FakeGpu, function: Callable) -> Callable:
    """Return a function whose kernels are launched as one."""

    def replayed(*args: Any) -> Any:
        before = gpu.ledger.phase
        gpu.ledger.phase = "graph"
        result = function(*args)
        gpu.ledger.phase = before
        return result

    return replayed


def search_full(gpu: FakeGpu) -> Facts:
    """Search with the decoder of full size, and find the cost of a layer from one of fewer."""
    few, facts = search(gpu), search(gpu, layers=FULL.n_layer)
    more = facts["counts"]["decoder"] - few["counts"]["decoder"]
    facts["counts"]["decoder, a layer"] = more // (FULL.n_layer - 2)
    return facts
