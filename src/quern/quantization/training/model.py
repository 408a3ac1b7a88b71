"""The student as a whole: every block and what lies behind the last one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from quern.codecs.trainable.base import Trainable
from quern.core.machine.parallel import Workers
from quern.quantization.training.distillation import Heads
from quern.quantization.training.student import StudentBlock


class Student:
    """An artifact's model, some of whose numbers are trained."""

    def __init__(
        self, blocks: Sequence[StudentBlock], heads: Heads, embed: Callable[[Tensor], Tensor], workers: Workers
    ) -> None:
        """``embed`` gives the embeddings ``(time, width)`` of token ids int64 ``(time,)``."""
        self.blocks, self.heads, self._embed, self._workers = list(blocks), heads, embed, workers
        self._modules: dict[str, nn.Module] = {
            f"{block.spec.prefix}{name}": module for block in blocks for name, module in block.modules().items()
        }
        self._modules["norm"] = heads.norm

    def parameters(self) -> dict[str, nn.Parameter]:
        """All that is trained, by name."""
        return {
            f"{owner}:{name}": parameter
            for owner, module in self._modules.items()
            for name, parameter in module.named_parameters()
        }

    def state(self) -> dict[str, Tensor]:
        """All that changes, by name."""
        return {
            f"{owner}:{name}": tensor.detach()
            for owner, module in self._modules.items()
            for name, tensor in module.state_dict().items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of ``state``."""
        for owner, module in self._modules.items():
            own = f"{owner}:"
            module.load_state_dict({n.removeprefix(own): t for n, t in state.items() if n.startswith(own)})

    def encode_again(self) -> None:
        """New codes where latent weights get them from time to time only."""
        trainables = [module for module in self._modules.values() if isinstance(module, Trainable)]
        self._workers.map(lambda trainable: trainable.encode_again(), trainables)

    def _forward(self, ids: Sequence[Tensor]) -> list[list[Tensor]]:
        """The inputs of every block, and what leaves the last one, of each sequence."""
        states = [[self._embed(sequence) for sequence in ids]]
        for block in self.blocks:
            states.append(block.outputs(states[-1], self._workers))
        return states

    def divergences(self, ids: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[float]:
        """KL divergence of each sequence int64 ``(time,)``, in nats summed over its tokens; ``teacher`` are the unquantized
        model's final hidden states ``(time, width)``."""
        hidden = [self._embed(sequence) for sequence in ids]
        for block in self.blocks:
            hidden = block.outputs(hidden, self._workers)
        norm = self.heads.open()
        pairs = list(zip(hidden, teacher, strict=True))
        return self._workers.map(lambda pair: self.heads.divergence(*pair, norm, False).total, pairs)

    def backward(self, ids: Sequence[Tensor], teacher: Sequence[Tensor]) -> float:
        """The mean divergence in nats a token; the gradients of all parameters are set to its own."""
        states = self._forward(ids)
        norm = self.heads.open()
        pairs = list(zip(states.pop(), teacher, strict=True))
        found = self._workers.map(lambda pair: self.heads.divergence(*pair, norm, True), pairs)
        tokens = sum(len(sequence) for sequence in ids)
        total, gradients = torch.zeros(norm.get_parameter("weight").shape), []
        for one in found:
            assert one.hidden is not None
            assert one.norm is not None
            total += one.norm
            gradients.append(one.hidden / tokens)
        self.heads.norm.offset.grad = None
        self.heads.norm.values().backward(total / tokens)  # type: ignore[no-untyped-call]
        for block in reversed(self.blocks):
            gradients = block.backward(states.pop(), gradients, self._workers)
        return sum(one.total for one in found) / tokens
