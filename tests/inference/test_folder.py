"""inference/folder.py: a folder into one JSON - side files, resuming, several processes."""

import fcntl
import json
import unicodedata
from typing import ClassVar

import pytest
from level_captioner import Interrupted, breaking_after, grey, say

from captioning.distributed import Processes
from captioning.files import HeldError
from captioning.inference import append_log, folder
from captioning.inference.batches import Entry, Job
from captioning.inference.folder import PredictionLog, caption_images

RUN = {"model": "m", "beams": (1, 2)}


def run(out, images, caption=say, batch_size=3, **kwargs):
    with PredictionLog(out, RUN, **kwargs) as predictions:
        entries = list(map(Entry.of, images))
        caption_images(predictions, entries, Job(grey, caption), batch_size)
        return predictions.finish(entries)


def test_every_image_has_its_caption_and_the_side_file_goes(tmp_path, images):
    out = tmp_path / "new" / "out.json"
    captions = run(out, images)
    assert captions == json.loads(out.read_text()) == {str(k): f"level {k}" for k in range(7)}
    assert [p.name for p in out.parent.iterdir()] == ["out.json"]


def test_a_run_is_resumed_where_it_was_interrupted(tmp_path, images):
    out = tmp_path / "out.json"
    with pytest.raises(Interrupted):
        run(out, images, breaking_after(1))
    assert not out.exists()
    seen = []
    captions = run(out, images, lambda levels: seen.extend(levels) or say(levels))
    assert seen == [3, 4, 5, 6]
    assert captions == {str(k): f"level {k}" for k in range(7)}


def test_a_torn_last_line_is_captioned_again(tmp_path, images):
    out = tmp_path / "out.json"
    with pytest.raises(Interrupted):
        run(out, images, breaking_after(1))
    part = tmp_path / "out.json.part.jsonl"
    part.write_bytes(part.read_bytes()[:-7])
    assert run(out, images) == {str(k): f"level {k}" for k in range(7)}


def test_another_run_is_neither_resumed_nor_dropped(tmp_path, images):
    out = tmp_path / "out.json"
    with pytest.raises(Interrupted):
        run(out, images, breaking_after(1))
    before = (tmp_path / "out.json.part.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"another run \(other model\)"):
        PredictionLog(out, {**RUN, "model": "n"})
    assert (tmp_path / "out.json.part.jsonl").read_bytes() == before
    with PredictionLog(out, {**RUN, "model": "n"}, overwrite=True) as predictions:
        assert predictions.captions == {}


def test_another_runs_captions_stay_until_there_is_a_model_to_replace_them(tmp_path, images, caplog):
    """`p2_infer.py … mistyped.bin` dropped hours of captions, and then found that there was no such file."""
    out, part, other = tmp_path / "out.json", tmp_path / "out.json.part.jsonl", {**RUN, "model": "n"}
    with pytest.raises(Interrupted):
        run(out, images, breaking_after(1))
    (tmp_path / "out.json.part1.jsonl").write_text('{"run": ' + json.dumps(RUN) + "}\n" + kept("6", "level 6"))
    before = {path: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
    assert len(before) == 2
    with pytest.raises(FileNotFoundError), PredictionLog(out, other, overwrite=True):
        raise FileNotFoundError("mistyped.bin")
    assert {path: path.read_bytes() for path in tmp_path.glob("*.jsonl")} == before
    out.write_text("{}")
    with pytest.raises(ValueError, match="leave out --keep"):  # nor is what is to be kept replaced by going on
        run(out, images, keep=True)
    assert {path: path.read_bytes() for path in tmp_path.glob("*.jsonl")} == before
    with PredictionLog(out, other, overwrite=True) as predictions:
        entries = list(map(Entry.of, images))
        caption_images(predictions, entries, Job(grey, say), 3)
        assert "out.json.part.jsonl: 4 captions of an interrupted run with other settings are dropped" in caplog.text
        assert json.loads(part.read_text().splitlines()[0])["run"]["model"] == "n"
        assert len(predictions.finish(entries)) == 7
    assert not list(tmp_path.glob("*.jsonl"))


def test_a_damaged_side_file_is_named(tmp_path, images):
    part = tmp_path / "out.json.part.jsonl"
    part.write_text("nonsense\n")
    with pytest.raises(ValueError, match="damaged"):
        run(tmp_path / "out.json", images)
    assert part.read_text() == "nonsense\n"
    assert len(run(tmp_path / "out.json", images, overwrite=True)) == 7


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_damaged_line_is_captioned_again_and_the_others_are_kept(tmp_path, images, caplog, overwrite):
    """A flipped letter in the side file got into the final captions; with overwriting damage cost them all."""
    out, part = tmp_path / "out.json", tmp_path / "out.json.part.jsonl"
    with pytest.raises(Interrupted):
        run(out, images, breaking_after(2))
    part.write_text(part.read_text().replace("level 1", "level 9").replace('"level 4"', "\x00"))
    seen = []
    captions = run(out, images, lambda levels: seen.extend(levels) or say(levels), overwrite=overwrite)
    assert seen == [1, 4, 6]
    assert captions == {str(k): f"level {k}" for k in range(7)}
    assert "2 lines are damaged" in caplog.text


def test_a_side_file_removed_between_open_and_lock_is_made_again(tmp_path, images, monkeypatch):
    """Captions went into a file without a name, and the run ended in an error when it removed it."""
    lock, calls = fcntl.flock, []

    def finished_meanwhile(file, mode):
        calls.append(mode)
        if len(calls) == 1:
            (tmp_path / "out.json.part.jsonl").unlink()
        lock(file, mode)

    monkeypatch.setattr(fcntl, "flock", finished_meanwhile)
    assert len(run(tmp_path / "out.json", images)) == 7


def test_an_existing_result_is_kept_where_that_is_asked_for(tmp_path, images):
    out = tmp_path / "out.json"
    out.write_text("precious")
    with pytest.raises(ValueError, match="leave out --keep"):
        run(out, images, keep=True)
    assert out.read_text() == "precious"
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["out.json"]
    assert len(run(out, images)) == 7
    with pytest.raises(ValueError, match="is a folder"):
        run(tmp_path, images)


def test_a_run_that_fails_at_its_start_leaves_no_trace(tmp_path):
    with pytest.raises(Interrupted), PredictionLog(tmp_path / "out.json", RUN):
        raise Interrupted
    assert list(tmp_path.iterdir()) == []


def test_two_writers_do_not_mix(tmp_path):
    with PredictionLog(tmp_path / "o.json", RUN), pytest.raises(HeldError, match="another run is writing it"):
        PredictionLog(tmp_path / "o.json", RUN)


def test_unreadable_images_are_named_and_the_rest_is_captioned(tmp_path, images, caplog):
    images[2].write_bytes(b"no picture")
    captions = run(tmp_path / "out.json", images)
    assert set(captions) == set("013456")
    assert str(images[2]) in caplog.text
    assert "1 of 7 images were not captioned" in caplog.text


def test_nothing_readable_is_an_error(tmp_path, images):
    for path in images:
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 7 images"):
        run(tmp_path / "out.json", images)
    assert not (tmp_path / "out.json").exists()


# -------------------------------------------------------------------------------------------------- several processes


def kept(image, caption):
    return json.dumps({"image": image, "caption": caption, "check": append_log.checksum(image, caption)}) + "\n"


class Pretended(Processes):
    """One of several processes, of which the others have always come already; notes where it waits for them."""

    events: ClassVar[list[str]] = []

    def wait(self):
        self.events.append("wait")

    def from_first(self, work):
        result = work() if self.first else {}
        self.events.append("wait for the first")
        return result


@pytest.mark.parametrize("rank", [0, 1])
def test_no_process_ends_before_the_result_is_written(tmp_path, images, monkeypatch, rank):
    """With an image that cannot be read all ended with exit code 3, and the launcher killed the one still writing."""
    processes = Pretended(rank, 2)
    monkeypatch.setattr(folder, "write_json", lambda *words: processes.events.append("write"))
    with PredictionLog(tmp_path / "out.json", RUN, processes=processes) as predictions:
        entries = list(map(Entry.of, images))
        caption_images(predictions, entries, Job(grey, say), 3)
        processes.events.clear()
        predictions.finish(entries)
    assert processes.events == (
        ["wait", "write", "wait for the first"] if rank == 0 else ["wait", "wait for the first"]
    )


def test_a_damaged_side_file_of_another_process_is_dropped_where_overwriting_is_allowed(tmp_path, images):
    """p2_infer.py, which always overwrites, asked for a flag that it did not have."""
    (tmp_path / "out.json.part.jsonl").write_text('{"run": ' + json.dumps(RUN) + "}\n" + kept("1", "kept"))
    (tmp_path / "out.json.part1.jsonl").write_text("nonsense\n" + kept("2", "lost"))
    captions = run(tmp_path / "out.json", images, overwrite=True)
    assert captions == {str(k): f"level {k}" for k in range(7)} | {"1": "kept"}


def test_side_files_of_another_run_are_refused_by_all(tmp_path, images):
    part = tmp_path / "out.json.part1.jsonl"
    part.write_text('{"run": {"model": "other"}}\n' + kept("1", "theirs"))
    with pytest.raises(ValueError, match=r"part1\.jsonl belongs to another run \(other model"):
        run(tmp_path / "out.json", images)
    assert "theirs" in part.read_text()
    assert len(run(tmp_path / "out.json", images, overwrite=True)) == 7
    assert not part.exists()


def test_every_image_belongs_to_one_process(tmp_path, images):
    seen = []
    for rank in (1, 2, 0):
        with PredictionLog(tmp_path / "out.json", RUN, processes=Pretended(rank, 3)) as predictions:
            predictions.captions.clear()  # as if all had started at once
            job = Job(grey, lambda levels: seen.extend(levels) or say(levels))
            entries = list(map(Entry.of, images))
            caption_images(predictions, entries, job, 2)
            if rank == 0:
                assert len(predictions.finish(entries)) == 7
    assert sorted(seen) == list(range(7))


def test_a_side_file_with_names_in_the_other_form_of_unicode_is_resumed(tmp_path, images):
    """An earlier version keyed by the name as the disk has it."""
    split, composed = (unicodedata.normalize(form, "é") for form in ("NFD", "NFC"))
    images[0] = images[0].rename(tmp_path / "images" / f"{split}.png")
    lines = [
        {"run": {"model": "m", "beams": [1, 2]}},
        {"image": split, "caption": "old", "check": append_log.checksum(split, "old")},
    ]
    (tmp_path / "out.json.part.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    seen = []
    captions = run(tmp_path / "out.json", images, lambda levels: seen.extend(levels) or say(levels))
    assert captions == {composed: "old", **{str(k): f"level {k}" for k in range(1, 7)}}
    assert seen == [1, 2, 3, 4, 5, 6]
