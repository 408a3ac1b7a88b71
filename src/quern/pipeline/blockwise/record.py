"""What the journal keeps of linears that were rounded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quern.codecs.base import codec_of
from quern.pipeline.blockwise.job import Job
from quern.quantization.block import RoundedLinear
from quern.quantization.calibration.experts import Met

NONE_MET: Mapping[str, Met] = {}


def record_of(
    job: Job, rounded: Sequence[RoundedLinear], prefix: str = "", met: Mapping[str, Met] = NONE_MET
) -> dict[str, Any]:
    """What the journal keeps of rounded linears, whose names get ``prefix``: their errors (see
    ``core.results.LayerError``), and ``scale_dtype`` of those where it is not the one asked for. ``met``: of experts'."""
    layers = [
        {
            "linear": prefix + linear.name,
            "bits_per_weight": linear.bits_per_weight
            - 8 * job.writer.saved_bytes(prefix + linear.name) / linear.decoded.numel(),
            "relative_error": linear.relative_loss,
            **({} if linear.drift_share is None else {"drift_share": linear.drift_share}),
            **({} if linear.rows_left is None else {"rows_left": linear.rows_left}),
            **({} if (own := met.get(linear.name)) is None else {"met_share": own.share}),
            **({} if own is None or own.stand_in is None else {"stand_in": own.stand_in}),
        }
        for linear in rounded
    ]
    dtypes: dict[str, str] = {}
    for linear in rounded:
        name = prefix + linear.name
        carried_out = codec_of(linear.plan.scheme).scale_dtype_name
        if carried_out is not None and carried_out != codec_of(job.plan[name].scheme).scale_dtype_name:
            dtypes[name] = carried_out
    return {"layers": layers, "scale_dtypes": dtypes}
