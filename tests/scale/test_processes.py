"""Several processes share a folder and shards, and others finish what they left when they were killed."""

import json
from pathlib import Path

from launching import launch
from level_captioner import picture
from shard_runs import contents, pictures, renamed, run, write_tar

from captioning.inference.append_log import checksum

SCRIPT = Path(__file__).with_name("launched_captioning.py")


def kept(image, caption):
    return json.dumps({"image": image, "caption": caption, "check": checksum(image, caption)}) + "\n"


def leave_side_files(out):
    """Make what a run of three processes leaves when it is killed, one in the middle of a line."""
    header = '{"run": {"model": "m"}}\n'
    out.with_name("out.json.part.jsonl").write_text(header)
    out.with_name("out.json.part1.jsonl").write_text(header + kept("1", "kept") + kept("4", "torn")[:-9])
    out.with_name("out.json.part2.jsonl").write_text(header + kept("2", "kept too"))


def test_two_processes_share_a_folder_and_shards_and_three_finish_what_killed_ones_began(tmp_path):
    """No image of the folder is lost or captioned twice; of the shards, only batches in which a process was killed."""
    images, predictions = tmp_path / "images", tmp_path / "out.json"
    images.mkdir()
    for level in range(7):
        (images / f"{level}.png").write_bytes(picture(level))
    leave_side_files(predictions)
    for number in range(8):
        write_tar(tmp_path / f"{number}.tar", pictures(number * 8, number * 8 + 8))
    said, out = tmp_path / "said", tmp_path / "out.jsonl"
    job = {"tars": str(tmp_path / "{0..7}.tar"), "out": str(out), "said": str(said)}
    more = {"images": str(images), "predictions": str(predictions), "killed_after": 5}
    killed = launch(2, SCRIPT, json.dumps(job | more))

    assert killed.returncode != 0
    expected = {str(level): f"level {level}" for level in range(7)} | {"1": "kept", "2": "kept too"}
    assert json.loads(predictions.read_text()) == expected, killed.stderr
    assert not list(tmp_path.glob("*.part*"))
    began = [line.split() for line in said.read_text().splitlines()]
    assert sorted(rank for _, rank in began) == ["0"] * 10 + ["1"] * 10

    finished = launch(3, SCRIPT, json.dumps(job))
    assert finished.returncode == 0, finished.stderr
    levels = [int(line.split()[0]) for line in said.read_text().splitlines()]
    assert set(levels) == set(range(64))
    assert len(levels) == 64 + 2 * 2  # of each killed process the batch that it was at
    assert run(job["tars"], tmp_path / "whole.jsonl") == 0
    assert contents(out) == renamed(contents(tmp_path / "whole.jsonl"), "whole", "out")
