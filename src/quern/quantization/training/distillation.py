"""The loss: how far the student's predictions are from the unquantized model's (Hinton et al. 2015, arXiv 1503.02531).

KL(p || q) = sum p (log p - log q), in nats, mean over tokens; its gradient by the student's logits is q - p. Logits are made
for a few tokens at a time, of both models from their final hidden states.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quern.core.machine import products
from quern.core.machine.parallel import pieces
from quern.quantization.calibration.token_weights import LOGIT_TOKENS
from quern.quantization.training.student import TrainedVector


@dataclass(frozen=True)
class Divergence:
    """Of one sequence."""

    total: float
    """KL divergence in nats, summed over its tokens."""
    hidden: Tensor | None
    """d(total) / d(hidden) float32 ``(time, width)``, where gradients were asked for."""
    norm: Tensor | None
    """d(total) / d(norm's weights) float32 ``(width,)``."""


class Heads:
    """Final norms and heads of both models. Heads ``(vocabulary, width)`` stay as they are."""

    def __init__(
        self,
        build: Callable[[], nn.Module],
        teacher: Tensor,
        teacher_head: Tensor,
        student: Tensor,
        student_head: Tensor,
    ) -> None:
        """``build`` makes the final norm's module; ``teacher`` and ``student`` are its weights ``(width,)``."""
        self._build, self._teacher_head, self._student_head = build, teacher_head, student_head
        self._teacher = self._with(teacher.to(teacher_head.dtype))
        self.norm = TrainedVector(student)

    def _with(self, weight: Tensor) -> nn.Module:
        with torch.device("meta"):
            norm = self._build()
        norm._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        return norm

    def open(self) -> nn.Module:
        """The student's norm, as it will be stored, to be given to ``divergence``."""
        norm = self._with(self.norm.values().detach().to(self._student_head.dtype))
        return norm.requires_grad_()

    def divergence(self, student: Tensor, teacher: Tensor, norm: nn.Module, gradients: bool) -> Divergence:
        """Of final hidden states ``(time, width)`` of both."""
        weight = norm.get_parameter("weight")
        total, by_hidden, by_norm = 0.0, [], torch.zeros(weight.shape)
        for start, stop in pieces(len(student), LOGIT_TOKENS):
            part = student[start:stop].detach().requires_grad_(gradients)
            with torch.no_grad():
                known = products.linear(self._teacher(teacher[start:stop]), self._teacher_head)
                known = known.float().log_softmax(-1)
            with torch.set_grad_enabled(gradients):
                final = norm(part)
            with torch.no_grad():
                found = products.linear(final, self._student_head).float().log_softmax(-1)
                probable = known.exp()
                total += float((probable * (known - found)).sum(-1).double().sum())
            if gradients:
                wrong = found.exp_().sub_(probable).to(self._student_head.dtype)
                one, other = torch.autograd.grad(final, [part, weight], products.linear(wrong, self._student_head.T))
                by_hidden.append(one.float())
                by_norm += other.float()
        return Divergence(total, torch.cat(by_hidden) if gradients else None, by_norm if gradients else None)
