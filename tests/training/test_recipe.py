"""Options of the training recipe, each through the command line or on the part that it changes."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from captioning.inference.encode import cached_features
from captioning.models.adapter import load_captioner, read_adapter
from captioning.models.captioner import Captioner, CaptionerConfig
from captioning.profiles import PROFILES
from captioning.scoring import evaluator
from captioning.training.run_folder import RunFolder
from decoder import LoraConfig, build_decoder
from p2_train import main

SMALL = (
    "--profile",
    "micro",
    "--device",
    "cpu",
    "--batch-size",
    "4",
    "--lora-rank",
    "4",
    "--val-images",
    "4",
    "--beam-size",
    "2",
    "--max-new-tokens",
    "8",
    "--log-every",
    "1",
)


@pytest.fixture(autouse=True, scope="module")
def micro(tiny_profile):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PROFILES, "micro", tiny_profile)
        yield


@pytest.fixture(autouse=True)
def scores(monkeypatch):
    """CIDEr of each validation, in turn; the last one stays."""
    values = [0.5]

    def cider(references, predictions):
        return (values.pop(0) if len(values) > 1 else values[0]), {}

    monkeypatch.setattr(evaluator, "cider", cider)
    return values


def train(out, *flags):
    return main([*SMALL, "--out", str(out), *map(str, flags)])


def lines(out, kind):
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == kind]


def captioner(profile, layer):
    lora = LoraConfig(4, 4.0)
    config = CaptionerConfig(profile.encoder, profile.encoder_kwargs, "random", lora=lora, encoder_layer=layer)
    return Captioner(config, build_decoder(profile.decoder, lora)).eval()


def test_first_only_the_projector_learns_then_lora_too(tmp_path):
    for epochs, learned in ((1, False), (2, True)):
        out = tmp_path / str(epochs)
        assert train(out, "--epochs", epochs, "--projector-epochs", 1) == 0
        state = load_file(out / "last.safetensors")
        assert {bool(tensor.any()) for name, tensor in state.items() if name.endswith("lora_B")} == {learned}


def test_lora_that_waited_begins_without_the_momentum_of_the_wait(tmp_path):
    assert train(tmp_path / "run", "--epochs", 1, "--projector-epochs", 1) == 0
    optimizer = RunFolder(tmp_path / "run").load_state().optimizer
    lora, projector = optimizer["param_groups"]
    assert not set(lora["params"]) & optimizer["state"].keys()
    assert set(projector["params"]) <= optimizer["state"].keys()


def test_the_projector_has_a_learning_rate_of_its_own(tmp_path, monkeypatch):
    seen = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, *a, **k: (seen.append([g["lr"] for g in self.param_groups]), step(self, *a, **k)),
    )
    flags = ("--epochs", 1, "--lr", 0.001, "--projector-lr", 0.004, "--schedule", "constant", "--warmup", 0)
    assert train(tmp_path / "run", *flags) == 0
    assert set(map(tuple, seen)) == {(0.001, 0.004)}


def test_training_stops_when_patience_is_at_its_end(tmp_path, scores):
    scores[:] = [0.5, 0.4, 0.45, 0.9]
    out = tmp_path / "run"
    assert train(out, "--epochs", 9, "--patience", 2) == 0
    assert [r["epoch"] for r in lines(out, "epoch")] == [1, 2, 3]
    assert lines(out, "stopped")


def test_another_layer_feeds_the_projector_and_has_features_of_its_own(tiny_profile, tiny_data, tmp_path):
    last, before = captioner(tiny_profile, -1), captioner(tiny_profile, -2)
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    tokens = {}
    block = before.encoder.blocks[-2]
    handle = block.register_forward_hook(lambda module, inputs, output: tokens.update(found=output))
    found = before.encode(pixels)
    handle.remove()
    assert torch.equal(found, tokens["found"])  # CLS first, then the patches, and no norm
    assert found.shape == last.encode(pixels).shape
    paths = sorted((tiny_data / "images" / "val").glob("*"))[:2]
    ours, theirs = (cached_features(model, paths, tmp_path / "cache") for model in (before, last))
    assert not torch.equal(ours[0], theirs[0])  # one key for both once gave the cached layer to either


def test_the_layer_is_remembered_by_the_adapter_and_adapters_without_one_have_the_last(tmp_path, tiny_profile):
    assert train(tmp_path / "run", "--epochs", 1, "--encoder-layer", -2) == 0
    assert read_adapter(tmp_path / "run" / "best.safetensors")[0].encoder_layer == -2
    plain = vars(captioner(tiny_profile, -1).config) | {"lora": {"rank": 4}}
    plain.pop("encoder_layer")
    assert CaptionerConfig.from_dict(plain).encoder_layer == -1


def test_report_faithful_preprocesses_by_name_and_scales_by_one_over_the_rank(tmp_path, tiny_data):
    """timm answers a name with ImageNet's mean, deviation and crop, whatever the model's own; inference must agree."""
    out = tmp_path / "run"
    assert train(out, "--epochs", 1, "--report-faithful") == 0
    stored = read_adapter(out / "best.safetensors")[0]
    assert stored.lora.scaling == pytest.approx(1 / 4)
    assert list(stored.encoder_kwargs["mean"]) == [0.485, 0.456, 0.406]
    assert stored.encoder_kwargs["crop_pct"] == 0.875
    assert json.loads((out / "config.json").read_text())["report_faithful"] is True
    loaded = load_captioner(out / "best.safetensors", PROFILES["micro"].decoder, None, torch.device("cpu"))
    own = captioner(PROFILES["micro"], -1).transform
    with Image.open(sorted((tiny_data / "images" / "val").iterdir())[0]) as image:
        assert not torch.allclose(loaded.transform(image), own(image), atol=0.05)
    assert "0.4850" in repr(loaded.transform)


def test_report_faithful_leaves_what_is_asked_for(tmp_path):
    assert train(tmp_path / "run", "--epochs", 1, "--report-faithful", "--lora-alpha", 2) == 0
    assert read_adapter(tmp_path / "run" / "best.safetensors")[0].lora.alpha == 2
