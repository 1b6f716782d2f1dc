"""--setting best-336, best-h and best-g: the encoder that a setting names, in small, from its flag to the captions."""

import json
from dataclasses import replace

import pytest
from runs import train
from safetensors.torch import save_file
from tiny import TINY_ENCODER_KWARGS

import p2_infer
from captioning.cli import BAD_INPUT
from captioning.models.adapter import read_adapter
from captioning.models.encoder import build_encoder
from captioning.profiles import PRESETS, PROFILES
from captioning.training.config import SETTINGS

pytestmark = pytest.mark.usefixtures("constant_score")


@pytest.fixture(autouse=True)
def micro(tiny_profile, monkeypatch, tmp_path):
    """A profile with the presets, all in small, in a folder where nothing was downloaded."""
    monkeypatch.setitem(PROFILES, "micro", replace(tiny_profile, presets=PRESETS))
    monkeypatch.chdir(tmp_path)


def write_encoder(name, file, scale=1.0):
    encoder = build_encoder(name, "random", TINY_ENCODER_KWARGS)
    file.parent.mkdir(exist_ok=True)
    save_file({key: scale * tensor.contiguous() for key, tensor in encoder.state_dict().items()}, file)


def infer(images, out, adapter, *flags):
    small = ("--profile", "micro", "--device", "cpu", "--beam-size", 2, "--max-new-tokens", 8)
    return p2_infer.main([*map(str, (images, out, PROFILES["micro"].decoder, "--adapter", adapter, *small, *flags))])


@pytest.mark.parametrize("setting", PRESETS)
def test_a_setting_brings_its_encoder_to_training_and_inference(setting, tmp_path, tiny_data, capsys):
    name = PRESETS[setting]
    weights, images = tmp_path / "weights" / f"{name}.safetensors", tiny_data / "images" / "val"
    assert train(tmp_path / "run", "--setting", setting) == BAD_INPUT
    assert (
        f"{weights.relative_to(tmp_path)}: no such file; run `bash hw3_download.sh {setting}`"
        in capsys.readouterr().err
    )
    write_encoder(name, weights)
    assert train(tmp_path / "run", "--setting", setting, "--epochs", 1) == 0
    adapter = tmp_path / "run" / "best.safetensors"
    assert read_adapter(adapter)[0].encoder == name
    assert json.loads((tmp_path / "run" / "config.json").read_text())["setting"] == setting
    assert infer(images, tmp_path / "captions.json", adapter) == 0
    assert len(json.loads((tmp_path / "captions.json").read_text())) == 8
    write_encoder(name, tmp_path / "other" / "encoder.safetensors", scale=1.5)
    other = ("--encoder-weights", tmp_path / "other" / "encoder.safetensors")
    assert infer(images, tmp_path / "captions2.json", adapter, *other) == BAD_INPUT
    assert "was trained on another encoder" in capsys.readouterr().err
    assert train(tmp_path / "run", "--resume", "--epochs", 1) == BAD_INPUT  # as best, on the profile's encoder
    assert "captioner.encoder" in capsys.readouterr().err


def test_an_adapter_from_another_machine_finds_what_was_downloaded_here(tmp_path, tiny_data, capsys):
    """The profile's own encoder would be another one, and a message about it would mislead."""
    name = PRESETS["best-h"]
    write_encoder(name, tmp_path / "elsewhere" / f"{name}.safetensors")
    stored = tmp_path / "elsewhere" / f"{name}.safetensors"
    assert train(tmp_path / "run", "--setting", "best-h", "--epochs", 1, "--encoder-weights", stored) == 0
    (tmp_path / "weights").mkdir()
    stored.rename(tmp_path / "weights" / stored.name)
    adapter, images = tmp_path / "run" / "best.safetensors", tiny_data / "images" / "val"
    assert infer(images, tmp_path / "captions.json", adapter) == 0
    (tmp_path / "weights" / stored.name).unlink()
    assert infer(images, tmp_path / "again.json", adapter) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert f"weights/{stored.name}: no such file; run `bash hw3_download.sh best-h`" in line


def test_a_profile_without_that_encoder_says_so(tiny_profile, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PROFILES, "micro", tiny_profile)
    assert train(tmp_path / "run", "--setting", "best-g") == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert "--setting best-g: an encoder of --profile full" in line and "--setting best" in line
    assert train(tmp_path / "run", "--setting", "best-g", "--encoder", PROFILES["micro"].encoder, "--epochs", 1) == 0


def test_presets_differ_from_best_in_the_encoder_alone():
    assert all(SETTINGS[setting] == SETTINGS["best"] for setting in PRESETS)
