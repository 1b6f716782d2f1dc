"""worker.py: a shard is captioned once, whatever interrupts it, and again when it has changed."""

import pytest
from level_captioner import Interrupted, breaking_after, picture, say
from shard_runs import EXPECTED, contents, pictures, renamed, results, run, write_tar

from captioning.cli import PARTIAL


@pytest.mark.parametrize("form", ["json", "jsonl", "parquet"])
def test_a_run_interrupted_anywhere_ends_like_one_that_was_not(tars, tmp_path, form):
    if form == "parquet":
        pytest.importorskip("pyarrow")
    write_tar(tars.parent / "1.tar", [*pictures(5, 12), ("003.png", picture(0)), ("bad.png", b"")])
    assert run(tars, tmp_path / f"whole.{form}") == PARTIAL
    expected = contents(tmp_path / f"whole.{form}")
    for calls in range(9):
        out, seen = tmp_path / f"broken{calls}.{form}", []
        with pytest.raises(Interrupted):
            run(tars, out, breaking_after(calls, seen))
        assert run(tars, out, lambda levels, seen=seen: seen.extend(levels) or say(levels)) == PARTIAL
        assert sorted(seen) == [0, *range(16)]  # no image is captioned again; 003 of 1.tar is grey level 0
        assert renamed(contents(out), f"broken{calls}", "whole") == expected


def test_a_torn_or_damaged_line_is_captioned_again(tars, tmp_path):
    out, seen = tmp_path / "out.jsonl", []
    with pytest.raises(Interrupted):
        run(tars, out, breaking_after(2, seen))
    side = out / "_state" / "0.part.jsonl"
    side.write_text(side.read_text().replace("level 1", "level 7")[:-3])
    run(tars, out, lambda levels: seen.extend(levels) or say(levels))
    assert sorted(seen) == sorted([*range(16), 1, 3])
    assert results(out) == EXPECTED


def test_of_a_finished_run_only_changed_shards_are_captioned_again(tars, tmp_path):
    out, seen = tmp_path / "out.jsonl", []
    run(tars, out)
    before = contents(out)
    assert run(tars, out, breaking_after(0, seen)) == 0
    assert contents(out) == before
    write_tar(tars.parent / "1.tar", pictures(50, 53))
    assert run(tars, out, lambda levels: seen.extend(levels) or say(levels)) == 0
    assert seen == [50, 51, 52]
    assert set(results(out)) == {f"{k:03d}" for k in (*range(5), *range(12, 16), 50, 51, 52)}
    (out / "2.jsonl").unlink()
    assert run(tars, out, lambda levels: seen.extend(levels) or say(levels)) == 0
    assert seen[3:] == [12, 13, 14, 15]


def test_images_that_could_be_read_later_are_captioned_on_demand(tmp_path):
    """A disk that was away for a moment: a finished shard is not looked at again unless it is asked for."""
    for name, content in pictures(0, 4):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "list.txt").write_text("".join(f"{n:03d}.png\n" for n in range(6)))
    out, seen = tmp_path / "out.jsonl", []
    assert run(tmp_path / "list.txt", out, shard_size=3) == PARTIAL
    (tmp_path / "004.png").write_bytes(picture(4))
    assert run(tmp_path / "list.txt", out, breaking_after(0, seen), shard_size=3) == PARTIAL
    again = {"shard_size": 3, "retry_unreadable": True}
    assert run(tmp_path / "list.txt", out, breaking_after(1, seen), **again) == PARTIAL
    assert seen == [4]
    (tmp_path / "005.png").write_bytes(picture(5))
    assert run(tmp_path / "list.txt", out, **again) == 0
    assert run(tmp_path / "list.txt", tmp_path / "whole.jsonl", shard_size=3) == 0
    assert contents(out) == renamed(contents(tmp_path / "whole.jsonl"), "whole", "out")
