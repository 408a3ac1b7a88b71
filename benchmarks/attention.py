"""Time of attention over a long text with each precision of the key/value cache, and what the text takes.

    python benchmarks/attention.py [--context 4096] [--heads 8] [--head-dim 64 128] [--share 3] [--threads 1 2] [--rounds 5]
        [--decode-only] [--isa avx2] [--dry]

A decoder that is nothing but one layer's attention: an embedding whose rows are queries, keys and values, and steps that
rotate, store and attend. It is fed a random text of ``--context`` tokens, and then single tokens, as in decoding; the same
with biased keys, whose biases the integer precisions keep apart. Precisions alternate over the rounds; the result is
the median with the extremes. Ratios within one run are results, absolute times on a shared machine are not.

``--decode-only`` stores the text's keys and values without attending to them, which for long texts takes longest, and leaves
out biased keys. The fraction is the time of a pure read of as many bytes as the text takes in the cache, by as many threads,
over the time of a token; reads take turns with tokens, so that both come from memory.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from measured import write_result
from native_matrices import Pool

from quern import _native
from quern._native import Step

PRECISIONS = ("float32", "float16", "int8", "int4")
TOKENS, VOCABULARY = 32, 256
QUERY, KEY, VALUE, ATTENDED = range(4)
FLUSHED = 1 << 26
"""Bytes that are read between two tokens, so that keys and values come from memory, as in a model of many layers."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=8, help="Of keys and values.")
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--share", type=int, default=3, help="Query heads to each of them.")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--decode-only", action="store_true")
    parser.add_argument("--isa", default=_native.isa())
    parser.add_argument("--dry", action="store_true", help="Write no result file.")
    options = parser.parse_args()
    _native.use_isa(options.isa)
    pool = Pool()
    rows = [
        row
        for head_dim in options.head_dim
        for threads in options.threads
        for biased in ((False,) if options.decode_only else (False, True))
        for row in _measure(head_dim, threads, biased, options, pool)
    ]
    sizes = {name: getattr(options, name) for name in ("context", "heads", "share", "isa")}
    if not options.dry:
        print(write_result("attention", {**sizes, "rows": rows}), flush=True)


def _measure(
    head_dim: int, threads: int, biased: bool, options: argparse.Namespace, pool: Pool
) -> list[dict[str, Any]]:
    decoder = _attention(options.heads, head_dim, options.share, threads, biased)
    reader = _attention(options.heads, head_dim, options.share, threads, biased, attends=False)
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, options.context).astype(np.int32)
    sizes = {
        precision: _native.cache_page_bytes([(options.heads, head_dim)], precision) // _native.CACHE_BLOCK
        for precision in PRECISIONS
    }
    rounds: dict[str, list[tuple[float, float, float]]] = {precision: [] for precision in PRECISIONS}
    for _ in range(options.rounds):
        for precision, found in rounds.items():
            parts = pool.parts(sizes[precision] * options.context)
            count = -(-FLUSHED // len(parts[0]))
            read = partial(_native.time_read, parts, threads, count)
            found.append(_round(reader if options.decode_only else decoder, decoder, tokens, precision, read))
    rows = []
    for precision, found in rounds.items():
        each = sizes[precision]
        row: dict[str, Any] = {
            "head_dim": head_dim, "threads": threads, "biased": biased, "precision": precision, "bytes_per_token": each,
            "decode_us": _spread([decode for _, decode, _ in found]),
            "prefill_us": _spread([prefill for prefill, *_ in found]),
            "fraction_of_read": _spread([read / decode for _, decode, read in found]),
        }  # fmt: skip
        decode, prefill = row["decode_us"], row["prefill_us"]
        print(
            f"head_dim {head_dim} {threads} threads {'biased' if biased else 'plain ':6} {precision:8} {each:6} bytes/token "
            f" decode {decode['median']:7.0f} us ({decode['least']:.0f}-{decode['most']:.0f})  "
            f"fraction {row['fraction_of_read']['median']:.2f}  "
            f"prefill {prefill['median']:6.1f} us a token ({prefill['least']:.1f}-{prefill['most']:.1f})",
            flush=True,
        )
        rows.append(row)
    return rows


def _round(
    reader: _native.Decoder,
    decoder: _native.Decoder,
    tokens: np.ndarray[Any, Any],
    precision: str,
    read: Callable[[], list[float]],
) -> tuple[float, float, float]:
    """Microseconds of a token of the text, which ``reader`` is fed at once, of single ones after it, and of a pure read."""
    pages = (len(tokens) + TOKENS) // _native.CACHE_BLOCK + 1
    sequence = decoder.pool(pages, precision).sequence()
    begin = time.perf_counter()
    reader.feed([sequence], [len(tokens)], tokens, False)
    prefill = (time.perf_counter() - begin) / len(tokens)
    times: list[float] = []
    reads: list[float] = []
    for token in tokens[:TOKENS]:
        reads += read()
        begin = time.perf_counter()
        decoder.feed([sequence], [1], np.array([token], np.int32), False)
        times.append(time.perf_counter() - begin)
    return prefill * 1e6, statistics.median(times) * 1e6, statistics.median(reads) * 1e6


def _attention(
    heads: int, head_dim: int, share: int, threads: int, biased: bool, attends: bool = True
) -> _native.Decoder:
    generator = np.random.default_rng(0)
    width, key_width = heads * share * head_dim, heads * head_dim
    table = generator.standard_normal((VOCABULARY, width + 2 * key_width)).astype(np.float32)
    bias = generator.standard_normal(key_width).astype(np.float32) if biased else None
    # Queries, keys and values are the rows of three embeddings, so that there is no product to pay for.
    parts = np.split(table, [width, width + key_width], 1)
    steps = [
        *(Step.embed(_matrix(part), to) for part, to in zip(parts, (QUERY, KEY, VALUE), strict=True)),
        Step.rotate(QUERY, 0, head_dim**-0.5),
        Step.store(0, KEY, VALUE, bias),
        *([Step.attend(0, QUERY, ATTENDED, 0, bias)] if attends else []),
    ]
    frequencies = [float(1e4 ** (-2 * i / head_dim)) for i in range(head_dim // 2)]
    head = _native.Linear(_matrix(np.zeros((VOCABULARY, width), np.float32)))
    widths = [width, key_width, key_width, width]
    return _native.Decoder(widths, [(heads, head_dim)], [([frequencies], 1.0)], steps, ATTENDED, head, threads)


def _matrix(weight: np.ndarray[Any, Any]) -> _native.Matrix:
    contiguous = np.ascontiguousarray(weight)
    return _native.Matrix("float32", *contiguous.shape, contiguous.reshape(-1).view(np.uint8))


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


if __name__ == "__main__":
    main()
