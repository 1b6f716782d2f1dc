"""A cost model of captioning very many images: rates of each resource, the one that saturates, shards and failures.

Times are in seconds and sizes in bytes, each for one image or one GPU unless it says otherwise. Nothing is measured or
read here; ``bench/simulate.py`` feeds it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bench import arithmetic
from bench.stand_ins import BEAMS, TOKENS

PROMPT, ANSWER = 40, 16  # tokens of LLaVA's text, and of its answer
RESOURCES = ("CPU cores", "network", "store", "GPU")


@dataclass(frozen=True)
class Cluster:
    """What a job runs on. ``SOURCES`` in bench/study.py says where each number comes from."""

    products: float = 989e12  # bf16 operations a second, H100 SXM, dense
    bandwidth: float = 3.35e12  # bytes a second of its memory
    encode_share: float = 0.40  # of products that encoding and reading reach
    step_share: float = 0.50  # of bandwidth that a step of a search or an answer reaches
    launch: float = 8e-6  # seconds of a kernel too small to fill the GPU, as Python launches it
    kernels: int = 20  # a block and step
    gpus_a_node: int = 8
    cores_a_gpu: int = 12
    core_share: float = 0.5  # of what one core does alone, when all are at work
    network: float = 12.5e9  # bytes a second into a node
    store: float = 50e9  # bytes a second out of the store, for all nodes together
    mtbf_hours: float = 16384 * 54 * 24 / 419 / 8  # of a node of eight GPUs
    restart: float = 900.0  # until a node that failed works again
    startup: float = 120.0  # from the launch to the first image
    shard_overhead: float = 1.0  # opening a shard, filling and draining the pipeline, writing its results
    price: float = 3.0  # dollars an hour of GPU

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be a positive number")

    @property
    def failures(self) -> float:
        """Of a node a second."""
        return 1 / (3600 * self.mtbf_hours)

    def nodes(self, gpus: int) -> int:
        """How many nodes ``gpus`` are."""
        return -(-gpus // self.gpus_a_node)


@dataclass(frozen=True)
class Workload:
    """What an image takes of each resource.

    Attributes:
        name: of the job.
        image_bytes: read.
        cpu_s: of one core, reading, decoding and preprocessing it.
        stages: seconds of the GPU, which takes them one after another.
        measured: whether ``stages`` come from a run on a GPU.
        batch: images at once on a GPU.
    """

    name: str
    image_bytes: float
    cpu_s: float
    stages: dict[str, float]
    batch: int
    measured: bool = False

    @property
    def gpu_s(self) -> float:
        """Seconds of a GPU."""
        return sum(self.stages.values())


def captioner(costs: dict[str, float], cluster: Cluster, batch: int = 64) -> Workload:
    """Return the tuned captioner's workload: ViT-L/14, GPT-2 small, beam search; ``costs`` as bench/costs.py has them.

    A step of the search is bound by the slowest of memory, products and launches.
    """
    models = arithmetic.Captioner()
    reach = cluster.products * cluster.encode_share
    moved = models.search_bytes(BEAMS, TOKENS, batch) / (cluster.bandwidth * cluster.step_share)
    products = models.search(BEAMS, TOKENS) / reach
    launches = TOKENS * models.decoder.layers * cluster.kernels * cluster.launch / batch
    stages = {"encode": models.encoder.operations / reach, "search": max(moved, products, launches)}
    cpu = costs["tar_read_s"] + costs["decode_s"] + costs["transform_s"] + costs["write_s"]
    return Workload("captioner", costs["image_bytes"], cpu, stages, batch)


def llava(costs: dict[str, float], cluster: Cluster, batch: int = 32) -> Workload:
    """Return LLaVA-1.5-7B's workload: greedy, with 16-bit weights."""
    reach = cluster.products * cluster.encode_share
    tower, read, steps = arithmetic.llava_operations(PROMPT, ANSWER)
    moved = arithmetic.llava_bytes(PROMPT, ANSWER, batch) / (cluster.bandwidth * cluster.step_share)
    launches = ANSWER * arithmetic.LLAMA_7B.layers * cluster.kernels * cluster.launch / batch
    stages = {"encode": tower / reach, "read": read / reach, "answer": max(moved, steps / reach, launches)}
    cpu = costs["tar_read_s"] + costs["decode_s"] + costs["transform_336_s"] + costs["write_s"]
    return Workload("LLaVA-1.5-7B", costs["image_bytes"], cpu, stages, batch)


def capacities(work: Workload, cluster: Cluster, gpus: int) -> dict[str, float]:
    """Return the images a second that each resource allows a GPU of ``gpus``."""
    sharing = min(gpus, cluster.gpus_a_node)
    return {
        "CPU cores": cluster.cores_a_gpu * cluster.core_share / work.cpu_s,
        "network": cluster.network / sharing / work.image_bytes,
        "store": cluster.store / gpus / work.image_bytes,
        "GPU": 1 / work.gpu_s,
    }


def bottleneck(work: Workload, cluster: Cluster, gpus: int) -> tuple[str, float]:
    """Return the resource that saturates first, and the images a second that it leaves a GPU."""
    found = capacities(work, cluster, gpus)
    name = min(found, key=found.get)
    return name, found[name]


# --- shards and failures ----------------------------------------------------------------------------------------------


def shard_seconds(length: float, failures: float, restart: float) -> float:
    """Return the expected seconds until a shard of ``length`` seconds is done, when a failure throws it away.

    Failures come at random, ``failures`` a second while the worker is up; each costs ``restart``, and the shard begins
    anew: ``(1 / failures + restart) (e^(failures length) - 1)`` (Daly, Future Generation Computer Systems 22, 2006).
    """
    return (1 / failures + restart) * math.expm1(failures * length)


def redone_seconds(length: float, failures: float) -> float:
    """Return the expected seconds of work on a shard that failures throw away."""
    return math.expm1(failures * length) / failures - length


@dataclass(frozen=True)
class Losses:
    """Shares of the useful time that shards of one size cost."""

    overhead: float
    redone: float  # thrown away, and waited for restarts
    tail: float  # idle at the end, when there are no shards left for all

    @property
    def total(self) -> float:
        """All of it."""
        return self.overhead + self.redone + self.tail


def losses(images_a_shard: float, images: float, rate: float, gpus: int, cluster: Cluster) -> Losses:
    """Return what shards of ``images_a_shard`` cost a job of ``images`` at ``rate`` images a second and GPU.

    At the end a GPU waits half a shard in the mean, as those that work reach the end of theirs at any time.
    """
    useful = images_a_shard / rate
    length = useful + cluster.shard_overhead
    whole = shard_seconds(length, cluster.failures, cluster.restart)
    return Losses(cluster.shard_overhead / useful, (whole - length) / useful, length / 2 / (images / rate / gpus))


def best_shard(images: float, rate: float, gpus: int, cluster: Cluster) -> float:
    """Return the images of a shard that lose least, to first order: ``sqrt(2 c / (failures + 1 / T))`` seconds.

    That is Young's interval (Communications of the ACM 17, 1974) where a job of ``T`` seconds has one more failure: its
    end.
    """
    job = images / rate / gpus
    return rate * math.sqrt(2 * cluster.shard_overhead / (cluster.failures + 1 / job))
