"""One decoder block in memory: transformers' own layer class, built without weights and filled from the checkpoint."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from quern.architectures.base import Architecture, parameter_reader
from quern.architectures.routing import routed_tokens
from quern.core.machine.parallel import Workers
from quern.core.machine.products import use_products

Seen = TypeVar("Seen")


class _Captured(Exception):  # noqa: N818 - not an error: it stops a forward pass that has nothing left to show
    pass


@dataclass(frozen=True)
class Tap:
    """What one linear reads in a run of the block."""

    inputs: Tensor
    """``(n, columns)``."""
    tokens: Tensor | None
    """The positions int64 ``(n,)`` of these inputs among the tokens of the run; None: all of them, in order."""
    length: int
    """Tokens of the run."""

    def of_tokens(self, values: Tensor) -> Tensor:
        """Those of ``values`` ``(length, ...)`` that belong to the inputs."""
        return values if self.tokens is None else values[self.tokens]

    def part(self, start: int, stop: int) -> Tap:
        """What the linear reads of the tokens ``[start, stop)`` of the run, as if they were a run of their own."""
        if self.tokens is None:
            return Tap(self.inputs[start:stop], None, stop - start)
        own = (self.tokens >= start) & (self.tokens < stop)
        return Tap(self.inputs[own.to(self.inputs.device)], self.tokens[own] - start, stop - start)


class Block:
    """Block ``index`` with weights in ``dtype``. ``time`` is the length of the sequences it will see."""

    def __init__(
        self, architecture: Architecture, index: int, read: Callable[[str], Tensor], dtype: torch.dtype, time: int
    ) -> None:
        with torch.device("meta"):
            self.module = architecture.build_block(index)
        self.spec, joined = architecture.block(index), parameter_reader(read)
        weights = {name: joined(self.spec.sources_of(name)).to(dtype) for name, _ in self.module.named_parameters()}
        self.module.load_state_dict(weights, assign=True)
        self.module.requires_grad_(False)
        use_products(self.module)
        self._place(architecture, next(iter(weights.values())).device, dtype, time)

    def _place(self, architecture: Architecture, device: torch.device, dtype: torch.dtype, time: int) -> None:
        """What a run needs beside the module."""
        self.dtype, self.device, self.time = dtype, device, time
        positions = torch.arange(time, device=self.device)[None]
        probe = torch.empty(1, dtype=dtype, device=self.device)
        self._rotary = architecture.build_rotary().to(self.device)(probe, positions)
        self._positions = positions
        self.recorded_linears: list[nn.Linear] = []
        """While it is ``recording``, the linears whose outputs are kept, in order."""
        self._start_recording()
        self._lent: Block | None = None
        self.hooked = False
        """Whether somebody looks at what goes on in runs."""

    def _start_recording(self) -> None:
        self.recorded = threading.local()  # sequences run in several threads through the same modules

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "recorded"} | {"_lent": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start_recording()

    @contextmanager
    def lent(self, workers: Workers) -> Iterator[None]:
        """Inside, where nothing of the block may change, runs elsewhere take it as it is now."""
        self._lent = workers.lend(self)
        try:
            yield
        finally:
            self._lent = None

    def _as_it_is(self, workers: Workers) -> Block:
        return workers.lend(self) if self._lent is None else self._lent

    def linear(self, name: str) -> nn.Linear:
        """The linear called ``name``, relative to the block."""
        found = self.module.get_submodule(name)
        assert isinstance(found, nn.Linear)
        return found

    def run(self, hidden: Tensor) -> Tensor:
        """Outputs ``(sequences, time, width)`` for inputs of the same shape; the mask is causal."""
        result: Tensor = self.module(
            hidden, attention_mask=None, position_ids=self._positions, position_embeddings=self._rotary
        )
        return result

    def run_each(self, hidden: Tensor, workers: Workers) -> Tensor:
        """``run``, one sequence a worker, so that the result does not depend on how many workers there are."""
        with torch.no_grad():
            return torch.cat(workers.spread(Block.run_alone, self._as_it_is(workers), list(hidden)))

    def run_alone(self, sequence: Tensor) -> Tensor:
        """``run`` of one sequence ``(time, width)``, without a graph."""
        return self._no_grad(sequence[None])

    def _no_grad(self, sequence: Tensor) -> Tensor:
        with torch.no_grad():  # the setting is per thread
            return self.run(sequence.to(self.device))

    def watch(
        self, linears: Sequence[str], hidden: Tensor, workers: Workers, look: Callable[[Tensor], Seen]
    ) -> tuple[Tensor, list[dict[str, Seen]]]:
        """``run_each``, and of each sequence what ``look`` makes of the inputs ``(time, columns)`` of each of ``linears``,
        which every token must meet."""
        watch = _Watch(tuple(linears), look)
        outputs, seen = zip(*self._spread_hooked(watch, hidden, workers), strict=True)
        return torch.cat(outputs), list(seen)

    def capture(
        self, linears: Sequence[str], hidden: Tensor, workers: Workers, others: Sequence[str] = ()
    ) -> dict[str, Tap]:
        """What each of ``linears`` reads when the block reads ``hidden`` ``(sequences, time, width)``; and what the modules
        ``others`` do, which lie before them.

        None of them may read what another one makes. The run of a sequence ends at the last of them that all tokens meet.
        """
        capture = _Capture(tuple(linears), tuple(others))
        runs = self._spread_hooked(capture, hidden, workers)
        return {name: self._joined(name, runs, hidden.shape[1]) for name in (*linears, *others)}

    def _spread_hooked(self, look: _Look[Seen], hidden: Tensor, workers: Workers) -> list[Seen]:
        """What ``look`` sees in the run of each sequence."""
        items = [(look, sequence) for sequence in hidden]
        with nullcontext() if workers.elsewhere else look.hooked(self):
            return workers.spread(_look, self._as_it_is(workers), items)

    def _joined(self, linear: str, runs: Sequence[dict[str, Tap]], time: int) -> Tap:
        """The taps of several sequences as one."""
        taps = {position: run[linear] for position, run in enumerate(runs) if linear in run}
        length = time * len(runs)
        if not taps:
            none = torch.empty(0, self.linear(linear).in_features, dtype=self.dtype, device=self.device)
            return Tap(none, torch.empty(0, dtype=torch.int64), length)
        inputs = torch.cat([tap.inputs for tap in taps.values()])
        if all(tap.tokens is None for tap in taps.values()):
            return Tap(inputs, None, length)
        every = torch.arange(time)
        tokens = [every if tap.tokens is None else tap.tokens.cpu() for tap in taps.values()]
        return Tap(inputs, torch.cat([at * time + own for at, own in zip(taps, tokens, strict=True)]), length)

    @contextmanager
    def recording(self, linears: Sequence[str]) -> Iterator[None]:
        """Inside, ``run_recorded`` keeps the outputs of ``linears``; the outermost counts."""
        if self.recorded_linears:
            yield
            return

        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.recorded.outputs[module] = (output, routed_tokens())

        handles = [self.linear(name).register_forward_hook(keep) for name in linears]
        self.recorded_linears = [self.linear(name) for name in linears]
        try:
            yield
        finally:
            self.recorded_linears = []
            for handle in handles:
                handle.remove()

    def run_recorded(self, hidden: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor | None] | None]]:
        """``run``, and of each recorded linear, in the order in which they were named, its output and the positions that
        this is of (see ``Tap.tokens``); None for one that no token met."""
        self.recorded.outputs = {}
        result = self.run(hidden.to(self.device))
        return result, [self.recorded.outputs.pop(module, None) for module in self.recorded_linears]


@dataclass(frozen=True)
class _Look(Generic[Seen]):
    """Hooks that see what goes on in the run of a sequence."""

    linears: tuple[str, ...]

    @abstractmethod
    def run(self, block: Block, sequence: Tensor) -> Seen:
        """Run ``sequence`` ``(time, width)`` through ``block``, which is hooked."""

    @abstractmethod
    def keep(self, block: Block, module: str, inputs: Tensor) -> None:
        """Called by the hook of ``module`` with its inputs ``(n, columns)``."""

    def modules(self, block: Block) -> dict[nn.Module, str]:
        """Those that have a hook, with their names."""
        return {block.linear(name): name for name in self.linears}

    @contextmanager
    def hooked(self, block: Block) -> Iterator[None]:
        """Inside, ``block`` has the hooks, each once."""
        if block.hooked:
            yield
            return
        modules = self.modules(block)

        def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.keep(block, modules[module], inputs[0].reshape(-1, inputs[0].shape[-1]))

        handles = [module.register_forward_pre_hook(keep) for module in modules]
        block.hooked = True
        try:
            yield
        finally:
            block.hooked = False
            for handle in handles:
                handle.remove()


def _look(block: Block, item: tuple[_Look[Seen], Tensor]) -> Seen:
    look, sequence = item
    with look.hooked(block):
        return look.run(block, sequence)


@dataclass(frozen=True)
class _Watch(_Look[tuple[Tensor, dict[str, Any]]]):
    """See ``Block.watch``."""

    look: Callable[[Tensor], Any]

    def run(self, block: Block, sequence: Tensor) -> tuple[Tensor, dict[str, Any]]:
        block.recorded.seen = {}
        return block.run_alone(sequence), block.recorded.seen

    def keep(self, block: Block, module: str, inputs: Tensor) -> None:
        block.recorded.seen[module] = self.look(inputs)


@dataclass(frozen=True)
class _Capture(_Look[dict[str, Tap]]):
    """See ``Block.capture``."""

    others: tuple[str, ...]

    def modules(self, block: Block) -> dict[nn.Module, str]:
        return super().modules(block) | {block.module.get_submodule(name): name for name in self.others}

    def run(self, block: Block, sequence: Tensor) -> dict[str, Tap]:
        seen: dict[str, Tap] = {}
        block.recorded.seen = seen
        with suppress(_Captured):
            block.run_alone(sequence)
        assert self._all(block, seen) or not self._certain(block), f"the block never reached {sorted(self.linears)}"
        return seen

    def keep(self, block: Block, module: str, inputs: Tensor) -> None:
        seen = block.recorded.seen
        seen[module] = Tap(inputs, routed_tokens(), block.time)
        if self._certain(block) and self._all(block, seen):
            raise _Captured

    def _certain(self, block: Block) -> bool:
        return all(block.spec.linear(name).expert is None for name in self.linears)

    def _all(self, block: Block, seen: dict[str, Tap]) -> bool:
        return len(seen) == len({*self.linears, *self.others})
