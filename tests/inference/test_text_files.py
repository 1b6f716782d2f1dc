"""text_files.py and the scores of folder.py: what is written beside the one JSON, and what is refused."""

import json

import pytest
from level_captioner import Interrupted, grey

from captioning.data.ranked import Ranked
from captioning.inference.batches import Entry, Job
from captioning.inference.folder import PredictionLog, caption_images
from captioning.inference.text_files import TextFiles


def say_ranked(levels):
    return [Ranked([(f"level {level}", -level / 8), ("a level", -9.0)]) for level in levels]


def run(out, images, caption=say_ranked, texts=None, settings=None):
    entries = [Entry.of(path) for path in images]
    with PredictionLog(out, settings or {"n_best": 2}, overwrite=True, texts=texts) as predictions:
        predictions.check_texts(entries)
        caption_images(predictions, entries, Job(grey, caption), 3)
        return predictions.finish(entries)


def test_scores_are_in_a_file_of_their_own(tmp_path, images):
    out = tmp_path / "out.json"
    run(out, images)
    assert json.loads(out.read_text()) == {str(k): f"level {k}" for k in range(7)}
    scores = json.loads((tmp_path / "out.scores.json").read_text())
    assert list(scores) == [str(k) for k in range(7)]
    assert scores["4"] == [{"caption": "level 4", "score": -0.5}, {"caption": "a level", "score": -9.0}]


def run_until_the_second_batch(out, images):
    """Leave what a run leaves that is interrupted there."""
    calls = []

    def breaking(levels):
        calls.append(levels)
        if len(calls) == 2:
            raise Interrupted
        return say_ranked(levels)

    with pytest.raises(Interrupted):
        run(out, images, breaking)


def test_a_run_that_is_resumed_has_all_scores(tmp_path, images):
    run_until_the_second_batch(tmp_path / "out.json", images)
    run(tmp_path / "out.json", images)
    run(tmp_path / "whole.json", images)
    assert (tmp_path / "out.scores.json").read_bytes() == (tmp_path / "whole.scores.json").read_bytes()


def test_a_damaged_score_is_made_again(tmp_path, images):
    run_until_the_second_batch(tmp_path / "out.json", images)
    part = tmp_path / "out.json.part.jsonl"
    part.write_text(part.read_text().replace("-0.125", "-0.625"))
    seen = []
    run(tmp_path / "out.json", images, lambda levels: seen.extend(levels) or say_ranked(levels))
    assert seen == [1, 3, 4, 5, 6]


def test_no_other_runs_scores_stay_beside_a_result(tmp_path, images):
    run(tmp_path / "out.json", images)
    run(tmp_path / "out.json", images, lambda levels: ["other"] * len(levels), settings={"n": 0})
    assert not (tmp_path / "out.scores.json").exists()


def test_a_text_file_beside_each_picture(tmp_path, images):
    images[2].write_bytes(b"no picture")
    run(tmp_path / "out.json", images, texts=TextFiles(None))
    assert images[4].with_suffix(".txt").read_text() == "level 4\n"
    assert not images[2].with_suffix(".txt").exists()


def test_text_files_in_a_folder_that_keys_may_divide(tmp_path, images):
    texts = TextFiles(tmp_path / "new" / "texts")
    texts.write([Entry("sub/a", "a.png", images[0])], {"sub/a": "words"})
    assert (tmp_path / "new" / "texts" / "sub" / "a.txt").read_text() == "words\n"


def test_other_text_files_are_kept(tmp_path, images):
    mine = images[3].with_suffix(".txt")
    mine.write_text("by hand")
    with pytest.raises(ValueError, match=r"--txt: there already: .*3\.txt; give --overwrite"):
        run(tmp_path / "out.json", images, texts=TextFiles(None))
    assert mine.read_text() == "by hand"
    assert not list(tmp_path.glob("out*"))
    run(tmp_path / "out.json", images, texts=TextFiles(None, overwrite=True))
    assert mine.read_text() == "level 3\n"


def test_a_run_killed_among_its_text_files_goes_on(tmp_path, images, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("captioning.inference.folder.write_json", lambda *_: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            run(tmp_path / "out.json", images, texts=TextFiles(None))
    assert len(run(tmp_path / "out.json", images, texts=TextFiles(None))) == 7


def test_a_folder_that_is_a_file_is_refused(tmp_path, images):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match=r"--txt .*taken: cannot be written \(.*\); name another with --txt"):
        TextFiles(tmp_path / "taken").check([Entry.of(images[0])], {})
