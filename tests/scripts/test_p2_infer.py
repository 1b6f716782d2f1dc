"""p2_infer.py end to end through its command line, with tiny random models on a tiny micro world."""

import functools
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import train
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import evaluate
import p2_infer
from captioning.data.images import load_image
from captioning.data.part_files import read_part
from captioning.inference import batches, jobs
from captioning.inference.encode import StreamEncoder, draft_side
from captioning.models.adapter import load_captioner
from captioning.models.step_functions import CompiledStepFunction
from captioning.profiles import PROFILES

pytestmark = pytest.mark.usefixtures("micro")


@pytest.fixture(scope="module")
def run(unbroken):
    return unbroken


def infer(images, out, adapter, *flags, decoder=None):
    files = (images, out, decoder or PROFILES["micro"].decoder, "--adapter", adapter)
    small = ("--profile", "micro", "--device", "cpu", "--beam-size", 2, "--max-new-tokens", 12)
    return p2_infer.main([*map(str, (*files, *small, *flags))])


def test_inference_captions_every_picture_and_is_scored(run, tiny_data, tmp_path, capsys):
    pred, images = tmp_path / "deep" / "pred.json", tiny_data / "images" / "val"
    assert infer(images, pred, run / "best.safetensors") == 0
    predictions = json.loads(pred.read_text())
    assert set(predictions) == {path.stem for path in images.iterdir()}
    assert all(isinstance(text, str) for text in predictions.values())
    scoring = ["--pred_file", str(pred), "--annotation_file", str(tiny_data / "val.json"), "--metrics", "cider"]
    assert evaluate.main(scoring) == 0
    assert "CIDEr:" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "expected"), [((), True), (("--precision", "fp32"), False)])
def test_auto_searches_in_bf16_at_full_size_on_a_processor_that_has_it(
    run, tiny_data, tmp_path, monkeypatch, bf16_processor, flags, expected
):
    """Encoder and decoder alike: their weights are cast, and what multiplies them runs under autocast."""
    seen, search = [], jobs.caption_features
    on = functools.partial(torch.is_autocast_enabled, "cpu")
    monkeypatch.setattr(jobs, "caption_features", lambda model, *how: seen.append((model, on())) or search(model, *how))
    assert infer(tiny_data / "images" / "val", tmp_path / "p.json", run / "best.safetensors", *flags) == 0
    types = {module.dtype for model, _ in seen for module in model.modules() if hasattr(module, "dtype")}
    assert types == {torch.bfloat16 if expected else torch.float32}
    assert {autocast for _, autocast in seen} == {expected}


def test_captions_in_a_run_folder_are_that_runs(run, tiny_data, tmp_path, monkeypatch, capsys):
    """Without --adapter, runs/1/val.json was captioned by runs/best."""
    loaded, load = [], p2_infer.load_captioner
    monkeypatch.setattr(
        p2_infer, "load_captioner", lambda adapter, *more: loaded.append(adapter) or load(adapter, *more)
    )
    monkeypatch.chdir(tmp_path)
    for name in ("1", "best"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        shutil.copy(run / "best.safetensors", tmp_path / "runs" / name)
    words = ["--profile", "micro", "--device", "cpu", "--beam-size", "1", "--max-new-tokens", "5"]
    for out in ("runs/1/val.json", "runs/best/val.json", "val.json", "runs/2/val.json"):
        assert p2_infer.main([str(tiny_data / "images" / "val"), out, PROFILES["micro"].decoder, *words]) == 0
    assert [adapter.parent.name for adapter in loaded] == ["1", "best", "best", "best"]
    shutil.rmtree(tmp_path / "runs" / "best")
    assert p2_infer.main([str(tiny_data / "images" / "val"), "val.json", PROFILES["micro"].decoder, *words]) == 2
    assert "runs/best/best.safetensors" in capsys.readouterr().err


def test_the_size_of_a_batch_changes_no_caption(run, tiny_data, tmp_path):
    results, files = [], (tiny_data / "images" / "val", tmp_path / "p.json", run / "last.safetensors")
    for size in (1, 3):
        assert infer(*files, "--batch-size", size) == 0
        results.append(json.loads((tmp_path / "p.json").read_text()))
    assert results[0] == results[1]


@pytest.fixture
def quick_compiler(monkeypatch):
    """--compile traces and does not compile: test_step_functions.py does."""
    torch._dynamo.reset()
    monkeypatch.setattr(jobs, "CompiledStepFunction", functools.partial(CompiledStepFunction, backend="eager"))


def test_options_change_captions_and_write_scores_beside_them(run, tiny_data, tmp_path):
    images, plain, out = tiny_data / "images" / "val", tmp_path / "plain.json", tmp_path / "out.json"
    assert infer(images, plain, run / "last.safetensors") == 0
    assert not (tmp_path / "plain.scores.json").exists()
    assert infer(images, out, run / "last.safetensors", "--n-best", 2) == 0
    assert out.read_bytes() == plain.read_bytes()
    scores = json.loads((tmp_path / "out.scores.json").read_text())
    assert {key: rows[0]["caption"] for key, rows in scores.items()} == json.loads(out.read_text())
    assert all(len(rows) == 2 and all(row["score"] < 0 for row in rows) for rows in scores.values())

    rules = ("--min-new-tokens", 12, "--no_repeat_ngram", 1, "--repetition_penalty", 1.2, "--scores")
    assert infer(images, out, run / "last.safetensors", *rules) == 0
    ruled = json.loads(out.read_text())
    assert ruled != json.loads(plain.read_text())
    assert all(len(text) > 5 for text in ruled.values())
    assert all(len(rows) == 1 for rows in json.loads((tmp_path / "out.scores.json").read_text()).values())


@pytest.mark.parametrize("form", ["jsonl", "parquet", "json"])
def test_scores_of_shards(run, tiny_data, tmp_path, form):
    """As a folder has them: in the field or column `ranked` of the parts, and beside one JSON."""
    if form == "parquet":
        pytest.importorskip("pyarrow")
    images, out = tiny_data / "images" / "val", tmp_path / f"out.{form}"
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{path}\n" for path in sorted(images.iterdir())))
    flags = ("--n-best", 2, "--batch-size", 2, "--precision", "fp32")
    assert infer(images, tmp_path / "folder.json", run / "last.safetensors", *flags) == 0
    expected = json.loads((tmp_path / "folder.scores.json").read_text())
    assert infer(listed, out, run / "last.safetensors", *flags, "--shard-size", 3) == 0
    if form == "json":
        found = json.loads((tmp_path / "out.scores.json").read_text())
        assert out.read_bytes() == (tmp_path / "folder.json").read_bytes()
    else:
        found = {key: caption.as_json() for part in out.glob(f"*.{form}") for key, caption in read_part(part)}
    assert {key: [row["caption"] for row in rows] for key, rows in found.items()} == {
        key: [row["caption"] for row in rows] for key, rows in expected.items()
    }
    for key, rows in found.items():
        assert [row["score"] for row in rows] == pytest.approx([row["score"] for row in expected[key]], abs=2e-6)


def test_text_files_go_beside_the_pictures(run, tiny_data, tmp_path, capsys):
    images, out = tmp_path / "images", tmp_path / "out.json"
    shutil.copytree(tiny_data / "images" / "val", images)
    assert infer(images, out, run / "last.safetensors", "--txt") == 0
    captions = json.loads(out.read_text())
    assert {path.stem: path.read_text() for path in images.glob("*.txt")} == {k: f"{v}\n" for k, v in captions.items()}
    assert infer(images, out, run / "last.safetensors", "--txt", "--min-new-tokens", 12) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert json.loads(out.read_text()) == captions
    assert infer(images, out, run / "last.safetensors", "--txt", "--min-new-tokens", 12, "--overwrite") == 0
    captions = json.loads(out.read_text())
    assert {path.stem: path.read_text() for path in images.glob("*.txt")} == {k: f"{v}\n" for k, v in captions.items()}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--n-best", 3), "--n-best 3: --beam-size 2 finds no more than 2"),
        (("--min-new-tokens", 13), "--min-new-tokens 13: is above --max-new-tokens 12"),
        (("--min-new-tokens", -1), "--min-new-tokens must be 0"),
        (("--no-repeat-ngram", -1), "--no-repeat-ngram must be 0"),
        (("--repetition-penalty", 0), "--repetition-penalty must be above 0"),
        (("--txt", "--out-format", "jsonl"), "--txt: goes with a folder or pictures and one OUT.json"),
    ],
)
def test_options_that_make_no_sense_are_refused_at_once(run, tiny_data, tmp_path, capsys, flags, message):
    assert infer(tiny_data / "images" / "val", tmp_path / "o.json", tmp_path / "no-adapter", *flags) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("quick_compiler")
def test_compiled_steps_caption_alike(run, tiny_data, tmp_path):
    """The last batch, of three pictures, is smaller than the others."""
    results, files = [], (tiny_data / "images" / "val", tmp_path / "p.json", run / "last.safetensors")
    for flags in ([], ["--compile"]):
        assert infer(*files, "--batch-size", 5, *flags) == 0
        results.append(json.loads((tmp_path / "p.json").read_text()))
    assert results[0] == results[1]


@pytest.fixture
def beam_adapter(tmp_path):
    """An adapter whose captions end, at rates that let it learn to: those that never end are equal by both rules."""
    assert train(tmp_path / "run", "--lr", 2e-3, "--projector-lr", 2e-3) == 0
    return tmp_path / "run" / "last.safetensors"


@pytest.fixture
def report_adapter(beam_adapter, tmp_path):
    """The same adapter as one that was trained to be searched by the report's rule."""
    path = tmp_path / "report.safetensors"
    with safe_open(beam_adapter, "pt") as file:
        config = json.loads(file.metadata()["captioner"])
    save_file(load_file(beam_adapter), path, {"captioner": json.dumps(config | {"search_rule": "report"})})
    return path


@pytest.mark.usefixtures("quick_compiler")
def test_the_adapter_says_by_which_rule_captions_are_searched(beam_adapter, report_adapter, tiny_data, tmp_path):
    results, images = {}, tiny_data / "images" / "val"
    for name, adapter, flags in (
        ("beam", beam_adapter, []),
        ("report", beam_adapter, ["--search-rule", "report"]),
        ("adapter's", report_adapter, []),
        ("compiled", report_adapter, ["--compile"]),
        ("against the adapter", report_adapter, ["--search-rule", "beam"]),
        ("as parts", report_adapter, ["--shard-size", 3]),
    ):
        assert infer(images, tmp_path / "p.json", adapter, "--batch-size", 5, "--beam-size", 5, *flags) == 0
        results[name] = json.loads((tmp_path / "p.json").read_text())
    assert results["beam"] == results["against the adapter"]
    assert results["beam"] != results["report"] == results["adapter's"] == results["compiled"] == results["as parts"]


def test_runs_of_two_rules_are_two_runs(report_adapter):
    """A run by the beam rule has the description that it had before there was a choice."""
    described = {}
    for rule in (None, "beam", "report"):
        words = ["images", "out.json", "decoder.bin", "--adapter", str(report_adapter)]
        args = p2_infer.build_parser().parse_args(words + ["--search-rule", rule] * (rule is not None))
        p2_infer.settle_search(args)
        described[rule] = p2_infer.describe_run(args)
    assert described[None] == described["report"]
    assert described["report"] == described["beam"] | {"search_rule": "report"}
    assert "search_rule" not in described["beam"]


def test_the_reports_rule_has_no_length_penalty(run, report_adapter, tiny_data, tmp_path, capsys):
    images, out = tiny_data / "images" / "val", tmp_path / "p.json"
    for adapter, flags in ((report_adapter, []), (run / "last.safetensors", ["--search-rule", "report"])):
        assert infer(images, out, adapter, "--length-penalty", 0.5, *flags) == 2
        assert "--length-penalty 0.5: the search rule `report`" in capsys.readouterr().err
    assert infer(images, out, report_adapter, "--length-penalty", 0.5, "--search-rule", "beam") == 0


def test_encoding_a_batch_ahead_captions_alike(run, tiny_data, tmp_path, monkeypatch):
    """What a GPU does on streams, here one after the other: the next batch is encoded before this one is decoded."""
    order, gather, encode = [], StreamEncoder.gather, StreamEncoder.encode
    monkeypatch.setattr(StreamEncoder, "gather", lambda s, e: order.append(f"decode {len(e)}") or gather(s, e))
    monkeypatch.setattr(StreamEncoder, "encode", lambda s, p: order.append(f"encode {len(p)}") or encode(s, p))
    results, files = [], (tiny_data / "images" / "val", tmp_path / "p.json", run / "last.safetensors")
    for ahead in (False, True):
        monkeypatch.setattr(jobs, "works_beside", lambda device, ahead=ahead: ahead)
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


def test_the_same_decoder_in_half_precision_captions_where_it_is_allowed(run, tiny_data, tmp_path, capsys, caplog):
    half, images = tmp_path / "half.BIN", tiny_data / "images" / "val"
    torch.save({key: value.half() for key, value in load_file(PROFILES["micro"].decoder).items()}, half)
    files = (images, tmp_path / "p.json", run / "last.safetensors")
    assert infer(*files, decoder=half) == 2
    assert "so the precision may be the reason); --allow-other-decoder" in capsys.readouterr().err
    for out in ((), ("--num-shards", 1)):  # a folder's own file, and parts
        caplog.clear()
        assert infer(images, tmp_path / f"p{len(out)}.json", files[2], "--allow-other-decoder", decoder=half) == 0
        assert "--allow-other-decoder: the adapter was trained on another decoder" in caplog.text
    assert len(json.loads((tmp_path / "p0.json").read_text())) == 8


@pytest.mark.parametrize("flag", ["--batch-size", "--beam-size", "--max-new-tokens"])
def test_sizes_below_one_are_refused(flag, run, tiny_data, tmp_path, capsys):
    argv = [tiny_data / "images" / "val", tmp_path / "p.json", PROFILES["micro"].decoder, flag, "0"]
    assert p2_infer.main([*map(str, argv), "--profile", "micro"]) == 2
    assert f"{flag} 0" in capsys.readouterr().err
