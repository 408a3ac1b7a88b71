"""Pieces of work on the machines of a Ray cluster. Everything that knows Ray is here.

Ray starts the processes, moves what pieces read and make, and repeats those of a machine that was lost; the driver, which is
the process that asked, keeps the order and the files. A piece runs with one thread, as it does on one machine, and machines
whose arithmetic differs from the driver's are refused, so that the bytes of a result are the same.

Tensors travel as flat arrays, which the pieces of one machine map read-only from its store instead of each having a copy.
"""

from __future__ import annotations

import logging
import signal
import socket
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import quern
from quern.core.errors import QuernError, UserError, option
from quern.core.machine.memory import free_memory
from quern.core.machine.parallel import Lent, Workers, fetched, workers_made_by
from quern.core.text.units import bytes_text
from quern.quantization.arithmetic import arithmetic

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")
Shared = TypeVar("Shared")

NAMED = option("quern.ray_cluster", "--ray")
BEGIN, JOIN = "ray start --head", "ray start --address=HOST:PORT"
JOIN_IDLE = f"{JOIN} --num-cpus=0"
NEEDS = 'needs Ray. Install it on every machine: pip install "quern[ray]"'
RETRIES = 5
"""So often a piece is repeated whose machine or process was lost."""
MOST_WAVES = 8
"""Waves that are in work at once, at most."""
POLL_S = 1.0
CONNECT_S = 5.0
PROBE_S = 300.0
"""That a machine may take to start a process and import torch."""
PATIENCE_S = 120.0
"""That a job waits for a machine when none is left."""
ALIGNED = 64
"""Bytes; torch allocates so, and sums in libraries may depend on it."""


@dataclass(frozen=True)
class Machine:
    """A machine of the cluster that takes pieces."""

    node: str
    """Ray's id of it."""
    name: str
    """Address and host name."""
    processors: int
    memory: int
    """Bytes that Ray may give to tasks there."""


@dataclass(frozen=True)
class Found:
    """What a machine says of itself."""

    identity: dict[str, str]
    free: int
    """Bytes of memory."""


def identity() -> dict[str, str]:
    """What has to be the same on all machines."""
    return {"quern": quern.__version__, **arithmetic()}


@contextmanager
def ray_cluster(address: str) -> Iterator[None]:
    """Inside, quantizing and planning take their work to the Ray cluster at ``address`` (``auto``, ``HOST:PORT``).

    The machine that asks is a node of the cluster; a process that has called ``ray.init`` stays connected as it is. The
    bytes of results do not depend on the machines. Raises ``UserError`` where Ray is not installed, where there is no
    cluster or no machine in it that takes work, and where one has another version of quern or torch, or other instructions.
    """
    ray, ours = _connected(address)
    try:
        cluster = _Cluster(ray, address)
        with workers_made_by(lambda threads: RayWorkers(cluster, threads)):
            yield
    finally:
        if ours:
            ray.shutdown()


def _connected(address: str) -> tuple[Any, bool]:
    """Ray, and whether it was connected here."""
    try:
        import ray
    except ImportError:
        raise UserError(f"{NAMED} {NEEDS}") from None
    if ray.is_initialized():
        _register(ray)
        return ray, False
    asked = f"{NAMED} {address!r}"
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not host or "/" in host or not port.isdigit() or not 0 < int(port) < 65536:
            raise UserError(
                f"{asked} is no address of a Ray cluster: it must be auto, for the one that this machine is a node of, or "
                f"HOST:PORT as {BEGIN} printed it. (Quern runs on a node of the cluster; {JOIN_IDLE} makes this machine one)"
            )
        try:
            socket.create_connection((host, int(port)), CONNECT_S).close()
        except OSError as error:
            raise UserError(f"{asked}: nothing answers there ({error}). Was {BEGIN} run on that machine?") from None
    on_term = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL, namespace="quern")
    except (ConnectionError, RuntimeError, ValueError, AssertionError, ray.exceptions.RayError) as error:
        raise UserError(
            f"{asked}: {str(error).splitlines()[0] if str(error) else type(error).__name__}. Quern runs on a node of the "
            f"cluster: {BEGIN} begins one here, {JOIN} joins one"
        ) from None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_term)  # Ray has put its own there
    _register(ray)
    return ray, True


class _Cluster:
    """The machines that are there, all of them found to be alike."""

    def __init__(self, ray: Any, address: str) -> None:
        self.ray, self.address, self.expected = ray, address, identity()
        self.machines = self._machines()
        if not self.machines:
            raise UserError(
                f"{NAMED} {address!r}: no machine of this cluster takes work. Run {JOIN} on those that are to"
            )
        self.found = self._ask()
        self._alone_since: float | None = None

    def _machines(self) -> list[Machine]:
        """Those with processors for pieces, by name."""
        found = []
        for node in self.ray.nodes():
            processors = int(node["Resources"].get("CPU", 0))
            if node["Alive"] and processors:
                name = f"{node['NodeManagerAddress']} ({node['NodeManagerHostname']}, node {node['NodeID'][:8]})"
                found.append(Machine(node["NodeID"], name, processors, int(node["Resources"].get("memory", 0))))
        return sorted(found, key=lambda machine: machine.name)

    def _ask(self) -> list[Found]:
        """What each machine says of itself. Raises ``UserError`` for those that are not like this one."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as At

        task = self.ray.remote(num_cpus=0, max_retries=0)(_probe)
        asked = [task.options(scheduling_strategy=At(one.node, soft=False)).remote() for one in self.machines]
        until, found, wrong = time.monotonic() + PROBE_S, [], []
        for machine, reference in zip(self.machines, asked, strict=True):
            try:
                found.append(self.ray.get(reference, timeout=max(0.0, until - time.monotonic())))
            except self.ray.exceptions.GetTimeoutError:
                wrong.append(f"{machine.name} did not answer in {PROBE_S:.0f} s")
            except self.ray.exceptions.RayError as error:
                wrong.append(f"{machine.name} cannot run quern ({_reason(error)})")
            else:
                wrong += difference(machine.name, self.expected, found[-1].identity)
        if wrong:
            raise UserError(
                "machines of the cluster that would not give the bytes that this one gives: " + "; ".join(wrong) + ". "
                "Install the same quern and torch there, use machines of one kind, or take these out (ray stop)"
            )
        return found

    def reserve(self, each: int, cap: int | None) -> None:
        """Refuse a ``cap`` of processes that need ``each`` bytes, and machines without that."""
        if cap is not None and each > cap:
            raise UserError(
                f"a memory cap of {bytes_text(cap)} is too small for the processes on other machines, each of which needs "
                f"{bytes_text(each)}. Give at least that, or leave out {NAMED}"
            )
        wanted = each if cap is None else cap
        small = [
            f"{machine.name} has {bytes_text(min(machine.memory, found.free))}"
            for machine, found in zip(self.machines, self.found, strict=True)
            if min(machine.memory, found.free) < wanted
        ]
        if small:
            raise UserError(
                f"a process of this job needs {bytes_text(wanted)} of free memory on each machine of the cluster: "
                + "; ".join(small)
                + ". Take these out of the cluster (ray stop), or give less work at once"
            )

    def look(self) -> None:
        """Called while pieces are waited for. Raises ``QuernError`` where nobody has been there to do them for long."""
        if self._machines():
            self._alone_since = None
            return
        now = time.monotonic()
        self._alone_since = self._alone_since or now
        if now - self._alone_since > PATIENCE_S:
            raise QuernError(
                f"no machine of the cluster at {self.address} has been left for {PATIENCE_S:.0f} s. What is done is kept: "
                "the same request continues, with a cluster or without"
            )


class RayWorkers(Workers):
    """``Workers`` that spread pieces over a cluster; what is not handed to ``spread`` stays with threads of this machine."""

    elsewhere = True

    def __init__(self, cluster: _Cluster, threads: int | None = None) -> None:
        super().__init__(threads)
        self._cluster, self._ray = cluster, cluster.ray
        self._each = 0
        self._task = cluster.ray.remote(max_retries=RETRIES, num_cpus=1)(_piece)
        self._stopped = threading.Event()
        self.waves_at_once = min(MOST_WAVES, sum(machine.processors for machine in cluster.machines))

    def lend(self, value: Shared) -> Shared:
        return value if isinstance(value, Lent) else _Stored(self._ray.put(value))  # type: ignore[return-value]

    def spread(
        self, function: Callable[[Shared, Item], Outcome], shared: Shared, items: Iterable[Item]
    ) -> list[Outcome]:
        lent = self.lend(shared)
        begun = []
        task = self._task.options(memory=self._each) if self._each else self._task
        try:
            begun = [task.remote(self._cluster.expected, function, lent, item) for item in items]
            return self._results(begun)
        except BaseException:
            for reference in begun:
                self._ray.cancel(reference, force=True)
            raise

    def _results(self, begun: Sequence[Any]) -> list[Any]:
        while not self._stopped.is_set():
            try:
                found: list[Any] = self._ray.get(list(begun), timeout=POLL_S)
                return found
            except self._ray.exceptions.GetTimeoutError:
                self._cluster.look()
            except self._ray.exceptions.RayTaskError as error:
                raise (error.cause if isinstance(error.cause, QuernError) else error) from None
            except self._ray.exceptions.RayError as error:
                raise QuernError(
                    f"the cluster at {self._cluster.address} gave up a piece of work after {RETRIES} retries: "
                    f"{_reason(error)} What is done is kept: the same request continues, with a cluster or without"
                ) from error
        raise QuernError("stopped")

    def ahead(self, function: Callable[..., Outcome], items: Iterable[tuple[Any, ...]]) -> Iterator[Outcome]:
        begun: deque[Future[Outcome]] = deque()
        with ThreadPoolExecutor(self.waves_at_once) as pool:
            try:
                for item in items:
                    begun.append(pool.submit(function, *item))
                    if len(begun) == self.waves_at_once:
                        yield begun.popleft().result()
                while begun:
                    yield begun.popleft().result()
            except BaseException:
                self._stopped.set()  # threads would go on waiting for their pieces
                raise

    def reserve(self, each: int, cap: int | None) -> None:
        self._cluster.reserve(each, cap)
        self._each = each

    def close(self) -> None:
        self._stopped.set()
        super().close()


@dataclass(frozen=True)
class _Stored(Lent):
    """In the cluster's object store."""

    reference: Any

    def fetch(self) -> Any:
        import ray

        return ray.get(self.reference)


def difference(name: str, expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """What of a machine's identity is not as it was expected to be, in words."""
    differs = [
        f"{key} {found.get(key)} instead of {value}" for key, value in expected.items() if found.get(key) != value
    ]
    return [f"{name} has {', '.join(differs)}"] if differs else []


def _probe() -> Found:
    return Found(identity(), free_memory())


def _piece(expected: dict[str, str], function: Callable[[Any, Any], Any], lent: Any, item: Any) -> Any:
    """A task: one piece, on a machine that may have joined after the job began."""
    import ray

    torch.set_num_threads(1)
    _register(ray)
    if wrong := difference(ray.util.get_node_ip_address(), expected, identity()):
        raise UserError(f"a machine that joined the cluster would not give the same bytes: {wrong[0]}")
    return function(fetched(lent), item)


def _reason(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(cause).__name__


def _register(ray: Any) -> None:
    """Let tensors travel as flat arrays, in this process."""
    ray.util.register_serializer(Tensor, serializer=_flat, deserializer=_tensor)
    ray.util.register_serializer(nn.Parameter, serializer=_flat, deserializer=_parameter)


def _flat(tensor: Tensor) -> tuple[Any, torch.dtype, tuple[int, ...], tuple[int, ...]]:
    """The bytes of a tensor in the order in which they lie, dtype, shape and strides."""
    tensor = tensor.detach().cpu()
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() != reach:
        tensor = tensor.contiguous()
    line = tensor.as_strided((tensor.numel(),), (1,))
    return line.view(torch.uint8).numpy(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _tensor(flat: tuple[Any, torch.dtype, tuple[int, ...], tuple[int, ...]]) -> Tensor:
    array, dtype, shape, strides = flat
    if array.ctypes.data % ALIGNED:
        line = torch.empty(array.nbytes, dtype=torch.uint8)
        line.numpy()[:] = array
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it may not be written, and nobody does
            line = torch.from_numpy(array)
    return line.view(dtype).as_strided(shape, strides)


def _parameter(flat: tuple[Any, torch.dtype, tuple[int, ...], tuple[int, ...]]) -> nn.Parameter:
    return nn.Parameter(_tensor(flat), requires_grad=False)
