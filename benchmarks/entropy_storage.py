"""Entropy-coded storage: bytes on the disk, bits against the entropy of the codes, and how fast tensors are loaded.

    python benchmarks/entropy_storage.py [--rows 4096] [--columns 4096] [--threads N] [--write]

A Gaussian matrix as int8 with a scale a row, as 4-bit integers in groups of 128, as a trellis of 3 bits, and as bf16; each
codec's largest tensor is coded into a file and read back, from the system's cache of files, on one thread and on all.
Beside it stands the time to read the same tensor plainly. Rates are decoded bytes a second, medians of seven rounds in turn.
Prints a line of JSON for each; ``--write`` keeps them in ``results/``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measured import write_result
from torch import Tensor

from quern.checkpoint.files import InputFile
from quern.checkpoint.safetensors_file import TensorInfo, read_header, read_tensor, write_safetensors
from quern.codecs.base import codec_of
from quern.core.machine.parallel import Workers, available_threads
from quern.core.scheme import parse_scheme
from quern.formats.entropy.entropy import CodedTensor, coder_version, encode
from quern.formats.entropy.symbols import Coding, entropy_bits

ROUNDS = 7
SCHEMES: dict[str, dict[str, Any]] = {
    "int8 channel": {"bits": 8, "granularity": "channel"},
    "int4 g128": {"bits": 4, "group_size": 128},
    "int3 g128": {"bits": 3, "group_size": 128},
    "trellis 3": {"codec": "trellis", "bits": 3},
}


def tensors_of(rows: int, columns: int) -> dict[str, tuple[Tensor, int]]:
    """By name: the largest tensor of each, and the bits of its codes."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02
    found: dict[str, tuple[Tensor, int]] = {}
    for name, values in SCHEMES.items():
        codec = codec_of(parse_scheme(values))
        encoder = codec.encoder(weight, weight, refit=False)
        encoder.round_all(weight)
        found[name] = (codec.join([encoder.parts()])["codes"], codec.code_bits().get("codes", 8))
    return {**found, "bf16": (weight.bfloat16(), 8)}


def in_turn(jobs: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of each, measured in turn."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(ROUNDS):
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def read_coded(path: Path, info: TensorInfo, coding: Coding, workers: Workers) -> Tensor:
    with InputFile(path) as file:
        return CodedTensor(file, "weight", info, coding).read(workers)


def measure(name: str, tensor: Tensor, bits: int, folder: Path, threads: int) -> dict[str, Any]:
    started = time.perf_counter()
    found = encode(tensor, bits)
    seconds = time.perf_counter() - started
    said: dict[str, Any] = {"tensor": name, "bytes": tensor.nbytes, "encode_gb_s": tensor.nbytes / seconds / 1e9}
    if found is None:
        return {**said, "coded_bytes": None, "note": "stays as it is: coding would save less than 1/64"}
    coded, coding = found
    plain, path = folder / "plain.safetensors", folder / "coded.safetensors"
    write_safetensors(plain, {"weight": tensor})
    write_safetensors(path, {"weight": coded})
    info, whole = read_header(path)["weight"], read_header(plain)["weight"]
    one, several = Workers(1), Workers(threads)
    with InputFile(path) as file:
        counts = CodedTensor(file, name, info, coding).counts(several)
    assert torch.equal(read_coded(path, info, coding, one), tensor)
    seconds_of = in_turn(
        {
            "load_gb_s_one_thread": lambda: read_coded(path, info, coding, one),
            f"load_gb_s_{threads}_threads": lambda: read_coded(path, info, coding, several),
            "plain_read_gb_s": lambda: read_tensor(plain, whole),
        }
    )
    one.close()
    several.close()
    entropy = entropy_bits(counts, coding.width, bits if coding.planes == 1 else 8)
    codes = 8 * tensor.nbytes / (bits if coding.planes == 1 else 8 * coding.planes)
    return {
        **said,
        "coded_bytes": coded.nbytes,
        "share": coded.nbytes / tensor.nbytes,
        "bits": 8 * coded.nbytes / codes,
        "entropy": entropy / codes,
        "above_entropy": 8 * coded.nbytes / entropy - 1,
        **{key: tensor.nbytes / value / 1e9 for key, value in seconds_of.items()},
    }


def main() -> None:
    """Measure every tensor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=available_threads())
    parser.add_argument("--write", action="store_true", help="keep the result in results/")
    arguments = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (tensor, bits) in tensors_of(arguments.rows, arguments.columns).items():
            lines.append(measure(name, tensor, bits, Path(folder), arguments.threads))
            print(json.dumps(lines[-1]), flush=True)
    if arguments.write:
        shape = [arguments.rows, arguments.columns]
        print(write_result("entropy_storage", {"zstd": coder_version(), "shape": shape, "tensors": lines}))


if __name__ == "__main__":
    main()
