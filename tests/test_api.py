"""The Python call: equal to the scripts, quick to import, and clear about what it cannot take."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import captioning
import evaluate
import p1_llava_caption
import p2_export
import p2_infer
import p3_attention
from captioning import api
from captioning.data.images import load_image
from captioning.profiles import PROFILES, ROOT

SMALL = ("--profile", "micro", "--device", "cpu", "--max-new-tokens", "8")


pytestmark = pytest.mark.usefixtures("micro")


@pytest.fixture(scope="module")
def run(unbroken):
    return unbroken


@pytest.fixture(scope="module")
def images(tiny_data):
    return sorted((tiny_data / "images" / "val").iterdir())


@pytest.fixture(scope="module")
def captioner(run):
    return captioning.load(run, device="cpu")


@pytest.fixture(scope="module")
def llava():
    return captioning.load("micro", model="llava", device="cpu")


# --- it is there at once --------------------------------------------------------------------------------------------


def test_importing_the_package_loads_no_torch_and_takes_a_moment():
    code = "import sys, time; start = time.process_time(); import captioning; took = time.process_time() - start\n"
    code += "assert not {'torch', 'numpy', 'PIL'} & sys.modules.keys(); print(took)"
    took = [
        float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(took) < 0.2


def test_the_names_are_those_that_the_package_promises():
    assert captioning.load is api.load and captioning.score is api.score
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = captioning.lode


# --- captions and maps are the scripts' -----------------------------------------------------------------------------


def test_captions_and_confidences_are_those_of_the_script(run, captioner, images, tmp_path):
    files = (str(images[0].parent), str(tmp_path / "out.json"), PROFILES["micro"].decoder)
    flags = ("--adapter", str(run / "best.safetensors"), "--beam-size", "3", "--n-best", "3")
    assert p2_infer.main([*files, *flags, *SMALL]) == 0
    expected = json.loads((tmp_path / "out.json").read_text())
    scores = json.loads((tmp_path / "out.scores.json").read_text())
    found = captioner.caption(images, beam_size=3, max_new_tokens=8, n_best=3, batch_size=3)
    assert found == [expected[path.stem] for path in images]
    for path, caption in zip(images, found, strict=True):
        texts, values = zip(*caption.ranked, strict=True)
        assert list(texts) == [row["caption"] for row in scores[path.stem]]
        np.testing.assert_allclose(values, [row["score"] for row in scores[path.stem]], atol=2e-6)


def test_a_path_a_string_and_a_picture_have_the_same_caption(captioner, images):
    path = images[0]
    one = captioner.caption(path, max_new_tokens=8)
    assert isinstance(one, str)
    assert one == captioner.caption(str(path), max_new_tokens=8)
    assert [one] == captioner.caption([Image.open(path)], max_new_tokens=8)
    assert captioner.caption([]) == []


def test_llava_answers_as_in_the_script(llava, images, tmp_path):
    out = tmp_path / "out.json"
    assert p1_llava_caption.main([str(images[0]), str(out), "--num-beams", "2", "--n-best", "2", *SMALL]) == 0
    (expected,) = json.loads(out.read_text()).values()
    (scores,) = json.loads((tmp_path / "out.scores.json").read_text()).values()
    found = llava.caption(images[0], beam_size=2, max_new_tokens=8, n_best=2)
    assert found == expected and [text for text, _ in found.ranked] == [row["caption"] for row in scores]


@pytest.mark.parametrize("model", ["p1", "p2"])
def test_words_and_maps_are_those_of_the_script(model, run, captioner, llava, images, tmp_path):
    flags = ("--adapter", str(run / "best.safetensors"), "--layers", "1", "--heads", "max")
    places = ("--images", str(images[0]), "--out", str(tmp_path))
    assert p3_attention.main(["--model", model, *places, *flags, *SMALL]) == 0
    expected = np.load(tmp_path / f"{images[0].stem}.npz")
    explained = {"p1": llava, "p2": captioner}[model].explain(images[0], layers="1", heads="max", max_new_tokens=8)
    assert explained.words == expected["words"].tolist() and explained.caption == str(expected["caption"])
    np.testing.assert_array_equal(explained.maps, expected["maps"])


def test_a_picture_in_memory_is_explained_and_drawn(captioner, images, tmp_path):
    from captioning.maps import figures, viewer

    of_file = captioner.explain(images[0], max_new_tokens=8, all_maps=True)
    in_memory = captioner.explain(Image.open(images[0]), of_file.caption, all_maps=True)
    np.testing.assert_array_equal(in_memory.maps, of_file.maps)
    assert len(in_memory.word_maps) == len(of_file.word_maps) > 10
    figures.word_grid(in_memory, tmp_path / "words.png")
    viewer.write([in_memory], tmp_path / "viewer.html", "One picture")
    assert (tmp_path / "words.png").stat().st_size and (tmp_path / "viewer.html").stat().st_size


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "I;16"])
def test_a_picture_in_memory_becomes_what_its_file_becomes(mode, tmp_path):
    levels = np.random.default_rng(0).integers(0, 255, (20, 30, 4), dtype=np.uint8)
    made = (
        Image.fromarray(levels, "RGBA").convert(mode)
        if mode != "I;16"
        else Image.fromarray(levels[..., 0].astype(np.uint16) * 257)
    )
    made.save(tmp_path / "a.png")
    for picture in (made, Image.open(tmp_path / "a.png")):
        np.testing.assert_array_equal(np.asarray(api.open_picture(picture)), load_image(tmp_path / "a.png"))


def test_a_photograph_is_turned_as_its_file_is(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), "red").save(tmp_path / "a.jpg", exif=exif)
    assert api.open_picture(Image.open(tmp_path / "a.jpg")).size == load_image(tmp_path / "a.jpg").size == (20, 40)


def llava_folder(out):
    """A folder as p2_export.py writes one, with the micro LLaVA in it: the tiny encoder has no exact export."""
    shutil.copytree(PROFILES["micro"].llava, out / "llava", dirs_exist_ok=True)
    return out


# --- what it loads --------------------------------------------------------------------------------------------------


def test_it_takes_a_run_an_adapter_an_exported_folder_and_a_profile(run, captioner, images, tmp_path, monkeypatch):
    out = tmp_path / "exported"
    assert p2_export.main([str(out), "--adapter", str(run / "best.safetensors"), "--profile", "micro"]) == 0
    profile = replace(PROFILES["micro"], adapter=str(run / "best.safetensors"))
    monkeypatch.setitem(PROFILES, "micro", profile)
    expected = captioner.caption(images[:2], max_new_tokens=8)
    for source in (run / "best.safetensors", str(run), out, out / "adapter", "micro"):
        assert captioning.load(source, device="cpu").caption(images[:2], max_new_tokens=8) == expected
    assert isinstance(captioning.load(llava_folder(out), model="llava", device="cpu"), api.LlavaCaptioner)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nowhere.safetensors", {}, "nowhere.safetensors: no such file"),
        (".", {}, "holds no adapter: none of best.safetensors"),
        ("micro", {"model": "clip"}, "model='clip': use one of captioner, llava"),
        ("nowhere", {"model": "llava"}, "nowhere: no such folder"),
        ("micro", {"model": "llava", "prompt": " "}, "--prompt is empty"),
    ],
)
def test_what_it_cannot_load_it_names(source, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=message.replace(".", r"\.")):
        captioning.load(source, device="cpu", **options)


def test_what_it_cannot_caption_it_names(captioner, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a\.jpg: the file is of no known image format"):
        captioner.caption(tmp_path / "a.jpg")
    with pytest.raises(FileNotFoundError):
        captioner.caption(tmp_path / "b.jpg")
    with pytest.raises(ValueError, match="n_best=4: 2 beams find no more than 2"):
        captioner.caption(tmp_path / "a.jpg", beam_size=2, n_best=4)
    with pytest.raises(ValueError, match="--layers 9: the model has layers 0 to 1"):
        captioner.explain(Image.new("RGB", (48, 48)), "a dog", layers="9")


# --- scores ---------------------------------------------------------------------------------------------------------

EXAMPLES = ROOT / "examples"


def test_scores_are_those_of_the_script(capsys):
    files = ("--pred-file", EXAMPLES / "predictions.json", "--annotation-file", EXAMPLES / "references.json")
    assert evaluate.main([*map(str, files), "--metrics", "cider,rouge"]) == 0
    found = captioning.score(EXAMPLES / "predictions.json", EXAMPLES / "references.json", metrics=["cider", "rouge"])
    assert found.line() in capsys.readouterr().out


def test_chair_with_boxes_is_the_scripts(capsys):
    files = [EXAMPLES / "predictions.json", EXAMPLES / "references.json"]
    flags = ("--pred-file", files[0], "--annotation-file", files[1], "--profile", "micro", "--boxes", "references")
    assert evaluate.main([*map(str, flags), "--metrics", "cider,chair"]) == 0
    found = captioning.score(*files, profile="micro", boxes="references")
    assert list(found.means) == ["CIDEr", "CHAIRs", "CHAIRi", "CHAIR recall"]
    assert found.line() in capsys.readouterr().out


def test_scores_of_files_dicts_and_lists_are_the_same():
    predictions = json.loads((EXAMPLES / "predictions.json").read_text())
    references = evaluate.load_references(EXAMPLES / "references.json")
    expected = captioning.score(EXAMPLES / "predictions.json", EXAMPLES / "references.json")
    assert list(expected.means) == ["CIDEr"]
    assert captioning.score(predictions, references).means == expected.means
    lists = [predictions[key] for key in references], list(references.values())
    assert captioning.score(*lists).means == expected.means


def test_clipscore_takes_a_folder_a_dict_or_a_list_of_pictures(monkeypatch):
    from captioning.profiles import MICRO_WEIGHTS

    monkeypatch.setattr(api, "ClipScorer", lambda *a: evaluate.ClipScorer(str(MICRO_WEIGHTS / "scorer"), None))
    predictions = json.loads((EXAMPLES / "predictions.json").read_text())
    references = evaluate.load_references(EXAMPLES / "references.json")
    paths = {path.stem: path for path in (EXAMPLES / "images").iterdir()}
    means = captioning.score(predictions, references, EXAMPLES / "images").means
    assert list(means) == ["CIDEr", "CLIPScore"]
    assert captioning.score(predictions, references, {key: paths[key] for key in references}).means == means
    order = list(references)
    lists = [predictions[key] for key in order], [references[key] for key in order], [paths[key] for key in order]
    assert captioning.score(*lists).means == means


def test_scores_that_cannot_be_computed_are_an_error_and_not_a_hole():
    with pytest.raises(ValueError, match="must name the same images: 1 missing"):
        captioning.score({"a": "x"}, {"a": ["x"], "b": ["y"]})
    with pytest.raises(FileNotFoundError):
        captioning.score(Path("nowhere.json"), {"a": ["x"]})
    with pytest.raises(ValueError, match=r"CLIPScore: .*images are not there \(no\.jpg, none\.jpg\)"):
        captioning.score(["x", "y"], [["x"], ["y"]], ["no.jpg", "none.jpg"], ["clipscore"])
