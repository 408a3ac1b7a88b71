"""What zeros that were added to a model ask of its plan."""

from __future__ import annotations

from dataclasses import replace

import torch

from quern.architectures.base import Architecture
from quern.checkpoint.checkpoint import Checkpoint
from quern.codecs.base import codec_of
from quern.core.errors import UserError
from quern.core.plan import Plan
from quern.core.scheme import CodecScheme
from quern.loading.padding import SIZE, ZERO_ROLE, padding_record

_ROWS, _SEED = 64, 0
"""Rows of the matrix on which a codec is tried: as many with numbers as with zeros."""


def padded_plan(plan: Plan, architecture: Architecture, checkpoint: Checkpoint) -> Plan:
    """The plan of a ``checkpoint`` that was padded: damping is what it would be without. Of any other the same plan.

    Raises ``UserError`` for a codec that would make other numbers of rows of zeros.
    """
    if not (record := padding_record(checkpoint)):
        return plan
    before, after = record["padding"][SIZE]
    tried: set[CodecScheme] = set()
    plans = dict(plan)
    for name, linear in architecture.linears.items():
        one = plans[name]
        if not one.quantized:
            continue
        if linear.role == ZERO_ROLE and one.scheme not in tried:
            tried.add(one.scheme)
            _try_zeros(name, one.scheme, linear.shape[1])
        if linear.shape[1] == after and linear.role == "down":
            # Zeros on the Hessian's diagonal lower its mean, of which damping is a share.
            rounding = one.rounding.model_copy(update={"damping": one.rounding.damping * after / before})
            plans[name] = replace(one, rounding=rounding)
    return Plan(plans)


def _try_zeros(name: str, scheme: CodecScheme, columns: int) -> None:
    """Whether rows of zeros among others stay zeros."""
    weight = torch.randn(_ROWS, columns, generator=torch.Generator().manual_seed(_SEED))
    weight[_ROWS // 2 :] = 0
    if codec_of(scheme).encoder(weight, weight, refit=False).round_all(weight)[_ROWS // 2 :].any():
        raise UserError(
            f"padding adds rows of zeros to {name}, and codec {scheme.codec} as the recipe has it does not store zeros "
            "exactly. Use one that does, such as integer, float8, nf4 or a K-quant, or leave padding out"
        )
