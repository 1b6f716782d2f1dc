"""What is cheap to check is checked before a model is built, and all scripts have one rule for an existing OUT.json."""

import json
import shutil

import pytest

import evaluate
import p1_llava_caption
import p2_export
import p2_infer
import p2_train
import p3_attention
from captioning.cli import BAD_INPUT
from captioning.profiles import PROFILES
from captioning.training import setup


class TooEarlyError(Exception):
    """A model is built before everything cheap was looked at."""


def built(*args, **kwargs):
    raise TooEarlyError


@pytest.fixture(autouse=True)
def expensive(monkeypatch, micro):
    """Every model is too expensive to be built."""
    for module, name in [
        (p1_llava_caption, "load_llava"),
        (p2_infer, "load_captioner"),
        (p2_export, "load_decoder"),
        (p3_attention, "load_captioner"),
        (p3_attention, "load_llava"),
        (setup, "make_models"),
        (evaluate.Evaluator, "evaluate"),
    ]:
        monkeypatch.setattr(module, name, built)


@pytest.fixture
def taken(tmp_path):
    """A file where a folder is wanted, into which nothing can be written; permissions do not stop root."""
    (tmp_path / "taken").write_text("mine")
    return tmp_path / "taken"


def refused(capsys, script, *arguments):
    assert script.main(["--profile", "micro", *map(str, arguments)]) == BAD_INPUT
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_a_model_would_be_built_where_nothing_is_wrong(tmp_path):
    with pytest.raises(TooEarlyError):
        p2_train.main(["--profile", "micro", "--out", str(tmp_path / "run")])


@pytest.mark.parametrize("split", ["train", "val"])
def test_training_reads_its_captions_first(split, tiny_data, tmp_path, capsys):
    """It took 16 s and a model until a missing train.json was noticed; val.json, after the images of train."""
    data = shutil.copytree(tiny_data, tmp_path / "data")
    (data / f"{split}.json").unlink()
    assert f"{split}.json: no such file" in refused(capsys, p2_train, "--data", data, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("flag", "what"), [("--cache", "tokens"), ("--out", "run")])
def test_training_where_nothing_can_be_written_names_the_flag(flag, what, taken, tmp_path, capsys):
    """From a read-only folder, `[Errno 30] Read-only file system: 'cache'` named no flag, after the model was built."""
    folders = {"--out": tmp_path / "run", "--cache": tmp_path / "tokens"} | {flag: taken / what}
    message = refused(capsys, p2_train, *(word for pair in folders.items() for word in pair))
    assert message == f"error: {flag} {taken / what}: cannot be written (Not a directory); name another with {flag}"
    assert not (tmp_path / "tokens").exists()  # nor is a folder left behind by the check


def test_scores_are_not_made_where_they_cannot_be_written(tiny_data, taken, capsys):
    files = ("--pred-file", "pred.json", "--annotation-file", tiny_data / "val.json")
    for flag, name in (("--json", "s.json"), ("--per-image", "s.csv"), ("--html", "s.html")):
        message = refused(capsys, evaluate, *files, "--images-root", tiny_data, flag, taken / name)
        assert message.startswith(f"error: {flag} {taken}: cannot be written")


def test_both_files_are_held_against_the_references_before_one_is_scored(tiny_data, tmp_path, capsys):
    stems = [path.stem for path in sorted((tiny_data / "images" / "val").iterdir())]
    for name, some in (("all.json", stems), ("few.json", stems[1:])):
        (tmp_path / name).write_text(json.dumps(dict.fromkeys(some, "a bike")))
    files = ("--pred-file", tmp_path / "all.json", "--annotation-file", tiny_data / "val.json")
    message = refused(capsys, evaluate, *files, "--metrics", "cider", "--compare", tmp_path / "few.json")
    assert stems[0] in message


def test_maps_read_their_files_first(tiny_data, tmp_path, taken, capsys):
    images = ("--images", tiny_data / "images" / "val", "--model", "p1")
    message = refused(capsys, p3_attention, *images, "--out", taken / "maps")
    assert message.startswith(f"error: --out {taken / 'maps'}: cannot be written")
    out = ("--out", tmp_path / "maps")
    assert "gone.json" in refused(capsys, p3_attention, *images, *out, "--grounding", "gone.json")
    few = tmp_path / "few.json"
    few.write_text(json.dumps({"nowhere": {"CLIPScore": 0.5, "caption": "a bike"}}))
    pair = ("--best-worst", few, "--annotation-file", tiny_data / "val.json")
    assert "nowhere" in refused(capsys, p3_attention, *images, *out, *pair)


def test_an_export_looks_at_tokenizer_and_folder_first(tmp_path, taken, capsys):
    assert "encoder.json" in refused(capsys, p2_export, tmp_path / "export", "--tokenizer", tmp_path)
    assert refused(capsys, p2_export, taken / "export").startswith(f"error: OUT {taken / 'export'}: cannot be written")


# ------------------------------------------------------------------------------------------------ an existing OUT.json


@pytest.fixture
def commands(tiny_data, tmp_path):
    """The command of each captioning script, for a folder and for a list."""
    (tmp_path / "adapter.safetensors").write_bytes(b"")
    images, out = tiny_data / "images" / "val", tmp_path / "out.json"
    (tmp_path / "list.txt").write_text("\n".join(map(str, images.iterdir())))

    def words(script, source):
        first = [str(images if source == "folder" else tmp_path / "list.txt"), str(out), "--profile", "micro"]
        own = [PROFILES["micro"].decoder, "--adapter", str(tmp_path / "adapter.safetensors")]
        return first + own * (script is p2_infer)

    return words


@pytest.mark.parametrize("source", ["folder", "list"])
@pytest.mark.parametrize("script", [p1_llava_caption, p2_infer], ids=["p1", "p2"])
def test_an_existing_out_is_replaced_unless_it_is_to_be_kept(script, source, commands, tmp_path, capsys, monkeypatch):
    """p1 refused it without --overwrite, p2 replaced it, and both refused it for a list."""
    monkeypatch.setattr(p2_infer, "settle_search", lambda args: None)
    monkeypatch.setattr(p2_infer, "describe_models", lambda args: {})
    out = tmp_path / "out.json"
    out.write_text("precious")
    words = commands(script, source)
    assert script.main([*words, "--keep"]) == BAD_INPUT
    assert f"{out}: exists already; leave out --keep to replace it" in capsys.readouterr().err
    for more in ([], ["--overwrite"]):
        with pytest.raises(TooEarlyError):
            script.main([*words, *more])
    assert out.read_text() == "precious"  # until there is something to replace it


@pytest.mark.parametrize("source", ["folder", "list"])
@pytest.mark.parametrize("script", [p1_llava_caption, p2_infer], ids=["p1", "p2"])
def test_captions_are_not_made_where_they_cannot_be_written(script, source, commands, taken, capsys, monkeypatch):
    """Text files in a folder that could not be made were missed when all captions were there."""
    monkeypatch.setattr(p2_infer, "describe_models", lambda args: {})
    monkeypatch.setattr(p2_infer, "settle_search", lambda args: None)
    images, _, *others = commands(script, source)
    assert script.main([images, str(taken / "deep" / "out.json"), *others]) == BAD_INPUT
    assert f"error: OUT {taken / 'deep'}: cannot be written (Not a directory)" in capsys.readouterr().err
    if source == "folder":
        out = str(taken.parent / "out.json")
        assert script.main([images, out, *others, f"--txt={taken / 'texts'}"]) == BAD_INPUT
        assert f"error: --txt {taken / 'texts'}: cannot be written (Not a directory)" in capsys.readouterr().err


def test_a_table_of_both_settings_is_kept_too(tiny_data, tmp_path, capsys):
    (tmp_path / "out.json").write_text("precious")
    words = (tiny_data / "images" / "val", tmp_path / "out.json", "--compare")
    message = refused(capsys, p1_llava_caption, *words, "--annotation-file", tiny_data / "val.json", "--keep")
    assert "leave out --keep" in message
