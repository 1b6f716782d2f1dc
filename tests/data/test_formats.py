"""formats.py: every layout gives the same references, predictions and samples; what is of none is named."""

import json
import re

import pytest
from caption_layouts import ID_FILES, IDS, PREDICTION_FILES, REFERENCE_FILES, karpathy, write_run
from scoring_examples import PREDICTIONS, REFERENCES, annotation_content

from captioning.data.annotations import load_annotations, load_predictions, load_split, predicted_split
from captioning.data.formats import read_images

HAVE_IDS = ("coco.json", "karpathy.json", "lavis_gt.json")


def written(folder, name, text):
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def annotations_in(folder, name):
    return load_annotations(written(folder, name, REFERENCE_FILES[name]), "test")


@pytest.mark.parametrize("name", REFERENCE_FILES)
def test_references_are_the_same_in_every_layout(tmp_path, name):
    found = annotations_in(tmp_path, name)
    by_stem = {next(s for s in IDS if key in (s, str(IDS[s]))): key for key in found.references}
    assert {stem: found.references[key] for stem, key in by_stem.items()} == REFERENCES
    assert list(by_stem) == list(REFERENCES)
    assert {stem: found.ids.get(key) for stem, key in by_stem.items()} == (
        IDS if name in HAVE_IDS else dict.fromkeys(IDS)
    )


@pytest.mark.parametrize("references", [name for name in REFERENCE_FILES if name != "lavis_gt.json"])
@pytest.mark.parametrize("name", PREDICTION_FILES)
def test_predictions_by_name_fit_references_of_every_layout_with_names(tmp_path, references, name):
    file = written(tmp_path, f"pred_{name}", PREDICTION_FILES[name])
    assert load_predictions(file, annotations_in(tmp_path, references)) == PREDICTIONS


@pytest.mark.parametrize("references", HAVE_IDS)
@pytest.mark.parametrize("name", ID_FILES)
def test_predictions_by_id_fit_references_with_ids(tmp_path, references, name):
    annotations = annotations_in(tmp_path, references)
    keys = {number: key for key, number in annotations.ids.items()}
    found = load_predictions(written(tmp_path, f"pred_{name}", ID_FILES[name]), annotations)
    assert found == {keys[IDS[stem]]: caption for stem, caption in PREDICTIONS.items()}


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_captioning_runs_folder_and_its_parts_are_predictions(tmp_path, form):
    if form == "parquet":
        pytest.importorskip("pyarrow")
    annotations = annotations_in(tmp_path, "coco.json")
    some, others = ({s: PREDICTIONS[s] for s in half} for half in ("ab", "cd"))
    folder = write_run(tmp_path / f"out.{form}", [some, {f"00/{s}": c for s, c in others.items()}], form)
    assert load_predictions(folder, annotations) == PREDICTIONS
    assert load_predictions(folder / f"0.{form}", annotations) == some
    assert load_predictions(folder / f"0.{form}") == some
    part = folder / f"1.{form}"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"1\.{form}: damaged since it was written"):
        load_predictions(folder, annotations)
    (folder / "_manifest.json").unlink()
    with pytest.raises(ValueError, match=r"without _manifest\.json, .* run the same command again"):
        load_predictions(folder, annotations)


def test_parquet_files_of_others_are_read_by_their_columns(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"image_id": IDS[s], "caption": c, "image_bytes": b"x"} for s, c in PREDICTIONS.items()]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "pred.parquet")
    assert load_predictions(tmp_path / "pred.parquet", annotations_in(tmp_path, "coco.json")) == PREDICTIONS
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"bad\.parquet: not a Parquet file of captions"):
        load_predictions(tmp_path / "bad.parquet")


@pytest.mark.parametrize("mark", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["captions.txt", "Flickr8k.token.txt", "metadata.jsonl", "stems.json"])
def test_every_text_may_have_a_byte_order_mark(tmp_path, name, mark):
    file = tmp_path / name
    file.write_bytes(REFERENCE_FILES[name].replace("\n", "\r\n").encode(mark))
    assert load_annotations(file).references == REFERENCES


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFERENCE_FILES)
@pytest.mark.parametrize("inner", ["", "val2014"])
def test_training_takes_every_layout(tmp_path, name, inner):
    """Images are found by name, in the folder that the file names or without, and by number where there is no name."""
    root = tmp_path / "images" / "test" / inner
    root.mkdir(parents=True)
    for stem in REFERENCES:
        (root / (f"COCO_val2014_{IDS[stem]:012d}.jpg" if name == "lavis_gt.json" else f"{stem}.png")).touch()
    suffix = "." + name.rpartition(".")[2]
    (tmp_path / f"test{suffix}").write_text(REFERENCE_FILES[name])
    if inner and not any(layout in name for layout in ("karpathy", "lavis_train", "lavis_val")):
        with pytest.raises(FileNotFoundError, match=r"4 of the 4 images that .* names are not there"):
            load_split(tmp_path, "test")
        return
    samples = load_split(tmp_path, "test")
    assert [list(sample.captions) for sample in samples] == list(REFERENCES.values())
    assert all(sample.path.parent == root and sample.path.is_file() for sample in samples)
    assert name not in HAVE_IDS or [sample.image_id for sample in samples] == list(IDS.values())


def test_karpathys_train_is_train_and_restval_and_other_splits_are_named(tmp_path):
    for split in ("train", "val", "dev"):
        (tmp_path / f"{split}.json").write_text(REFERENCE_FILES["karpathy.json"])
        (tmp_path / "images" / split).mkdir(parents=True)
        for stem in "xyzabcd":
            (tmp_path / "images" / split / f"{stem}.png").touch()
    assert [sample.path.stem for sample in load_split(tmp_path, "train")] == ["x", "y"]
    assert [sample.path.stem for sample in load_split(tmp_path, "val")] == ["z"]
    with pytest.raises(ValueError, match=r"dev\.json: has no split 'dev'; its splits are test, train, val"):
        load_split(tmp_path, "dev")


def test_two_files_of_one_split_are_refused(tmp_path):
    for name in ("train.json", "train.csv"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"train\.json, train\.csv could be meant; leave one of them there"):
        load_split(tmp_path, "train")


# --- splits ---------------------------------------------------------------------------------------------------------


def test_the_split_that_is_predicted_is_scored(tmp_path):
    file = written(tmp_path, "karpathy.json", REFERENCE_FILES["karpathy.json"])
    everything = load_annotations(file)
    assert predicted_split(file, everything, [PREDICTIONS]) == load_annotations(file, "test")
    assert list(predicted_split(file, everything, [{"x": "", "y": ""}]).references) == ["x", "y"]
    assert predicted_split(file, everything, [{"elsewhere": ""}]) == everything
    with pytest.raises(ValueError, match=r"karpathy\.json: the predictions are of its splits test, val; .* --split"):
        predicted_split(file, everything, [PREDICTIONS, {"z": ""}])
    assert list(load_annotations(file, "test, val").references) == ["a", "b", "c", "d", "z"]


def test_the_flickr_files_of_karpathy_have_no_folder_and_no_cocoid(tmp_path):
    content = karpathy()
    for image in content["images"]:
        del image["filepath"], image["cocoid"]
    found = load_annotations(written(tmp_path, "dataset_flickr8k.json", json.dumps(content)), "test")
    assert found.references == REFERENCES
    assert found.file_names["a"] == "a.png"
    assert sorted(found.ids.values()) == [996, 997, 998, 999]


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"image": "a.jpg", "caption": "a dog"}', "could mean .* or .*; write it as "),
        ("a.json", "a dog runs\n", "of no known layout, which are: "),
        ("a.json", "5", "of no known layout, which are: "),
        ("a.json", "{}", "holds no image"),
        ("a.jsonl", "", "holds no image"),
        ("a.json", '{"": "a dog"}', "an image is called '', which is empty"),
        ("a.json", '{"\\ud83d": "a dog"}', "an image is called '.ud83d', which is empty or not valid Unicode"),
        ("a.json", '[{"caption": "a dog"}]', "record 1 names no image: it needs one of key, file_name"),
        ("a.json", '[{"image": "a"}]', "record 1 has none of caption"),
        ("a.json", '[{"image": 5, "caption": "x"}]', "record 1 needs .* as non-empty text in valid Unicode, not 5"),
        ("a.json", '[{"image_id": 1.5, "caption": "x"}]', "record 1 needs image_id .*, not 1.5"),
        ("a.json", '[{"image_id": true, "caption": "x"}]', "record 1 needs image_id .*, not True"),
        (
            "a.json",
            '[{"image": "a", "file_name": "b", "caption": "x"}]',
            "'file_name' 'b' and 'image' 'a'; it needs one",
        ),
        ("a.json", '[{"image": "a", "caption": "x", "text": "y"}]', "'caption' 'x' and 'text' 'y'; it needs one"),
        ("a.json", '[["a", "x"]]', "record 1 must be an object with image and caption"),
        ("a.jsonl", '{"image": "a", "caption": "x"}\n{"image": "b", "cap', r"line 2: not a JSON value .*cut off\?"),
        ("a.jsonl", '{"image": "a", "caption": "x"}\n{"image": b}\n{}', r"line 2: not a JSON value [^?]*$"),
        ("a.json", '{"a": "x"}\n{"b": "y"}', "record 1 names no image"),
        ("a.txt", "a.jpg#0\ta dog\na.jpg#0\tone dog\n", "line 2: a.jpg#0 a second time"),
        ("a.txt", "a.jpg#0\ta dog\nb.jpg a cat\n", "line 2: needs NAME.jpg#0, a tab and a caption, not 'b.jpg a cat'"),
        (
            "a.csv",
            "image,caption\na.jpg,a dog, and a cat\n",
            "line 2: 3 cells with ',' between, and 2 in the first line",
        ),
        ("a.csv", 'image,caption\na.jpg,"a dog\nb.jpg,a cat\n', "line 3: unexpected end of data"),
        ("a.csv", 'image,caption\na.jpg,"a" dog\n', "line 2: ',' expected after '\"'"),
        ("a.csv", "image|caption\na.jpg|a dog\nb.jpg a cat\n", "line 3: 1 cells with '|' between"),
        (
            "a.json",
            '{"images": [{"filename": "a.jpg", "sentences": 5}]}',
            r"images\[0\] \(a.jpg\) needs a list 'sentences'",
        ),
        ("a.json", '{"images": [{"filename": "a.jpg", "sentences": []}, 5]}', r"images\[1\] "),
        ("a.json", '{"images": [{"filename": "a.jpg", "split": [1], "sentences": []}]}', r"images\[0\] needs split "),
        ("a.json", '{"images": [{"filename": "a.jpg", "filepath": 5, "sentences": []}]}', r"images\[0\] needs filep"),
        ("a.json", '{"images": [{"id": 1}], "annotations": [{"image_id": 2, "caption": "x"}]}', "does not list: 2"),
        ("a.json", '{"images": [{"id": 1.5}], "annotations": []}', r"images\[0\] needs 'id' as an integer or text"),
    ],
)
def test_what_is_of_no_layout_is_refused_with_what_is_wrong(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path / name))}:? .*{message}".replace("a.j", "a[.]j")):
        read_images(written(tmp_path, name, text))


EMPTY = ("", " \\n", "half \\ud83d")  # in JSON; other text cannot hold the last two


@pytest.mark.parametrize(
    ("name", "text"), [(name, text) for name in REFERENCE_FILES for text in (EMPTY if "json" in name else EMPTY[:1])]
)
def test_an_empty_caption_is_no_reference_in_any_layout(tmp_path, name, text):
    file = written(tmp_path, name, REFERENCE_FILES[name].replace("two green cubes beside a red ball", text))
    with pytest.raises(ValueError, match=r"'(val2014/)?(b|b\.png)' must be non-empty |needs 'caption' as non-empty "):
        load_annotations(file, "test")


def test_ids_without_names_may_be_text_and_must_differ(tmp_path):
    content = {
        "images": [{"id": "a"}, {"id": 7}],
        "annotations": [{"image_id": "a", "caption": "x"}, {"image_id": 7, "caption": "y"}],
    }
    found = load_annotations(written(tmp_path, "gt.json", json.dumps(content)))
    assert (found.references, found.ids) == ({"a": ["x"], "7": ["y"]}, {"7": 7})
    assert load_predictions(written(tmp_path, "p.json", '{"a.jpg": "1", "COCO_val2014_000000000007": "2"}'), found) == {
        "a": "1",
        "7": "2",
    }
    content["images"][1]["id"] = "a"
    with pytest.raises(ValueError, match="two images have the id 'a'"):
        load_annotations(written(tmp_path, "gt.json", json.dumps(content)))


def test_a_missing_file_is_named_whatever_its_suffix(tmp_path):
    for name in ("a.json", "a.parquet", "a.txt", "folder"):
        with pytest.raises(FileNotFoundError, match=f"{name}: no such file"):
            read_images(tmp_path / name)


def test_references_go_to_the_other_flag(tmp_path):
    file = written(tmp_path, "val.json", json.dumps(annotation_content()))
    with pytest.raises(
        ValueError, match=r"val\.json: 'a\.png' must have one caption, not 3; .* which go to --annotation-file"
    ):
        load_predictions(file)
