"""Shards, workers, failing nodes: an event simulation of a job whose only checkpoint is a finished shard.

A node's failure throws away what all of its workers are doing; the shards go back to the queue, and the node comes back
after a while. With ``claiming`` a worker takes the next shard when it is free; without, it has its own list from the
start, as images split by rank have.
"""

from __future__ import annotations

import heapq
import math
import random
from bisect import bisect_right
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Job:
    """A job and the machines it runs on; times in seconds.

    Attributes:
        shards: how many.
        shard: seconds of one on a worker of speed 1.
        workers: GPUs.
        workers_a_node: that fail together.
        failures: of a node a second while it is up; 0 never.
        restart: until a node is back.
        spread: standard deviation of the logarithm of workers' speeds.
        slow_nodes: share of nodes that run at ``slow_speed``.
        slow_speed: of them.
        claiming: shards are taken one by one; otherwise dealt out at the start.
        jitter: standard deviation of a shard's time, relative; the mean stays.
    """

    shards: int
    shard: float
    workers: int
    workers_a_node: int = 8
    failures: float = 0.0
    restart: float = 0.0
    spread: float = 0.0
    slow_nodes: float = 0.0
    slow_speed: float = 0.5
    claiming: bool = True
    jitter: float = 0.0


@dataclass
class Outcome:
    """What came of a job; seconds of all workers together, but for ``makespan``."""

    makespan: float = 0.0
    useful: float = 0.0
    redone: float = 0.0  # thrown away by failures
    down: float = 0.0  # waiting for a node that was at work to come back
    lost_shards: int = 0
    workers: int = 0

    @property
    def idle(self) -> float:
        """Waiting for others at the end, failures of idle nodes included."""
        return max(0.0, self.workers * self.makespan - self.useful - self.redone - self.down)


class Node:
    """When one node is up. Failures are drawn as far as anybody asks."""

    def __init__(self, job: Job, random_numbers: random.Random) -> None:
        self.job, self.random = job, random_numbers
        self.failed: list[float] = []

    def next_failure(self, now: float) -> float:
        """Return when the node fails next after ``now``."""
        if not self.job.failures:
            return math.inf
        while not self.failed or self.failed[-1] <= now:
            up = self.failed[-1] + self.job.restart if self.failed else 0.0
            self.failed.append(up + self.random.expovariate(self.job.failures))
        return self.failed[bisect_right(self.failed, now)]

    def up_from(self, now: float) -> float:
        """Return the first moment from ``now`` on at which the node is up."""
        self.next_failure(now)
        before = bisect_right(self.failed, now)
        return max(now, self.failed[before - 1] + self.job.restart) if before else now


@dataclass
class Simulation:
    """One run of a job; call ``run`` once. Shards are alike, so that counting them is enough."""

    job: Job
    seed: int = 0
    events: list[tuple[float, int, str, int]] = field(default_factory=list)
    idle: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        job, numbers = self.job, random.Random(self.seed)
        count = -(-job.workers // job.workers_a_node)
        self.nodes = [Node(job, random.Random(numbers.random())) for _ in range(count)]
        slow = [numbers.random() < job.slow_nodes for _ in self.nodes]
        speeds = [math.exp(numbers.gauss(0, job.spread)) for _ in range(job.workers)]
        self.speeds = [v * (job.slow_speed if slow[w // job.workers_a_node] else 1) for w, v in enumerate(speeds)]
        self.number, self.random = 0, numbers
        self.outcome = Outcome(workers=job.workers)
        self.common = job.shards if job.claiming else 0  # shards that anybody may take
        split = [job.shards // job.workers + (w < job.shards % job.workers) for w in range(job.workers)]
        self.own = [0 if job.claiming else n for n in split]  # shards of the worker's own list

    def push(self, time: float, kind: str, worker: int) -> None:
        """Let something happen at ``time``."""
        self.number += 1
        heapq.heappush(self.events, (time, self.number, kind, worker))

    def run(self) -> Outcome:
        """Play the job through."""
        for worker in range(self.job.workers):
            self.push(0.0, "free", worker)
        while self.events:
            now, _, kind, worker = heapq.heappop(self.events)
            if kind == "free":
                self.take(now, worker)
            elif kind == "lost":
                self.give_back(now, worker)
            else:
                self.outcome.makespan = max(self.outcome.makespan, now)
                self.take(now, worker)
        return self.outcome

    def take(self, now: float, worker: int) -> None:
        """Give a free worker its next shard, or let it wait."""
        node = self.nodes[worker // self.job.workers_a_node]
        if not self.common and not self.own[worker]:
            self.idle.append(worker)
            return
        up = node.up_from(now)
        if up > now:
            self.push(up, "free", worker)
            return
        if self.job.claiming:
            self.common -= 1
        else:
            self.own[worker] -= 1
        needed, failure = self.job.shard / self.speeds[worker], node.next_failure(now)
        if self.job.jitter:
            needed *= math.exp(self.random.gauss(-(self.job.jitter**2) / 2, self.job.jitter))
        if now + needed <= failure:
            self.outcome.useful += needed
            self.push(now + needed, "done", worker)
        else:
            self.outcome.redone += failure - now
            self.push(failure, "lost", worker)

    def give_back(self, now: float, worker: int) -> None:
        """Put the shard of a worker that failed back, for whoever is idle."""
        self.outcome.lost_shards += 1
        self.outcome.down += self.job.restart
        if self.job.claiming:
            self.common += 1
            if self.idle:
                self.push(now, "free", self.idle.pop())
        else:
            self.own[worker] += 1
        self.push(now + self.job.restart, "free", worker)


def simulate(job: Job, seed: int = 0) -> Outcome:
    """Return what comes of ``job`` with one draw of failures and speeds."""
    return Simulation(job, seed).run()
