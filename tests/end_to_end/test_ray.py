"""Quantizing on a Ray cluster: a head that takes no work and three nodes that do, of which one is killed on the way.

All of it is real, on this machine; starting the processes is what takes the time.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from artifacts import hashes, small_recipe
from tiny_model import tiny_config, write_model

import quern
from quern.core.errors import UserError
from quern.pipeline.quantize import quantize
from quern.quantization import ray_workers
from quern.quantization.ray_workers import RayWorkers, ray_cluster

pytest.importorskip("ray", reason='Ray is not installed: pip install "quern[ray]"')
STORE = 80 << 20
"""Bytes of each node's object store; the least that Ray takes is 75 MiB."""
# Deprecations inside Ray, and sockets and processes that it leaves to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def head() -> Iterator[Any]:
    """A cluster of one node, which takes no work."""
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False},
    )
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def nodes(head) -> list[Any]:
    """Three that take work."""
    return [head.add_node(num_cpus=1, object_store_memory=STORE) for _ in range(3)]


@pytest.mark.parametrize("address", ["", "local", "here", "ray://127.0.0.1:10001", "127.0.0.1:", "127.0.0.1:99999"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(UserError, match="no address of a Ray cluster"), ray_cluster(address):
        pass


def test_an_address_where_nobody_is_is_refused():
    with pytest.raises(UserError, match="nothing answers there"), ray_cluster("127.0.0.1:1"):
        pass


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r'needs Ray.*pip install "quern\[ray\]"'), ray_cluster("auto"):
        pass


def test_caps_and_machines_that_are_too_small_are_refused():
    cluster = object.__new__(ray_workers._Cluster)
    cluster.machines = [
        ray_workers.Machine(name, name, 1, memory) for name, memory in (("first", 8 << 30), ("second", 1 << 30))
    ]
    cluster.found = [ray_workers.Found({}, 4 << 30)] * 2
    cluster.reserve(1 << 30, 1 << 30)
    with pytest.raises(UserError, match="cap of 1.07 GB is too small for the processes on other machines.*2.15 GB"):
        cluster.reserve(2 << 30, 1 << 30)
    with pytest.raises(UserError, match="a process of this job needs 2.15 GB.*: second has 1.07 GB. Take"):
        cluster.reserve(2 << 30, None)
    with pytest.raises(UserError, match="needs 6.44 GB.*: first has 4.29 GB; second has 1.07 GB"):
        cluster.reserve(1 << 20, 6 << 30)


def test_a_cluster_without_workers_is_refused(head):
    with pytest.raises(UserError, match="no machine of this cluster takes work"), ray_cluster(head.address):
        pass


def test_machines_that_are_not_alike_are_refused_by_name(head, nodes, monkeypatch):
    """All three are as they are, and this process says that it is another."""
    mine = {**ray_workers.arithmetic(), "torch_instruction_set": "AVX1024"}
    monkeypatch.setattr(quern, "__version__", "9.9")
    monkeypatch.setattr(ray_workers, "arithmetic", lambda: mine)
    with pytest.raises(UserError) as refused, ray_cluster(head.address):
        pass
    assert str(refused.value).count("quern 0.1.0 instead of 9.9, torch_instruction_set") == 3
    for node in nodes:
        assert node.node_id[:8] in str(refused.value)


def test_one_of_three_machines_is_killed_after_ctrl_c_and_the_bytes_are_those_of_one(
    head, nodes, tiny_text, tmp_path, monkeypatch
):
    model = write_model(tmp_path / "model", tiny_config(num_hidden_layers=2, tie_word_embeddings=False))
    recipe = small_recipe(
        weights={"bits": 4, "group_size": 20},
        rounding={"method": "gptq", "target": "drift"},
        transforms=[{"method": "hadamard"}],
    )
    given = {"recipe": recipe, "calibration": [tiny_text], "threads": 1}
    for module in ("pipeline.blockwise.blocks", "quantization.rounding.base"):
        monkeypatch.setattr(f"quern.{module}.SLAB", 32)  # so that there are several of a matrix
    quantize(model, tmp_path / "alone", **given)
    waits: list[int] = []

    def results(self: RayWorkers, begun: Any) -> list[Any]:
        waits.append(len(begun))
        if len(waits) == 6:
            raise KeyboardInterrupt
        if len(waits) == 12:
            head.remove_node(nodes.pop(), allow_graceful=False)
        return wait(self, begun)

    wait = RayWorkers._results
    monkeypatch.setattr(RayWorkers, "_results", results)
    with ray_cluster(head.address):
        with pytest.raises(KeyboardInterrupt):
            quantize(model, tmp_path / "spread", **given)
        report = quantize(model, tmp_path / "spread", **given)
    assert report.resumed
    assert len(nodes) == 2
    assert max(waits) > 1
    assert hashes(tmp_path / "alone") == hashes(tmp_path / "spread")
