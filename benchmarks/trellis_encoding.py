"""How fast the trellis encoder is and what the codes lose: one decoder layer of a 72B model's size, without Hessian work.

    python benchmarks/trellis_encoding.py [--threads N] [--columns COLUMNS]

For every shipped table: mean squared error on unit Gaussian weights, nanoseconds of a weight on one thread, and seconds for
the 878 million weights of one Qwen2-72B layer on all threads, from a sample of the layer's rows and columns. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from quern import _native
from quern.codecs.trellis import lag, trained_tables
from quern.core.machine.parallel import Workers, available_threads

LAYER_WEIGHTS = 2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 29568 * 8192
SLAB = 1024
ROUNDS = 3


Matrix = NDArray[np.float32]


def encode(variant: tuple[int, int, int], weight: Matrix, out: Matrix) -> float:
    """Seconds to code ``weight`` by the shipped table of ``variant``; what it decodes to goes to ``out``."""
    table = trained_tables()[variant]
    scales = np.full(len(weight), table.unit, np.float32)
    encoder = _native.TrellisEncoder(variant[0], lag(*variant), table.entries.numpy(), scales, weight.shape[1])
    started = time.perf_counter()
    encoder.round_all(weight, out)
    return time.perf_counter() - started


def median(times: Iterable[float]) -> float:
    """Of an odd number of times."""
    ordered = sorted(times)
    return ordered[len(ordered) // 2]


def main() -> None:
    """Measure every shipped table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=available_threads())
    parser.add_argument("--columns", type=int, default=256, help="columns of a sample")
    arguments = parser.parse_args()
    weight = np.random.default_rng(0).standard_normal((SLAB, arguments.columns)).astype(np.float32)
    decoded = [np.empty_like(weight) for _ in range(arguments.threads)]
    workers = Workers(arguments.threads)
    for variant, table in sorted(trained_tables().items()):
        job = partial(encode, variant, weight)
        alone = median(job(decoded[0]) for _ in range(ROUNDS))
        together = median(max(workers.map(job, decoded)) for _ in range(ROUNDS))
        bits, window, tables = variant
        found = {
            "bits": bits,
            "window": window,
            "tables": tables,
            "distortion": table.distortion,
            "distortion_of_this_sample": float(np.square(weight - decoded[0]).mean(dtype=np.float64)),
            "nanoseconds_a_weight": 1e9 * alone / weight.size,
            "threads": arguments.threads,
            "seconds_a_72b_layer": LAYER_WEIGHTS * together / (weight.size * arguments.threads),
        }
        print(json.dumps(found), flush=True)
    workers.close()


if __name__ == "__main__":
    main()
