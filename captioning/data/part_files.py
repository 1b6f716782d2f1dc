"""Part files: the captions of one shard as JSONL or Parquet."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from captioning.data.ranked import caption_of, record_of
from captioning.files import atomic_path, composed, parse_json
from captioning.imports import import_guarded
from captioning.messages import install

FORMS = ("json", "jsonl", "parquet")
ROWS = 10_000  # of a Parquet file that are in memory at once


def form_of(out: Path, asked: str) -> str:
    """Return the form of the results: the one ``asked`` for, or for ``auto`` what the suffix of ``out`` says."""
    if asked != "auto":
        return asked
    return {".jsonl": "jsonl", ".parquet": "parquet"}.get(out.suffix.lower(), "json")


def write_part(path: Path, rows: Iterable[tuple[str, str]], ranked: bool = False) -> None:
    """Write (key, caption) rows as JSONL or Parquet, by the suffix of ``path``, atomically.

    Captions that are ``Ranked`` have their scores beside them, in the field or column ``ranked``. Parquet must be told
    by ``ranked``: all files of a run have the same columns, those without a row too.

    Raises:
        OSError: naming the file and what to do.
    """
    try:
        with atomic_path(path) as temporary:
            if path.suffix == ".parquet":
                _write_parquet(temporary, rows, ranked)
            else:
                with temporary.open("w", encoding="utf-8") as file:
                    for key, caption in rows:
                        file.write(json.dumps({"key": key, **record_of(caption)}, ensure_ascii=False) + "\n")
    except OSError as error:
        raise OSError(
            f"{path}: cannot be written ({error}); the captions so far are kept, so make room and run the "
            "same command again"
        ) from error


def read_part(path: Path) -> Iterator[tuple[str, str]]:
    """Yield a part's (key, caption) rows in order; an earlier version wrote keys in whichever form of Unicode."""
    if path.suffix == ".parquet":
        with parquet().ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS):
                yield from ((composed(row["key"]), caption_of(row)) for row in batch.to_pylist())
        return
    with path.open("rb") as file:
        for line in file:
            row = parse_json(line.decode())
            yield composed(row["key"]), caption_of(row)


def _write_parquet(path: Path, rows: Iterable[tuple[str, str]], ranked: bool) -> None:
    arrow, module = import_guarded("pyarrow"), parquet()
    columns = [("key", arrow.string()), ("caption", arrow.string())]
    if ranked:
        columns.append(("ranked", arrow.list_(arrow.struct([("caption", arrow.string()), ("score", arrow.float64())]))))
    schema = arrow.schema(columns)
    left = iter(rows)
    with module.ParquetWriter(path, schema) as writer:
        while chunk := list(itertools.islice(left, ROWS)):
            records = [{"key": key, **record_of(caption)} for key, caption in chunk]
            writer.write_table(arrow.Table.from_pylist(records, schema=schema))


def parquet() -> Any:
    """Return the Parquet module. Raises ValueError where it is not installed."""
    try:
        return import_guarded("pyarrow.parquet")
    except ImportError as error:
        raise ValueError(
            f"Parquet needs pyarrow, which cannot be imported ({error}): {install('parquet')}, or take JSON lines "
            "(--out-format jsonl)"
        ) from error
