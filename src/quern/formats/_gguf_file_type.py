"""``general.file_type`` of a GGUF: llama.cpp's number for the mix of types that a file has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from quern.architectures.base import Architecture
from quern.checkpoint.gguf.writing.container import TensorPlan
from quern.codecs.base import codec_of
from quern.codecs.packing.ggml import GgmlForm
from quern.core.recipe import MIXES
from quern.formats.mixes.base import Mix, scheme_of


def file_type(architecture: Architecture, kinds: Mapping[str, str], matrices: Sequence[TensorPlan]) -> int:
    """The number of the mix that gives all modules the types ``kinds`` (by full name), where linears have several;
    otherwise that of the type that takes the most bytes of ``matrices``."""
    from gguf import LlamaFileType

    known = LlamaFileType.__members__
    if len({kinds.get(linear) for linear in architecture.linears}) > 1:
        for name in MIXES:
            if (label := f"MOSTLY_{name.upper()}") in known and _types(MIXES.get(name), architecture) == kinds:
                return int(known[label])
    return _usual_type(matrices)


def _types(mix: Mix, architecture: Architecture) -> dict[str, str]:
    """What becomes of every matrix under a mix."""
    shapes, found = architecture.module_shapes(), {}
    for module, kind in mix.types(architecture).items():
        rows, columns = shapes[f"{module}.weight"]
        form = codec_of(codec_of(scheme_of(kind)).fitting((rows, columns))).ggml((rows, columns))
        found[module] = form.kind if isinstance(form, GgmlForm) else ""
    return found


def _usual_type(matrices: Sequence[TensorPlan]) -> int:
    from gguf import LlamaFileType

    weights: Counter[str] = Counter()
    for matrix in matrices:
        weights[matrix.kind] += matrix.stored_bytes
    kind = weights.most_common(1)[0][0]
    if kind == "F32":
        return int(LlamaFileType.ALL_F32)
    found = [
        known for known in LlamaFileType if known.name in (f"MOSTLY_{kind}", f"MOSTLY_{kind}_S", f"MOSTLY_{kind}_MOE")
    ]
    return int(found[0] if found else LlamaFileType.GUESSED)
