"""part_files.py: parts that other programs can read, and what is said where one cannot be written."""

import errno
import os
import sys

import pytest
from level_captioner import say
from shard_runs import EXPECTED, results, run, write_tar

from captioning import files
from captioning.cli import PARTIAL
from captioning.data import part_files
from captioning.data.part_files import read_part


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
    write = files.atomic_path

    def atomic_path(path):
        if path == full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path)

    return atomic_path


def test_parquet_without_pyarrow_is_refused_at_once(tars, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[parquet\]'"):
        run(tars, tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()
