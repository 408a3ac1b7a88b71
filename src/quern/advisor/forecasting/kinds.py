"""Kinds of weights: matrices of one kind are read by one kernel and rounded by one encoder."""

from __future__ import annotations

from quern.codecs.base import codec_of
from quern.core.plan import LinearPlan

PLAIN = "16-bit"
"""Weights that are not quantized."""


def kernel_kind(plan: LinearPlan) -> str:
    """What the cpu engine's kernels tell apart: ``integer4``, ``trellis 3-bit, 1 table``. A scheme without a kernel has the
    name of its type, or its codec's."""
    if not plan.quantized:
        return PLAIN
    form = codec_of(plan.scheme).kernel((1, 1))
    if isinstance(form, str):
        return str(plan.scheme.to_json().get("type", plan.scheme.codec))
    bits, tables = form.options.get("bits"), form.options.get("tables")
    if bits is None:
        return form.kind
    return f"{form.kind} {bits}-bit" + (f", {tables} table{'s' * (tables != 1)}" if tables is not None else "")


def rounding_kind(plan: LinearPlan) -> str:
    """What takes as long a weight: the kernel's kind, and the rounding."""
    return f"{kernel_kind(plan)}, {plan.rounding.method}"
