"""Products of packed weights and 512 tokens beside torch: int8 GEMM of oneDNN (``torch._int_mm``) and bfloat16.

    python benchmarks/matmul.py [--rounds 7] [--isas amx,avx512] [--threads 1,2] [--shape 8192x29568] [--tokens 512]
        [--peers llama.cpp,onnxruntime,openvino]

All contenders take turns in every round. Ours include the dynamic quantization of their inputs and the scaling of their
float32 outputs, torch's int8 product neither. Targets: 80 % of ``torch._int_mm``, and more than bfloat16 and every peer.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from measured import write_result
from native_matrices import Packing, Pool, rounds_of, spread
from peer_matrices import PeerProcess

from quern import _native
from quern.core.machine.foreign_load import ForeignLoad

PACKINGS = [
    Packing("trellis2-w6", "trellis", 2, window=6),
    Packing("trellis3-w7", "trellis", 3, window=7),
    Packing("trellis4-w7+7", "trellis", 4, window=7, tables=2, lag=1),
    Packing("int4-g128", "integer4", 4, group=128),
    Packing("int4-g64", "integer4", 4, group=64),
    Packing("int4-channel", "integer4", 4),
    Packing("int8-channel", "integer8", 8),
    Packing("nf4-g64", "codebook4", 4, group=64),
    Packing("kmeans3-channel", "codebook3", 3, group=64, shared="row"),
]


def torch_contenders(rows: int, columns: int, tokens: int) -> dict[str, Callable[[], float]]:
    random = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=random)
    inputs = torch.randint(-127, 128, (tokens, columns), dtype=torch.int8, generator=random)
    wide_weight, wide_inputs = weight.to(torch.bfloat16), inputs.to(torch.bfloat16)

    def timed(work: Callable[[], object]) -> Callable[[], float]:
        def run() -> float:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start

        return run

    return {
        "torch int8": timed(lambda: torch._int_mm(inputs, weight.T)),
        "torch bfloat16": timed(lambda: wide_inputs @ wide_weight.T),
    }


def ours(
    packing: Packing, isa: str, rows: int, columns: int, inputs: np.ndarray, threads: int, pool: Pool
) -> Callable[[], float]:
    matrices = [packing.matrix(rows, columns, part) for part in pool.parts(packing.code_bytes(rows, columns))]

    def run() -> float:
        _native.use_isa(isa)
        (seconds,) = _native.time_multiply(matrices[:1], inputs, threads, 1)
        matrices.append(matrices.pop(0))
        return seconds

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--isas", default=",".join(isa for isa in ("amx", "avx512") if isa in _native.isas()))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--shape", default="8192x29568", help="rows x columns of the weight")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--peers", default="", help="llama.cpp, onnxruntime, openvino")
    parser.add_argument("--dry", action="store_true", help="write no result file")
    options = parser.parse_args()
    rows, columns = map(int, options.shape.split("x"))
    operations = 2 * rows * columns * options.tokens
    inputs = np.random.default_rng(3).standard_normal((options.tokens, columns)).astype(np.float32)
    pool, found = Pool(), []
    torch_work = torch_contenders(rows, columns, options.tokens)
    for threads in map(int, options.threads.split(",")):
        torch.set_num_threads(threads)
        contenders: dict[Any, Callable[[], float]] = dict(torch_work)
        for isa in options.isas.split(","):
            for packing in PACKINGS:
                contenders[f"{packing.name} {isa}"] = ours(packing, isa, rows, columns, inputs, threads, pool)
        processes = [
            PeerProcess(peer, rows, columns, options.tokens, threads, 0) for peer in options.peers.split(",") if peer
        ]
        for process in processes:
            contenders |= process.contenders
        load = ForeignLoad([process.pid for process in processes])
        times = rounds_of(options.rounds, contenders)
        foreign = load.processors()
        for process in processes:
            process.close()
        for name, seconds in times.items():
            ratios = {
                other: spread([o / s for o, s in zip(times[other], seconds)]) for other in torch_work if other != name
            }
            rate = operations / statistics.median(seconds) / 1e9
            found.append(
                {
                    "contender": name,
                    "threads": threads,
                    "milliseconds": spread([1e3 * s for s in seconds]),
                    "billion_operations_a_second": rate,
                    "speed_relative_to": ratios,
                    "foreign_processors": foreign,
                }
            )
            relative = ", ".join(f"{ratio['median']:.2f} of {other}" for other, ratio in ratios.items())
            print(
                f"threads {threads} {name:24} {found[-1]['milliseconds']['median']:8.1f} ms {rate:7.0f} GOP/s  {relative}",
                flush=True,
            )
        print(f"foreign processors: {foreign:.2f}")
    if not options.dry:
        content = {"rounds": options.rounds, "shape": (rows, columns), "tokens": options.tokens, "results": found}
        print(write_result("matmul", content))


if __name__ == "__main__":
    main()
