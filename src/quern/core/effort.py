"""How much work goes into the least loss at a recipe's size: ``compact@medium``, ``my.yaml@high``.

None of it changes a scheme, so the weights take the same bytes and run in the same way; docs/accuracy.md says what each
part is worth.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quern.core.errors import UserError
from quern.core.recipe_parts import ROUNDINGS
from quern.core.text.suggest import did_you_mean

MARK = "@"
EFFORTS = {
    "medium": "targets that make up for drift, a sweep, feedback among rows, and error feedback in the head",
    "high": "all that, and blocks are tuned",
}
_KEYS = {"target": "drift", "sweeps": 1}


def split_effort(text: str) -> tuple[str, str | None]:
    """A recipe's name or file and the effort behind the last ``@``. Raises ``UserError`` for an unknown effort."""
    name, mark, effort = text.rpartition(MARK)
    if not mark:
        return text, None
    if effort not in EFFORTS:
        known = "; ".join(f"{name}{MARK}{known}: {what}" for known, what in EFFORTS.items())
        raise UserError(
            f"recipe {text!r} asks for an unknown effort {effort!r}. Known: {known}{did_you_mean(effort, EFFORTS)}"
        )
    return name, effort


def with_effort(data: Mapping[str, Any], effort: str | None, source: str) -> Mapping[str, Any]:
    """A recipe's plain data with the keys of an effort; those that it gives itself stay, and its name says so.

    Raises ``UserError`` for a recipe without error feedback, which all of them go on from.
    """
    if effort is None:
        return data
    rounding, calibration, overrides = (data.get(key, {}) for key in ("rounding", "calibration", "overrides"))
    if not (isinstance(rounding, Mapping) and isinstance(calibration, Mapping) and isinstance(overrides or [], list)):
        return data  # refused as what it is when it is parsed
    method = str(rounding.get("method", "gptq"))
    if method in ROUNDINGS and not ROUNDINGS.get(method).needs_hessian:
        raise UserError(
            f"recipe {source!r} rounds by {method}, and an effort goes on from error feedback. Use a recipe with rounding: "
            f"{{method: gptq}}, or leave {MARK}{effort} out"
        )
    weighted = calibration.get("token_weight", "fisher") == "fisher"  # gradients are computed
    keys = {**_KEYS, "two_sided": weighted}
    raised = {**data, "name": f"{data.get('name')}-{effort}", "rounding": {**keys, **rounding}}
    if overrides:
        raised["overrides"] = [_override(override, keys) for override in overrides]
    if weighted and _head_quantized(data):
        raised["head_rounding"] = data.get("head_rounding", {"method": "gptq"})
    if effort == "high":
        raised["tuning"] = {} if data.get("tuning") is None else data["tuning"]
    return raised


def _override(override: Any, keys: Mapping[str, Any]) -> Any:
    """Another rounding of some linears, raised too where it reads Hessians."""
    rounding = override.get("rounding") if isinstance(override, Mapping) else None
    if not isinstance(rounding, Mapping) or rounding.get("method", "gptq") not in ROUNDINGS:
        return override
    if not ROUNDINGS.get(str(rounding.get("method", "gptq"))).needs_hessian:
        return override
    return {**override, "rounding": {**keys, **rounding}}


def _head_quantized(data: Mapping[str, Any]) -> bool:
    """Whether the head, or the embedding that may be one, is to be quantized."""
    schemes = [data.get(key) for key in ("head", "embedding")]
    allocated = isinstance(data.get("allocation"), Mapping) and bool(data["allocation"].get("outer"))
    return allocated or any(isinstance(s, Mapping) and s.get("codec", "integer") != "none" for s in schemes)
