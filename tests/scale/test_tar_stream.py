"""tar_stream.py: tars give all their images or say why not, wherever they are cut off or damaged."""

import itertools
import json
import random
import tracemalloc

import numpy as np
import pytest
from level_captioner import grey, picture
from shard_runs import pictures, write_tar

from captioning.files import sha256_of
from captioning.scale.archives import Findings, TarShard


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
    assert [entry.key for entry in entries] == ["in/a.b", "seg.mask", "bad", "x" * 150, "link"]
    assert [grey(entries[i].load()) for i in (0, 1, 3)] == [1, 2, 3]
    for i, message in ((4, "a link to elsewhere, which is not"), (2, r"t\.tar: bad\.jpg: the file is of no known")):
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
def test_a_tar_cut_off_anywhere_gives_its_complete_entries_and_names_the_damage(tmp_path, mode):
    """tarfile takes a missing or damaged header for a good end, and so does webdataset, which uses it."""
    whole = write_tar(tmp_path / "whole.tar", pictures(0, 6), mode).read_bytes()
    expected = [entry.source for entry in TarShard(tmp_path / "whole.tar", "t").entries(Findings())]
    end = 6 * 1024 if mode == "w" else len(whole) - 40  # from there on all entries and the end mark are in it
    cut = tmp_path / "cut.tar"
    for length in {*range(0, end, 97), *range(0, end, 512), end - 1}:
        cut.write_bytes(whole[:length])
        found = Findings()
        sources = [entry.source for entry in TarShard(cut, "t").entries(found)]
        assert sources == expected[: len(sources)]
        assert found.damage, length


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
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


def test_a_stream_holds_a_few_images_and_not_a_shard(tmp_path):
    content = np.random.default_rng(0).bytes(200_000)
    path = write_tar(tmp_path / "t.tar", [(f"{n}.jpg", content) for n in range(200)])  # 40 MB
    tracemalloc.start()
    assert sum(1 for _ in TarShard(path, "t").entries(Findings())) == 200
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e6
