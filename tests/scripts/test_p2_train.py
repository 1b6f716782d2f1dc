"""p2_train.py from its command line to an adapter that captions, and p2_train.sh, with tiny random models."""

import json
import os
import shutil
import subprocess

import pytest
import torch
from PIL import Image
from runs import STEPS, records, train

import p2_infer
from captioning.cli import BAD_INPUT
from captioning.data.annotations import load_annotations
from captioning.models.adapter import read_adapter
from captioning.profiles import PROFILES, ROOT
from p2_train import main

pytestmark = pytest.mark.usefixtures("micro")


def test_a_run_folder_holds_all_that_is_promised(tmp_path):
    run = tmp_path / "run"
    assert train(run) == 0
    config = json.loads((run / "config.json").read_text())
    assert config["train"]["epochs"] == 2
    assert config["captioner"]["encoder"] == PROFILES["micro"].encoder
    assert config["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert [r["epoch"] for r in records(run, "epoch")] == [1, 2]
    assert [r["step"] for r in records(run, "step")] == list(range(1, 2 * STEPS + 1))
    assert all(r["val_cider"] >= 0 and r["val_loss"] < 8 for r in records(run, "epoch"))
    with Image.open(run / "loss.png") as plot:
        assert plot.width > 100
    for name in ("best", "last"):
        stored, state = read_adapter(run / f"{name}.safetensors")
        assert stored.lora.rank == 4
        assert config["trainable_parameters"] == sum(t.numel() for t in state.values())
    assert not list(run.glob("*.tmp")) + list(run.glob(".*"))


def test_a_dry_run_counts_the_steps_of_full_size_data(tmp_path, capsys):
    """The pictures are not read, so empty files stand for them."""
    for split, count in (("train", 10_000), ("val", 1)):
        (tmp_path / "images" / split).mkdir(parents=True)
        names = [f"{number:012}.jpg" for number in range(count)]
        for name in names:
            (tmp_path / "images" / split / name).touch()
        annotations = {
            "images": [{"id": number, "file_name": name} for number, name in enumerate(names)],
            "annotations": [{"id": n, "image_id": n // 5, "caption": "a red bike"} for n in range(5 * count)],
        }
        (tmp_path / f"{split}.json").write_text(json.dumps(annotations))
    common = ["--profile", "micro", "--device", "cpu", "--data", str(tmp_path), "--dry-run", "--out"]
    for setting, said in (
        ("1", "16 captions a batch, 3,125 optimiser steps an epoch, 31,250 in all"),
        ("best", "16 images a batch, 625 optimiser steps an epoch, 5,000 in all"),
    ):
        assert main([*common, str(tmp_path / "run"), "--setting", setting]) == 0
        shown = capsys.readouterr().out
        assert f"training: 10,000 images with 50,000 captions, {said}\n" in shown
    assert not (tmp_path / "run").exists()


def test_a_dry_run_refuses_what_a_run_refuses(tmp_path, capsys):
    assert train(tmp_path / "run", "--dry-run", "--data", tmp_path / "gone") == BAD_INPUT
    assert "gone" in capsys.readouterr().err
    assert train(tmp_path / "run", "--dry-run", "--max-trainable", 1000) == BAD_INPUT
    assert "--max-trainable 1,000" in capsys.readouterr().err


@pytest.mark.usefixtures("constant_score")
@pytest.mark.parametrize(
    "flags",
    [
        ("--no-cls",),
        ("--lora-enable", "1,0,1"),
        ("--accumulate", "2"),
        ("--precision", "bf16"),
    ],
)
def test_options_train(flags, tmp_path):
    assert train(tmp_path / "run", *flags, "--epochs", 1) == 0
    steps = 2 if flags[0] == "--accumulate" else STEPS
    assert records(tmp_path / "run", "epoch")[0]["step"] == steps


@pytest.mark.usefixtures("constant_score")
def test_the_layout_of_the_captions_changes_no_weight(tiny_data, tmp_path):
    """train.jsonl with a caption a line, and Karpathy's layout as val.json, of the same images."""
    data, files = (
        tmp_path / "data",
        {split: load_annotations(tiny_data / f"{split}.json") for split in ("train", "val")},
    )
    data.mkdir()
    (data / "images").symlink_to(tiny_data / "images")
    pairs = [(key, caption) for key, captions in files["train"].references.items() for caption in captions]
    lines = [json.dumps({"file_name": files["train"].file_names[key], "text": caption}) for key, caption in pairs]
    (data / "train.jsonl").write_text("\n".join(lines))
    images = [
        {
            "filename": files[split].file_names[key],
            "split": split,
            "sentences": [{"raw": caption} for caption in captions],
        }
        for split in files
        for key, captions in files[split].references.items()
        if split == "val" or key not in files["val"].references
    ]
    (data / "val.json").write_text(json.dumps({"images": images, "dataset": "flickr8k"}))
    assert train(tmp_path / "coco", "--epochs", 1) == train(tmp_path / "others", "--epochs", 1, "--data", data) == 0
    trained = [read_adapter(tmp_path / run / "last.safetensors")[1] for run in ("coco", "others")]
    assert all(torch.equal(tensor, trained[1][name]) for name, tensor in trained[0].items())
    one, other = (records(tmp_path / run, "epoch")[0]["val_loss"] for run in ("coco", "others"))
    assert one == other


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--epochs", "0"), "--epochs 0"),
        (("--encoder-layer", "-9"), "--encoder-layer -9"),
        (("--lora-rank", "0"), "--lora-rank"),
        (("--data", "nowhere"), "nowhere"),
        (("--device", "cuda:99"), "cuda:99"),
    ],
)
def test_bad_flags_are_refused_by_name(flags, message, tmp_path, capsys):
    assert train(tmp_path / "run", *flags) == 2
    assert message in capsys.readouterr().err


def test_a_few_pictures_are_learned_by_heart_and_captioned_word_for_word(tiny_data, tmp_path):
    """Training, search, adapter file and inference in one: a break in any of them loses these captions."""
    copies = 15  # under other names: an epoch then has enough steps, and each picture is encoded but once
    content = json.loads((tiny_data / "train.json").read_text())
    captions = {n: content["annotations"][5 * n]["caption"] for n in range(4)}
    folder = tmp_path / "data"
    for split, repeats in (("train", copies), ("val", 1)):
        (folder / "images" / split).mkdir(parents=True)
        rows = {"images": [], "annotations": []}
        for n, caption in captions.items():
            for copy in range(repeats):
                number = n * copies + copy
                name = f"picture-{number}.jpg"
                shutil.copy(tiny_data / "images" / "train" / f"{n:012d}.jpg", folder / "images" / split / name)
                rows["images"].append({"id": number, "file_name": name})
                rows["annotations"].append({"id": number, "image_id": number, "caption": caption})
        (folder / f"{split}.json").write_text(json.dumps(rows))

    out = tmp_path / "run"
    flags = "--epochs 5 --lr 5e-3 --lora-dropout 0 --lora-rank 16 --lora-alpha 16 --max-new-tokens 20"
    assert train(out, "--data", folder, *flags.split()) == 0
    losses = [r["train_loss"] for r in records(out, "epoch")]
    assert losses[-1] < losses[0] / 2
    pred = tmp_path / "pred.json"
    small = "--profile micro --device cpu --beam-size 2 --max-new-tokens 20"
    files = (folder / "images" / "val", pred, PROFILES["micro"].decoder, "--adapter", out / "last.safetensors")
    assert p2_infer.main([*map(str, files), *small.split()]) == 0
    assert json.loads(pred.read_text()) == {f"picture-{n * copies}": caption for n, caption in captions.items()}


# ------------------------------------------------------------------------------------------------------ p2_train.sh


NVIDIA_SMI = """#!/bin/sh
[ "$LISTED" != fails ] || exit 9  # as it does beside a driver of another version
for gpu in $LISTED; do
  echo "GPU $gpu: NVIDIA H100 (UUID: GPU-$gpu)"
  [ -z "$PARTED" ] || echo "  MIG 1g.10gb     Device  0: (UUID: MIG-$gpu)"
done
"""
PYTHON = """#!/bin/sh
if [ "$1" = -c ]; then echo asked >>"$0.asked"; echo "$USABLE"; else printf '%s\\n' "$@"; fi
"""


SCRIPT = str(ROOT / "p2_train.py")


def shell(tmp_path, listed, usable, *flags):
    """Run p2_train.sh on a machine with such GPUs; return the words of the command that it starts."""
    for name, text in (("nvidia-smi", NVIDIA_SMI), ("python", PYTHON)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PARTED": os.environ.get("PARTED", ""),
        "PYTHON": str(tmp_path / "python"),
        "LISTED": listed,
        "USABLE": usable,
    }
    result = subprocess.run(
        ["bash", ROOT / "p2_train.sh", *flags],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.splitlines()


def test_the_shell_script_starts_a_process_for_every_gpu(tmp_path):
    words = shell(tmp_path, "0 1 2 3", "4", "--epochs", "4", "--out", "a folder")
    assert words[:2] == ["-m", "accelerate.commands.launch"]
    assert words[words.index("--num_processes") + 1] == "4"
    assert words[words.index(SCRIPT) :] == [SCRIPT, "--epochs", "4", "--out", "a folder"]


@pytest.mark.parametrize(
    ("listed", "usable", "flags"),
    [
        ("", "0", []),
        ("fails", "0", []),
        ("0", "1", []),
        ("0 1", "1", []),
        ("0 1", "2", ["--device", "cuda:1"]),
        ("0 1", "2", ["--device=cpu"]),
    ],
)
def test_the_shell_script_starts_one_plain_process_otherwise(listed, usable, flags, tmp_path):
    assert shell(tmp_path, listed, usable, "--epochs", "4", *flags) == [SCRIPT, "--epochs", "4", *flags]


def test_parts_of_one_gpu_are_not_several(tmp_path, monkeypatch):
    """A GPU in MIG parts has a line for each; torch, which takes seconds, was asked how many there are."""
    monkeypatch.setenv("PARTED", "yes")
    assert shell(tmp_path, "0", "1") == [SCRIPT]
    assert not (tmp_path / "python.asked").exists()
    assert "accelerate.commands.launch" in shell(tmp_path, "0 1", "2")
