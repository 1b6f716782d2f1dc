"""The feature cache survives what kills it, never serves a wrong row, and reads what the last version wrote."""

import itertools
import json
import logging
import math
import re
import shutil
import struct
import threading
from pathlib import Path

import pytest
import torch

from captioning.data import feature_cache
from captioning.data.feature_cache import CacheSpec, FeatureCache, _append
from captioning.data.images import load_image

SHAPE = (3, 4)
KEY = {"encoder": "vit", "weights": "abc"}


class Encoder:
    """Features that depend on the content of files only; counts its work and can fail at one call."""

    def __init__(self, fail_at=None):
        self.batches, self.fail_at = [], fail_at

    def __call__(self, paths):
        if len(self.batches) == self.fail_at:
            raise RuntimeError("killed")
        self.batches.append([path.name for path in paths])
        return torch.stack([features_of(path) for path in paths])

    @property
    def encoded(self):
        return list(itertools.chain(*self.batches))


def features_of(path):
    return torch.arange(12.0).reshape(SHAPE) + int(path.read_text())


@pytest.fixture
def paths(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.jpg").write_text(str(100 * number))
    return sorted(folder.iterdir())


@pytest.fixture
def open_cache(tmp_path, paths):
    """Return a function that opens the cache of ``paths``; fields of the spec may be given by name."""

    def open_(encode, paths=paths, read=lambda path: path, **fields):
        spec = CacheSpec(**{"root": tmp_path / "cache", "key": KEY, "shape": SHAPE, "batch_size": 4, **fields})
        return FeatureCache.open(spec, paths, encode, read=read)

    return open_


def cache_folder(tmp_path):
    (folder,) = (tmp_path / "cache").iterdir()
    return folder


def assert_serves(cache, paths):
    assert len(cache) == len(paths)
    for i, path in enumerate(paths):
        assert torch.equal(cache[i].float(), features_of(path)), path


def test_cache_encodes_once_and_reuses(open_cache, paths):
    first, second = Encoder(), Encoder()
    cache = open_cache(encode=first)
    assert first.encoded == [path.name for path in paths] and list(map(len, first.batches)) == [4, 4, 2]
    assert_serves(cache, paths)
    backwards = open_cache(encode=second, paths=paths[::-1])
    assert second.batches == []
    assert_serves(backwards, paths[::-1])


def test_gather_gives_writable_copies(open_cache, paths):
    cache = open_cache(encode=Encoder())
    block = cache.gather(torch.tensor([7, 2, 2]))
    assert block.shape == (3, *SHAPE) and block.dtype == torch.float16
    assert torch.equal(block, torch.stack([cache[7], cache[2], cache[2]]))
    block += 1
    cache[7].zero_()
    assert_serves(cache, paths)
    with pytest.raises(IndexError):
        cache[10]


def test_float32_is_exact_and_apart_from_float16(open_cache, tmp_path):
    def thirds(batch):
        return torch.stack([features_of(path) / 3 for path in batch])

    assert open_cache(encode=thirds)[1].dtype == torch.float16
    cache = open_cache(encode=thirds, dtype=torch.float32)
    assert torch.equal(cache[1], (torch.arange(12.0).reshape(SHAPE) + 100) / 3)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_another_key_is_another_cache(open_cache, tmp_path):
    open_cache(encode=Encoder())
    encoder = Encoder()
    open_cache(encode=encoder, key={**KEY, "weights": "def"})
    assert len(encoder.encoded) == 10
    again = Encoder()
    open_cache(encode=again, key=dict(reversed(KEY.items())))  # the order of the key means nothing
    assert again.encoded == []
    key = json.loads(next((tmp_path / "cache").iterdir()).joinpath("key.json").read_text())
    assert key["key"]["encoder"] == "vit" and key["shape"] == [3, 4]


def test_changed_images_are_encoded_again_and_copies_are_not(open_cache, paths):
    """A cache keyed by file name served the features of the old picture."""
    open_cache(encode=Encoder())
    paths[3].write_text("77")
    paths[5].write_text(paths[6].read_text())
    encoder = Encoder()
    cache = open_cache(encode=encoder)
    assert encoder.encoded == ["3.jpg"]
    assert_serves(cache, paths)


def test_identical_images_share_a_row(open_cache, paths, tmp_path):
    for path in paths[1:]:
        path.write_text("0")
    encoder = Encoder()
    cache = open_cache(encode=encoder)
    assert len(encoder.encoded) == 1
    assert_serves(cache, paths)
    assert (cache_folder(tmp_path) / "features.bin").stat().st_size == 3 * 4 * 2


def test_more_images_are_appended(open_cache, paths):
    small = open_cache(encode=Encoder(), paths=paths[:3])
    encoder = Encoder()
    assert_serves(open_cache(encode=encoder), paths)
    assert encoder.encoded == [path.name for path in paths[3:]]
    assert_serves(small, paths[:3])  # open while the file grew


@pytest.mark.parametrize("limit", [math.inf, 0])
def test_images_are_read_in_threads_while_the_encoder_works(open_cache, paths, limit):
    begun = {path: threading.Event() for path in paths}

    def read(path):
        assert threading.current_thread() is not threading.main_thread()
        begun[path].set()
        return features_of(path)

    def encode(images):
        last = int(images[-1][0, 0]) // 100
        assert begun[paths[min(last + 4, 9)]].wait(60)  # the whole next batch, before this one is encoded
        return torch.stack(images)

    if limit:
        assert_serves(open_cache(encode, read=read), paths)
    else:
        assert_serves(open_cache(torch.stack, read=read, limit=limit), paths)  # encoded when asked for


@pytest.mark.parametrize("limit", [math.inf, 0, 4])
@pytest.mark.parametrize(
    "error", [ValueError("not an image"), struct.error("bad"), MemoryError(), RecursionError("deep")]
)
def test_an_image_that_cannot_be_read_in_a_thread_is_named_and_spares_the_others(
    open_cache, paths, limit, error, caplog
):
    """Whatever its reader raises, and whether it would be stored or is beyond the limit."""

    def read(path):
        if path.name == "5.jpg":
            raise error
        return features_of(path)

    rows = limit * 24  # of float16
    cache, good = open_cache(torch.stack, read=read, limit=rows), [i for i in range(10) if i != 5]
    assert cache.readable == good
    assert f"left out: {paths[5]}: " in caplog.text and caplog.text.count("left out: ") == 1
    kept = cache.only(good)
    assert kept.readable == list(range(9))
    for i, number in enumerate(good):
        assert torch.equal(kept[i].float(), features_of(paths[number]))
    with pytest.raises(ValueError, match=re.escape(str(paths[5]))):
        cache.gather([4, 5])
    encoder = Encoder()
    assert_serves(open_cache(encoder), paths)  # once it can be read
    assert "5.jpg" in encoder.encoded
    assert len(encoder.encoded) == {math.inf: 1, 4: 6, 0: 10}[limit]


def test_images_none_of_which_can_be_read_are_refused(open_cache, paths):
    with pytest.raises(ValueError, match="none of the 10 images can be read"):
        open_cache(torch.stack, read=lambda path: 1 / 0)


def test_a_build_killed_half_way_resumes(open_cache, paths):
    with pytest.raises(RuntimeError, match="killed"):
        open_cache(encode=Encoder(fail_at=2))
    encoder = Encoder()
    assert_serves(open_cache(encode=encoder), paths)
    assert encoder.encoded == ["8.jpg", "9.jpg"]


@pytest.mark.parametrize("file", ["features.bin", "rows.sha256"])
@pytest.mark.parametrize("written", [0.0, 0.4, 1.0])
def test_killed_at_any_write_never_serves_an_unwritten_row(open_cache, paths, monkeypatch, file, written):
    """A row must not be listed before it is on disk: the reader would get zeros or a neighbour's features."""
    append, calls = _append, []

    def killed(path, content):
        calls.append(path.name)
        if path.name == file and calls.count(file) == 2:
            append(path, content[: int(len(content) * written)])
            raise KeyboardInterrupt
        append(path, content)

    monkeypatch.setattr(feature_cache, "_append", killed)
    with pytest.raises(KeyboardInterrupt):
        open_cache(encode=Encoder())
    monkeypatch.setattr(feature_cache, "_append", append)
    encoder = Encoder()
    assert_serves(open_cache(encode=encoder), paths)
    kept, last = 10 - len(encoder.encoded), Encoder()
    open_cache(encode=last)
    assert last.encoded == []  # half a line in the listing does not spoil the next one
    assert kept >= 4 and (file == "features.bin" or written < 1 or kept == 8)


def damage_shorter(folder):
    with (folder / "features.bin").open("r+b") as file:
        file.truncate(100)


def damage_one_bit(folder):
    with (folder / "features.bin").open("r+b") as file:
        file.seek(100)
        bit = file.read(1)[0] ^ 1
        file.seek(100)
        file.write(bytes([bit]))


def damage_checksum(folder):
    listing = folder / "rows.sha256"
    listing.write_text(listing.read_text()[:-9] + "00000000\n")


def damage_lost_features(folder):
    (folder / "features.bin").unlink()


def damage_listing(folder):
    listing = folder / "rows.sha256"
    listing.write_text(listing.read_text().replace("\n", "z\n", 1))


def damage_double_listing(folder):
    listing = folder / "rows.sha256"
    first, _, *others = listing.read_text().splitlines(keepends=True)
    listing.write_text("".join([first, first, *others]))


def damage_lost_listing(folder):
    (folder / "rows.sha256").unlink()


def damage_key(folder):
    (folder / "key.json").write_text('{"key": "of another encoder"}')


def damage_key_syntax(folder):
    (folder / "key.json").write_text("{")


def damage_lost_key(folder):
    (folder / "key.json").unlink()


@pytest.mark.parametrize(
    "damage",
    [
        damage_one_bit,
        damage_checksum,
        damage_shorter,
        damage_lost_features,
        damage_listing,
        damage_double_listing,
        damage_lost_listing,
        damage_key,
        damage_key_syntax,
        damage_lost_key,
    ],
)
def test_damaged_or_stale_caches_are_rebuilt_with_a_warning(open_cache, paths, tmp_path, caplog, damage):
    open_cache(encode=Encoder())
    damage(cache_folder(tmp_path))
    encoder = Encoder()
    with caplog.at_level(logging.WARNING):
        cache = open_cache(encode=encoder)
    assert len(encoder.encoded) == 10
    assert_serves(cache, paths)
    assert "feature cache" in caplog.text
    last = Encoder()
    open_cache(encode=last)
    assert last.encoded == []


def test_a_healthy_cache_gives_no_warning(open_cache, caplog):
    with caplog.at_level(logging.INFO):
        open_cache(encode=Encoder())
        open_cache(encode=Encoder())
    assert [record.levelname for record in caplog.records] == ["INFO"] * 3
    assert "10 of 10 images to encode" in caplog.messages[0] and "10 images encoded in" in caplog.messages[1]
    assert "0 of 10 images to encode" in caplog.messages[2]


def test_a_reader_keeps_its_features_while_the_cache_is_rebuilt(open_cache, paths, tmp_path):
    reader = open_cache(encode=Encoder())
    damage_key(cache_folder(tmp_path))
    open_cache(encode=lambda batch: torch.zeros(len(batch), *SHAPE))
    assert_serves(reader, paths)


def test_two_builders_at_once_share_the_work(open_cache, paths):
    encoder, caches = Encoder(), []
    threads = [
        threading.Thread(target=lambda: caches.append(open_cache(encode=encoder, progress=False))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(encoder.encoded) == [path.name for path in paths]
    assert len(caches) == 3
    for cache in caches:
        assert_serves(cache, paths)


@pytest.mark.parametrize("kept", [0, 3, 10])
def test_images_beyond_the_limit_are_encoded_when_asked_for(open_cache, paths, tmp_path, caplog, kept):
    encoder, row = Encoder(), 3 * 4 * 2
    cache = open_cache(encode=encoder, limit=kept * row + row - 1)
    assert len(encoder.encoded) == kept
    assert (cache_folder(tmp_path) / "features.bin").stat().st_size == kept * row
    assert ("beyond its limit" in caplog.text) == (kept < 10)
    for _ in range(2):
        assert torch.equal(cache.gather([9, 0, 4]), torch.stack([features_of(paths[i]).half() for i in (9, 0, 4)]))
    assert len(encoder.encoded) == kept + {0: 6, 3: 4, 10: 0}[kept]
    assert len(open_cache(encode=Encoder(), limit=0)) == 10  # what is there is used, whatever the limit
    whole = open_cache(encode=encoder)
    assert_serves(whole, paths)


def test_disk_space_is_checked_before_encoding(open_cache, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10 * 3 * 4 * 2 - 1))
    encoder = Encoder()
    with pytest.raises(ValueError, match=r"features of 10 images need .* --cache"):
        open_cache(encode=encoder)
    assert encoder.batches == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10 * 3 * 4 * 2))
    assert len(open_cache(encode=encoder)) == 10


def test_features_out_of_range_or_shape_are_refused(open_cache, paths):
    """fp16 ends at 65504: larger numbers became inf in the cache, and training NaN hours later."""
    paths[5].write_text("70000")
    with pytest.raises(ValueError, match=r"float16: .*5\.jpg; cache in float32"):
        open_cache(encode=Encoder())
    assert_serves(open_cache(encode=Encoder(), dtype=torch.float32), paths)
    with pytest.raises(ValueError, match=r"\(4, 3, 4\), not \(4, 2, 4\)"):
        open_cache(encode=Encoder(), shape=(2, 4))


def test_bad_arguments_are_refused(open_cache, tmp_path):
    with pytest.raises(ValueError, match="at least one image"):
        open_cache(encode=Encoder(), paths=[])
    with pytest.raises(ValueError, match="batch_size is 0"):
        open_cache(encode=Encoder(), batch_size=0)
    with pytest.raises(ValueError, match="bfloat16"):
        open_cache(encode=Encoder(), dtype=torch.bfloat16)
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg"):
        open_cache(encode=Encoder(), paths=[tmp_path / "gone.jpg"])


STORED = Path(__file__).parents[1] / "fixtures" / "feature_cache"  # written by the version before this package


def stored_features(path):
    return torch.arange(12.0).reshape(SHAPE) / 8 + load_image(path).getpixel((0, 0))[0]


def test_a_cache_of_the_last_version_is_read_as_it_is(tmp_path):
    """Its folder is found by the same key, its rows by the same digests, and nothing is encoded again."""
    shutil.copytree(STORED, tmp_path / "cache")
    key = {"encoder": "vit", "weights": "abc", "transform": "Resize(4)"}
    paths = [STORED / "green.png", STORED / "red.png"]
    encoder = Encoder()
    cache = FeatureCache.open(CacheSpec(tmp_path / "cache", key, SHAPE), paths, encoder)
    assert encoder.batches == []
    for i, path in enumerate(paths):
        assert torch.equal(cache[i], stored_features(path).half())
    (before,), (after,) = STORED.glob("*/"), (tmp_path / "cache").glob("*/")
    for name in ("features.bin", "rows.sha256", "key.json"):
        assert (after / name).read_bytes() == (before / name).read_bytes()


def test_a_cache_is_written_as_the_last_version_wrote_it(tmp_path):
    (stored,) = STORED.glob("*/")
    spec = CacheSpec(tmp_path, json.loads((stored / "key.json").read_text())["key"], SHAPE)
    paths = [STORED / "red.png", STORED / "green.png"]
    FeatureCache.open(spec, paths, lambda batch: torch.stack([stored_features(path) for path in batch]))
    assert spec.folder.name == stored.name
    for file in stored.iterdir():
        assert (spec.folder / file.name).read_bytes() == file.read_bytes()
