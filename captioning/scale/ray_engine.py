"""Caption shards with the actors of a Ray cluster: the same model, the same shards, the same parts and records.

Ray Data hands out shards, restarts actors that die and gives their shards to others. What a dead actor had captioned is
in the shard's side file, which the next one resumes; records say which shards are finished. So all that Ray moves are
names of shards, and all machines must see the same files under the same paths, this repository's included.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from captioning.imports import import_guarded
from captioning.inference.batches import Job
from captioning.messages import install, one_line
from captioning.scale.sources import Shard
from captioning.scale.worker import Folder, caption_shards

log = logging.getLogger(__name__)

PATIENCE = 60.0  # seconds to wait for a shard whose process may be about to die
TRIES = 10  # of a shard whose actor died; Ray would try without end, and the shard may be the reason for the crash
MOST_BLOCKS = 10_000  # what Ray hands out at once; with more shards than that, several in a block
ROOT = str(Path(__file__).resolve().parents[2])


class CaptionActor:
    """The actor: loads the model at its first shard, then captions one of ``shards`` after another."""

    def __init__(self, build: Callable[[], Job], folder: Folder, batch_size: int, shards: Sequence[Shard]) -> None:
        self._build, self._folder, self._batch_size, self._shards = build, folder, batch_size, shards
        self._job: Job | None = None

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[str]]:
        """Caption the shard with the number ``rows["item"]``; return what went wrong, or an empty text."""
        try:
            self._job = self._job or self._build()
            shards = [self._shards[number] for number in rows["item"]]
            caption_shards(self._folder, shards, self._job, self._batch_size, PATIENCE)
        except (ValueError, OSError) as error:  # bad input or no room, which another try would meet again
            return {"error": [str(error) or type(error).__name__]}
        return {"error": [""]}


def caption_with_ray(
    folder: Folder,
    shards: Sequence[Shard],
    build: Callable[[], Job],
    batch_size: int,
    actors: int | None = None,
    use_gpus: bool = True,
) -> None:
    """Caption the shards that are not finished on the cluster of ``RAY_ADDRESS``, or on this machine without one.

    ``build`` loads the model in each actor, of which there are ``actors``: without a number one for each GPU that may
    be used, or else each CPU.

    Raises:
        ValueError: Ray is not installed, an actor met bad input, or actors died too often.
    """
    ray = import_ray()
    todo = [shard for shard in shards if folder.done(shard) is None]
    started = not ray.is_initialized()
    if started:
        _start(ray)
    try:
        count, resources = _share(ray.cluster_resources(), actors, use_gpus, len(todo))
        log.info("%d shards for %d actors", len(todo), count)
        results = ray.data.from_items([*range(len(todo))], override_num_blocks=min(len(todo), MOST_BLOCKS)).map_batches(
            CaptionActor,
            fn_constructor_args=(build, folder, batch_size, todo),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=count, max_tasks_in_flight_per_actor=1),
            max_task_retries=TRIES,
            **resources,
        )
        for row in results.iter_rows():
            if row["error"]:
                raise ValueError(row["error"])
    except ray.exceptions.RayError as error:
        raise ValueError(
            f"--engine ray: the same shard failed {TRIES + 1} times, or the cluster did; what is captioned"
            f" is kept. Ray says: {one_line(str(error), 500)}"
        ) from error
    finally:
        if started:
            ray.shutdown()


def import_ray() -> Any:
    """Return Ray with Ray Data. Raises ValueError where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # sends nothing to anyone
    try:
        import_guarded("ray.data")
    except ImportError as error:
        raise ValueError(
            f"--engine ray: Ray cannot be imported ({error}): {install('ray')}, or leave --engine out"
        ) from error
    return sys.modules["ray"]


def _start(ray: Any) -> None:
    """Join the cluster of ``RAY_ADDRESS``, or start one on this machine. Actors import the suite from where it is."""
    environment = {"PYTHONPATH": os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])}
    # The store holds names of shards; Ray's default is a third of the memory.
    local = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False, "object_store_memory": 100 * 2**20}
    ray.init(runtime_env={"env_vars": environment}, logging_level=logging.WARNING, **local)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it logs each plan


def _share(found: dict[str, float], actors: int | None, use_gpus: bool, shards: int) -> tuple[int, dict[str, float]]:
    """Return how many actors to start, and what each of them takes of the cluster's resources ``found``."""
    gpus = int(found.get("GPU", 0)) if use_gpus else 0
    cpus = int(found.get("CPU", 1))
    count = min(actors or gpus or cpus, max(shards, 1))
    name, have = ("num_gpus", gpus) if gpus else ("num_cpus", cpus)
    # An actor takes its share of one device: of two GPUs three actors cannot have two thirds each.
    return count, {name: 1 / math.ceil(count / have) if have else 0.0}
