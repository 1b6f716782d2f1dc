"""All that is rehearsed, by name."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from fake_gpu import FakeGpu  # first: it loads the hooks before torch  # isort: skip

from inference_cases import search, search_full
from other_cases import answer, answer_maps, maps, score
from self_check import check
from stage import Facts, described
from training_cases import cache, train, train_full, train_rewarded, validate

from captioning.inference.wording import Wording
from captioning.training.config import REPORT_FAITHFUL, SETTINGS

LETTER = replace(SETTINGS["1"], **REPORT_FAITHFUL | {"preprocessing": "own"})
# name: compute capability, function
CASES: dict[str, tuple[tuple[int, int], Callable[[FakeGpu], Facts]]] = {
    "train best": ((8, 0), train_full),
    "train best, by a mask": ((8, 0), partial(train, config=replace(SETTINGS["best"], attention="mask"))),
    "train best, 7.5": ((7, 5), partial(train, config=SETTINGS["best"])),
    "train best, 9.0": ((9, 0), partial(train, config=SETTINGS["best"])),
    "train best, 4 images": ((9, 0), partial(train, config=replace(SETTINGS["best"], batch_size=4))),
    "train 1": ((8, 0), partial(train, config=SETTINGS["1"])),
    "train 4": ((8, 0), partial(train, config=SETTINGS["4"])),
    "train 1, to the letter": ((8, 0), partial(train, config=LETTER)),
    "train scst": ((8, 0), train_rewarded),
    "validation": ((8, 0), validate),
    "feature cache": ((8, 0), cache),
    "beam search": ((8, 0), search_full),
    "beam search, 7.5": ((7, 5), search),
    "beam search, compiled": ((8, 0), partial(search, compiled=True)),
    "beam search, the report's": ((8, 0), partial(search, rule="report")),
    "beam search, worded and scored": ((8, 0), partial(search, wording=Wording(4, 2), n_best=2)),
    "greedy search": ((8, 0), partial(search, beams=1)),
    "maps": ((8, 0), maps),
    "CLIPScore": ((8, 0), score),
    "the rehearsal itself": ((8, 0), check),
    "the rehearsal itself, 7.5": ((7, 5), check),
    "LLaVA's maps": ((8, 0), answer_maps),
    "LLaVA": ((8, 0), answer),
}


def run(name: str) -> Facts:
    """Run one case; whatever stops it is a fact of it."""
    capability, case = CASES[name]
    try:
        with FakeGpu(capability) as gpu:
            return case(gpu)
    except Exception:
        told = [line for line in traceback.format_exc().splitlines() if " registered at " not in line]
        return {**described(Counter(), Counter()), "wrong": ["\n".join(told)]}
