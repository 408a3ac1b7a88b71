"""GPTQ: columns in turn, each rounded after adding what the columns before it got wrong.

With H = U D U^T (``factor``), column k is rounded at

    w'_k = w_k + (W - Q)_{:, <k} U_{<k, k}                                (QuIP, arXiv 2307.13304, eq. 2)

which minimizes tr((W - Q) H (W - Q)^T) over roundings of this kind; the loss is sum_k D_k |w'_k - q_k|^2. Work goes
left to right in blocks: one matrix product brings in all earlier blocks, the columns inside a block follow one at a
time.
"""

from __future__ import annotations

from math import lcm

import torch
from torch import Tensor

from quern.codecs.base import Codec, Encoder
from quern.core.errors import UserError
from quern.core.machine.parallel import pieces
from quern.core.stacking import Traits
from quern.quantization.rounding.base import ROUNDINGS, RoundedSlab, Rounding
from quern.quantization.rounding.columns import loop_of
from quern.quantization.rounding.factor import Factor, quadratic_size
from quern.quantization.rounding.sweeps import sweep


@ROUNDINGS.add("gptq")
class Gptq(Rounding):
    """Error feedback with the Hessian of the calibration inputs."""

    needs_hessian = True
    traits = Traits(acts="takes the Hessian of the inputs as the model that runs will have them")

    def round_slab(
        self, slab: Tensor, whole: Tensor, codec: Codec, factor: Factor | None, native: bool = False
    ) -> RoundedSlab:
        assert factor is not None
        encoder = codec.encoder(slab, whole, refit=factor.order is None)
        if factor.order is not None and encoder.width > 1:
            raise UserError(
                f"codec {codec.scheme.codec} codes {encoder.width} neighbouring columns jointly, which cannot be rounded in "
                "another order. Set rounding: {activation_order: false}"
            )
        encoder.weigh(factor.diagonal if factor.order is None else factor.diagonal[factor.order.argsort()])
        weight = slab if factor.order is None else slab[:, factor.order]
        decoded, error = self._feed_forward(weight, encoder, factor, native)
        size = quadratic_size(slab, factor)
        if factor.order is not None:
            decoded = decoded[:, factor.order.argsort()]
        if self.settings.sweeps and (encoder.width == 1 or encoder.heeds_metric):
            assert factor.hessian is not None, "sweeps need the whole Hessian"
            error = sweep(slab, decoded, encoder, factor.hessian, self.settings.sweeps)
            decoded = codec.decode((slab.shape[0], slab.shape[1]), encoder.parts())
        return RoundedSlab(encoder.parts(), decoded, error, size)

    def _feed_forward(
        self, weight: Tensor, encoder: Encoder, factor: Factor, native: bool = True
    ) -> tuple[Tensor, float]:
        """Q ``(rows, columns)`` and the quadratic loss; ``weight`` and Q have their columns in rounding order."""
        rows, columns = weight.shape
        group, width, block = encoder.refit_width, encoder.width, self.settings.block_size
        together = lcm(group or 1, width)
        block = -(-block // together) * together  # parameters are fitted to whole groups, and tuples stay whole
        change = torch.empty_like(weight)  # W - Q
        decoded = torch.empty_like(weight)
        error = 0.0
        for start in range(0, columns, block):
            stop = min(start + block, columns)
            target = torch.addmm(weight[:, start:stop], change[:, :start], factor.upper[:start, start:stop])
            target = target.T.contiguous()  # one column of the weight = one contiguous row
            done = weight.new_zeros(stop - start, rows)  # rows of (W - Q)^T inside this block
            rounded = weight.new_empty(stop - start, rows)
            original = weight[:, start:stop].T.contiguous()
            inside = factor.upper[start:stop, start:stop].T.contiguous()
            places = list(range(start, stop)) if factor.order is None else factor.order[start:stop].tolist()
            loop = loop_of(encoder, places, native)
            for k, end in pieces(stop - start, width if width > 1 else encoder.refine_width or group or stop - start):
                column = start + k
                for size, fit in ((group, encoder.refit), (encoder.refine_width, encoder.refine)):
                    if size and column % size == 0:
                        last = min(k + size, stop - start)
                        values = torch.addmm(target[k:last], inside[k:last, :k], done[:k])
                        values = _expected(values, original[k:last], inside[k:last, k:last])
                        fit(column, values, factor.diagonal[column : start + last])
                if width > 1:
                    at, diagonal = slice(k, end), factor.diagonal[column : start + end]
                    _round_jointly(encoder, column, at, diagonal, target, original, inside, done, rounded)
                else:
                    loop.feed_forward(k, end, inside, original, target, done, rounded)
            error += float(target.square_().sum(1).double() @ factor.diagonal[start:stop].double())
            change[:, start:stop] = done.T
            decoded[:, start:stop] = rounded.T
        return decoded, error


def _round_jointly(
    encoder: Encoder,
    first: int,
    at: slice,
    diagonal: Tensor,
    target: Tensor,
    original: Tensor,
    inside: Tensor,
    done: Tensor,
    rounded: Tensor,
) -> None:
    """Round the columns ``at`` of a block at once, to values near what they would be rounded at one after the other.

    That is ``_expected``, because what one of them gets wrong cannot be fed to the next. What is left in ``target``
    counts the feedback among them as it then is, so that the loss stays sum_k D_k |w'_k - q_k|^2: by the block of U
    and ``diagonal``, the part of D, errors e of the tuple cost e U D U^T e^T, which is what is left once all columns
    after it make up for them.
    """
    values = torch.addmm(target[at], inside[at, : at.start], done[: at.start])
    among = inside[at, at].tril(-1)
    upper = among.T + torch.eye(len(among), device=among.device)
    metric = (upper * diagonal) @ upper.T
    rounded[at] = encoder.round_within(first, _expected(values, original[at], inside[at, at]), metric)
    done[at] = original[at] - rounded[at]
    target[at] = values + among @ done[at] - rounded[at]


def _expected(values: Tensor, original: Tensor, inside: Tensor) -> Tensor:
    """A group's columns ``(columns, rows)`` as they will come to be rounded, but for the rounding noise inside the group.

    ``values`` hold the feedback of all columns before the group. Inside it column i will have moved by m_i = w'_i - w_i,
    which in turn moves the columns after it: m_k = v_k - w_k - sum_{i < k} U_ik m_i.
    """
    moved: Tensor = torch.linalg.solve_triangular(inside, values - original, upper=False, unitriangular=True)
    return original + moved
