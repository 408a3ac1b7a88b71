"""Bits where the loss is, against the same bits everywhere; and predicted against measured losses.

    python benchmarks/allocation.py [MODEL] [--calibration C4] [--text WIKITEXT] [--tokens 8192] [-o FOLDER]

Plans of recipe ``auto`` for several bits per weight, and uniform ones: each candidate for all linears, with the embedding at
4 and at 8 bits. Every plan is quantized and its divergence measured on the cpu engine; what was measured is kept in FOLDER,
so that the same command goes on after an interruption. A uniform plan of as many bytes as an allocated one lies between two
that were measured: its KL is interpolated, log KL against bytes, over the uniform plans that no other beats.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measured import write_result
from rich.console import Console

import quern
from quern.checkpoint.checkpoint import Checkpoint
from quern.cli.terminal.progress import progress_on
from quern.comparison.inputs import MeasurementSettings, prepare_inputs
from quern.core.allocation import Target
from quern.core.recipe import Recipe, load_recipe
from quern.core.results import METRICS_VERSION
from quern.loading.fitting import open_model
from quern.pipeline.planning.budget import decided
from quern.pipeline.planning.plan import Candidates, candidates_of

BUNDLED = Path(__file__).parents[1] / "models" / "python-7m"
SHARES = (0.1, 0.2, 0.35, 0.5, 0.7)
"""Allocated plans, by their place between the smallest and the largest uniform plan of up to 4 bits."""
SMALL = 0.3
"""Nats a token below which a prediction is to be near what is measured."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(BUNDLED))
    parser.add_argument("--calibration", nargs="*", default=[])
    parser.add_argument("--text", nargs="*", default=[])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument(
        "--bits", type=float, nargs="*", help="Bits per weight of the allocated plans, everything included."
    )
    parser.add_argument("-o", "--output", default="build/allocation")
    options = parser.parse_args()
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    with progress_on(Console(stderr=True)) as progress:
        checkpoint = open_model(options.model, progress=progress)
        measured_on = {"model_sha256": checkpoint.sha256(progress), "metrics_version": METRICS_VERSION}
        candidates = candidates_of(
            checkpoint,
            load_recipe("auto"),
            calibration=options.calibration,
            memory=None,
            device="cpu",
            seed=0,
            threads=None,
            cache=folder / "cache",
            progress=progress,
        )
        uniform = [_measured(options, folder, *plan) for plan in uniform_plans(candidates)]
        allocated = [_measured(options, folder, *plan) for plan in allocated_plans(candidates, uniform, options.bits)]
    found = summary(uniform, allocated)
    print(json.dumps(found, indent=2))
    content = {"model": Path(options.model).name, **measured_on, "texts": _texts(options, checkpoint, folder)}
    content |= {"tokens": options.tokens, "seconds_of_losses": candidates.seconds}
    print(write_result(f"allocation_{Path(options.model).name}", {**content, **found}))


def _texts(options: argparse.Namespace, checkpoint: Checkpoint, folder: Path) -> list[dict[str, Any]]:
    """The texts that every plan was measured on, as results files name them."""
    settings = MeasurementSettings(tokens=options.tokens)
    inputs = prepare_inputs(checkpoint, folder / "texts", texts=options.text, settings=settings)
    return [text.model_dump(mode="json") for text in inputs.sources]


def uniform_plans(candidates: Candidates) -> Iterable[tuple[str, Recipe, float]]:
    """Name, recipe and predicted loss of candidates for all linears, embedding and head at 4 and at 8 bits; of those of one
    codec and width only the one of least predicted loss."""
    outer = set(candidates.architecture.outer)
    first = next(choices for name, choices in candidates.of.items() if name not in outer)
    found: dict[tuple[str, int, int], tuple[str, Recipe, float]] = {}
    for place, bits in itertools.product(range(len(first)), (4, 8)):
        chosen = {}
        for name, choices in candidates.of.items():
            at = [one.plan.scheme.to_json()["bits"] for one in choices].index(bits) if name in outer else place
            chosen[name] = choices[at]
        params = first[place].plan.scheme.to_json()
        label = f"{params['codec']}-{params['bits']}-tables-{params.get('tables', 0)}-outer-{bits}"
        recipe = decided(candidates.recipe, {n: one.plan for n, one in chosen.items()}, candidates.architecture.outer)
        kind, loss = (params["codec"], params["bits"], bits), sum(one.loss for one in chosen.values())
        if kind not in found or loss < found[kind][2]:
            found[kind] = f"uniform-{label}", recipe, loss
    yield from found.values()


def allocated_plans(
    candidates: Candidates, uniform: Sequence[dict[str, Any]], bits: Sequence[float] | None
) -> Iterable[tuple[str, Recipe, float]]:
    """The same of plans for ``bits`` per weight, or for some between the uniform plans."""
    sizes = sorted(one["bits_per_weight"] for one in uniform if not one["name"].startswith("uniform-integer"))
    wanted = bits or [sizes[0] + share * (sizes[-1] - sizes[0]) for share in SHARES]
    for target in wanted:
        report = candidates.choose(Target(bits=target))
        yield f"allocated-{target:.3f}", report.recipe, report.predicted_loss


def _measured(options: argparse.Namespace, folder: Path, name: str, recipe: Recipe, predicted: float) -> dict[str, Any]:
    """A plan quantized and measured, or what is known of it."""
    known = folder / f"{name}.json"
    asked = json.dumps(
        [recipe.to_json(), options.model, options.text, options.calibration, options.tokens], sort_keys=True
    )
    record = json.loads(known.read_text("utf-8")) if known.is_file() else {}
    if record.get("asked") != asked:
        artifact = folder / "artifact"
        shutil.rmtree(artifact, ignore_errors=True)
        report = quern.quantize(
            options.model, artifact, recipe=recipe, calibration=options.calibration, cache=folder / "cache"
        )
        row = quern.evaluate(
            artifact, reference=options.model, texts=options.text, tokens=options.tokens, speed_rounds=0
        )
        record = {"asked": asked, "kl": row.kl_mean, "interval": row.kl_ci95, "bytes": report.bytes}
        record |= {"bits_per_weight": report.bits_per_weight, "noise_floor": row.kl_noise_floor}
        known.write_text(json.dumps(record), "utf-8")
    found = {"name": name, **{key: value for key, value in record.items() if key != "asked"}, "predicted": predicted}
    print(f"{name}: {found['bytes']} bytes, KL {found['kl']:.5f}, predicted {predicted:.5f}", flush=True)
    return found


def summary(uniform: Sequence[dict[str, Any]], allocated: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Each allocated plan beside a uniform one of its bytes, and how predictions and measurements go together."""
    best = frontier(uniform)
    compared = []
    for one in allocated:
        equal = interpolated(best, one["bytes"])
        lower = None if equal is None else 1 - one["kl"] / equal
        compared.append({**one, "uniform_kl_at_equal_bytes": equal, "lower_by": lower})
    every = [*uniform, *allocated]
    small = [one["predicted"] / one["kl"] for one in every if one["kl"] < SMALL]
    return {
        "rank_correlation": rank_correlation([o["predicted"] for o in every], [o["kl"] for o in every]),
        "predicted_over_measured": {"least": min(small), "median": float(np.median(small)), "greatest": max(small)},
        "plans": len(every),
        "allocated": compared,
        "uniform": list(uniform),
    }


def frontier(plans: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that no smaller plan is as good as, by bytes."""
    found: list[dict[str, Any]] = []
    for one in sorted(plans, key=lambda plan: (plan["bytes"], plan["kl"])):
        if not found or one["kl"] < found[-1]["kl"]:
            found.append(one)
    return found


def interpolated(plans: Sequence[dict[str, Any]], size: int) -> float | None:
    """KL of a uniform plan of ``size`` bytes; None outside of the plans' sizes."""
    for low, high in itertools.pairwise(plans):
        if low["bytes"] <= size <= high["bytes"]:
            share = (size - low["bytes"]) / (high["bytes"] - low["bytes"])
            return math.exp((1 - share) * math.log(low["kl"]) + share * math.log(high["kl"]))
    return None


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's, of values without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


if __name__ == "__main__":
    main()
