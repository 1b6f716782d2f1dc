"""The model of costs: what an image takes of each resource, the one that saturates, shards and failures.

Times are in seconds and sizes in bytes, for one image or one GPU unless it says otherwise.
"""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import dataclass

from bench import arithmetic
from bench.arithmetic import BEAMS, TOKENS

PROMPT, ANSWER = 40, 16  # tokens of LLaVA's text, and of its answer


@dataclass(frozen=True)
class Cluster:
    """What a job runs on; page.md says where each number comes from."""

    products: float = 989e12  # bf16 operations a second, H100 SXM, dense
    bandwidth: float = 3.35e12  # bytes a second of its memory
    encode_share: float = 0.40  # of products that encoding and reading reach
    step_share: float = 0.50  # of bandwidth that a step of a search or an answer reaches
    launch: float = 8e-6  # seconds of a kernel too small to fill the GPU, as Python launches it
    kernels: int = 20  # a block and step
    gpus_a_node: int = 8
    cores_a_gpu: float = 12
    core_share: float = 0.5  # of what one core does alone, when all are at work
    network: float = 12.5e9  # bytes a second into a node
    store: float = 50e9  # bytes a second out of the store, for all nodes together
    mtbf_hours: float = 16384 * 54 * 24 / 419 / 8  # of a node of eight GPUs
    restart: float = 900.0  # until a node that failed works again
    startup: float = 120.0  # from the launch to the first image
    shard_overhead: float = 1.0  # opening a shard, filling and draining the pipeline, writing its results
    price: float = 3.0  # dollars an hour of GPU

    @property
    def failures(self) -> float:
        """Of a node a second."""
        return 1 / (3600 * self.mtbf_hours)

    def nodes(self, gpus: int) -> int:
        """How many nodes ``gpus`` are."""
        return -(-gpus // self.gpus_a_node)

    def slowest(self, moved: float, operations: float, launches: float) -> float:
        """Return the seconds of a step: the slowest of bytes moved, operations, and blocks launched."""
        memory, products = moved / self.bandwidth / self.step_share, operations / self.products / self.encode_share
        return max(memory, products, launches * self.kernels * self.launch)


@dataclass(frozen=True)
class Workload:
    """What an image takes: bytes read, seconds of one CPU core, seconds of a GPU by stage, ``batch`` images at once."""

    name: str
    image_bytes: float
    cpu_s: float
    stages: dict[str, float]
    batch: int

    @property
    def gpu_s(self) -> float:
        """Seconds of a GPU, which takes the stages one after another."""
        return sum(self.stages.values())


def workloads(costs: dict[str, float], cluster: Cluster) -> tuple[Workload, Workload]:
    """Return the tuned captioner and LLaVA-1.5-7B with 16-bit weights; ``costs`` as costs.json has them."""
    reach, models = cluster.products * cluster.encode_share, arithmetic.CaptionerShape()
    cpu = costs["tar_read_s"] + costs["decode_s"] + costs["write_s"]
    batch = 64
    moved, operations = models.search_bytes(BEAMS, TOKENS, batch), models.search(BEAMS, TOKENS)
    search = cluster.slowest(moved, operations, TOKENS * models.decoder.layers / batch)
    stages = {"encode": models.encoder.operations / reach, "search": search}
    captioner = Workload("captioner", costs["image_bytes"], cpu + costs["transform_s"], stages, batch)
    batch = 32
    tower, read, operations = arithmetic.llava_operations(PROMPT, ANSWER)
    moved = arithmetic.llava_bytes(PROMPT, ANSWER, batch)
    answer = cluster.slowest(moved, operations, ANSWER * arithmetic.LLAMA_7B.layers / batch)
    stages = {"encode": tower / reach, "read": read / reach, "answer": answer}
    return captioner, Workload("LLaVA-1.5-7B", costs["image_bytes"], cpu + costs["transform_336_s"], stages, batch)


@dataclass(frozen=True)
class Job:
    """``images`` captioned on ``gpus`` of a cluster, in shards, which are what a GPU claims and the only checkpoint."""

    work: Workload
    cluster: Cluster
    gpus: int
    images: float

    @property
    def capacities(self) -> dict[str, float]:
        """Images a second that each resource allows a GPU."""
        cluster, work = self.cluster, self.work
        return {
            "CPU cores": cluster.cores_a_gpu * cluster.core_share / work.cpu_s,
            "network": cluster.network / min(self.gpus, cluster.gpus_a_node) / work.image_bytes,
            "store": cluster.store / self.gpus / work.image_bytes,
            "GPU": 1 / work.gpu_s,
        }

    @property
    def rate(self) -> float:
        """Images a second of a GPU: what the resource that saturates first leaves it."""
        return min(self.capacities.values())

    @property
    def seconds(self) -> float:
        """Useful time, without losses."""
        return self.images / self.rate / self.gpus

    @property
    def best_shard(self) -> int:
        """Images of a shard that lose least, to first order and one digit: ``sqrt(2 c / (failures + 1 / T))`` seconds.

        That is Young's interval (Communications of the ACM 17, 1974) where a job of ``T`` seconds has one more failure:
        its end.
        """
        length = math.sqrt(2 * self.cluster.shard_overhead / (self.cluster.failures + 1 / self.seconds))
        return int(float(f"{self.rate * length:.0e}"))

    def length(self, shard: float) -> float:
        """Return the seconds of a shard of so many images."""
        return shard / self.rate + self.cluster.shard_overhead

    def redone(self, shard: float) -> float:
        """Return the expected work that failures throw away, as a share of the work."""
        expected = self.cluster.failures * self.length(shard)
        return math.expm1(expected) / expected - 1

    def losses(self, shard: float) -> dict[str, float]:
        """Return what shards of so many images cost, as shares of the useful time.

        A failure throws the shard away and costs a restart, so a shard of ``length`` seconds takes
        ``(1 / failures + restart) (e^(failures length) - 1)`` (Daly, Future Generation Computer Systems 22, 2006). At
        the end a GPU waits half a shard in the mean, as those that work reach the end of theirs at any time.
        """
        useful, length, cluster = shard / self.rate, self.length(shard), self.cluster
        lost = self.redone(shard) * length + cluster.restart * math.expm1(cluster.failures * length)
        overhead, failures, tail = cluster.shard_overhead / useful, lost / useful, length / 2 / self.seconds
        return {"overhead": overhead, "failures": failures, "tail": tail, "all": overhead + failures + tail}

    def simulate(self, shard: float, jitter: float = 0.1, seed: int = 0) -> tuple[float, float]:
        """Play the job through: a free GPU claims the next shard; a failing node throws away what its GPUs are doing.

        Args:
            shard: images of one; shards that are thrown away go back to the queue.
            jitter: how much longer or shorter than the mean a shard may take, relative.
            seed: of failures and times.

        Returns:
            The time lost and the work thrown away, as shares of the useful time and of the work.
        """
        rng, cluster, length, end, redone = random.Random(seed), self.cluster, self.length(shard), 0.0, 0.0
        count = round(self.images / shard)
        queue = [0.0] * count  # a heap: from when on each waiting shard is available
        free = [(0.0, gpu) for gpu in range(self.gpus)]  # a heap: when each GPU is free
        fails = [rng.expovariate(cluster.failures) for _ in range(cluster.nodes(self.gpus))]  # when a node fails next
        up = [0.0] * len(fails)  # from when on a node is up
        while queue:
            now, gpu = heapq.heappop(free)
            now, node = max(now, queue[0]), gpu // cluster.gpus_a_node
            while now >= fails[node]:
                up[node] = fails[node] + cluster.restart
                fails[node] = up[node] + rng.expovariate(cluster.failures)
            if now < up[node]:
                heapq.heappush(free, (up[node], gpu))
                continue
            heapq.heappop(queue)
            done = now + length * (1 - jitter + 2 * jitter * rng.random())
            if done <= fails[node]:
                end = max(end, done)
                heapq.heappush(free, (done, gpu))
            else:
                redone += fails[node] - now
                heapq.heappush(queue, fails[node])
                heapq.heappush(free, (fails[node] + cluster.restart, gpu))
        return self.gpus * end * self.rate / (count * shard) - 1, redone / (count * length)
