"""A decoder block as an artifact stores it, with what can be trained of it.

The block is transformers' own class. Weights are decoded when the block is used and let go afterwards, so that of the blocks
that are not in use only what is trained is in memory. A rotated weight is rotated back, which is the same function.

Sequences run one a worker, each with torch in one thread; their gradients are added in order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quern.architectures.base import Architecture
from quern.codecs.base import Parts
from quern.codecs.trainable.base import Trainable, straight_through
from quern.core.machine import products
from quern.core.machine.heap import release_freed
from quern.core.machine.parallel import Workers, pieces
from quern.quantization.calibration.block import Block
from quern.quantization.training.inputs import InputRounding
from quern.rotation.rotation import rotate, rotate_back

HANDED_ON_TOGETHER = 1 << 24
"""Entries of matrices up to which gradients are handed on by all workers at once; graphs of larger ones take gigabytes."""

RELEASED_FROM = 1 << 22
"""Entries of a block from which memory that runs leave behind is given back before gradients are handed on: heaps of threads
keep it, and other threads would take as much again."""


class TrainedVector(nn.Module):
    """A norm's weights or a bias: what was stored plus an offset in units of its root mean square; zeros stay."""

    def __init__(self, stored: Tensor) -> None:
        super().__init__()
        self._stored = stored
        self._unit = stored.float().square().mean().sqrt()
        self.offset = nn.Parameter(torch.zeros(stored.shape))

    def values(self) -> Tensor:
        """float32, as they will be stored; differentiable."""
        moved = self._stored.float() + self._unit * self.offset
        return straight_through(moved, moved.detach().to(self._stored.dtype).float())

    @torch.no_grad()
    def stored(self) -> Tensor:
        """In the dtype that they came in."""
        return self.values().to(self._stored.dtype)


class Unrounded(Trainable):
    """A weight that is not rounded yet, in units of each row's root mean square."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        unit = weight.float().square().mean(1, keepdim=True).sqrt()
        self._unit = torch.where(unit > 0, unit, 1.0)
        self.latent = nn.Parameter(weight.float() / self._unit)

    def values(self) -> Tensor:
        return self.latent * self._unit

    @torch.no_grad()
    def parts(self) -> Parts:
        return {"weight": self.values()}


@dataclass(frozen=True)
class TrainedWeight:
    """A quantized weight and what becomes of its inputs."""

    trainable: Trainable
    signs: Tensor | None = None
    """Packed signs of the rotation of its inputs."""
    inputs: InputRounding | None = None
    """Where activations are int8."""

    def effective(self, values: Tensor) -> Tensor:
        """What inputs that are not rotated are multiplied with."""
        return values if self.signs is None else rotate_back(values, self.signs)

    def stored_gradient(self, gradient: Tensor) -> Tensor:
        """dL / d(stored values) from dL / d(effective ones): the rotation is orthogonal."""
        return gradient if self.signs is None else rotate(gradient, self.signs)


class _Linear(nn.Linear):
    """A linear with factors of its outputs and rounded inputs."""

    factor: Tensor | None = None
    rounding: InputRounding | None = None

    def forward(self, input: Tensor) -> Tensor:
        seen = input if self.rounding is None else self.rounding(input)
        output = products.linear(seen, self.weight)
        if self.factor is not None:
            output = output * self.factor
        return output if self.bias is None else output + self.bias


@dataclass
class _Leaves:
    """What gradients are taken by while a block is in use."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)

    def all(self) -> list[Tensor]:
        """In order."""
        return [*self.weights.values(), *self.vectors.values()]


class StudentBlock(Block):
    """Block ``index`` of an artifact; sequences have ``time`` tokens."""

    def __init__(
        self,
        architecture: Architecture,
        index: int,
        weights: Mapping[str, TrainedWeight],
        read: Callable[[str], Tensor],
        dtype: torch.dtype,
        time: int,
    ) -> None:
        """``weights``: of the quantized linears, by name relative to the block; ``read`` reads all other parameters by full
        name."""
        with torch.device("meta"):
            self.module = architecture.build_block(index)
            for name in weights:
                linear = self.linear(name)
                own = _Linear(linear.in_features, linear.out_features, linear.bias is not None)
                own.rounding = weights[name].inputs
                self.module.set_submodule(name, own)
        self.spec, self.weights = architecture.block(index), dict(weights)
        self.vectors: dict[str, TrainedVector] = {}
        plain = {}
        for name, parameter in self.module.named_parameters():
            if name.removesuffix(".weight") in weights:
                continue
            stored = read(self.spec.prefix + name)
            if parameter.dim() == 1:
                self.vectors[name] = TrainedVector(stored)
            plain[name] = stored.to(dtype)
        self.module.load_state_dict(plain, assign=True, strict=False)
        self.module.requires_grad_(False)
        self._place(architecture, torch.device("cpu"), dtype, time)
        self.recorded_linears = []

    def modules(self) -> dict[str, nn.Module]:
        """Everything that has parameters to train, by name relative to the block."""
        return {**{name: weight.trainable for name, weight in self.weights.items()}, **self.vectors}

    def _open(self, workers: Workers, gradients: bool) -> _Leaves:
        """Put the weights into the module; leaves where ``gradients`` are wanted."""
        leaves = _Leaves()

        def decoded(weight: TrainedWeight) -> Tensor:
            with torch.no_grad():
                return weight.effective(weight.trainable.values()).to(self.dtype)

        found = workers.map(decoded, list(self.weights.values()))
        for (name, weight), effective in zip(self.weights.items(), found, strict=True):
            linear = self.linear(name)
            assert isinstance(linear, _Linear)
            by_rows = weight.trainable.by_rows
            linear.weight = nn.Parameter(effective, requires_grad=gradients and not by_rows)
            linear.factor = None
            if gradients and by_rows:
                linear.factor = torch.ones(len(effective), dtype=self.dtype, requires_grad=True)
                leaves.weights[name] = linear.factor
            elif gradients:
                leaves.weights[name] = linear.weight
        for name, vector in self.vectors.items():
            owner, _, leaf = name.rpartition(".")
            parameter = nn.Parameter(vector.values().detach().to(self.dtype), requires_grad=gradients)
            self.module.get_submodule(owner)._parameters[leaf] = parameter
            leaves.vectors[name] = parameter
        return leaves

    def _close(self) -> None:
        for name in self.weights:
            linear = self.linear(name)
            assert isinstance(linear, _Linear)
            linear.weight, linear.factor = nn.Parameter(torch.empty(0), requires_grad=False), None

    def outputs(self, hidden: Sequence[Tensor], workers: Workers) -> list[Tensor]:
        """What the block makes of each sequence ``(time, width)``."""
        self._open(workers, gradients=False)
        found = workers.map(lambda sequence: self._no_grad(sequence[None])[0], hidden)
        self._close()
        return found

    def backward(self, hidden: Sequence[Tensor], gradients: Sequence[Tensor], workers: Workers) -> list[Tensor]:
        """dL / d(inputs) of each sequence from its inputs and dL / d(outputs), all ``(time, width)``; the gradients of all
        that is trained are set to their sums."""
        return self.descend(hidden, lambda place, _: gradients[place], workers)

    def descend(
        self, hidden: Sequence[Tensor], gradient: Callable[[int, Tensor], Tensor], workers: Workers
    ) -> list[Tensor]:
        """``backward`` where dL / d(outputs) is a function of the outputs ``(time, width)`` of the sequence at a place."""
        leaves = self._open(workers, gradients=True)
        wanted = leaves.all()

        def one(place: int) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                inputs = hidden[place][None].detach().requires_grad_()
                result = self.run(inputs)
                outer = gradient(place, result.detach()[0])[None].to(result)
                return torch.autograd.grad(result, [inputs, *wanted], outer, allow_unused=True)

        sums = [torch.zeros(leaf.shape) for leaf in wanted]
        inner: list[Tensor] = []
        for start, stop in pieces(len(hidden), workers.threads):
            for by_input, *by_leaf in workers.map(one, range(start, stop)):
                inner.append(by_input[0])
                for total, part in zip(sums, by_leaf, strict=True):
                    if part is not None:  # an expert that no token of the sequence met
                        total += part
        self._close()
        if sum(total.numel() for total in sums) > RELEASED_FROM:
            release_freed()
        self._hand_on(leaves, sums, workers)
        return inner

    def _hand_on(self, leaves: _Leaves, sums: Sequence[Tensor], workers: Workers) -> None:
        """From the leaves to what is trained."""
        by_name = dict(zip([*leaves.weights, *leaves.vectors], sums, strict=True))

        def one(name: str) -> None:
            gradient = by_name.pop(name)
            if name in leaves.vectors:
                self.vectors[name].offset.grad = None
                self.vectors[name].values().backward(gradient)  # type: ignore[no-untyped-call]
                return
            weight = self.weights[name]
            if weight.trainable.by_rows:
                weight.trainable.take_row_gradient(gradient)
                return
            weight.trainable.zero_grad(set_to_none=True)
            with (
                torch.enable_grad()
            ):  # decoded once more: the graphs of all weights together would be many times the block
                values = weight.trainable.values()
            values.backward(weight.stored_gradient(gradient))  # type: ignore[no-untyped-call]

        sizes = {name: gradient.numel() for name, gradient in by_name.items()}
        workers.map(one, [name for name, size in sizes.items() if size <= HANDED_ON_TOGETHER])
        for name in [name for name, size in sizes.items() if size > HANDED_ON_TOGETHER]:
            one(name)
