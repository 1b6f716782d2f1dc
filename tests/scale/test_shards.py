"""shards.py, parts.py and the loop over them: tars, lists and folders as streams, one result a key, resuming."""

import argparse
import errno
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import p1_llava_caption
import p2_infer
from bench import stream
from captioning import files as files_module
from captioning.cli import BAD_INPUT, PARTIAL
from captioning.data.images import list_images
from captioning.distributed import join
from captioning.files import sha256_of, write_json
from captioning.inference.batches import Job
from captioning.models.captioner import Captioner, CaptionerConfig
from captioning.profiles import ROOT
from captioning.scale import duplicate_keys, part_files
from captioning.scale import sources as shards
from captioning.scale.duplicate_keys import DuplicateKeys
from captioning.scale.part_files import read_part
from captioning.scale.pipeline import ShardRun, add_flags, caption_source
from captioning.scale.sources import Findings, Source, TarShard, expand_braces, find_tars
from decoder import LoraConfig, build_decoder

RUN = {"model": "m"}


def picture(level):
    """A one-coloured PNG; its grey level is its caption."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (level, level, level)).save(file, "PNG")
    return file.getvalue()


def write_tar(path, files, mode="w"):
    """Write ``{name: content}``; None as content makes a link."""
    with tarfile.open(path, mode) as archive:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            if content is None:
                entry.type, entry.linkname = tarfile.SYMTYPE, "elsewhere"
                archive.addfile(entry)
            else:
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return path


def pictures(first, last):
    return [(f"{level:03d}.png", picture(level)) for level in range(first, last)]


@pytest.fixture
def tars(tmp_path):
    """Three tars of 5, 7 and 4 images, grey levels 0 to 15."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for number, (first, last) in enumerate([(0, 5), (5, 12), (12, 16)]):
        write_tar(folder / f"{number}.tar", pictures(first, last))
    return folder / "{0..2}.tar"


def grey(image):
    return image.getpixel((0, 0))[0]


def say(levels):
    return [f"level {level}" for level in levels]


def run(source, out, caption=say, overwrite=False, run_of=RUN, **flags):
    """Run ``caption_source`` on what a command line would hold; return the exit code."""
    parser = argparse.ArgumentParser()
    add_flags(parser)
    args = parser.parse_args([])
    places = {"img_dir": Path(source), "out": Path(out)}
    vars(args).update(places | {"batch_size": 2, "device": "cpu", "overwrite": overwrite} | flags)
    with join(torch.device("cpu")) as processes:
        return caption_source(ShardRun.from_flags(args, run_of), lambda: Job(grey, caption), processes)


def contents(out):
    """All that a run leaves, by name; a part as its rows."""
    out = Path(out)
    if out.is_file():
        return {"one": out.read_text(), "manifest": out.with_name(f"{out.stem}.manifest.json").read_text()}
    ours = [path for path in sorted(out.rglob("*")) if path.is_file()]
    return {str(p.relative_to(out)): p.read_bytes() if p.suffix == ".parquet" else p.read_text() for p in ours}


def renamed(found, old, new):
    """Return contents as if the run had gone to another place, which the manifest says."""
    return {name: text.replace(old, new) if isinstance(text, str) else text for name, text in found.items()}


def results(out):
    """Return ``{key: caption}`` of all parts, and that no key is there twice."""
    files = [path for path in sorted(Path(out).iterdir()) if path.suffix in (".jsonl", ".parquet")]
    rows = [row for path in files for row in read_part(path)]
    assert len(dict(rows)) == len(rows)
    return dict(rows)


def manifest(out):
    return json.loads((Path(out) / "_manifest.json").read_text())


EXPECTED = {f"{level:03d}": f"level {level}" for level in range(16)}


# ------------------------------------------------------------------------------------------------------------- sources


def test_braces():
    assert list(expand_braces("a/{08..11}-{x,y}.tar")) == [
        f"a/{n}-{c}.tar" for n in ("08", "09", "10", "11") for c in "xy"
    ]
    assert list(expand_braces("{8..10}")) == ["8", "9", "10"]
    assert list(expand_braces("plain.tar")) == ["plain.tar"]
    assert list(expand_braces("{x}.tar")) == ["{x}.tar"]
    for text, message in (
        ("{3..1}", "backwards"),
        ("{a..c}", "two numbers"),
        ("{0..999999999}", "a digit too many"),
        ("{0..9999}{0..9999}", "a digit too many"),
    ):
        with pytest.raises(ValueError, match=message):
            list(expand_braces(text))


def test_what_a_command_line_names_must_be_there(tars):
    assert [path.name for path in find_tars(str(tars))] == ["0.tar", "1.tar", "2.tar"]
    assert [path.name for path in find_tars(str(tars.parent / "*.tar"))] == ["0.tar", "1.tar", "2.tar"]
    with pytest.raises(FileNotFoundError, match=r"3\.tar"):
        list(find_tars(str(tars.parent / "{0..3}.tar")))
    with pytest.raises(FileNotFoundError, match=r"\*\.tgz"):
        list(find_tars(str(tars.parent / "*.tgz")))
    with pytest.raises(ValueError, match="only local files"):
        list(find_tars("https://example.org/{0..3}.tar"))
    with pytest.raises(ValueError, match="named twice"):
        Source(tars.parent / "{0,1,0}.tar").shards(tars.parent)


def test_shards_of_one_name_in_two_folders_get_two_names(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "0.tar.gz", pictures(0, 1), "w:gz")
    names = [shard.name for shard in Source(tmp_path / "{a,b}" / "0.tar.gz").shards(tmp_path)]
    assert len(set(names)) == 2
    assert all(name.startswith("0-") for name in names)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_tar_gives_its_images_and_says_what_else_it_holds(tmp_path, mode):
    files = [
        ("./in/a.b.PNG", picture(1)),
        ("in/a.txt", b"1"),
        ("in/._a.png", b"mac"),
        ("link.jpg", None),
        ("seg.mask.png", picture(2)),
        ("bad.jpg", b"no picture"),
        ("x" * 150 + ".png", picture(3)),
    ]
    path, found = write_tar(tmp_path / "t.tar", files, mode), Findings()
    entries = list(TarShard(path, "t").entries(found))
    assert [entry.key for entry in entries] == ["in/a.b", "link", "seg.mask", "bad", "x" * 150]
    assert [grey(entries[i].load()) for i in (0, 2, 4)] == [1, 2, 3]
    for i, message in ((1, "a link"), (3, r"t\.tar: bad\.jpg: the file is of no known")):
        with pytest.raises(ValueError, match=message):
            entries[i].load()
    assert (found.others, found.damage) == (2, "")
    assert found.sha256 == sha256_of(path)


def test_a_pattern_says_which_entries_are_images(tmp_path):
    files = [("a.jpg", picture(1)), ("a.seg.png", picture(2)), ("a.image", picture(3))]
    path = write_tar(tmp_path / "t.tar", files)
    for pattern, keys in (("*.image", ["a"]), ("*.jpg", ["a"]), ("*", ["a", "a.seg", "a"])):
        assert [entry.key for entry in TarShard(path, "t", pattern).entries(Findings())] == keys


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_cut_off_anywhere_gives_what_is_whole_and_names_the_damage(tmp_path, mode):
    """tarfile ends at a missing or damaged header as at a good end; webdataset, which uses it, does so too."""
    whole = write_tar(tmp_path / "whole.tar", pictures(0, 6), mode).read_bytes()
    expected = [entry.source for entry in TarShard(tmp_path / "whole.tar", "t").entries(Findings())]
    end = 6 * 1024 if mode == "w" else len(whole) - 40  # behind it all entries and the end mark are there
    cut = tmp_path / "cut.tar"
    for length in {*range(0, end, 97), *range(0, end, 512), end - 1}:
        cut.write_bytes(whole[:length])
        found = Findings()
        sources = [entry.source for entry in TarShard(cut, "t").entries(found)]
        assert sources == expected[: len(sources)]
        assert found.damage, length


def test_a_damaged_header_is_no_good_end(tmp_path):
    path = write_tar(tmp_path / "t.tar", pictures(0, 6))
    whole = bytearray(path.read_bytes())
    for number in range(6):
        for offset in (0, 124, 148, 156):  # name, size, checksum, kind
            damaged = whole.copy()
            damaged[number * 1024 + offset] ^= 0x55
            path.write_bytes(damaged)
            found = Findings()
            assert [entry.key for entry in TarShard(path, "t").entries(found)] == [f"{k:03d}" for k in range(number)]
            assert found.damage


def test_random_damage_never_escapes_as_another_exception(tmp_path):
    rng, path = random.Random(0), tmp_path / "t.tar"
    for mode, number in itertools.product(("w", "w:gz", "w:bz2", "w:xz"), range(60)):
        mutated = bytearray(write_tar(path, [*pictures(0, 3), ("é" * 120 + ".png", picture(3))], mode).read_bytes())
        for _ in range(1 + number % 5):
            start = rng.randrange(len(mutated))
            mutated[start : start + rng.choice([1, 4, 600])] = rng.randbytes(rng.choice([0, 1, 4, 600]))
        path.write_bytes(mutated)
        found = Findings()
        for entry in TarShard(path, "t").entries(found):
            json.dumps([entry.key, entry.name], ensure_ascii=False).encode()
        assert found.sha256 == sha256_of(path)


def test_a_list_is_cut_into_shards_of_lines(tmp_path):
    for level in range(5):
        (tmp_path / f"{level}.png").write_bytes(picture(level))
    file = tmp_path / "list.txt"
    file.write_text("0.png\n1.png\n\n./2.png\n" + str(tmp_path / "3.png") + "\r\n4.png")
    found = Source(file, shard_size=2).shards(tmp_path)
    entries = [list(shard.entries(Findings())) for shard in found]
    assert [[entry.key for entry in some] for some in entries] == [["0", "1"], ["2"], ["3", "4"]]
    assert [grey(entry.load()) for some in entries for entry in some] == [0, 1, 2, 3, 4]
    assert len({shard.name for shard in found}) == 3
    rooted = Source(file, root=tmp_path / "elsewhere").shards(tmp_path)[0]
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        next(iter(rooted.entries(Findings()))).load()


def test_a_jsonl_list_names_keys_and_its_bad_lines_are_named(tmp_path):
    (tmp_path / "p.png").write_bytes(picture(9))
    lines = [
        '{"image": "p.png", "key": "own"}',
        '{"image": "p.png"}',
        "{",
        '{"key": "x"}',
        '{"image": ""}',
        '{"image": "a\\u0000b"}',
        '{"image": "\\ud800.png"}',
        '{"image": "p.png", "key": 3}',
        "[]",
    ]
    (tmp_path / "l.jsonl").write_text("\n".join(lines))
    entries = list(Source(tmp_path / "l.jsonl").shards(tmp_path)[0].entries(Findings()))
    assert [entry.key for entry in entries[:2]] == ["own", "p"]
    assert grey(entries[0].load()) == 9
    assert len(entries) == len(lines)
    for number, entry in enumerate(entries[2:], start=3):
        with pytest.raises(ValueError, match=rf"l\.jsonl line {number}: "):
            entry.load()


def test_a_folder_is_listed_in_the_order_of_its_names(tmp_path, monkeypatch):
    """In sorted runs on disk, since a million names must not be in memory."""
    monkeypatch.setattr(shards, "SORTED_AT_ONCE", 3)
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("b.png", "a.JPG", "é.png", "Z.webp", "10.png", "9.png", ".hidden.png", "note.txt", "line\nend.png"):
        (folder / name).write_bytes(b"")
    (folder / "folder.png").mkdir()
    shards.list_folder(folder, tmp_path / "spool.jsonl")
    found = Source(tmp_path / "spool.jsonl", root=folder).shards(tmp_path)[0]
    assert [entry.source for entry in found.entries(Findings())] == list_images(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "spool.jsonl"]


@pytest.mark.parametrize(
    ("argument", "flags", "message"),
    [
        ("x.tar", {"root": Path("r")}, "--list-root"),
        ("x.txt", {"pattern": "*.jpg"}, "--entries"),
        ("x.tar", {"shard_size": 0}, "--shard-size 0"),
    ],
)
def test_flags_that_do_not_belong_are_refused(argument, flags, message):
    with pytest.raises(ValueError, match=message):
        Source(Path(argument), **flags)


def test_a_stream_holds_a_few_images_and_not_a_shard(tmp_path):
    content = np.random.default_rng(0).bytes(200_000)
    path = write_tar(tmp_path / "t.tar", [(f"{n}.jpg", content) for n in range(200)])  # 40 MB
    tracemalloc.start()
    assert sum(1 for _ in TarShard(path, "t").entries(Findings())) == 200
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e6


# --------------------------------------------------------------------------------------------------------------- sinks


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_every_key_has_one_result_and_the_manifest_says_so(tars, tmp_path, form):
    if form == "parquet":
        pytest.importorskip("pyarrow")
    out = tmp_path / f"out.{form}"
    assert run(tars, out) == 0
    assert results(out) == EXPECTED
    said = manifest(out)
    assert said["totals"] == {
        "shards": 3,
        "images": 16,
        "captioned": 16,
        "unreadable": 0,
        "duplicates": 0,
        "others": 0,
        "damaged": 0,
    }
    assert said["exactly_one_result_for_each_key"] is True
    assert said["keys"] == 16
    assert said["run"]["model"] == "m"
    for number, (shard, count) in enumerate(zip(said["shards"], (5, 7, 4), strict=True)):
        path = tars.parent / f"{number}.tar"
        assert shard["shard"]["path"] == str(path)
        assert shard["sha256"] == sha256_of(path)
        assert shard["captioned"] == count
        assert shard["part_sha256"] == sha256_of(out / shard["part"])


def test_a_parquet_file_is_one_to_other_readers(tars, tmp_path):
    dataset = pytest.importorskip("pyarrow.dataset")
    run(tars, tmp_path / "out.parquet")
    table = dataset.dataset(tmp_path / "out.parquet", format="parquet").to_table()  # manifest and state are passed over
    assert dict(zip(table["key"].to_pylist(), table["caption"].to_pylist(), strict=True)) == EXPECTED


def test_a_shard_without_a_caption_has_an_empty_part(tars, tmp_path):
    pytest.importorskip("pyarrow")
    write_tar(tars.parent / "1.tar", [("a.png", b"")])
    assert run(tars, tmp_path / "out.parquet") == PARTIAL
    assert list(read_part(tmp_path / "out.parquet" / "1.parquet")) == []
    assert len(results(tmp_path / "out.parquet")) == 9


def test_a_full_disk_is_named_and_loses_nothing(tars, tmp_path, monkeypatch):
    out, seen = tmp_path / "out.jsonl", []
    with monkeypatch.context() as patch:
        patch.setattr(part_files, "atomic_path", full_at(out / "1.jsonl"))
        with pytest.raises(OSError, match=r"1\.jsonl: cannot be written .*No space left.* make room"):
            run(tars, out)
    assert run(tars, out, lambda levels: seen.extend(levels) or say(levels)) == 0
    assert seen == [12, 13, 14, 15]
    assert results(out) == EXPECTED


def full_at(full):
    """Return a ``files.atomic_path`` for which the disk is full at one file."""
    write = files_module.atomic_path

    def atomic_path(path):
        if path == full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path)

    return atomic_path


def test_parquet_without_pyarrow_is_refused_at_once(tars, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        run(tars, tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


def test_one_json_is_what_a_folder_would_have_given(tars, tmp_path):
    assert run(tars, tmp_path / "out.json") == 0
    write_json(tmp_path / "expected.json", EXPECTED)
    assert (tmp_path / "out.json").read_bytes() == (tmp_path / "expected.json").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["expected.json", "out.json", "out.manifest.json", "tars"]
    with pytest.raises(ValueError, match="exists already"):
        run(tars, tmp_path / "out.json")
    assert run(tars, tmp_path / "out.json", overwrite=True) == 0


def test_a_folder_and_a_list_become_parts_too(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, content in pictures(0, 16):
        (folder / name).write_bytes(content)
    assert run(folder, tmp_path / "a.jsonl", shard_size=7) == 0
    (tmp_path / "list.txt").write_text("".join(f"{n:03d}.png\n" for n in range(16)))
    assert run(tmp_path / "list.txt", tmp_path / "b", out_format="jsonl", list_root=folder) == 0
    assert results(tmp_path / "a.jsonl") == results(tmp_path / "b") == EXPECTED
    assert len(list((tmp_path / "a.jsonl").glob("*.jsonl"))) == 3


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
    said = manifest(tmp_path / "out.jsonl")
    assert said["totals"] == {
        "shards": 4,
        "images": 11,
        "captioned": 8,
        "unreadable": 1,
        "duplicates": 2,
        "others": 1,
        "damaged": 2,
    }
    assert said["keys"] == len(expected)
    first, second, third, fourth = said["shards"]
    for shard in said["shards"]:
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


class Interrupted(Exception):  # noqa: N818 - stands for KeyboardInterrupt
    """Stands for a kill."""


def breaking_after(calls, seen):
    left = iter(range(calls))

    def caption(levels):
        if next(left, None) is None:
            raise Interrupted
        seen.extend(levels)
        return say(levels)

    return caption


@pytest.mark.parametrize("form", ["json", "jsonl", "parquet"])
def test_a_run_interrupted_anywhere_ends_as_if_it_never_was(tars, tmp_path, form):
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


def test_a_finished_run_does_nothing_more_and_a_changed_shard_alone_is_done_again(tars, tmp_path):
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


def test_a_shard_that_is_gone_takes_its_part_out_of_sight_and_comes_back_with_it(tars, tmp_path):
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


def test_a_folder_is_listed_anew_when_a_run_has_finished(tmp_path):
    folder, out = tmp_path / "images", tmp_path / "out.jsonl"
    folder.mkdir()
    for name, content in pictures(0, 5):
        (folder / name).write_bytes(content)
    assert run(folder, out, shard_size=2) == 0
    (folder / "009.png").write_bytes(picture(9))
    seen = []
    assert run(folder, out, lambda levels: seen.extend(levels) or say(levels), shard_size=2) == 0
    assert seen == [4, 9]
    for name in ("003.png", "004.png", "009.png"):
        (folder / name).unlink()
    assert run(folder, out, shard_size=2) == 0
    assert results(out) == {f"{k:03d}": f"level {k}" for k in range(3)}


def test_another_run_is_neither_gone_on_with_nor_dropped(tars, tmp_path):
    out = tmp_path / "out.jsonl"
    run(tars, out)
    (out / "mine.txt").write_text("precious")
    before = contents(out)
    with pytest.raises(ValueError, match=r"another run \(other model\).*--overwrite"):
        run(tars, out, run_of={"model": "n"})
    assert contents(out) == before
    assert run(tars, out, lambda levels: ["new"] * len(levels), overwrite=True, run_of={"model": "n"}) == 0
    assert set(results(out).values()) == {"new"}
    assert (out / "mine.txt").read_text() == "precious"


def test_a_strange_folder_or_file_is_left_alone(tars, tmp_path):
    strange = tmp_path / "strange.jsonl"
    strange.mkdir()
    (strange / "0.jsonl").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds other things"):
            run(tars, strange, overwrite=overwrite)
    assert contents(strange) == {"0.jsonl": "precious"}
    (tmp_path / "file.jsonl").write_text("precious")
    with pytest.raises(ValueError, match="is a file"):
        run(tars, tmp_path / "file.jsonl")
    with pytest.raises(ValueError, match="is a folder"):
        run(tars, strange, out_format="json")


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
    held = files_module.lock(out / "_state" / "lock")
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


def test_what_a_killed_process_left_half_made_goes(tars, tmp_path):
    out = tmp_path / "out.jsonl"
    run(tars, out)
    (out / ".0.jsonl.abc.tmp").write_text("half")
    (out / "_state" / ".keys.tmp").mkdir()
    run(tars, out)
    assert not list(out.rglob(".*"))


def test_repeats_are_found_as_by_a_set(tmp_path, monkeypatch):
    monkeypatch.setattr(duplicate_keys, "BUCKET_KEYS", 80)
    rng = random.Random(0)
    keys = [[f"k{rng.randrange(400)}" for _ in range(rng.randrange(60))] for _ in range(12)]
    seen = set()
    expected = [[row for row, key in enumerate(some) if key in seen or seen.add(key)] for some in keys]
    with DuplicateKeys(tmp_path, sum(map(len, keys))) as table:
        for number, some in enumerate(keys):
            table.add(number, some)
        assert [rows.tolist() for rows in table.rows(len(keys))] == expected
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------- command lines


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_profile):
    """An untrained adapter of the tiny captioner; its captions differ from image to image all the same."""
    torch.manual_seed(0)
    lora = LoraConfig(4, 4.0)
    config = CaptionerConfig(tiny_profile.encoder, tiny_profile.encoder_kwargs, "random", lora=lora)
    path = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
    Captioner(config, build_decoder(tiny_profile.decoder, lora)).save_adapter(path)
    return path


def flags(profile, adapter):
    return [
        profile.decoder,
        "--adapter",
        str(adapter),
        "--tokenizer",
        profile.tokenizer,
        "--device",
        "cpu",
        "--beam-size",
        "2",
        "--max-new-tokens",
        "8",
        "--batch-size",
        "2",
    ]


def test_p2_infer_captions_tars_as_the_folder_that_they_were_made_of(tmp_path, tiny_data, tiny_profile, adapter):
    images = sorted((tiny_data / "images" / "val").iterdir())
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", [(p.name, p.read_bytes()) for p in images[number::2]])
    words = flags(tiny_profile, adapter)
    folder, tars, out = tiny_data / "images" / "val", str(tmp_path / "{0..1}.tar"), str(tmp_path / "tars.jsonl")
    assert p2_infer.main([str(folder), str(tmp_path / "folder.json"), *words]) == 0
    assert p2_infer.main([tars, out, *words]) == 0
    expected = json.loads((tmp_path / "folder.json").read_text())
    assert len(set(expected.values())) > 1
    assert results(out) == expected
    said = manifest(out)["run"]
    assert said["encoder_hash"] and said["decoder_hash"] and said["adapter"] == sha256_of(adapter)
    assert p2_infer.main([tars, out, *words, "--max-new-tokens", "3"]) == BAD_INPUT
    assert p2_infer.main([tars, out, *words, "--max-new-tokens", "3", "--overwrite"]) == 0
    write_tar(tmp_path / "1.tar", [("x.png", b"")])
    assert p2_infer.main([tars, out, *words, "--max-new-tokens", "3"]) == PARTIAL


def test_llava_captions_a_list_as_its_folder(tmp_path, tiny_data):
    folder = tmp_path / "images"
    folder.mkdir()
    for path in sorted((tiny_data / "images" / "val").iterdir())[:3]:
        (folder / path.name).write_bytes(path.read_bytes())
    (tmp_path / "list.txt").write_text("".join(f"{path.name}\n" for path in sorted(folder.iterdir())))
    words = ["--profile", "micro", "--device", "cpu", "--max-new-tokens", "6"]
    assert p1_llava_caption.main([str(folder), str(tmp_path / "a.json"), *words]) == 0
    listed = [str(tmp_path / "list.txt"), str(tmp_path / "b.json"), *words]
    assert p1_llava_caption.main([*listed, "--list-root", str(folder)]) == 0
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    said = json.loads((tmp_path / "b.manifest.json").read_text())
    assert len(said["run"]["weights_sha256"]) == 64
    assert p1_llava_caption.main([*listed, "--compare", "--annotation-file", str(tiny_data / "val.json")]) == 2


def test_the_benchmark_streams_and_draws_its_curve(tmp_path, capsys):
    words = ["--images", "60", "--per-tar", "20", "--distinct", "3", "--captioner", "tiny", "--every", "0.2"]
    assert stream.main([*words, "--out", str(tmp_path / "curve")]) == 0
    assert "60 images from 3 tars" in capsys.readouterr().out
    points = [json.loads(line) for line in (tmp_path / "curve.curve.jsonl").read_text().splitlines()]
    assert 100 < points[-1]["peak MB"] < 1500
    assert (tmp_path / "curve.png").stat().st_size > 1000


# -------------------------------------------------------------------------------------------------- several processes


SHARED = """
import os, sys, time
import test_shards
def caption(levels):
    with open(sys.argv[3], "a") as file:
        file.write("".join(f"{level} {os.environ['RANK']}\\n" for level in levels))
    time.sleep(0.15)
    return test_shards.say(levels)
sys.exit(test_shards.run(sys.argv[1], sys.argv[2], caption))
"""


def launch(script, processes, *arguments):
    """Start a launcher of so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), str(script)]
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([*command, *map(str, arguments)], env=environment, stderr=subprocess.PIPE, text=True)


def test_two_processes_share_the_shards_and_three_finish_what_killed_ones_began(tmp_path):
    """All processes of a run of two get SIGKILL at once; a run of three ends as one that nobody killed."""
    for number in range(8):
        write_tar(tmp_path / f"{number}.tar", pictures(number * 8, number * 8 + 8))
    script, said, out = tmp_path / "share.py", tmp_path / "said", tmp_path / "out.jsonl"
    script.write_text(SHARED)
    killed = launch(script, 2, tmp_path / "{0..7}.tar", out, said)
    deadline = time.monotonic() + 90
    while (not said.exists() or len(said.read_text().splitlines()) < 20) and time.monotonic() < deadline:
        time.sleep(0.05)
    for child in family(killed.pid):
        os.kill(child, signal.SIGKILL)
    killed.communicate()
    began = [line.split() for line in said.read_text().splitlines()]
    assert 20 <= len(began) < 64
    assert {rank for _, rank in began} == {"0", "1"}
    process = launch(script, 3, tmp_path / "{0..7}.tar", out, said)
    assert process.wait(timeout=120) == 0, process.stderr.read()
    process.stderr.close()
    levels = [int(line.split()[0]) for line in said.read_text().splitlines()]
    assert set(levels) == set(range(64))
    assert len(levels) <= 64 + 2 * 2  # of each killed process the batch that it was at
    assert run(tmp_path / "{0..7}.tar", tmp_path / "whole.jsonl") == 0
    assert contents(out) == renamed(contents(tmp_path / "whole.jsonl"), "whole", "out")


def family(pid):
    """Return a process and all that it started, itself first; the launcher gives each a session of its own."""
    found = [pid]
    for process in found:
        children = Path(f"/proc/{process}/task/{process}/children")
        found.extend(map(int, children.read_text().split()))
    return found
