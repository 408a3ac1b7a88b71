"""All tools and quern's recipes side by side on one model; the run behind docs/tools.md.

    python benchmarks/tools.py MODEL --calibration FILE --text FILE [--choice FILE] -o DIR [--seed 0] [--rows hqq,...]
    python benchmarks/tools.py --ranks RESULTS1.json RESULTS2.json
    python benchmarks/tools.py --against RESULTS.json

The first form is `quern compare --peers all` with the recipes below; an interrupted run goes on when it is started again. It
keeps its results as results/tools_<model>_<date>.json (with another seed than 0: ..._seed<N>_...). The second form
prints Spearman's rank correlation of the KL of the rows that two runs share, for instance with two seeds of calibration
text. The third puts beside each tool's row quern's row with the least KL among those with no more bytes, and quern's fastest
row among those with no more KL.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

import quern
from quern.cli.terminal.progress import progress_on
from quern.core.results import Row, load_results

HERE = Path(__file__).parent
RECIPES = (
    *("compact", "balanced", "fast", "rtn4"),
    *("trellis2", "trellis3", "gptq4-g64", "gptq5-g64", "hadamard-gptq4-g64", "gptq8-channel", "gptq8-g64"),
)
TOKENS = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--ranks", nargs=2, metavar="RESULTS.json")
    parser.add_argument("--against", metavar="RESULTS.json")
    parser.add_argument("--calibration", nargs="*", default=[])
    parser.add_argument("--text", nargs="*", default=[])
    parser.add_argument("--choice", nargs="*", default=[])
    parser.add_argument("--peers", default="all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--speed-rounds", type=int, default=3)
    parser.add_argument("-o", "--output", default="build/tools")
    options = parser.parse_args()
    if options.ranks:
        print(ranks(*options.ranks))
        return
    if options.against:
        print(against(load_results(options.against).rows))
        return
    if options.model is None:
        parser.error("name a MODEL, or results after --ranks or --against")
    run(options)


def run(options: argparse.Namespace) -> None:
    ours = {path.stem: str(path) for path in (HERE / "recipes").glob("*.yaml")}
    with progress_on(Console(stderr=True)) as progress:
        results = quern.compare(
            options.model,
            options.output,
            recipes=[ours.get(name, name) for name in RECIPES],
            peers=[name for name in options.peers.split(",") if name],
            calibration=options.calibration,
            texts=options.text,
            choices=options.choice,
            tokens=TOKENS,
            seed=options.seed,
            speed_rounds=options.speed_rounds,
            progress=progress,
        )
    for row in sorted(results.rows, key=lambda row: row.bytes):
        print(
            f"{row.name:30} {row.bytes / 1e6:7.1f} MB  {row.bits_per_weight:5.2f} bits  KL {row.kl_mean or np.nan:.4f}  "
            f"decode {row.decode_tokens_per_s or np.nan:7.1f}  prefill {row.prefill_tokens_per_s or np.nan:7.1f}  "
            f"made in {row.quantize_seconds or 0:5.0f} s"
        )
    for failure in results.failures:
        print(f"{failure.name}: {failure.stage} failed: {failure.reason.splitlines()[0]}")
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    theme = f"seed{options.seed}" if options.seed else "tools"  # docs/tools.md shows all of the second kind
    target = HERE / "results" / f"{theme}_{Path(options.model).name}_{date}.json"
    named = results.model.model_copy(update={"path": Path(options.model).name})  # not where it lies on this machine
    target.write_text(results.model_copy(update={"model": named}).model_dump_json(indent=2) + "\n", "utf-8")
    print(target)


def against(rows: Sequence[Row]) -> str:
    """A line for each tool's row; ``-`` where no row of quern's has as few bytes, or as little KL."""
    lines = [
        f"{'':30} {'MB':>6} {'KL':>7} {'tok/s':>7}   "
        f"{'no more bytes:':21} {'MB':>7} {'KL':>7}   {'no more KL:':21} {'KL':>7} {'tok/s':>7}"
    ]
    ours = [row for row in rows if row.kind == "quern"]
    for row in sorted(rows, key=lambda row: row.bytes):
        if row.kind != "peer" or row.kl_mean is None:
            continue
        near = min((own for own in ours if own.bytes <= row.bytes), key=lambda own: own.kl_mean or 0, default=None)
        fast = max(
            (own for own in ours if own.kl_mean is not None and own.kl_mean <= row.kl_mean),
            key=lambda own: own.decode_tokens_per_s or 0,
            default=None,
        )
        small = "-" if near is None else f"{near.name:21} {near.bytes / 1e6:7.1f} {near.kl_mean:7.4f}"
        quick = "-" if fast is None else f"{fast.name:21} {fast.kl_mean:7.4f} {fast.decode_tokens_per_s or np.nan:7.1f}"
        speed = row.decode_tokens_per_s or np.nan
        lines.append(f"{row.name:30} {row.bytes / 1e6:6.1f} {row.kl_mean:7.4f} {speed:7.1f}   {small:37}   {quick}")
    return "\n".join(lines)


def ranks(first: str, second: str) -> str:
    """Spearman's correlation: Pearson's of the ranks, ties at their mean rank."""
    one, two = (
        {row.name: row.kl_mean for row in load_results(path).rows if row.kind != "unquantized"}
        for path in (first, second)
    )
    names = [name for name in one if one[name] is not None and two.get(name) is not None]
    places = [_mean_ranks(np.array([found[name] for name in names], dtype=float)) for found in (one, two)]
    return f"rank correlation {np.corrcoef(*places)[0, 1]:.3f} over {len(names)} rows"


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    return np.array([(values < value).sum() + ((values == value).sum() - 1) / 2 for value in values])


if __name__ == "__main__":
    main()
