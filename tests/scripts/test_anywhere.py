"""The scripts from a folder that is not theirs: the profile's files are found, and nothing stray is written."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import train
from safetensors.torch import save_file
from tiny import TINY_ENCODER, TINY_ENCODER_KWARGS

import evaluate
import p2_export
import p2_infer
from captioning import profiles
from captioning.models.adapter import load_captioner, read_adapter
from captioning.models.encoder import build_encoder
from captioning.profiles import PROFILES, ROOT


@pytest.fixture
def clone(tmp_path, tiny_profile, tiny_data, monkeypatch):
    """A clone with the tiny files where its profile names them, relative; the working directory is another folder."""
    folder, elsewhere = tmp_path / "clone", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(tiny_data, folder / "hw3_data")
    shutil.copytree(tiny_profile.tokenizer, folder / "tokenizer")
    (folder / "weights").mkdir()
    shutil.copy(tiny_profile.decoder, folder / "weights" / "decoder.safetensors")
    encoder = build_encoder(TINY_ENCODER, "random", TINY_ENCODER_KWARGS).state_dict()
    save_file({name: tensor * 0.9 for name, tensor in encoder.items()}, folder / "weights" / "encoder.safetensors")
    relative = replace(
        tiny_profile,
        data="hw3_data",
        tokenizer="tokenizer",
        decoder_files=("weights/gone.safetensors", "weights/decoder.safetensors"),
        encoder_weights="weights/encoder.safetensors",
        cache="cache",
    )
    monkeypatch.setitem(PROFILES, "micro", relative)
    monkeypatch.setattr(profiles, "ROOT", folder)
    monkeypatch.chdir(elsewhere)
    return folder


def infer(clone, out, adapter, *flags):
    images, decoder = clone / "hw3_data" / "images" / "val", clone / "weights" / "decoder.safetensors"
    small = ("--profile", "micro", "--device", "cpu", "--beam-size", 1, "--max-new-tokens", 5, "--adapter", adapter)
    return p2_infer.main([*map(str, (images, out, decoder, *small, *flags))])


def test_train_infer_score_and_export_from_another_folder(clone, capsys):
    assert train("runs/best", "--epochs", "1") == 0
    assert infer(clone, "out.json", "runs/best/best.safetensors") == 0
    assert len(json.loads(Path("out.json").read_text())) == 8
    references = str(clone / "hw3_data" / "val.json")
    argv = ["--pred-file", "out.json", "--annotation-file", references, "--metrics", "cider", "--tokenizer", "ptb"]
    assert evaluate.main([*argv, "--profile", "micro"]) == 0
    assert p2_export.main(["export", "--adapter", "runs/best/best.safetensors", "--profile", "micro"]) == 0
    assert {path.name for path in Path().iterdir()} == {"runs", "out.json", "export"}
    assert any((clone / "cache").iterdir())
    assert not (clone / "runs").exists()


def test_a_run_is_resumed_from_another_folder_than_it_was_started_in(clone, monkeypatch, capsys):
    """Its weights have another path from there, and the same fingerprint."""
    out = Path("runs").resolve()
    assert train(out, "--epochs", "1") == 0
    assert read_adapter(out / "best.safetensors")[0].encoder_weights == str(clone / "weights" / "encoder.safetensors")
    monkeypatch.chdir(clone)
    assert train(out, "--epochs", "1", "--resume") == 0
    assert train(out, "--epochs", "1", "--resume", "--encoder-weights", "random") == 2
    assert "captioner.encoder_hash" in capsys.readouterr().err


def test_an_adapter_of_the_clone_finds_its_encoder_from_another_folder(clone, monkeypatch):
    monkeypatch.chdir(clone)
    assert train("run", "--epochs", "1") == 0
    assert read_adapter("run/best.safetensors")[0].encoder_weights == "weights/encoder.safetensors"
    monkeypatch.chdir(clone.parent / "elsewhere")
    adapter, decoder = clone / "run" / "best.safetensors", Path(PROFILES["micro"].decoder)
    assert load_captioner(adapter, decoder, None, torch.device("cpu")).decoder.merged


@pytest.mark.parametrize("start", [["bash", ROOT / "p2_train.sh"], [sys.executable, ROOT / "p2_infer.py"]])
def test_the_scripts_start_from_anywhere(start, tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable}
    result = subprocess.run(
        [*start, "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0 and "--tokenizer" in result.stdout, result.stderr
    assert not list(tmp_path.iterdir())
