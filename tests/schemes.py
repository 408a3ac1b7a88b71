"""Weight schemes of every kind, and matrices to store under them, for the tests that run over the registries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quern.codecs.base import CODECS, Codec, Encoder, codec_of
from quern.core.errors import UserError
from quern.core.scheme import parse_scheme

GRANULARITIES: dict[str, dict[str, Any]] = {
    "tensor": {"granularity": "tensor"},
    "channel": {"granularity": "channel"},
    "group32": {"granularity": "group", "group_size": 32},
    "group64": {"granularity": "group", "group_size": 64},
}

GGML = (
    "q4_0", "q4_1", "q5_1", "q8_0", "iq4_nl", "q2_k", "q3_k", "q4_k", "q6_k", "iq4_xs", "iq2_xxs", "iq2_s", "iq3_xxs",
    "iq3_s",
)  # fmt: skip


def scheme_id(scheme: dict[str, Any]) -> str:
    if "type" in scheme:
        return f"{scheme['codec']}-{scheme['type']}"
    sign = "symmetric" if scheme["symmetric"] else "asymmetric"
    variant = "".join(f"-{scheme[key]}" for key in ("window", "tables", "variant") if key in scheme)
    return f"{scheme['codec']}-{scheme['bits']}-{sign}-{scheme['granularity']}{scheme.get('group_size') or ''}{variant}"


def storable(scheme: dict[str, Any]) -> bool:
    """Whether the scheme's codec takes it; a trellis takes few."""
    try:
        codec_of(parse_scheme(scheme))
    except (UserError, ValueError):
        return False
    return True


EVERY: list[dict[str, Any]] = [
    {"codec": codec, "bits": bits, "symmetric": symmetric, **granularity}
    for codec in CODECS.names()
    for bits in range(1, 9)
    for symmetric in (True, False)
    for granularity in GRANULARITIES.values()
] + [
    {"codec": "trellis", "bits": bits, "symmetric": True, "granularity": "channel", "window": window, "tables": 1}
    for bits in (2, 3, 4)
    for window in (6, 7)
]
EVERY += [
    {"codec": "nvfp4", "bits": 4, "symmetric": True, "granularity": "group", "group_size": 16},
    {"codec": "integer", "bits": 4, "symmetric": True, "granularity": "block", "group_size": 32},
    {"codec": "integer", "bits": 8, "symmetric": True, "granularity": "block", "group_size": 64},
    {"codec": "float8", "bits": 8, "symmetric": True, "granularity": "channel", "variant": "e5m2"},
    {"codec": "float8", "bits": 8, "symmetric": True, "granularity": "block", "group_size": 32},
    *({"codec": "ggml", "type": name} for name in GGML),
]
ALL = [scheme for scheme in EVERY if storable(scheme)]
"""Every codec with every width, sign and granularity that it stores."""


def promised(scheme: dict[str, Any]) -> bool | None:
    """Whether the page on recipes promises that the scheme's codec stores it; None for codecs that it does not name."""
    if scheme["codec"] == "integer":
        return True
    if scheme["codec"] == "trellis":
        return scheme["symmetric"] and scheme["granularity"] == "channel" and scheme["bits"] in (2, 3, 4)
    return None


def make_codec(scheme: dict[str, Any], **changes: Any) -> Codec:
    """The codec of a scheme that it stores; of ``changes`` those that it knows."""
    known = CODECS.get(scheme.get("codec", "integer")).Parameters.model_fields
    return codec_of(parse_scheme({**scheme, **{key: value for key, value in changes.items() if key in known}}))


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    """A matrix of rows of different sizes, with one outlier."""
    generator = torch.Generator().manual_seed(seed + 1000 * rows + columns)
    weight = torch.randn(rows, columns, generator=generator) * torch.logspace(-2, 0, rows)[:, None]
    weight[rows // 2, columns // 3] *= 6
    return weight


def round_by_column(encoder: Encoder, weight: Tensor) -> Tensor:
    """What a rounding with error feedback does: column by column, fitting parameters where the encoder wants it."""
    rounded = torch.empty_like(weight)
    for column in range(0, weight.shape[1], encoder.width):
        if encoder.refit_width and column % encoder.refit_width == 0:
            group = slice(column, min(column + encoder.refit_width, weight.shape[1]))
            encoder.refit(column, weight[:, group].T, torch.ones(group.stop - group.start))
        if encoder.refine_width and column % encoder.refine_width == 0:
            group = slice(column, min(column + encoder.refine_width, weight.shape[1]))
            encoder.refine(column, weight[:, group].T, torch.ones(group.stop - group.start))
        columns = slice(column, column + encoder.width)
        rounded[:, columns] = encoder.round(column, weight[:, columns].T.clone()).T
    return rounded
