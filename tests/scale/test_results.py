"""results.py and manifest.py: exactly one result for each key, and no other run's results touched."""

import subprocess
import sys

import pytest
from level_captioner import breaking_after, picture
from shard_runs import EXPECTED, contents, manifest, pictures, results, run, write_tar

from captioning import files
from captioning.cli import PARTIAL
from captioning.files import sha256_of, write_json
from captioning.profiles import ROOT


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_every_key_has_one_result_and_the_manifest_says_so(tars, tmp_path, form):
    if form == "parquet":
        pytest.importorskip("pyarrow")
    out = tmp_path / f"out.{form}"
    assert run(tars, out) == 0
    assert results(out) == EXPECTED
    found = manifest(out)
    assert found["totals"] == {
        "shards": 3,
        "images": 16,
        "captioned": 16,
        "unreadable": 0,
        "duplicates": 0,
        "others": 0,
        "damaged": 0,
    }
    assert found["exactly_one_result_for_each_key"] is True
    assert found["keys"] == 16
    assert found["run"]["model"] == "m"
    for number, (shard, count) in enumerate(zip(found["shards"], (5, 7, 4), strict=True)):
        path = tars.parent / f"{number}.tar"
        assert shard["shard"]["path"] == str(path)
        assert shard["sha256"] == sha256_of(path)
        assert shard["captioned"] == count
        assert shard["part_sha256"] == sha256_of(out / shard["part"])


def test_one_json_is_what_a_folder_would_have_given(tars, tmp_path):
    assert run(tars, tmp_path / "out.json") == 0
    write_json(tmp_path / "expected.json", EXPECTED)
    assert (tmp_path / "out.json").read_bytes() == (tmp_path / "expected.json").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["expected.json", "out.json", "out.manifest.json", "tars"]
    with pytest.raises(ValueError, match="exists already; leave out --keep"):
        run(tars, tmp_path / "out.json", keep=True)
    assert run(tars, tmp_path / "out.json") == 0


def test_bad_input_is_named_counted_and_spares_the_rest(tmp_path, caplog):
    """Damaged and truncated tars, keys twice in a shard and over shards, no image, unreadable ones: exit code 3."""
    folder = tmp_path / "tars"
    folder.mkdir()
    write_tar(folder / "0.tar", [*pictures(0, 3), ("001.png", picture(99)), ("bad.png", b"bad"), ("note.txt", b"")])
    write_tar(folder / "1.tar", [*pictures(2, 5), ("bad.png", picture(7))])  # 002 again; bad is readable here
    cut = write_tar(folder / "2.tar", pictures(5, 9))
    cut.write_bytes(cut.read_bytes()[:2600])  # in the third image
    (folder / "3.tar").write_bytes(b"no tar at all")
    assert run(folder / "*.tar", tmp_path / "out.jsonl") == PARTIAL
    expected = {f"{k:03d}": f"level {k}" for k in range(7)} | {"bad": "level 7"}
    assert results(tmp_path / "out.jsonl") == expected
    found = manifest(tmp_path / "out.jsonl")
    assert found["totals"] == {
        "shards": 4,
        "images": 11,
        "captioned": 8,
        "unreadable": 1,
        "duplicates": 2,
        "others": 1,
        "damaged": 2,
    }
    assert found["keys"] == len(expected)
    first, second, third, fourth = found["shards"]
    for shard in found["shards"]:
        assert shard["images"] == shard["captioned"] + shard["unreadable"] + shard["duplicates"]
    assert [p["entry"].rpartition(": ")[2] for p in first["problems"]] == ["001.png", "bad.png"]
    assert [p["entry"].rpartition(": ")[2] for p in second["problems"]] == ["002"]
    assert second["part_sha256"] == sha256_of(tmp_path / "out.jsonl" / "1.jsonl")
    assert "unexpected end of data" in third["damage"]
    assert fourth["damage"]
    for text in (
        "001.png: another entry before it has the key 001",
        "bad.png: the file is of no known",
        "2.tar: damaged",
        "3.tar: damaged",
        "1 keys have a caption in an earlier shard, which stays: 002",
        "1 images cannot be read, 2 have another's key, 2 shards are damaged",
    ):
        assert text in caplog.text


def test_nothing_readable_is_an_error(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.png", b"")])
    with pytest.raises(ValueError, match="none of the 1 images"):
        run(tmp_path / "0.tar", tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_a_key_that_an_earlier_shard_no_longer_has_comes_back(tars, tmp_path):
    """A later shard's caption is only put aside, since the earlier shard may be replaced."""
    out = tmp_path / "out.jsonl"
    write_tar(tars.parent / "1.tar", [*pictures(0, 2), *pictures(5, 7)])
    assert run(tars, out) == PARTIAL
    assert manifest(out)["totals"]["duplicates"] == 2
    write_tar(tars.parent / "0.tar", pictures(1, 5))
    assert run(tars, out) == PARTIAL
    assert manifest(out)["totals"]["duplicates"] == 1
    write_tar(tars.parent / "0.tar", pictures(2, 5))
    assert run(tars, out) == 0
    assert results(out) == {f"{k:03d}": f"level {k}" for k in (*range(7), *range(12, 16))}
    assert not list((out / "_state").glob("*.whole.*"))


def test_a_part_is_put_aside_with_its_shard_and_comes_back_with_it(tars, tmp_path):
    """Its captions would have stayed among the results, and the manifest would not have named them."""
    out, seen = tmp_path / "out.jsonl", []
    source = tars.parent / "*.tar"
    run(source, out)
    before = contents(out)
    (tars.parent / "1.tar").rename(tmp_path / "away.tar")
    assert run(source, out, breaking_after(0, seen)) == 0
    assert set(results(out)) == EXPECTED.keys() - {f"{k:03d}" for k in range(5, 12)}
    assert manifest(out)["totals"]["shards"] == 2
    (tmp_path / "away.tar").rename(tars.parent / "1.tar")
    assert run(source, out, breaking_after(0, seen)) == 0
    assert contents(out) == before


def test_another_run_is_neither_resumed_nor_dropped(tars, tmp_path):
    out = tmp_path / "out.jsonl"
    run(tars, out)
    (out / "mine.txt").write_text("precious")
    before = contents(out)
    with pytest.raises(ValueError, match=r"another run \(other model\).*--overwrite"):
        run(tars, out, settings={"model": "n"})
    assert contents(out) == before
    assert run(tars, out, lambda levels: ["new"] * len(levels), overwrite=True, settings={"model": "n"}) == 0
    assert set(results(out).values()) == {"new"}
    assert (out / "mine.txt").read_text() == "precious"


def test_a_folder_or_file_of_others_is_left_alone(tars, tmp_path):
    others = tmp_path / "others.jsonl"
    others.mkdir()
    (others / "0.jsonl").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds other things"):
            run(tars, others, overwrite=overwrite)
    assert contents(others) == {"0.jsonl": "precious"}
    (tmp_path / "file.jsonl").write_text("precious")
    with pytest.raises(ValueError, match="is a file"):
        run(tars, tmp_path / "file.jsonl")
    with pytest.raises(ValueError, match="is a folder"):
        run(tars, others, form="json")


@pytest.mark.parametrize("source", ["no.tar", "no.txt", "tars/{0..9}.tar", "images"])
def test_a_run_that_fails_at_its_start_leaves_no_trace(tars, tmp_path, source):
    (tmp_path / "images").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ValueError, FileNotFoundError), match=r"no\.tar|no\.txt|3\.tar|no image here"):
        run(tmp_path / source, tmp_path / "out.jsonl")
    assert sorted(tmp_path.rglob("*")) == before


def test_two_runs_do_not_mix(tars, tmp_path):
    out = tmp_path / "out.jsonl"
    run(tars, out)
    held = files.lock(out / "_state" / "lock")
    held_by_us = str(out / "_state" / "lock")
    code = f"import pathlib; from captioning.files import lock; lock(pathlib.Path({held_by_us!r}))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    held.close()
    assert "another run is writing it" in result.stderr


def test_a_part_damaged_since_is_named(tars, tmp_path):
    out = tmp_path / "out.jsonl"
    run(tars, out)
    part = out / "1.jsonl"
    part.write_text(part.read_text().replace("level 6", "level 9"))
    with pytest.raises(ValueError, match=r"1\.jsonl: damaged since it was written; remove it"):
        run(tars, out)
    part.unlink()
    assert run(tars, out) == 0
    assert results(out) == EXPECTED


def test_unfinished_files_of_a_killed_process_are_removed(tars, tmp_path):
    out = tmp_path / "out.jsonl"
    run(tars, out)
    (out / ".0.jsonl.abc.tmp").write_text("half")
    (out / "_state" / ".keys.tmp").mkdir()
    run(tars, out)
    assert not list(out.rglob(".*"))
