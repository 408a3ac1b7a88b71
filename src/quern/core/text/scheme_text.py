"""Schemes in a few words."""

from __future__ import annotations

from quern.core.scheme import CODECS, CodecScheme


def scheme_text(scheme: CodecScheme) -> str:
    """``trellis 3 bits, tables 1``: the codec, its bits, and the parameters that are not the codec's usual ones."""
    if not scheme.quantized:
        return "kept"
    fields = CODECS.get(scheme.codec).Parameters.model_fields
    values = {name: getattr(scheme.params, name) for name in fields}
    first = f"{scheme.codec} {values['bits']} bits" if "bits" in values else scheme.codec
    others = [
        f"{name} {value}"
        for name, value in values.items()
        if name not in ("bits", "scale_dtype") and value is not None and value != fields[name].default
    ]
    return ", ".join([first, *others])
