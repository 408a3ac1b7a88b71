"""Matrix-vector products of packed weights against a pure read of the same bytes: batch 1, the shapes of Qwen2-72B's MLP.

    python benchmarks/matvec.py [--rounds 7] [--isas avx512,avx2] [--threads 1,2] [--shapes 29568x8192,...]
        [--only NAME,...] [--batches 1,2,4,8,16] [--cached] [--peers NAME,...]

Each round times every packing and, right before it, reading as many bytes with the same threads and the same cut into
pieces; copies of the matrices fill 1 GiB and take turns, so that none comes from a cache. The fraction is read time over
product time, inputs' quantization included. Targets: 85 % with AVX-512, half for 4 bits with AVX2.

``--batches`` lets products for so many tokens take turns: how many times as many tokens a second each has as the first one.
``--cached`` takes the best of many calls on one matrix instead: with a small one of ``--shapes``, what a core computes.

``--peers llama.cpp,onnxruntime,openvino`` (as installed by ``quern peers install``) lets their kernels take turns with ours
at the first of ``--isas``: for each, the packings of no more bytes (scales included), and how many times as fast they are.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from typing import Any

import numpy as np
from measured import write_result
from native_matrices import POOL_BYTES, Packing, Pool, rounds_of, spread
from peer_matrices import PeerProcess

from quern import _native
from quern.core.machine.foreign_load import ForeignLoad

CACHED_CALLS = 300
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
    Packing("nf4-g64", "codebook4", 4, group=64),
    Packing("mxfp4", "codebook4", 4, group=32, scale_bytes=1, scale_type="float8_e8m0fnu"),
    Packing("nvfp4", "codebook4", 4, group=16, scale_bytes=1, scale_type="float8_e4m3fn"),
    Packing("kmeans4-channel", "codebook4", 4, group=64, shared="row"),
    Packing("kmeans3-channel", "codebook3", 3, group=64, shared="row"),
    Packing("kmeans2-channel", "codebook2", 2, group=64, shared="row"),
    Packing("kmeans2-g128", "codebook2", 2, group=128, shared="row"),
    Packing("log3-g64", "codebook3", 3, group=64),
    Packing("log4-g64", "codebook4", 4, group=64),
    Packing("int3-g64", "codebook3", 3, group=64),
    Packing("float8-e4m3", "float8_e4m3", 8),
    Packing("float8-e5m2", "float8_e5m2", 8),
    Packing("q2_k", "q2_k", 2, group=16, super_bytes=84),
    Packing("q3_k", "q3_k", 3, group=16, super_bytes=110),
    Packing("q4_k", "q4_k", 4, group=32, super_bytes=144),
    Packing("q5_k", "q5_k", 5, group=32, super_bytes=176),
    Packing("q6_k", "q6_k", 6, group=16, super_bytes=210),
    Packing("iq4_xs", "iq4_xs", 4, group=32, super_bytes=136),
    Packing("q4_0", "integer4", 4, group=32),
    Packing("q8_0", "integer8", 8, group=32),
    Packing("iq4_nl", "codebook4", 4, group=32),
    Packing("q4_1", "q4_1", 4, group=32, super_bytes=160),
    Packing("q5_1", "q5_1", 5, group=32, super_bytes=192),
    Packing("iq2_xxs", "iq2_xxs", 2, group=32, super_bytes=66, table_bytes=2048),
    Packing("iq2_xs", "iq2_xs", 2, group=16, super_bytes=74, table_bytes=4096),
    Packing("iq2_s", "iq2_s", 2, group=16, super_bytes=82, table_bytes=8192),
    Packing("iq3_xxs", "iq3_xxs", 3, group=32, super_bytes=98, table_bytes=1024),
    Packing("iq3_s", "iq3_s", 3, group=32, super_bytes=110, table_bytes=2048),
]


def measure(
    packing: Packing, shape: tuple[int, int], threads: int, batches: list[int], pool: Pool, cached: bool
) -> dict[Any, Any]:
    """The median times of reading one copy and of multiplying it by each number of tokens, over all copies."""
    rows, columns = shape
    parts = pool.parts(packing.code_bytes(rows, columns))[: 1 if cached else None]
    calls, middle = (CACHED_CALLS, min) if cached else (len(parts), statistics.median)
    matrices = [packing.matrix(rows, columns, part) for part in parts]
    inputs = np.random.default_rng(2).standard_normal((max(batches), columns)).astype(np.float32)

    def product(tokens: int) -> float:
        return middle(_native.time_multiply(matrices, inputs[:tokens].copy(), threads, calls))

    return {
        "read": lambda: middle(_native.time_read(parts, threads, calls)),
        **{tokens: partial(product, tokens) for tokens in batches},
    }


def run(
    packings: list[Packing],
    isa: str,
    shape: tuple[int, int],
    threads: int,
    rounds: int,
    batches: list[int],
    pool: Pool,
    cached: bool,
    peers: list[str],
) -> list[dict[str, Any]]:
    _native.use_isa(isa)
    contenders = {
        (packing.name, what): work
        for packing in packings
        for what, work in measure(packing, shape, threads, batches, pool, cached).items()
    }
    processes = [PeerProcess(peer, *shape, 1, threads, POOL_BYTES) for peer in peers]
    for process in processes:
        contenders |= {(name, batches[0]): work for name, work in process.contenders.items()}
    load = ForeignLoad([process.pid for process in processes])
    times = rounds_of(rounds, contenders)
    foreign = load.processors()
    for process in processes:
        process.close()
    setting = {"isa": isa, "shape": shape, "threads": threads, "foreign_processors": foreign}
    found: list[dict[str, Any]] = []
    for packing in packings:
        read, product = times[packing.name, "read"], times[packing.name, batches[0]]
        size = packing.code_bytes(*shape)
        fraction = spread([r / p for r, p in zip(read, product)])
        rates = {
            tokens: spread([tokens * p / batches[0] / t for p, t in zip(product, times[packing.name, tokens])])
            for tokens in batches[1:]
        }
        found.append(
            {
                "packing": packing.name,
                **setting,
                "bytes": size,
                "milliseconds": spread([1e3 * p for p in product]),
                "gigabytes_a_second": size / statistics.median(product) / 1e9,
                "read_gigabytes_a_second": size / statistics.median(read) / 1e9,
                "fraction_of_read": fraction,
                **({"tokens_a_second": {str(tokens): rate for tokens, rate in rates.items()}} if rates else {}),
            }
        )
        print(
            f"{isa:7} {shape[0]}x{shape[1]} threads {threads} {packing.name:22} "
            f"{found[-1]['milliseconds']['median']:7.2f} ms "
            f"{found[-1]['gigabytes_a_second']:6.1f} GB/s  read {found[-1]['read_gigabytes_a_second']:6.1f}  "
            f"fraction {fraction['median']:.2f} ({fraction['lower_quartile']:.2f}-{fraction['upper_quartile']:.2f})  "
            f"foreign {foreign:.2f}"
            + "".join(f"  {tokens} tokens x{rate['median']:.2f}" for tokens, rate in rates.items()),
            flush=True,
        )
    for process in processes:
        for name, size in process.sizes.items():
            theirs = times[name, batches[0]]
            smaller = [packing for packing in packings if packing.bytes(*shape) <= size]
            ratios = {
                packing.name: spread([t / o for t, o in zip(theirs, times[packing.name, batches[0]])])
                for packing in smaller
            }
            milliseconds = spread([1e3 * t for t in theirs])
            found.append(
                {"peer": name, **setting, "bytes": size, "milliseconds": milliseconds, "times_as_fast": ratios}
            )
            told = ", ".join(f"{packing} {ratio['median']:.2f}" for packing, ratio in ratios.items())
            where = f"{shape[0]}x{shape[1]} threads {threads}"
            print(f"{where} {name} {size / 1e6:.0f} MB {milliseconds['median']:.2f} ms; as fast: {told}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--isas", default=",".join(isa for isa in ("avx512", "avx2") if isa in _native.isas()))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--shapes", default=",".join(f"{rows}x{columns}" for rows, columns in SHAPES))
    parser.add_argument("--only", default="")
    parser.add_argument("--batches", default="1", help="numbers of tokens; the first is compared with reading")
    parser.add_argument("--cached", action="store_true", help="the best of many calls on one matrix")
    parser.add_argument("--peers", default="", help="llama.cpp, onnxruntime, openvino")
    parser.add_argument("--dry", action="store_true", help="write no result file")
    options = parser.parse_args()
    packings = [p for p in PACKINGS if not options.only or p.name in options.only.split(",")]
    batches = [int(tokens) for tokens in options.batches.split(",")]
    pool, found = Pool(), []
    for number, isa in enumerate(options.isas.split(",")):
        peers = options.peers.split(",") if options.peers and number == 0 else []
        for rows, columns in (map(int, shape.split("x")) for shape in options.shapes.split(",")):
            for threads in map(int, options.threads.split(",")):
                found += run(
                    packings, isa, (rows, columns), threads, options.rounds, batches, pool, options.cached, peers
                )
    if not options.dry:
        print(write_result("matvec", {"rounds": options.rounds, "results": found}))


if __name__ == "__main__":
    main()
