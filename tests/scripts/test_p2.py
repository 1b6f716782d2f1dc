"""p2_train.py and p2_infer.py end to end through their command lines, with tiny random models on a tiny micro world."""

import functools
import json
import math
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import evaluate
import p2_infer
from captioning.data.images import load_image
from captioning.inference import batches
from captioning.inference.captions import compile_steps
from captioning.inference.encode import StreamEncoder, draft_side
from captioning.models.adapter import load_captioner, read_adapter
from captioning.models.captioner import Captioner
from captioning.profiles import PROFILES
from captioning.scoring import evaluator
from captioning.training.trainer import Trainer
from p2_train import main

EPOCHS, STEPS = 2, 3  # 12 images in batches of 4
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
    """The tiny profile stands in for the micro one: only a profile names an encoder's arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PROFILES, "micro", tiny_profile)
        yield


@pytest.fixture
def no_scoring(monkeypatch):
    """Spare the tests that ask for no score the start of Java."""
    monkeypatch.setattr(evaluator, "cider", lambda references, predictions: (0.5, {}))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An unbroken run of two epochs."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert train(out) == 0
    return out


def train(out, *flags):
    return main([*SMALL, "--epochs", str(EPOCHS), "--out", str(out), *map(str, flags)])


def infer(images, out, adapter, *flags, decoder=None):
    files = (images, out, decoder or PROFILES["micro"].decoder, "--adapter", adapter)
    small = ("--profile", "micro", "--device", "cpu", "--beam-size", 2, "--max-new-tokens", 12)
    return p2_infer.main([*map(str, (*files, *small, *flags))])


def records(out, kind):
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def copy_data(tiny_data, folder, change):
    """Copy the data with ``change`` applied to the parsed train.json."""
    shutil.copytree(tiny_data, folder)
    content = json.loads((folder / "train.json").read_text())
    change(content)
    (folder / "train.json").write_text(json.dumps(content))
    return folder


# --------------------------------------------------------------------------------------------------------- training


def test_a_run_folder_holds_all_that_is_promised(run):
    config = json.loads((run / "config.json").read_text())
    assert config["train"]["epochs"] == EPOCHS
    assert config["captioner"]["encoder"] == PROFILES["micro"].encoder
    assert config["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert [r["epoch"] for r in records(run, "epoch")] == [1, 2]
    assert [r["step"] for r in records(run, "step")] == list(range(1, EPOCHS * STEPS + 1))
    assert all(r["val_cider"] >= 0 and r["val_loss"] < 8 for r in records(run, "epoch"))
    with Image.open(run / "loss.png") as plot:
        assert plot.width > 100
    for name in ("best", "last"):
        stored, state = read_adapter(run / f"{name}.safetensors")
        assert stored.lora.rank == 4
        assert config["trainable_parameters"] == sum(t.numel() for t in state.values())
    assert not list(run.glob("*.tmp")) + list(run.glob(".*"))


def test_the_best_adapter_is_the_one_of_the_best_cider_and_not_the_last(tmp_path, monkeypatch):
    scores = iter([0.4, 0.9, 0.2])
    monkeypatch.setattr(evaluator, "cider", lambda references, predictions: (next(scores), {}))
    kept = []
    save = Captioner.save_adapter
    monkeypatch.setattr(Captioner, "save_adapter", lambda model, path: (kept.append(path.stem), save(model, path)))
    assert train(tmp_path / "run", "--epochs", 3) == 0
    assert kept == ["last", "best", "last", "best", "last"]
    assert [r["best"] for r in records(tmp_path / "run", "epoch")] == [True, True, False]


def test_without_java_the_best_epoch_is_that_of_the_lowest_loss(tmp_path, monkeypatch):
    def no_java(references, predictions):
        raise FileNotFoundError("java")

    monkeypatch.setattr(evaluator, "cider", no_java)
    assert train(tmp_path / "run") == 0
    losses = [r["val_loss"] for r in records(tmp_path / "run", "epoch")]
    assert [r["best"] for r in records(tmp_path / "run", "epoch")] == [True, losses[1] < losses[0]]
    assert (tmp_path / "run" / "loss.png").is_file()


def test_a_run_interrupted_in_its_second_epoch_resumes_to_the_same_adapter(run, tmp_path, monkeypatch, no_scoring):
    out, step = tmp_path / "run", Trainer.train_step

    def interrupted(trainer, batches):
        if trainer.progress.step == STEPS + 1:
            raise KeyboardInterrupt
        return step(trainer, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        assert train(out) == 130
    assert len(records(out, "epoch")) == 1
    halfway = load_file(out / "last.safetensors")
    assert train(out, "--resume") == 0
    resumed, unbroken = load_file(out / "last.safetensors"), load_file(run / "last.safetensors")
    for name, tensor in unbroken.items():
        assert torch.allclose(resumed[name], tensor, atol=1e-6), name
    assert any(not torch.allclose(halfway[name], unbroken[name], atol=1e-5) for name in unbroken)
    assert [r["epoch"] for r in records(out, "epoch")] == [1, 2]
    steps = [r["step"] for r in records(out, "step")]
    assert steps == sorted(set(steps))  # steps taken again were once listed twice, and the curve ran backwards


def test_a_run_stopped_before_its_first_whole_epoch_can_be_started_again(tmp_path, monkeypatch, no_scoring):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "validate", lambda trainer: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(out)
    assert train(out) == 0
    assert [r["epoch"] for r in records(out, "epoch")] == [1, 2]


def test_resuming_on_other_captions_or_from_a_damaged_state_is_refused(run, tmp_path, capsys):
    assert train(run, "--resume", "--shuffle-captions") == 2
    assert "shuffled_captions" in capsys.readouterr().err
    out = tmp_path / "run"
    shutil.copytree(run, out)
    for state in out.glob("training_state*.safetensors"):
        state.write_bytes(state.read_bytes()[:200])
    assert train(out, "--resume") == 2
    assert "no state is intact" in capsys.readouterr().err


def test_resuming_with_other_numbers_or_nothing_to_resume_is_refused(run, tmp_path, capsys):
    assert train(run, "--resume", "--lr", "0.5") == 2
    error = capsys.readouterr().err
    assert "train.lr" in error
    assert "--resume" in error
    assert train(tmp_path / "empty", "--resume") == 2
    assert "start without --resume" in capsys.readouterr().err


def test_a_run_folder_in_use_is_not_written_over(run, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    assert train(run) == 2
    assert f"--out {run}" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before


@pytest.mark.usefixtures("no_scoring")
def test_images_that_are_not_cached_give_the_losses_of_cached_ones(run, tmp_path, no_scoring):
    """Of the validation images too, whose loss is taken where autocast might round the encoder."""
    flags = ("--cache", tmp_path / "cache", "--cache-gb", 0)
    assert train(tmp_path / "run", *flags) == 0
    (folder,) = (tmp_path / "cache").iterdir()
    assert (folder / "features.bin").stat().st_size == 0
    for kind, key in (("step", "loss"), ("epoch", "val_loss")):
        cached, anew = ([record[key] for record in records(out, kind)] for out in (run, tmp_path / "run"))
        assert anew == pytest.approx(cached, abs=1e-4)


def test_a_loss_that_is_not_a_number_stops_the_run_and_spares_the_last_adapter(tmp_path, monkeypatch, capsys):
    out, loss, calls = tmp_path / "run", Captioner.loss, []

    def spoilt(captioner, *args):
        calls.extend([1] * captioner.training)
        return loss(captioner, *args) * (math.nan if len(calls) > STEPS else 1)

    monkeypatch.setattr(Captioner, "loss", spoilt)
    monkeypatch.setattr(Trainer, "val_loss", lambda trainer, count: 1.0)
    assert train(out, "--max-skipped", 2) == 2
    error = capsys.readouterr().err
    assert "not finite in 2 steps in a row, up to step 5" in error
    assert "--lr" in error
    assert [r["skipped"] for r in records(out, "skipped")] == [1, 2]
    assert len(records(out, "epoch")) == 1
    assert all(tensor.isfinite().all() for tensor in read_adapter(out / "last.safetensors")[1].values())


def test_too_many_trained_parameters_are_refused(tmp_path, capsys):
    assert train(tmp_path / "run", "--max-trainable", 1000) == 2
    assert "--max-trainable 1,000" in capsys.readouterr().err
    assert not (tmp_path / "run" / "last.safetensors").exists()


def test_the_blind_baseline_trains_and_says_so(run, tmp_path, no_scoring):
    assert train(tmp_path / "run", "--shuffle-captions", "--epochs", 1) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["shuffled_captions"] is True
    blind, seeing = (records(out, "step")[0]["loss"] for out in (tmp_path / "run", run))
    assert blind != seeing  # the first batch shows the same images with other captions


@pytest.mark.parametrize(
    "flags",
    [
        ("--no-cls",),
        ("--lora-enable", "1,0,1"),
        ("--accumulate", "2"),
        ("--captions-per-image", "2"),
        ("--precision", "bf16"),
    ],
)
def test_options_train(flags, tmp_path, no_scoring):
    assert train(tmp_path / "run", *flags, "--epochs", 1) == 0
    steps = 2 if flags[0] == "--accumulate" else STEPS
    assert records(tmp_path / "run", "epoch")[0]["step"] == steps


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


def test_a_missing_training_image_is_named(tiny_data, tmp_path, capsys):
    folder = copy_data(tiny_data, tmp_path / "data", lambda content: None)
    (folder / "images" / "train" / "000000000003.jpg").unlink()
    assert train(tmp_path / "run", "--data", folder) == 2
    assert "000000000003.jpg" in capsys.readouterr().err


def test_a_caption_too_long_for_the_context_is_named_with_its_image(tiny_data, tmp_path, capsys):
    def lengthen(content):
        content["annotations"][26]["caption"] = "a red bike " * 90

    folder = copy_data(tiny_data, tmp_path / "data", lengthen)
    assert train(tmp_path / "run", "--data", folder) == 2
    error = capsys.readouterr().err
    assert "000000000005.jpg" in error
    assert "caption 2" in error


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
    assert (
        train(
            out,
            "--data",
            folder,
            "--epochs",
            5,
            "--lr",
            "5e-3",
            "--lora-dropout",
            0,
            "--lora-rank",
            16,
            "--lora-alpha",
            16,
            "--max-new-tokens",
            20,
        )
        == 0
    )
    losses = [r["train_loss"] for r in records(out, "epoch")]
    assert losses[-1] < losses[0] / 2
    pred = tmp_path / "pred.json"
    assert infer(folder / "images" / "val", pred, out / "last.safetensors", "--max-new-tokens", 20) == 0
    assert json.loads(pred.read_text()) == {f"picture-{n * copies}": caption for n, caption in captions.items()}


# --------------------------------------------------------------------------------------------------------- inference


def test_inference_captions_every_picture_and_is_scored(run, tiny_data, tmp_path, capsys):
    pred, images = tmp_path / "deep" / "pred.json", tiny_data / "images" / "val"
    assert infer(images, pred, run / "best.safetensors") == 0
    predictions = json.loads(pred.read_text())
    assert set(predictions) == {path.stem for path in images.iterdir()}
    assert all(isinstance(text, str) for text in predictions.values())
    scoring = ["--pred_file", str(pred), "--annotation_file", str(tiny_data / "val.json"), "--metrics", "cider"]
    assert evaluate.main(scoring) == 0
    assert "CIDEr:" in capsys.readouterr().out


def test_the_size_of_a_batch_changes_no_caption(run, tiny_data, tmp_path):
    results, files = [], (tiny_data / "images" / "val", tmp_path / "p.json", run / "last.safetensors")
    for size in (1, 3):
        assert infer(*files, "--batch-size", size) == 0
        results.append(json.loads((tmp_path / "p.json").read_text()))
    assert results[0] == results[1]


def test_compiled_steps_caption_alike(run, tiny_data, tmp_path, monkeypatch):
    """The last batch, of three pictures, is smaller than the others; the compiler itself is test_compiling.py's."""
    monkeypatch.setattr(p2_infer, "compile_steps", functools.partial(compile_steps, backend="eager"))
    results, files = [], (tiny_data / "images" / "val", tmp_path / "p.json", run / "last.safetensors")
    for flags in ([], ["--compile"]):
        assert infer(*files, "--batch-size", 5, *flags) == 0
        results.append(json.loads((tmp_path / "p.json").read_text()))
    assert results[0] == results[1]


def test_encoding_a_batch_ahead_captions_alike(run, tiny_data, tmp_path, monkeypatch):
    """What a GPU does on streams, here one after the other: the next batch is encoded before this one is decoded."""
    order, gather, encode = [], StreamEncoder.gather, StreamEncoder.encode
    monkeypatch.setattr(StreamEncoder, "gather", lambda s, e: order.append(f"decode {len(e)}") or gather(s, e))
    monkeypatch.setattr(StreamEncoder, "encode", lambda s, p: order.append(f"encode {len(p)}") or encode(s, p))
    results, files = [], (tiny_data / "images" / "val", tmp_path / "p.json", run / "last.safetensors")
    for ahead in (False, True):
        monkeypatch.setattr(p2_infer, "works_beside", lambda device, ahead=ahead: ahead)
        assert infer(*files, "--batch-size", 3) == 0
        results.append(json.loads((tmp_path / "p.json").read_text()))
    assert results[0] == results[1]
    assert order[:6] == ["encode 3", "decode 3", "encode 3", "decode 3", "encode 2", "decode 2"]
    assert order[6:] == ["encode 3", "encode 3", "decode 3", "encode 2", "decode 3", "decode 2"]


def test_big_photographs_may_be_decoded_smaller(run, tmp_path, monkeypatch):
    """The flag reaches the reader, with four times the pixels that the encoder sees; without it all is decoded."""
    sizes, load = [], load_image

    def noted(path, draft=None):
        image = load(path, draft)
        sizes.append(image.size)
        return image

    monkeypatch.setattr(batches, "load_image", noted)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (640, 480), "red").save(tmp_path / "images" / "a.jpg")
    for flags in ([], ["--jpeg-draft"], ["--no-jpeg-draft"]):
        assert infer(tmp_path / "images", tmp_path / "p.json", run / "last.safetensors", *flags) == 0
    assert sizes == [(640, 480), (320, 240), (640, 480)]  # 4 x 48 = 192 is what a quarter would be below


def test_a_draft_keeps_four_times_the_pixels_of_the_transform(run):
    captioner = load_captioner(run / "last.safetensors", Path(PROFILES["micro"].decoder), None, torch.device("cpu"))
    assert draft_side(captioner.transform) == 192
    with pytest.raises(ValueError, match="--jpeg-draft needs a transform with a resize"):
        draft_side(lambda image: image)


def test_odd_pictures_are_captioned(run, tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (40, 64, 3), np.uint8)
    picture = Image.fromarray(noise)
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.convert("L").save(folder / "grey.jpeg")
    picture.convert("1").save(folder / "bits.png")
    picture.convert("P").save(folder / "palette.png", transparency=3)
    Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(folder / "sixteen.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture.save(folder / "turned.JPG", exif=exif)
    Image.new("RGBA", (1, 1)).save(folder / "dot.webp")
    Image.new("RGB", (900, 3)).save(folder / "stripe.png")
    assert infer(folder, tmp_path / "pred.json", run / "last.safetensors") == 0
    assert set(json.loads((tmp_path / "pred.json").read_text())) == {
        "cmyk",
        "grey",
        "bits",
        "palette",
        "sixteen",
        "turned",
        "dot",
        "stripe",
    }


def test_a_broken_picture_is_named_and_spares_the_others(run, tiny_data, tmp_path, capfd, caplog):
    folder = tmp_path / "images"
    shutil.copytree(tiny_data / "images" / "val", folder)
    broken = folder / "000000000002.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    assert infer(folder, tmp_path / "pred.json", run / "last.safetensors") == 3
    predictions = json.loads((tmp_path / "pred.json").read_text())
    assert len(predictions) == 7
    assert "000000000002" not in predictions
    assert "000000000002.jpg" in caplog.text
    for path in folder.iterdir():
        path.write_bytes(b"no picture")
    assert infer(folder, tmp_path / "none.json", run / "last.safetensors") == 2
    assert not (tmp_path / "none.json").exists()


def test_folders_without_plain_pictures_are_refused(run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    twins = tmp_path / "twins"
    twins.mkdir()
    for name in ("a.jpg", "a.png"):
        Image.new("RGB", (8, 8)).save(twins / name)
    for place, message in (
        (tmp_path / "gone", "no such folder"),
        (tmp_path / "empty", "no image here"),
        (twins, "a.jpg and a.png"),
    ):
        assert infer(place, tmp_path / "pred.json", run / "last.safetensors") == 2
        error = capsys.readouterr().err
        assert message in error
        assert str(place) in error
    assert not (tmp_path / "pred.json").exists()


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_bad_adapters_and_decoders_are_refused_by_name(run, tiny_data, tmp_path, capsys):
    images, adapter = tiny_data / "images" / "val", run / "last.safetensors"
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(adapter.read_bytes()[:1000])
    whole = PROFILES["micro"].decoder
    short = tmp_path / "short.bin"
    torch.save(load_file(whole), short)
    short.write_bytes(short.read_bytes()[:-5000])
    other = tmp_path / "other.bin"
    torch.save({k: v + 1e-3 for k, v in load_file(whole).items()}, other)
    evil = tmp_path / "evil.bin"
    evil.write_bytes(pickle.dumps({"wte.weight": Bomb(tmp_path / "exploded")}, protocol=2))
    for bad, decoder, message in (
        (tmp_path / "gone.safetensors", whole, "gone.safetensors"),
        (cut, whole, "cut.safetensors"),
        (adapter, tmp_path / "none.bin", "none.bin"),
        (adapter, short, "short.bin"),
        (adapter, other, "trained on another decoder"),
        (adapter, evil, "evil.bin"),
    ):
        assert infer(images, tmp_path / "pred.json", bad, decoder=decoder) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
    assert not (tmp_path / "exploded").exists()
    assert not (tmp_path / "pred.json").exists()


def test_a_pickled_decoder_captions_like_the_same_safetensors(run, tiny_data, tmp_path):
    file = tmp_path / "decoder_model.bin"
    state = {f"transformer.{k}": v for k, v in load_file(PROFILES["micro"].decoder).items()}
    torch.save(state | {"lm_head.weight": state["transformer.wte.weight"]}, file)
    results = []
    for decoder in (None, file):
        assert infer(tiny_data / "images" / "val", tmp_path / "p.json", run / "last.safetensors", decoder=decoder) == 0
        results.append(json.loads((tmp_path / "p.json").read_text()))
    assert results[0] == results[1]


@pytest.mark.parametrize("flag", ["--batch-size", "--beam-size", "--max-new-tokens"])
def test_sizes_below_one_are_refused(flag, run, tiny_data, tmp_path, capsys):
    argv = [tiny_data / "images" / "val", tmp_path / "p.json", PROFILES["micro"].decoder, flag, "0"]
    assert p2_infer.main([*map(str, argv), "--profile", "micro"]) == 2
    assert f"{flag} 0" in capsys.readouterr().err
