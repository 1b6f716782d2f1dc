"""p3_attention.py end to end through its command line, for both models."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import p3_attention
from captioning.cli import BAD_INPUT, PARTIAL
from captioning.maps import figures
from captioning.maps.attention import METHODS
from captioning.maps.by_agreement import POINTS
from captioning.maps.saved import load_maps
from captioning.profiles import PROFILES
from p2_train import main

TRAIN = "--batch-size=4 --lora-rank=4 --val-images=2 --beam-size=2 --max-new-tokens=8 --epochs=1 --device=cpu"


pytestmark = pytest.mark.usefixtures("micro")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter of one epoch; nothing scores it."""
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("captioning.scoring.evaluator.cider", lambda references, predictions, *rest: (0.5, {}))
        assert main(["--profile", "micro", "--out", str(out), *TRAIN.split()]) == 0
    return out / "best.safetensors"


@pytest.fixture
def images(tiny_data, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for path in sorted((tiny_data / "images" / "val").iterdir())[:3]:
        shutil.copy(path, folder)
    Image.effect_noise((200, 90), 60).convert("RGB").save(folder / "wide.png")
    return folder


def explain(model, images, out, adapter, *flags):
    arguments = ["--model", model, "--images", *images, "--out", out, "--adapter", adapter, *flags]
    return p3_attention.main([*map(str, arguments), "--profile", "micro", "--device", "cpu"])


@pytest.mark.parametrize("model", ["p1", "p2"])
def test_maps_of_a_folder(model, images, tmp_path, adapter, capsys):
    out = tmp_path / "out"
    assert explain(model, [images], out, adapter, "--html") == 0
    names = sorted(path.stem for path in images.iterdir())
    assert sorted(path.stem for path in out.glob("*.png")) == names
    printed = capsys.readouterr().out.splitlines()
    for name, line in zip(names, printed, strict=True):
        maps = np.load(out / f"{name}.npz")
        layers, heads, tokens, *grid = maps["attention"].shape
        assert maps["maps"].shape == (len(maps["words"]), *(POINTS * size for size in grid))  # agree's are finer
        assert len(maps["tokens"]) == tokens == len(maps["word_of_token"])
        assert heads == (4 if model == "p1" else 2)
        assert set(maps["layers"]) == set(range(layers))
        assert str(maps["caption"]).split() == maps["words"].tolist()
        assert line.split()[0].startswith(f"{name}.")
    wide = load_maps(out / "wide.npz")
    assert (wide.window, wide.model) == ((55, 0, 145, 90), model)
    assert wide.path.samefile(images / "wide.png")
    assert wide.word_maps[0].maps.shape == (len(wide.words), *(POINTS * size for size in grid))
    assert "<script" in (out / "viewer.html").read_text(encoding="utf-8")


def test_flags_choose_layers_heads_and_method(images, tmp_path, adapter):
    one = sorted(images.iterdir())[:1]
    text = ("--caption", "A red ball.")
    assert explain("p2", one, tmp_path / "a", adapter, *text, "--method", "raw", "--layers", 1, "--heads", 0) == 0
    changed = ("--method", "generic", "--heads", "max", "--row", "own")
    assert explain("p2", one, tmp_path / "b", adapter, *text, *changed) == 0
    a, b = (np.load(tmp_path / x / f"{one[0].stem}.npz") for x in "ab")
    assert (str(a["method"]), a["layers"].tolist(), str(a["heads"])) == ("raw", [1], "head 0")
    assert (str(b["method"]), str(b["heads"]), str(b["row"])) == ("generic", "max", "own")
    words = [a["attention"][1, 0][a["word_of_token"] == n].mean(0) for n in range(3)]
    assert np.allclose(a["maps"], words, atol=1e-3)


@pytest.mark.parametrize("model", ["p1", "p2"])
def test_one_picture_by_all_methods(model, tiny_data, tmp_path, adapter, monkeypatch):
    content = json.loads((tiny_data / "val.json").read_text())
    image, names = content["images"][0], {category["id"]: category["name"] for category in content["categories"]}
    mine = [record for record in content["objects"] if record["image_id"] == image["id"]]
    name = names[mine[0]["category_id"]]
    drawn, draw = [], figures.contact_sheet
    monkeypatch.setattr(figures, "contact_sheet", lambda *args: drawn.append(args) or draw(*args))
    out, path = tmp_path / "out", tiny_data / "images" / "val" / image["file_name"]
    flags = ("--contact-sheet", "--html", "--boxes", tiny_data / "val.json", "--caption", f"A {name} and a thing.")
    assert explain(model, [path], out, adapter, *flags) == 0
    ((item, specs, rows, file, absent),) = drawn
    assert [spec.method for spec in specs] == list(METHODS) and not absent
    assert rows == {1: [record["bbox"] for record in mine if names[record["category_id"]] == name]}
    assert file == out / f"{path.stem}.methods.png" and file.stat().st_size > 10_000
    assert {found.spec for found in item.word_maps} >= set(specs)
    page = (out / "viewer.html").read_text(encoding="utf-8")
    assert all(f'"method":"{method}"' in page for method in METHODS)


def test_rows_of_a_contact_sheet_without_nouns_that_are_known(images, tmp_path, adapter, monkeypatch, capsys):
    rows = []
    monkeypatch.setattr(figures, "contact_sheet", lambda item, specs, *args: rows.append(args[0]))
    one, out = sorted(images.iterdir())[:1], tmp_path / "out"
    for caption in ("A thing on the gadget.", "Up."):
        assert explain("p2", one, out, adapter, "--contact-sheet", "--caption", caption) == 0
    assert rows == [{1: [], 4: []}, {0: []}]
    wide, boxes = [images / "wide.png"], tmp_path / "boxes.json"
    other, ball = [{"id": 1, "file_name": "other.jpg"}], [{"id": 1, "name": "ball"}]
    boxes.write_text(json.dumps({"images": other, "categories": ball, "annotations": []}))
    for flags, message in [
        (("--contact-sheet", "--boxes", tmp_path / "no.json"), "no.json"),
        (("--boxes", boxes), "--boxes belongs to --grounding and --contact-sheet"),
        (("--contact-sheet", "--boxes", boxes), "has the boxes of other images: 1 of the 1"),
        (("--contact-sheet", "--best-worst", boxes), "--best-worst and --contact-sheet are 2 runs"),
    ]:
        assert message in fails(capsys, "p2", wide, tmp_path / "bad", adapter, *flags)


@pytest.mark.parametrize("worst_is_empty", [False, True])
def test_best_and_worst_pair(worst_is_empty, tiny_data, tmp_path, adapter, capsys):
    content = json.loads((tiny_data / "val.json").read_text())
    stems = [image["file_name"].rsplit(".", 1)[0] for image in content["images"]]
    empty = len(stems) // 2
    scores = {stem: {"CLIPScore": n / 10, "CIDEr": 0.0, "caption": f"A ball {n}."} for n, stem in enumerate(stems)}
    scores[stems[empty]] |= {"caption": "", "CLIPScore": -1.0} if worst_is_empty else {}
    per_image = tmp_path / "per_image.json"
    per_image.write_text(json.dumps(scores))
    flags = ("--best-worst", per_image, "--annotation-file", tiny_data / "val.json")
    assert explain("p2", [tiny_data / "images" / "val"], tmp_path / "out", adapter, *flags) == 0
    drawn = ["best_worst.png", *([] if worst_is_empty else ["last-1.png"]), "top-1.png"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == drawn
    top, last = capsys.readouterr().out.splitlines()
    assert top == f"Top-1: {stems[-1]}.jpg  CLIPScore 0.7  A ball 7."
    worst = f"{stems[empty]}.jpg  CLIPScore -1.0  " if worst_is_empty else f"{stems[0]}.jpg  CLIPScore 0.0  A ball 0."
    assert last == f"Last-1: {worst}"


def test_best_and_worst_pair_of_a_run_by_what_lies_beside_its_adapter(tiny_data, tmp_path, adapter, capsys):
    stems = sorted(path.stem for path in (tiny_data / "images" / "val").iterdir())
    for path in (tmp_path / "1.json", tmp_path / "val_per_image.json"):
        path.write_text(json.dumps({stem: {"CLIPScore": n / 10, "caption": "A ball."} for n, stem in enumerate(stems)}))
    shutil.copy(adapter, tmp_path / "best.safetensors")
    for flags in ((tmp_path / "1.json",), ()):
        words = ("p2", [tiny_data / "images" / "val"], tmp_path / "out", tmp_path / "best.safetensors", "--best-worst")
        assert explain(*words, *flags) == 0
        assert f"Top-1: {stems[-1]}.jpg" in capsys.readouterr().out
    (tmp_path / "val_per_image.json").unlink()
    message = f"--best-worst {tmp_path / 'val_per_image.json'}: no such file; write it with evaluate.py --per-image"
    assert message in fails(capsys, *words)


@pytest.mark.parametrize("model", ["p1", "p2"])
def test_the_grounding_table(model, tiny_data, tmp_path, adapter, capsys):
    out = tmp_path / "out"
    flags = ("--grounding", tiny_data / "val.json", "--count", 3)
    assert explain(model, [tiny_data / "images" / "val"], out, adapter, *flags) == 0
    rows = list(csv.DictReader((out / "grounding.csv").open()))
    methods = {row["method"] for row in rows}
    assert {n for n, m in METHODS.items() if not m.slow} | {"centre", "random", "mean image"} == {
        method for method in methods if not method.startswith("the boxes, ")
    }
    notes = [row["note"] for row in rows]
    assert notes.count("default") == notes.count("report") == 1
    assert notes.count("baseline") == 3
    assert all(0 <= float(row["pointing"]) <= 1 for row in rows)
    assert (out / "grounding.png").stat().st_size > 10_000
    assert "baseline" in capsys.readouterr().out
    kinds = {row["kind"] for row in csv.DictReader((out / "grounding_kinds.csv").open())}
    assert "colour" in kinds and "thing" not in kinds
    flags = (*flags, "--specs", "rollout", "raw,0", "--ask", 1)
    assert explain(model, [tiny_data / "images" / "val"], tmp_path / "few", adapter, *flags) == 0
    few = [row for row in csv.DictReader((tmp_path / "few" / "grounding.csv").open()) if row["layers"]]
    assert len(few) == 4 + 1 + 2  # of rollout, the one asked for, the default and the report's
    asked = [row for row in few if row["asked"]]
    assert {row["method"] for row in asked} == {row["method"] for row in few}
    assert all(0 <= float(row["deletion"]) <= 1 and -1 <= float(row["random_layers"]) < 0.999 for row in asked)


def test_globs_and_subfolders_are_explained_and_one_bad_picture_spares_the_others(
    images, tmp_path, adapter, caplog, monkeypatch
):
    (images / "a" / "b").mkdir(parents=True)
    (images / "wide.png").rename(images / "a" / "b" / "wide.png")
    (images / "broken.gif").write_bytes(b"no picture")
    (images / "notes.txt").touch()
    text = ("--caption", "A ball.")
    assert explain("p2", [images / "a" / "**" / "*.png"], tmp_path / "glob", adapter, *text) == 0
    assert (tmp_path / "glob" / "wide.png").exists()
    out = tmp_path / "out"
    assert explain("p2", [images], out, adapter, "--recursive") == PARTIAL
    assert (out / "a" / "b" / "wide.png").exists() and (out / "a" / "b" / "wide.npz").exists()
    assert len(list(out.glob("*.npz"))) == 3
    assert "broken.gif: the file is of no known image format" in caplog.text
    assert "1 file passed over: notes.txt" in caplog.text
    monkeypatch.setattr("captioning.maps.explainers.load_image", lambda path: 1 / 0)
    assert explain("p2", [images], out, adapter) == BAD_INPUT
    assert f"not explained: {images / 'broken.gif'}: division by zero" in caplog.text


def test_one_bad_picture_spares_the_grounding_table(tiny_data, tmp_path, adapter, caplog, capsys):
    shutil.copytree(tiny_data / "images" / "val", tmp_path / "val")
    first = sorted((tmp_path / "val").iterdir())[0]
    first.write_bytes(b"no picture")
    flags = ("--grounding", tiny_data / "val.json", "--count", 2)
    assert explain("p2", [tmp_path / "val"], tmp_path / "out", adapter, *flags) == PARTIAL
    assert f"not measured: {first}" in caplog.text
    assert "p2: 1 images, " in capsys.readouterr().out
    for path in (tmp_path / "val").iterdir():
        path.write_bytes(b"no picture")
    assert "none of the 2 images" in fails(capsys, "p2", [tmp_path / "val"], tmp_path / "out", adapter, *flags)


def test_localisation_heads_are_chosen_once_and_kept_beside_the_adapter(images, tmp_path, adapter, capsys):
    own = Path(shutil.copy(adapter, tmp_path / "own.safetensors"))
    local = ("p2", [images], tmp_path / "out", own, "--heads", "local", "--caption", "A ball.")
    one = ("p2", [images / "wide.png"], *local[2:])
    assert f"{tmp_path / 'own.heads.json'} has no localisation heads" in fails(capsys, *one)
    (images / "broken.png").write_bytes(b"no picture")
    assert explain("p2", [images], tmp_path / "out", own, "--find-heads") == PARTIAL
    assert "localisation heads by 4 images" in capsys.readouterr().out
    assert explain(*one) == 0
    assert str(np.load(tmp_path / "out" / "wide.npz")["heads"]) == "local"


def test_a_choice_that_a_method_does_not_read_is_refused(images, tmp_path, adapter, capsys):
    for name, value in (("--heads", "max"), ("--layers", "all")):
        flags = ("--method", "occlusion", name, value)
        message = f"{name} makes no difference to --method occlusion"
        assert message in fails(capsys, "p2", [images], tmp_path / "out", adapter, *flags)


def fails(capsys, *arguments):
    assert explain(*arguments) == BAD_INPUT
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line


def test_bad_input(images, tmp_path, adapter, tiny_data, capsys):
    out, one = tmp_path / "out", sorted(images.iterdir())[:1]
    assert "layers 0 to 1" in fails(capsys, "p2", one, out, adapter, "--layers", "7")
    assert "heads 0 to 1" in fails(capsys, "p2", one, out, adapter, "--heads", "5")
    assert "--caption explains one image" in fails(capsys, "p2", [images], out, adapter, "--caption", "A dog.")
    assert "--caption is empty" in fails(capsys, "p2", one, out, adapter, "--caption", " ")
    for name in ("list.txt", "a.zip", "a.tar"):
        (tmp_path / name).touch()
        message = fails(capsys, "p2", [tmp_path / name], out, adapter)
        assert f"--images {tmp_path / name}: not a picture; give folders, pictures or globs, of an archive" in message
    assert "none.jpg: no such file; give folders, pictures or globs" in fails(
        capsys, "p2", [tmp_path / "none.jpg"], out, adapter
    )
    assert "share the name" in fails(capsys, "p2", [one[0], one[0]], out, adapter)
    assert "--annotation-file" in fails(capsys, "p2", [images], out, adapter, "--best-worst", adapter)
    bad = tmp_path / "bad.json"
    bad.write_text('{"a": {"CIDEr": 1}}')
    flags = ("--best-worst", bad, "--annotation-file", tiny_data / "val.json")
    assert "needs CLIPScore" in fails(capsys, "p2", [images], out, adapter, *flags)
    assert "one folder" in fails(capsys, "p2", one, out, adapter, "--grounding", tiny_data / "val.json")
    assert "--specs belongs to --grounding" in fails(capsys, "p2", one, out, adapter, "--specs", "raw")
    assert "no such file" in fails(capsys, "p2", one, out, tmp_path / "no.safetensors")
    assert not out.exists()


def test_another_decoder_explains_where_it_is_allowed(images, tmp_path, adapter, capsys, caplog):
    half, picture = tmp_path / "half.pt", next(iter(sorted(images.iterdir())))
    torch.save({key: value.half() for key, value in load_file(PROFILES["micro"].decoder).items()}, half)
    assert explain("p2", [picture], tmp_path / "out", adapter, "--decoder", half) == BAD_INPUT
    assert "precision may be the reason); --allow-other-decoder" in capsys.readouterr().err
    assert explain("p2", [picture], tmp_path / "out", adapter, "--decoder", half, "--allow-other-decoder") == 0
    assert "--allow-other-decoder: the adapter was trained on another decoder" in caplog.text


def test_unreadable_images_are_named_and_the_rest_is_explained(images, tmp_path, adapter, caplog):
    damaged, good = images / "wide.png", sorted(images.iterdir())[0]
    damaged.write_bytes(b"no picture")
    assert explain("p2", [damaged, good], tmp_path / "out", adapter) == PARTIAL
    assert [path.stem for path in (tmp_path / "out").glob("*.npz")] == [good.stem]
    assert "wide.png" in caplog.text
