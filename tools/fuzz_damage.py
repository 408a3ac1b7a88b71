"""Damage for the fuzzer: a model's files with bytes, numbers and words of them changed, and hostile native matrices."""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Callable
from typing import Any

Files = dict[str, bytes | None]
"""Contents by name; None: the file is missing."""

NUMBERS = [0, 1, -1, 2, 3, 5, 7, 8, 15, 16, 17, 63, 255, 300, 2**31 - 1, 2**31, 2**53, 2**63, 0.5, -0.0, 1e300]
WORDS = [
    "", "integer", "trellis", "none", "group", "channel", "tensor", "float16", "float32", "bfloat16", "qwen2", "llama",
    "hadamard", "static", "dynamic", "quern", "compressed-tensors", "F32", "I8", "../x", "\ud800", "a\0b",
]  # fmt: skip
OPTIONS: list[Any] = [None, True, False, [], {}, [[]], *NUMBERS, *WORDS]
INDEX, CONFIG, PROVENANCE = "model.safetensors.index.json", "config.json", "quern.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
LONGEST = 1 << 22
"""A native matrix of more weights is only built, not multiplied."""


def damage(files: Files, generator: random.Random) -> None:
    """One to three kinds of damage."""
    kinds = GGUF_DAMAGES if any(name.endswith(".gguf") for name in files) else DAMAGES
    if not any(name in files for name in TOKENIZER):
        kinds = tuple(kind for kind in kinds if kind not in TOKENIZER_DAMAGES)
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        generator.choice(kinds)(files, generator)


def _shard(files: Files, generator: random.Random) -> tuple[str, bytearray, int]:
    """A shard's name, its bytes, and where its data begins."""
    name = generator.choice(sorted(name for name in files if name.endswith(".safetensors")))
    data = bytearray(files[name] or b"")
    return name, data, min(len(data), 8 + int.from_bytes(data[:8], "little"))


def _header_bytes(files: Files, generator: random.Random) -> None:
    name, data, end = _shard(files, generator)
    for _ in range(generator.randint(1, 4)):
        if end:
            data[generator.randrange(end)] = generator.choice(b'0123456789,:[]{}"-IFUBx\xff\0')
    files[name] = bytes(data)


def _header_value(files: Files, generator: random.Random) -> None:
    """Change the header as JSON and keep its length right, so that the damage lies behind the parser."""
    name, data, end = _shard(files, generator)
    try:
        header = json.loads(data[8:end])
        tensor = generator.choice(sorted(header))
        entry, kind = header[tensor], generator.randrange(4)
        if kind == 0:
            header[generator.choice([tensor + "x", generator.choice(sorted(header))])] = header.pop(tensor)
        elif kind == 1:
            entry["dtype"] = generator.choice(["BOOL", "U8", "I8", "F16", "BF16", "I32", "F32", "F64", "U64"])
        elif kind == 2:
            entry["shape"] = _other_shape(entry["shape"], generator)
        else:
            entry["data_offsets"][generator.randrange(2)] = generator.choice([0, 1, 64, len(data) - end, 2**63])
    except (ValueError, KeyError, TypeError, IndexError):  # damaged before
        return
    text = json.dumps(header).encode()
    files[name] = len(text).to_bytes(8, "little") + text + data[end:]


def _other_shape(shape: list[int], generator: random.Random) -> list[int]:
    """Often one of as many elements, which only a comparison with the model can tell."""
    options = [shape[::-1], [*shape, 1], shape[1:], [2 * size for size in shape]]
    if len(shape) == 2 and shape[0] % 2 == 0:
        options += [[shape[0] // 2, shape[1] * 2]]
    return generator.choice(options)


def _data_bytes(files: Files, generator: random.Random) -> None:
    name, data, begin = _shard(files, generator)
    for _ in range(generator.randint(1, 64)):
        if begin < len(data):
            data[generator.randrange(begin, len(data))] = generator.choice(
                (0, 0x7F, 0x80, 0xFF, generator.randrange(256))
            )
    files[name] = bytes(data)


def _cut(files: Files, generator: random.Random) -> None:
    name = generator.choice(sorted(files))
    content = files[name] or b""
    files[name] = content[: generator.randrange(len(content) + 1)]


def _extended(files: Files, generator: random.Random) -> None:
    name = generator.choice(sorted(files))
    files[name] = (files[name] or b"") + generator.randbytes(generator.randint(1, 64))


def _missing(files: Files, generator: random.Random) -> None:
    files[generator.choice(sorted(files))] = None


def _swapped(files: Files, generator: random.Random) -> None:
    one, two = generator.choices(sorted(files), k=2)
    files[one], files[two] = files[two], files[one]


def _text_bytes(files: Files, generator: random.Random) -> None:
    name = generator.choice((CONFIG, INDEX, PROVENANCE))
    data = bytearray(files.get(name) or b"")
    for _ in range(generator.randint(1, 3)):
        at = generator.randrange(len(data) + 1)
        data[at : at + generator.randrange(3)] = generator.choice(
            (b"", b"0", b'"', b"}", b",", b"-", b"1e999", b"\xff")
        )
    files[name] = bytes(data)


def _value_of(name: str, start: tuple[str, ...] = (), descend: float = 0.8) -> Callable[[Files, random.Random], None]:
    """Damage that replaces, removes or adds one value of a JSON file, below the keys ``start``."""

    def change(files: Files, generator: random.Random) -> None:
        try:
            root = json.loads(files.get(name) or b"")
            place: Any = root
            for key in start:
                place = place[key]
            key = generator.choice(sorted(place))
            while isinstance(place[key], dict) and place[key] and generator.random() < descend:
                place = place[key]
                key = generator.choice(sorted(place))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):  # damaged before
            return
        old = place[key]
        options = [*OPTIONS, *([old + 1, old - 1, old * 2, old // 2] if type(old) is int else [])]
        kind = generator.randrange(8)
        if kind == 0:
            del place[key]
        elif kind == 1:
            place[generator.choice(WORDS)] = old
        else:
            place[key] = generator.choice(options)
        files[name] = json.dumps(root).encode()

    return change


GGUF_KEY = re.compile(rb"(?:general|split|tokenizer|llama|qwen2|qwen3)\.[a-z0-9_.]+")
GGUF_TENSOR = re.compile(rb"(?:blk\.\d+\.\w+|token_embd|output_norm|output)\.(?:weight|bias)|rope_freqs\.weight")
INTEGERS = [number for number in NUMBERS if type(number) is int and number >= 0] + [2**61, 2**64 - 1]


def _gguf(files: Files, generator: random.Random) -> tuple[str, bytearray]:
    name = generator.choice(sorted(name for name in files if name.endswith(".gguf")))
    return name, bytearray(files[name] or b"")


def _gguf_entry(
    pattern: re.Pattern[bytes], forms: tuple[str, ...], reach: int
) -> Callable[[Files, random.Random], None]:
    """Damage that writes a hostile number within ``reach`` bytes behind a name, or just before it, where its length is."""

    def change(files: Files, generator: random.Random) -> None:
        name, data = _gguf(files, generator)
        found = [match.span() for match in pattern.finditer(data, 0, data.rfind(b".weight") + 8)]
        if not found:
            return
        begin, end = generator.choice(found)
        at = begin - 8 if generator.random() < 0.05 else end + 4 * generator.randrange(reach // 4)
        form = generator.choice(forms)
        number = generator.choice(INTEGERS) if generator.random() < 0.8 else generator.randrange(64)
        packed = struct.pack("<Q", number & (2**64 - 1))[: struct.calcsize(form)]
        data[at : at + len(packed)] = packed
        files[name] = bytes(data)

    return change


def _gguf_bytes(files: Files, generator: random.Random) -> None:
    """Bytes of the header, some put in or taken out."""
    name, data = _gguf(files, generator)
    end = data.rfind(b".weight") + 40
    for _ in range(generator.randint(1, 4)):
        if end > 0 and data:
            at = generator.randrange(min(end, len(data)))
            data[at : at + generator.choice((1, 1, 1, 0, 2))] = generator.choice((b"\0", b"\xff", b"a", b"1", b"zz"))
    files[name] = bytes(data)


def _gguf_data(files: Files, generator: random.Random) -> None:
    name, data = _gguf(files, generator)
    begin = data.rfind(b".weight") + 40
    for _ in range(generator.randint(1, 64)):
        if begin < len(data):
            data[generator.randrange(begin, len(data))] = generator.choice((0, 0x7F, 0x80, 0xFF))
    files[name] = bytes(data)


GGUF_DAMAGES: tuple[Callable[[Files, random.Random], None], ...] = (
    *[_gguf_entry(GGUF_KEY, ("<B", "<I", "<Q"), 24)] * 6,
    *[_gguf_entry(GGUF_TENSOR, ("<I", "<Q"), 36)] * 4,
    *[_gguf_bytes] * 4,
    *[_gguf_data] * 2,
    _cut,
    _extended,
    _missing,
    _swapped,
)
TOKENIZER_DAMAGES = (
    _value_of(TOKENIZER[0]),
    _value_of(TOKENIZER[0], ("model",), 0.3),
    _value_of(TOKENIZER[1]),
)
DAMAGES: tuple[Callable[[Files, random.Random], None], ...] = (
    _header_bytes,
    *[_header_value] * 2,
    *[_data_bytes] * 6,
    _cut,
    _extended,
    _missing,
    _swapped,
    _text_bytes,
    *[_value_of(CONFIG)] * 2,
    _value_of(CONFIG, (), 0.0),
    *[_value_of(CONFIG, ("quantization_config", "modules"), 1.0)] * 2,
    _value_of(INDEX),
    _value_of(PROVENANCE),
    *TOKENIZER_DAMAGES,
)
"""Some more often than others: damaged data mostly runs, and that is when kernels could go astray."""


def hostile_matrix(generator: random.Random) -> tuple[dict[str, Any], int | None]:
    """Keywords for ``_native.Matrix`` near and far from those of a good one, and a number of columns to multiply with.

    Sizes are extreme at times, and each buffer may be a few bytes off, missing, or of another dtype.
    """
    import numpy as np

    rows, columns = (generator.choice((1, 2, 15, 16, 17, 64, 255, 256, 257)) for _ in range(2))
    kind = generator.choice(("integer4", "integer8", "codebook4", "trellis", "bfloat16", "float32"))
    group = generator.choice((columns, 32, 1, None)) if kind != "trellis" else None
    bits, window, tables = generator.randint(1, 4), generator.choice((6, 7)), generator.choice((1, 2))
    width = min(group or columns, columns)
    groups, one_scale = -(-columns // width), generator.random() < 0.2
    steps = [-(-min(256, rows - first) // 16) for first in range(0, rows, 256)]
    codes = {
        "trellis": sum(-(-bits * step // 8) * 64 * -(-columns // 4) for step in steps),
        "integer8": rows * columns, "bfloat16": 2 * rows * columns, "float32": 4 * rows * columns,
    }.get(kind, rows * (-(-columns // 8) * 4))  # fmt: skip
    scale_rows = 1 if one_scale else rows
    arrays: dict[str, Any] = {"codes": codes}
    if kind not in ("bfloat16", "float32"):
        arrays["scale"] = 2 * groups * scale_rows
    if kind == "integer4" and generator.random() < 0.5:
        arrays["zeros"] = -(-scale_rows // 8) * groups * 4
    keywords: dict[str, Any] = {
        name: np.frombuffer(generator.randbytes(size), np.uint8) for name, size in arrays.items()
    }
    if kind in ("trellis", "codebook4"):
        size = tables << window if kind == "trellis" else 16
        keywords["table"] = np.frombuffer(generator.randbytes(size), np.int8)
    keywords |= {"kind": kind, "rows": rows, "columns": columns, "group": width, "one_scale": one_scale}
    if kind == "trellis":
        keywords |= {"bits": bits, "window": window, "tables": tables, "lag": tables - 1}
    for _ in range(generator.choice((0, 1, 1, 2))):
        _spoil(keywords, generator)
    rows, columns = keywords.get("rows"), keywords.get("columns")
    usable = type(rows) is int and type(columns) is int and 0 < rows * columns <= LONGEST and columns > 0
    return keywords, columns if usable else None


def _spoil(keywords: dict[str, Any], generator: random.Random) -> None:
    import numpy as np

    key = generator.choice(sorted(keywords))
    value = keywords[key]
    if isinstance(value, np.ndarray):
        missing, short = value[:0], value[: max(0, len(value) - generator.randint(1, 8))]
        longer, other = np.concatenate([value, value[:1]]), value.astype(np.float32)
        keywords[key] = generator.choice(
            (None, missing, short, longer, other, value[::2], value[1:], value.reshape(1, -1))
        )
    elif key == "kind":
        keywords[key] = generator.choice(("integer4", "integer8", "codebook4", "trellis", "float32", "zap"))
    else:
        keywords[key] = generator.choice((0, -1, 1, 3, 8, 9, 64, 2**30, 2**31 - 1, -(2**31), 2**31, None, value))
