"""Tars of one-coloured pictures, and runs over shards by a captioner that says the grey level."""

import io
import json
import tarfile
from pathlib import Path

from level_captioner import grey, picture, say

from captioning.data.part_files import form_of, read_part
from captioning.distributed import ALONE
from captioning.inference.batches import Job
from captioning.scale.pipeline import ShardRun, caption_source
from captioning.scale.sources import Source

RUN = {"model": "m"}


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


def run(
    source,
    out,
    caption=say,
    settings=RUN,
    form="auto",
    shard_size=Source.shard_size,
    root=None,
    processes=ALONE,
    **options,
):
    """Caption a source in batches of two; return the exit code."""
    images, out = Source((Path(source),), shard_size, root), Path(out)
    shard_run = ShardRun(images, out, form_of(out, form), settings, batch_size=2, **options)
    return caption_source(shard_run, lambda: Job(grey, caption), processes)


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


def flags(profile, adapter):
    """Return what p2_infer.py takes besides images and results."""
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
