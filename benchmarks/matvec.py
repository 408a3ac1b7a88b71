"""Matrix-vector products of packed weights against a pure read of the same bytes: batch 1, the shapes of Qwen2-72B's MLP.

    python benchmarks/matvec.py [--rounds 7] [--isas avx512,avx2] [--threads 1,2] [--only NAME,...]

Each round times every packing and, right before it, reading as many bytes with the same threads and the same cut into
pieces; copies of the matrices fill 1 GiB and take turns, so that none comes from a cache. The fraction is read time over
product time, inputs' quantization included. Targets: 85 % with AVX-512, half for 4 bits with AVX2.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import numpy as np
from measured import write_result
from native_matrices import ForeignLoad, Packing, Pool, rounds_of, spread

from quern import _native

SHAPES = ((29568, 8192), (8192, 29568))

PACKINGS = [
    *(Packing(f"trellis{b}-w{w}", "trellis", b, window=w) for b in (2, 3, 4) for w in (6, 7)),
    Packing("trellis2-w6+6", "trellis", 2, window=6, tables=2, lag=1),
    Packing("trellis2-w7+7", "trellis", 2, window=7, tables=2, lag=1),
    Packing("trellis3-w6+6", "trellis", 3, window=6, tables=2, lag=1),
    Packing("trellis3-w7+7", "trellis", 3, window=7, tables=2, lag=1),
    Packing("trellis4-w6+6", "trellis", 4, window=6, tables=2, lag=1),
    Packing("trellis4-w7+7", "trellis", 4, window=7, tables=2, lag=1),
    Packing("int4-g128", "integer4", 4, group=128),
    Packing("int4-g128-asymmetric", "integer4", 4, group=128, zeros=True),
    Packing("int4-g64", "integer4", 4, group=64),
    Packing("int4-channel", "integer4", 4),
    Packing("int8-channel", "integer8", 8),
    Packing("codebook4-g64", "codebook4", 4, group=64),
]


def measure(packing: Packing, shape: tuple[int, int], threads: int, pool: Pool) -> dict[str, Any]:
    """Two contenders: the mean time of reading one copy and of multiplying by it, over all copies."""
    rows, columns = shape
    parts = pool.parts(packing.code_bytes(rows, columns))
    matrices = [packing.matrix(rows, columns, part) for part in parts]
    inputs = np.random.default_rng(2).standard_normal((1, columns)).astype(np.float32)
    return {
        "read": lambda: statistics.median(_native.time_read(parts, threads, len(parts))),
        "product": lambda: statistics.median(_native.time_multiply(matrices, inputs, threads, len(parts))),
    }


def run(
    packings: list[Packing], isa: str, shape: tuple[int, int], threads: int, rounds: int, pool: Pool
) -> list[dict[str, Any]]:
    _native.use_isa(isa)
    contenders = {
        (packing.name, what): work
        for packing in packings
        for what, work in measure(packing, shape, threads, pool).items()
    }
    load = ForeignLoad()
    times = rounds_of(rounds, contenders)
    found = []
    for packing in packings:
        read, product = times[packing.name, "read"], times[packing.name, "product"]
        size = packing.code_bytes(*shape)
        fraction = spread([r / p for r, p in zip(read, product)])
        found.append(
            {
                "packing": packing.name,
                "isa": isa,
                "shape": shape,
                "threads": threads,
                "bytes": size,
                "milliseconds": spread([1e3 * p for p in product]),
                "gigabytes_a_second": size / statistics.median(product) / 1e9,
                "read_gigabytes_a_second": size / statistics.median(read) / 1e9,
                "fraction_of_read": fraction,
                "foreign_processors": load.processors(),
            }
        )
        print(
            f"{isa:7} {shape[0]}x{shape[1]} threads {threads} {packing.name:22} "
            f"{found[-1]['milliseconds']['median']:7.2f} ms "
            f"{found[-1]['gigabytes_a_second']:6.1f} GB/s  read {found[-1]['read_gigabytes_a_second']:6.1f}  "
            f"fraction {fraction['median']:.2f} ({fraction['lower_quartile']:.2f}-{fraction['upper_quartile']:.2f})  "
            f"foreign {found[-1]['foreign_processors']:.2f}",
            flush=True,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--isas", default=",".join(isa for isa in ("avx512", "avx2") if isa in _native.isas()))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--only", default="")
    parser.add_argument("--dry", action="store_true", help="write no result file")
    options = parser.parse_args()
    packings = [p for p in PACKINGS if not options.only or p.name in options.only.split(",")]
    pool, found = Pool(), []
    for isa in options.isas.split(","):
        for shape in SHAPES:
            for threads in map(int, options.threads.split(",")):
                found += run(packings, isa, shape, threads, options.rounds, pool)
    if not options.dry:
        print(write_result("matvec", {"rounds": options.rounds, "results": found}))


if __name__ == "__main__":
    main()
