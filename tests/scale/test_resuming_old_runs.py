"""Side files and folders of runs that an earlier version began, in tests/fixtures/side_files, are resumed.

They belong to p1_llava_caption.py and p2_infer.py with default settings, killed after a few of eight images; FOLDER in
them stands for the folder of the run.
"""

import json
import shutil

import pytest
from level_captioner import grey
from PIL import Image
from shard_runs import results

import p1_llava_caption
import p2_infer
from captioning.distributed import ALONE
from captioning.inference.batches import Job
from captioning.inference.folder import PredictionLog, caption_images
from captioning.profiles import ROOT
from captioning.scale.pipeline import ShardRun, caption_source, source_of

OLD = ROOT / "tests" / "fixtures" / "side_files"


@pytest.fixture
def folder(tmp_path):
    """The stored files, the images that they are about, and an adapter with the fingerprint of the one in them."""
    folder = tmp_path / "run"
    shutil.copytree(OLD, folder)
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_text(path.read_text().replace("FOLDER", str(folder)))
    (folder / "images").mkdir()
    for level in range(8):
        Image.new("RGB", (4, 4), (level, level, level)).save(folder / "images" / f"{level}.png")
    (folder / "adapter.safetensors").write_bytes(b"adapter")
    return folder


def p2_args(folder, source, out, *flags):
    words = (folder / source, folder / out, folder / "decoder.bin", "--adapter", folder / "adapter.safetensors", *flags)
    return p2_infer.build_parser().parse_args([*map(str, words)])


def job(seen):
    def caption(levels):
        seen.extend(levels)
        return [f"new {level}" for level in levels]

    return Job(grey, caption)


def expected(old):
    return {str(level): f"{'old' if level < old else 'new'} {level}" for level in range(8)}


@pytest.mark.parametrize("script", ["p1", "p2"])
def test_a_folder_is_resumed(folder, script):
    if script == "p1":
        words = [str(folder / "images"), str(folder / "llava.json"), "--model", str(folder / "llava")]
        words += ["--max-new-tokens", "64"]  # the default of then
        args = p1_llava_caption.build_parser().parse_args(words)
        settings = p1_llava_caption.describe_run(p1_llava_caption.PROMPTS[1], args)
    else:
        args = p2_args(folder, "images", "out.json")  # of two processes
        settings = p2_infer.describe_run(args)
    entries, seen = source_of(args).images(), []
    with PredictionLog(args.out, settings, processes=ALONE) as predictions:
        caption_images(predictions, entries, job(seen), batch_size=2)
        assert predictions.finish(entries) == expected(old=4)
    assert seen == [4, 5, 6, 7]
    assert not list(folder.glob(f"{args.out.name}.part*"))


@pytest.mark.parametrize("out", ["parts.jsonl", "one.json"])
def test_shards_are_resumed(folder, out):
    args = p2_args(folder, "list.txt", out, "--shard-size", 3, "--batch-size", 2)
    run, seen = ShardRun.from_flags(args, p2_infer.describe_run(args)), []
    assert caption_source(run, lambda: job(seen)) == 0
    assert seen == [5, 6, 7]
    found = results(args.out) if out == "parts.jsonl" else json.loads(args.out.read_text())
    assert found == expected(old=5)
