"""What can be trained of a stored weight, without another byte: its values, differentiable, and the parts to store.

Parameters have no unit: those of scales are logarithms of factors, those of tables shares of their range, and latent weights
(whose names end with ``LATENT``) count in steps of their grid. So one learning rate suits matrices of every size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from quern.codecs.base import Codec, Parts

LATENT = "latent"
"""Name of the parameter with the weights that are rounded anew at every step, in steps of the grid."""


class _Replaced(torch.autograd.Function):
    """A number in the place of another one, whose gradient it gets."""

    @staticmethod
    def forward(context: Any, value: Tensor, instead: Tensor) -> Tensor:
        return instead.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(value: Tensor, instead: Tensor) -> Tensor:
    """``instead``, bit for bit, with the gradient of ``value`` (Bengio et al. 2013, arXiv 1308.3432)."""
    found: Tensor = _Replaced.apply(value, instead)  # type: ignore[no-untyped-call]
    return found


class Trainable(nn.Module, ABC):
    """A stored matrix ``(rows, columns)`` whose parameters can be trained."""

    by_rows: bool = False
    """Whether nothing but factors of rows is trained, so that ``take_row_gradient`` is all that is needed."""

    @abstractmethod
    def values(self) -> Tensor:
        """The stored values float32 ``(rows, columns)``, differentiable: bit for bit what ``parts`` decode to."""

    @abstractmethod
    def parts(self) -> Parts:
        """What is to be stored."""

    def take_row_gradient(self, gradient: Tensor) -> None:
        """Set the parameters' gradients by dL / d(log of a factor of each row), float32 ``(rows,)``; where ``by_rows``."""
        raise NotImplementedError

    def encode_again(self) -> None:
        """Find the codes of the latent weights as they are now, where ``values`` does not do that each time."""


class Fixed(Trainable):
    """A matrix that stays as it is."""

    by_rows = True

    def __init__(self, codec: Codec, shape: tuple[int, int], parts: Parts) -> None:
        super().__init__()
        self.codec, self.shape, self._parts = codec, shape, parts

    def values(self) -> Tensor:
        return self.codec.decode(self.shape, self._parts)

    def parts(self) -> Parts:
        return self._parts

    def take_row_gradient(self, gradient: Tensor) -> None:
        pass


class RowFactors(Trainable):
    """Codes stay; what lies under one scale in all its columns gets a factor, which is folded into the stored scales.

    A factor of a row commutes with the product, y = t (W x), so that its gradient needs none of the weights.
    """

    by_rows = True

    def __init__(self, codec: Codec, shape: tuple[int, int], parts: Parts) -> None:
        super().__init__()
        self.codec, self.shape, self._parts = codec, shape, parts
        self.together = codec.rows_of_factor(shape[0])
        self.factor = nn.Parameter(torch.zeros(-(-shape[0] // self.together)))

    def values(self) -> Tensor:
        values = self.codec.decode(self.shape, self.parts())
        logs = self.factor.repeat_interleave(self.together)[: self.shape[0], None]
        return straight_through(values * logs.exp() / logs.detach().exp(), values) if logs.requires_grad else values

    def parts(self) -> Parts:
        folded = self.codec.fold(self._parts, self.factor.detach().exp())
        assert folded is not None, "codecs that fold nothing have no such factors"
        return folded

    def take_row_gradient(self, gradient: Tensor) -> None:
        spare = -len(gradient) % self.together
        padded = torch.cat([gradient, gradient.new_zeros(spare)])
        self.factor.grad = padded.view(-1, self.together).sum(1)
