"""Five machines of a Ray cluster are killed during one quantization; the artifact is that of one machine, byte for byte.

    pip install ray
    python benchmarks/ray_kills.py

The cluster is processes of this machine: a head that takes no work and three nodes of one processor. At moments that a seed
draws, in the middle of pieces, one node is killed with all its processes, and a new one joins.
"""

from __future__ import annotations

import hashlib
import random
import tempfile
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import ray
from measured import write_result
from ray.cluster_utils import Cluster

import quern
from quern.core.machine.time_left import Work
from quern.core.progress import Silent, Task

MODEL = Path(__file__).parent.parent / "models" / "python-7m"
RECIPE = Path(__file__).parent / "recipes" / "gptq4-g64.yaml"
KILLS, NODES, SEED, TOKENS = 5, 3, 0, 2048
STORE = 200 << 20
STEPS = ("token weights", "quantizing blocks")


class Killer(Silent):
    """Kills a node soon after some of the steps that the job reports."""

    def __init__(self, cluster: Cluster, nodes: list[Any], steps: list[tuple[int, float]]) -> None:
        self.cluster, self.nodes, self.steps = cluster, nodes, steps
        self.step, self.kills, self.started = 0, [], time.perf_counter()
        self.threads: list[threading.Thread] = []

    def task(self, description: str, total: float, done: float = 0, work: Sequence[Work] | None = None) -> Task:
        return _Steps(self, description)

    def advanced(self, description: str) -> None:
        if description not in STEPS:
            return
        self.step += 1
        while len(self.nodes) < NODES:  # here, because Ray starts nodes from the main thread only
            self.nodes.append(self.cluster.add_node(num_cpus=1, object_store_memory=STORE))
        if self.steps and self.step == self.steps[0][0]:
            thread = threading.Timer(self.steps.pop(0)[1], self.kill, (description, self.step))
            thread.start()
            self.threads.append(thread)

    def kill(self, during: str, step: int) -> None:
        victim = self.nodes.pop(0)
        self.cluster.remove_node(victim, allow_graceful=False)
        self.kills.append({"during": during, "after_step": step, "seconds": time.perf_counter() - self.started})
        print(self.kills[-1], flush=True)


class _Steps:
    def __init__(self, killer: Killer, description: str) -> None:
        self.killer, self.description = killer, description

    def advance(self, steps: float = 1) -> None:
        self.killer.advanced(self.description)

    def done(self) -> None:
        pass


def main() -> None:
    given = {"recipe": RECIPE, "calibration_tokens": TOKENS}
    layers = 8
    draw = random.Random(SEED)
    # Forward, behind the head, backward, blocks: 3 x layers + 1 steps. After the last one nothing is left to disturb.
    ends = [1 + 3 * layers * part // KILLS for part in range(KILLS + 1)]
    steps = [draw.randrange(*part) for part in pairwise(ends)]
    with tempfile.TemporaryDirectory(prefix="quern-ray-") as folder:
        alone, spread = Path(folder, "alone"), Path(folder, "spread")
        quern.quantize(MODEL, alone, **given)
        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False},
        )
        nodes = [cluster.add_node(num_cpus=1, object_store_memory=STORE) for _ in range(NODES)]
        killer = Killer(cluster, nodes, [(step, draw.uniform(0.2, 1.0)) for step in steps])
        try:
            with quern.ray_cluster(cluster.address):
                report = quern.quantize(MODEL, spread, **given, progress=killer)
                for thread in killer.threads:
                    thread.join()
        finally:
            cluster.shutdown()
        identical = hashes(alone) == hashes(spread)
        print("identical:", identical)
        found = {"tokens": TOKENS, "nodes": NODES, "seed": SEED, "ray": ray.__version__, "kills": killer.kills}
        print(
            write_result(
                "ray_kills", {**found, "seconds": report.seconds, "identical": identical, "files": hashes(spread)}
            )
        )
    if not identical or len(killer.kills) != KILLS:
        raise SystemExit(1)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


if __name__ == "__main__":
    main()
