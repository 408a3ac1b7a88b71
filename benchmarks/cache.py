"""What each precision of the key/value cache costs one model: KL divergence from its own float32 cache, and perplexity.

    python benchmarks/cache.py MODEL [--text FILE ...] [--tokens 8192] [--window 1024] [--precisions float16 int8 int4]

The model, quantized or not, runs on the cpu engine throughout, so that nothing but the cache differs: ``quern evaluate
--cache`` measures the sum of this and of what rounding the weights costs. ``int8, not transformed`` and ``int4, not
transformed`` leave out the Hadamard transform of keys, queries and values. Without ``--text``, held-out text of the running
Python is scored.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
from measured import write_result
from numpy.typing import NDArray

from quern import _native
from quern.checkpoint.tokenizer import load_tokenizer
from quern.engines._cpu_pool import Pool
from quern.engines.cpu import CpuEngine
from quern.evaluation.accuracy import agreement, mean_divergence, reference_logits, score_windows, text_perplexity
from quern.evaluation.heldout import held_out_text
from quern.evaluation.texts import Window, cut_windows
from quern.loading.fitting import open_model
from quern.texts.source import Text, read_text

NOT_TRANSFORMED = ", not transformed"
PRECISIONS = ["float16", "int8", "int8" + NOT_TRANSFORMED, "int4", "int4" + NOT_TRANSFORMED]


class Untransformed:
    """A decoder whose pools of integers leave out the transform."""

    def __init__(self, decoder: _native.Decoder) -> None:
        self._decoder = decoder

    def page_bytes(self, precision: str) -> int:
        return self._decoder.page_bytes(precision)

    def pool(self, pages: int, precision: str) -> _native.Pool:
        return self._decoder.pool(pages, precision, transformed=False)


class Kept:
    """Logits of windows in memory."""

    def __init__(self) -> None:
        self._logits: dict[int, NDArray[np.float32]] = {}

    def keep(self, number: int, logits: NDArray[np.float32]) -> None:
        self._logits[number] = logits.copy()

    def __len__(self) -> int:
        return len(self._logits)

    def window(self, number: int) -> NDArray[np.float32]:
        return self._logits[number]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", nargs="+", default=[])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS)
    parser.add_argument("--theme", default="cache", help="The result file's name begins with it.")
    options = parser.parse_args()
    windows = _windows(options)
    reference = Kept()
    exact = CpuEngine().load(options.model, cache="float32")
    reference_logits(exact, windows, reference.keep)
    rows = [_row("float32", exact, windows, reference)]
    for precision in options.precisions:
        row = _row(precision, _loaded(options.model, precision), windows, reference)
        row["perplexity_change"] = row["perplexity"] / rows[0]["perplexity"] - 1
        rows.append(row)
        low, high = row["kl_ci95"] or (row["kl"], row["kl"])
        print(
            f"{precision:22} {row['bytes_per_token']:7} bytes/token  KL {row['kl']:.6f} ({low:.6f} to {high:.6f})  "
            f"perplexity {row['perplexity']:.3f} ({row['perplexity_change']:+.3%})  top-1 {row['top1']:.2%}",
            flush=True,
        )
    print(write_result(options.theme, {"tokens": options.tokens, "window": options.window, "rows": rows}), flush=True)


def _loaded(path: str, precision: str) -> Any:
    stored: Any = precision.removesuffix(NOT_TRANSFORMED)
    model: Any = CpuEngine().load(path, cache=stored)
    if precision != stored:
        model.pool = Pool(Untransformed(model._decoder), stored)  # type: ignore[arg-type]
    return model


def _row(precision: str, model: Any, windows: Sequence[Window], reference: Kept) -> dict[str, Any]:
    scores = score_windows(model, windows, reference)
    divergence = mean_divergence(scores, seed=0)
    assert divergence is not None
    return {
        "precision": precision,
        "bytes_per_token": model.cache_bytes_per_token,
        "kl": divergence.mean,
        "kl_ci95": divergence.interval,
        "perplexity": text_perplexity(scores),
        "top1": agreement(scores),
    }


def _windows(options: argparse.Namespace) -> Sequence[Window]:
    checkpoint = open_model(options.model)
    texts = [read_text(path) for path in options.text] or [Text.of("held-out", [text for _, text in held_out_text()])]
    window = min(options.window, int(checkpoint.config["max_position_embeddings"]))
    tokenizer = load_tokenizer(checkpoint.path)
    size = int(checkpoint.config["vocab_size"])
    return cut_windows(texts, tokenizer, vocabulary_size=size, tokens=options.tokens, window=window).windows


if __name__ == "__main__":
    main()
