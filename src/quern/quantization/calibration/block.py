"""One decoder block in memory: transformers' own layer class, built without weights and filled from the checkpoint."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from quern.architectures.base import Architecture
from quern.core.parallel import Workers


class _Captured(Exception):  # noqa: N818 - not an error: it carries a value out of a forward pass that may stop there
    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs


class Block:
    """Block ``index`` with weights in ``dtype``. ``time`` is the length of the sequences it will see."""

    def __init__(
        self, architecture: Architecture, index: int, read: Callable[[str], Tensor], dtype: torch.dtype, time: int
    ) -> None:
        with torch.device("meta"):
            self.module = architecture.build_block(index)
        prefix = architecture.block_prefix(index)
        weights = {name: read(prefix + name).to(dtype) for name, _ in self.module.named_parameters()}
        self.module.load_state_dict(weights, assign=True)
        self.module.requires_grad_(False)
        self.dtype = dtype
        self.device = next(iter(weights.values())).device
        positions = torch.arange(time, device=self.device)[None]
        probe = torch.empty(1, dtype=dtype, device=self.device)
        self._rotary = architecture.build_rotary().to(self.device)(probe, positions)
        self._positions = positions
        self._recorded = threading.local()  # sequences run in several threads through the same modules

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
            return torch.cat(workers.map(lambda sequence: self._no_grad(sequence[None]), list(hidden)))

    def _no_grad(self, sequence: Tensor) -> Tensor:
        with torch.no_grad():  # the setting is per thread
            return self.run(sequence.to(self.device))

    def capture(self, linear: str, hidden: Tensor, workers: Workers) -> Tensor:
        """What ``linear`` reads when the block reads ``hidden``: ``(sequences * time, inputs)``."""

        def stop(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            raise _Captured(inputs[0])

        def inputs_of(sequence: Tensor) -> Tensor:
            try:
                self._no_grad(sequence[None])
            except _Captured as captured:
                return captured.inputs[0]
            raise AssertionError(f"the block never reached {linear}")

        handle = self.linear(linear).register_forward_pre_hook(stop)
        try:
            return torch.cat(workers.map(inputs_of, list(hidden)))
        finally:
            handle.remove()

    @contextmanager
    def recording(self, linears: Sequence[str]) -> Iterator[None]:
        """Inside, ``run_recorded`` keeps the outputs of ``linears``."""

        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._recorded.outputs[module] = output

        handles = [self.linear(name).register_forward_hook(keep) for name in linears]
        self._order = [self.linear(name) for name in linears]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run_recorded(self, hidden: Tensor) -> tuple[Tensor, list[Tensor]]:
        """``run``, and the outputs of the recorded linears in the order in which they were named."""
        self._recorded.outputs = {}
        result = self.run(hidden.to(self.device))
        return result, [self._recorded.outputs.pop(module) for module in self._order]
