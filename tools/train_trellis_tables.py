"""Train the tables of the trellis codec and write src/quern/codecs/trellis_tables.json.

    python tools/train_trellis_tables.py [--only BITS/WINDOW/TABLES ...] [--seed SEED]

Lloyd's iterations on unit Gaussian samples in the codec's own tiles (16 steps, read around the end of the stream): code the
samples by the native encoder, then set the tables to the least squares fit of what each entry was used for. They end in a
local optimum, so they start from many places: sorted quantiles spread over the branches as set partitioning does it
(Ungerboeck 1982; Marcellin and Fischer 1990), or at random; noise that fades away shakes them out of poor ones. Entries
are rounded to integers before every coding, so what is judged is what is stored. Seeded; on one kind of machine the bytes
are the same.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from quern import _native
from quern.codecs.packing.trellis_lanes import BLOCK, LANE_ROWS, TILE
from quern.codecs.trellis import LANES, lag, windows

OUTPUT = Path(__file__).resolve().parents[1] / "src" / "quern" / "codecs" / "trellis_tables.json"
VARIANTS = [(bits, window, tables) for bits in (2, 3, 4) for window, tables in ((6, 1), (7, 1), (7, 2))]
LARGEST = 127
"""Greatest sum of two entries (or greatest entry), so that the kernels can add before they multiply."""
EXTREME = {2: 2.35, 3: 2.9, 4: 3.4}
"""Standard deviations that the greatest value of a fresh table stands for."""
UNGERBOECK = {1: (1, 2), 2: (5, 2), 3: (0o13, 0o4), 4: (0o23, 0o4), 5: (0o45, 0o10), 6: (0o103, 0o24)}
"""Parity checks (h0, h1) of the best codes of 2^memory states for amplitude modulation."""

Array = NDArray[np.float64]


@dataclass
class Samples:
    """Unit Gaussian weights ``(TILE, columns)`` and the same in the order of steps and lanes."""

    weight: NDArray[np.float32]
    lanes: Array

    @classmethod
    def draw(cls, rng: np.random.Generator, columns: int) -> Samples:
        weight = rng.standard_normal((TILE, columns)).astype(np.float32)
        by_lane = weight.reshape(TILE // LANE_ROWS, LANE_ROWS, columns // BLOCK, BLOCK).transpose(2, 0, 1, 3)
        return cls(weight, by_lane.reshape(-1).astype(np.float64))


@dataclass
class Coded:
    """What the best streams for some samples used: the entries of each table, and how far they are off."""

    entries: list[NDArray[np.int64]]
    distortion: float


class Trainer:
    """Tables of one variant. A table is float64 ``(tables, 2^window)`` in standard deviations."""

    def __init__(self, bits: int, window: int, tables: int, seed: int) -> None:
        self.bits, self.window, self.tables = bits, window, tables
        self.lag = lag(bits, window, tables)
        self.rng = np.random.default_rng([seed, bits, window, tables])

    def code(self, entries: NDArray[np.int8], unit: float, samples: Samples) -> Coded:
        columns = samples.weight.shape[1]
        encoder = _native.TrellisEncoder(self.bits, self.lag, entries, np.full(TILE, unit, np.float32), columns)
        decoded = np.empty_like(samples.weight)
        encoder.round_all(samples.weight, decoded)
        streams = torch.from_numpy(encoder.codes()).view(columns // BLOCK, -1, LANES)
        steps = TILE // LANE_ROWS
        used = [
            windows(streams, steps, self.bits, self.window, older).reshape(-1).numpy().astype(np.int64)
            for older in (0, self.lag)[: self.tables]
        ]
        return Coded(used, float(np.square(samples.weight - decoded, dtype=np.float64).mean()))

    def fit(self, table: Array, coded: Coded, samples: Samples) -> Array:
        """The least squares table for what was coded; what was hardly used stays where it was."""
        size = 1 << self.window
        if self.tables == 1:
            count = np.bincount(coded.entries[0], minlength=size)
            total = np.bincount(coded.entries[0], samples.lanes, size)
            return ((total + table[0]) / (count + 1))[None]
        first, second = coded.entries
        joint = np.bincount(first * size + second, minlength=size * size).reshape(size, size).astype(np.float64)
        square = np.block([[np.diag(joint.sum(1)), joint], [joint.T, np.diag(joint.sum(0))]]) + np.eye(2 * size)
        right = [np.bincount(entries, samples.lanes, size) for entries in coded.entries]
        solved = np.linalg.solve(square, np.concatenate(right) + table.reshape(-1))
        fitted = solved.reshape(2, size)
        # Only the sum of the two means counts; shared out so that both tables use their integers alike.
        middle = fitted.mean(1, keepdims=True)
        return fitted - middle + middle.mean()

    def start(self, index: int) -> Array:
        """Sorted quantiles spread by set partitioning, or at random; a second table at random."""
        size = 1 << self.window
        first = self.partitioned() if index % 2 == 0 else self.rng.permutation(self.quantiles(size))
        if self.tables == 1:
            return first[None] + 0.02 * self.rng.standard_normal((1, size))
        second = self.rng.permutation(self.quantiles(size))
        share = (0.7, 0.5, 0.3)[index % 3]
        return np.stack([np.sqrt(1 - share**2) * first, share * second])

    def quantiles(self, count: int) -> Array:
        drawn = np.sort(self.rng.standard_normal(count * 64))
        return drawn.reshape(count, 64).mean(1) * EXTREME[self.bits] / 2.6

    def partitioned(self) -> Array:
        """Trellis-coded quantization as a table: subsets of every fourth level, chosen by a convolutional code.

        One bit of each weight (its highest) runs through the code's register, as far as the window shows it; the others
        pick a level of the subset.
        """
        places = [
            self.window - 1 - self.bits * age for age in range(self.window) if self.window - 1 - self.bits * age >= 0
        ]
        memory = len(places) - 1
        h0, h1 = UNGERBOECK[max(1, memory)]
        window = np.arange(1 << self.window)
        register = sum(((window >> place & 1) << age for age, place in enumerate(places)), np.zeros_like(window))
        parity = np.vectorize(lambda value: bin(value).count("1") & 1)
        subset = 2 * parity(register & h0) + parity(register & h1)
        inner = window >> (self.window - self.bits) & ((1 << (self.bits - 1)) - 1)
        levels = self.quantiles(4 << (self.bits - 1))
        return levels[inner * 4 + subset]

    def anneal(self, table: Array, samples: list[Samples], iterations: int, noise: float) -> Array:
        """Lloyd's iterations; what is fitted is disturbed less and less, and in the last quarter not at all."""
        for index in range(iterations):
            drawn = samples[index % len(samples)]
            table = self.fit(table, self.code(*integers(table), drawn), drawn)
            left = noise * (1 - index / (0.75 * iterations))
            if left > 0:
                table = table + left * table.std() * self.rng.standard_normal(table.shape)
        return table

    def train(self, starts: int, iterations: int, columns: int) -> tuple[NDArray[np.int8], float, float]:
        """The best of all starts, refined on more samples: entries, unit, and the distortion of fresh samples."""
        samples = [Samples.draw(self.rng, columns) for _ in range(4)]
        judge = Samples.draw(self.rng, 2 * columns)
        best, least = self.start(0), np.inf
        for index in range(starts):
            noise = (0.05, 0.1, 0.2)[index % 3]
            table = self.anneal(self.start(index), samples, iterations, noise)
            cost = self.code(*integers(table), judge).distortion
            print(f"  start {index:2d} {cost:.5f}", flush=True)
            if cost < least:
                best, least = table, cost
        more = [Samples.draw(self.rng, 4 * columns) for _ in range(8)]
        entries, unit = integers(self.anneal(best, more, 2 * len(more), 0.0))
        return entries, unit, self.code(entries, unit, Samples.draw(self.rng, 16 * columns)).distortion


def integers(table: Array) -> tuple[NDArray[np.int8], float]:
    """The table as it is stored, and what the integer 1 stands for: sums of two entries fit a byte, too."""
    unit = float(np.abs(table).max(1).sum()) / LARGEST
    entries = np.rint(table / unit)
    if np.abs(entries).max(1).sum() > LARGEST:  # two halves were rounded up
        unit *= LARGEST / (LARGEST - 1)
        entries = np.rint(table / unit)
    return entries.astype(np.int8), unit


EFFORT = {1: (18, 160, 512), 2: (9, 160, 512)}
"""Starts, iterations and columns of samples, by the number of tables."""


def main() -> None:
    """Train the chosen variants, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="*", metavar="BITS/WINDOW/TABLES", help="the variants to train; others are kept"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    chosen = [tuple(map(int, name.split("/"))) for name in arguments.only] if arguments.only else VARIANTS
    stored = json.loads(arguments.output.read_text("utf-8")) if arguments.output.exists() else []
    kept = {(e["bits"], e["window"], len(e["table"])): e for e in stored}
    for bits, window, tables in chosen:
        started = time.perf_counter()
        entries, unit, distortion = Trainer(bits, window, tables, arguments.seed).train(*EFFORT[tables])
        kept[bits, window, tables] = {
            "bits": bits,
            "window": window,
            "unit": float(np.float32(unit)),
            "distortion": round(distortion, 5),
            "table": entries.tolist(),
        }
        print(f"{bits}/{window}/{tables}: {distortion:.5f} in {time.perf_counter() - started:.0f} s", flush=True)
        lines = ",\n".join(json.dumps(kept[key]) for key in sorted(kept))
        arguments.output.write_text(f"[\n{lines}\n]\n", "utf-8")


if __name__ == "__main__":
    main()
