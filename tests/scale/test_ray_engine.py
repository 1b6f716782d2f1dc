"""ray_engine.py: a local cluster of two actors, one killed half-way; and what is said where Ray is missing."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from level_captioner import grey, say
from shard_runs import contents, flags, pictures, renamed, results, write_tar

import p2_infer
from captioning.cli import BAD_INPUT
from captioning.distributed import Processes
from captioning.inference.batches import Job
from captioning.scale import ray_engine
from captioning.scale.pipeline import ShardRun, caption_source
from captioning.scale.results import Results
from captioning.scale.sources import Source
from captioning.scale.worker import Folder, caption_shards

SHARDS, IMAGES = 6, 8  # of a shard


@pytest.fixture(scope="module")
def cluster():
    """A cluster of two processors on this machine; a script would start one for each run."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray[data]'")
    pytest.importorskip("ray.data", reason="Ray is installed without Ray Data: pip install 'ray[data]'")
    with pytest.MonkeyPatch.context() as patch:
        folders = [ray_engine.ROOT, Path(__file__).parent, Path(__file__).parents[1]]
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture
def tars(tmp_path):
    for number in range(SHARDS):
        write_tar(tmp_path / f"{number}.tar", pictures(number * IMAGES, (number + 1) * IMAGES))
    return tmp_path / f"{{0..{SHARDS - 1}}}.tar"


class Build:
    """Makes a captioner that notes which process captioned what; one is killed in its second shard's second batch."""

    def __init__(self, said, killed):
        self.said, self.killed = said, killed

    def __call__(self):
        return Job(grey, self.caption)

    def caption(self, levels):
        with self.said.open("a") as file:
            file.write("".join(f"{level} {os.getpid()}\n" for level in levels))
        if IMAGES + 2 in levels and not self.killed.exists():
            while len({pid for _, pid in said_by(self.said)}) < 2:  # the other actor is at work too
                time.sleep(0.01)
            self.killed.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return say(levels)


def said_by(said):
    return [tuple(map(int, line.split())) for line in said.read_text().splitlines()]


def test_two_actors_of_which_one_is_killed_give_what_one_process_gives(cluster, tars, tmp_path):
    said, killed, out = tmp_path / "said", tmp_path / "killed", tmp_path / "ray.jsonl"
    with Results(out, "jsonl", {"model": "m"}) as found:
        found.begin()
        shards = Source((tars,)).shards(tmp_path)
        ray_engine.caption_with_ray(found.folder, shards, Build(said, killed), 2, actors=2)
        found.finish(shards)
    lines = said_by(said)
    assert int(killed.read_text()) in {pid for _, pid in lines}
    assert len({pid for _, pid in lines}) >= 2
    assert {level for level, _ in lines} == set(range(SHARDS * IMAGES))
    assert len(lines) == SHARDS * IMAGES + 2  # the batch that the killed one was at
    with Results(tmp_path / "plain.jsonl", "jsonl", {"model": "m"}) as plain:
        plain.begin()
        caption_shards(plain.folder, shards, Job(grey, say), 2)
        plain.finish(shards)
    assert contents(out) == renamed(contents(tmp_path / "plain.jsonl"), "plain", "ray")


def test_p2_infer_gives_the_same_with_ray(cluster, tmp_path, tiny_data, tiny_profile, adapter):
    images = sorted((tiny_data / "images" / "val").iterdir())
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", [(p.name, p.read_bytes()) for p in images[number::2]])
    words = flags(tiny_profile, adapter)
    assert p2_infer.main([str(tmp_path / "*.tar"), str(tmp_path / "plain.jsonl"), *words]) == 0
    by_ray = [*words, "--engine", "ray", "--ray-actors", "1"]
    assert p2_infer.main([str(tmp_path / "*.tar"), str(tmp_path / "ray.jsonl"), *by_ray]) == 0
    assert results(tmp_path / "ray.jsonl") == results(tmp_path / "plain.jsonl")
    assert len(results(tmp_path / "ray.jsonl")) == len(images)


class Crash:
    """Loads a captioner that takes its process with it."""

    def __call__(self):
        return Job(grey, lambda levels: os._exit(1))


def test_a_shard_that_kills_its_actor_again_and_again_ends_the_run(cluster, tars, tmp_path, monkeypatch):
    """Ray would restart it without end."""
    monkeypatch.setattr(ray_engine, "TRIES", 1)
    folder = Folder(tmp_path / "out")
    folder.state.mkdir(parents=True)
    with pytest.raises(ValueError, match="the same shard failed 2 times"):
        ray_engine.caption_with_ray(folder, Source((tars,)).shards(tmp_path)[:1], Crash(), 2, actors=1)


def test_what_an_actor_cannot_do_is_said_as_one_line(cluster, tars, tmp_path):
    def build():
        raise FileNotFoundError("weights.bin: no such file")

    folder = Folder(tmp_path / "out")
    folder.state.mkdir(parents=True)
    with pytest.raises(ValueError, match=r"^weights\.bin: no such file$"):
        ray_engine.caption_with_ray(folder, Source((tars,)).shards(tmp_path), build, 2, actors=1)


def test_without_ray_one_line_says_how_to_get_it(tmp_path, tars, monkeypatch, capsys, tiny_profile, adapter):
    monkeypatch.setitem(sys.modules, "ray.data", None)
    words = [str(tars), str(tmp_path / "out.jsonl"), *flags(tiny_profile, adapter), "--engine", "ray"]
    assert p2_infer.main(words) == BAD_INPUT
    assert "pip install -e '.[ray]'" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_ray_starts_its_processes_itself(tmp_path, tars, capsys, tiny_profile, adapter):
    words = [str(tars), str(tmp_path / "out.jsonl"), *flags(tiny_profile, adapter), "--engine", "ray"]
    assert p2_infer.main([*words, "--ray-actors", "0"]) == BAD_INPUT
    assert "--ray-actors 0: must be at least 1" in capsys.readouterr().err
    launched = ShardRun(Source((tars,)), tmp_path / "out.jsonl", "jsonl", {}, batch_size=2, engine="ray")
    with pytest.raises(ValueError, match="without accelerate launch"):
        caption_source(launched, Crash(), Processes(0, 2))
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("cluster_has", "asked", "use_gpus", "share"),
    [
        ({"CPU": 8.0}, None, False, (8, {"num_cpus": 1.0})),
        ({"CPU": 2.0}, 4, True, (4, {"num_cpus": 0.5})),
        ({"CPU": 64.0, "GPU": 4.0}, None, True, (4, {"num_gpus": 1.0})),
        ({"CPU": 64.0, "GPU": 4.0}, 8, True, (8, {"num_gpus": 0.5})),
        ({"CPU": 64.0, "GPU": 2.0}, 3, True, (3, {"num_gpus": 0.5})),  # two thirds each left one that never started
        ({"CPU": 2.0}, 3, False, (3, {"num_cpus": 0.5})),  # of two machines, perhaps
        ({"CPU": 3.0, "GPU": 4.0}, None, False, (3, {"num_cpus": 1.0})),
    ],
)
def test_actors_share_what_the_cluster_has(cluster_has, asked, use_gpus, share):
    assert ray_engine._share(cluster_has, asked, use_gpus, 100) == share
    assert ray_engine._share(cluster_has, asked, use_gpus, 1)[0] == 1
