"""Time of attention over a long text with each precision of the key/value cache, and what the text takes.

    python benchmarks/attention.py [--context 4096] [--heads 8] [--head-dim 64 128] [--share 3] [--threads 1 2] [--rounds 5]

A decoder that is nothing but one layer's attention: an embedding whose rows are queries, keys and values, and steps that
rotate, store and attend. It is fed a random text of ``--context`` tokens, and then single tokens, as in decoding; the same
with ``--biased`` keys, whose biases the integer precisions keep apart. Precisions alternate over the rounds; the result is
the median with the extremes. Ratios within one run are results, absolute times on a shared machine are not.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
from measured import write_result

from quern import _native
from quern._native import Step

PRECISIONS = ("float32", "float16", "int8", "int4")
TOKENS, VOCABULARY = 32, 256
QUERY, KEY, VALUE, ATTENDED = range(4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=8, help="Of keys and values.")
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--share", type=int, default=3, help="Query heads to each of them.")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rows = [
        row
        for head_dim in options.head_dim
        for threads in options.threads
        for biased in (False, True)
        for row in _measure(head_dim, threads, biased, options)
    ]
    sizes = {name: getattr(options, name) for name in ("context", "heads", "share")}
    print(write_result("attention", {**sizes, "rows": rows}), flush=True)


def _measure(head_dim: int, threads: int, biased: bool, options: argparse.Namespace) -> list[dict[str, Any]]:
    decoder = _attention(options.heads, head_dim, options.share, threads, biased)
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, options.context).astype(np.int32)
    rounds: dict[str, list[tuple[float, float]]] = {precision: [] for precision in PRECISIONS}
    for _ in range(options.rounds):
        for precision, found in rounds.items():
            found.append(_round(decoder, tokens, precision))
    rows = []
    for precision, found in rounds.items():
        each = _native.cache_page_bytes([(options.heads, head_dim)], precision) // _native.CACHE_BLOCK
        row: dict[str, Any] = {
            "head_dim": head_dim, "threads": threads, "biased": biased, "precision": precision, "bytes_per_token": each,
            "decode_us": _spread([decode for _, decode in found]), "prefill_us": _spread([prefill for prefill, _ in found]),
        }  # fmt: skip
        decode, prefill = row["decode_us"], row["prefill_us"]
        print(
            f"head_dim {head_dim} {threads} threads {'biased' if biased else 'plain ':6} {precision:8} {each:6} bytes/token "
            f" decode {decode['median']:7.0f} us ({decode['least']:.0f}-{decode['most']:.0f})  "
            f"prefill {prefill['median']:6.1f} us a token ({prefill['least']:.1f}-{prefill['most']:.1f})",
            flush=True,
        )
        rows.append(row)
    return rows


def _round(decoder: _native.Decoder, tokens: np.ndarray[Any, Any], precision: str) -> tuple[float, float]:
    """Microseconds of a token: of the text at once, and of single ones after it."""
    pages = (len(tokens) + TOKENS) // _native.CACHE_BLOCK + 1
    sequence = decoder.pool(pages, precision).sequence()
    begin = time.perf_counter()
    decoder.feed([sequence], [len(tokens)], tokens, False)
    prefill = (time.perf_counter() - begin) / len(tokens)
    begin = time.perf_counter()
    for token in tokens[:TOKENS]:
        decoder.feed([sequence], [1], np.array([token], np.int32), False)
    return prefill * 1e6, (time.perf_counter() - begin) / TOKENS * 1e6


def _attention(heads: int, head_dim: int, share: int, threads: int, biased: bool) -> _native.Decoder:
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
        Step.attend(0, QUERY, ATTENDED, 0, bias),
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
