"""Maps, CLIPScore and LLaVA on a fake GPU."""

from __future__ import annotations

import tempfile
from pathlib import Path

from fake_gpu import FakeGpu  # first: it loads the hooks before torch  # isort: skip

import torch
from PIL import Image
from stage import Facts, Ids, build, described

from captioning.device import pick_device
from captioning.maps.attention import MapSpec
from captioning.maps.explainers import CaptionerExplainer, LlavaExplainer, explain
from captioning.models.llava import PROMPTS, load_llava, pick_dtype
from captioning.profiles import PROFILES
from captioning.scoring.clipscore import ClipScorer, clipscore
from captioning.training.config import SETTINGS

MICRO = PROFILES["micro"]
SPECS = [
    MapSpec("raw", "all", "mean"),
    MapSpec("relative", "last", "max"),
    MapSpec("rollout", "all", "mean"),
    MapSpec("grad", "all", "mean"),
    MapSpec("raw", "all", "top3"),
]


def maps(gpu: FakeGpu) -> Facts:
    """Make every kind of map for a caption."""
    captioner = build(gpu, SETTINGS["best"])
    with tempfile.TemporaryDirectory() as folder, gpu.rehearsed() as ledger:
        path = Path(folder) / "image.png"
        Image.new("RGB", (240, 240), "teal").save(path)
        explainer = CaptionerExplainer(captioner.merge(), Ids(), 5, 8)
        explanation, _ = explain(explainer, path, SPECS, "1 2 3 4 5")
    assert [found.maps.shape for found in explanation.word_maps] == [(5, 16, 16)] * len(SPECS)
    return described(ledger.kernels, ledger.waits)


def score(gpu: FakeGpu) -> Facts:
    """Compute the CLIPScore of two images by the micro world's CLIP."""
    with tempfile.TemporaryDirectory() as folder, gpu.rehearsed() as ledger:
        paths = {name: Path(folder) / f"{name}.png" for name in ("red", "teal")}
        for name, path in paths.items():
            Image.new("RGB", (64, 64), name).save(path)
        scorer = ClipScorer(MICRO.clip_model, MICRO.clip_weights)
        loading = ledger.snapshot()
        scores = clipscore(scorer, paths, {name: f"a {name} square" for name in paths})
    assert scorer.precision == "fp16" and scores.keys() == paths.keys()
    return described(ledger.kernels - loading[0], ledger.waits - loading[1])


def answer_maps(gpu: FakeGpu) -> Facts:
    """Make maps for an answer of the micro world's LLaVA."""
    llava = load_llava(MICRO.llava, torch.device("cpu"), torch.float32)
    device = pick_device("auto")
    with tempfile.TemporaryDirectory() as folder, gpu.rehearsed() as ledger:
        llava.model.to(device, pick_dtype("auto", device))
        path = Path(folder) / "image.png"
        Image.new("RGB", (64, 64), "teal").save(path)
        loading = ledger.snapshot()
        explain(LlavaExplainer(llava, PROMPTS[1], 1, 4), path, SPECS, "a red bike")
    return described(ledger.kernels - loading[0], ledger.waits - loading[1])


def answer(gpu: FakeGpu) -> Facts:
    """Let the micro world's LLaVA answer on a batch of two images."""
    llava = load_llava(MICRO.llava, torch.device("cpu"), torch.float32)
    device = pick_device("auto")
    with gpu.rehearsed() as ledger:
        llava.model.to(device, pick_dtype("auto", device))
        rows = [llava.row(Image.new("RGB", (64, 48), "teal"), prompt) for prompt in PROMPTS.values()]
        loading = ledger.snapshot()
        answers = llava.generate(rows, max_new_tokens=4)
    assert len(answers) == len(rows)
    return described(ledger.kernels - loading[0], ledger.waits - loading[1])
