"""A hardware file of this machine, for `quern forecast --on`: what it reads and multiplies, and quern's kernels one by one.

    python benchmarks/hardware_file.py NAME --clock GHZ [--description TEXT] [--least] [--out FILE]

NAME is what the machine will be called, --clock the clock at which all cores run (no system tells it reliably). Each kind of
weights in the shipped recipes is timed with one thread, with one token and with a prompt of 256; each kind's rounding by
quantizing a block of random weights. Every figure carries this command and the date. Takes about 4 minutes on two cores.
--least is for a machine that others use too: the shortest of the repeats counts in place of the median, and of roundings the
processors' time in place of the clock's.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from quern import _native
from quern.advisor.forecasting.kinds import kernel_kind, rounding_kind
from quern.advisor.forecasting.machines import parsed
from quern.advisor.hardware import measured_rates, probe
from quern.architectures.base import architecture_of
from quern.checkpoint.checkpoint import open_checkpoint
from quern.core.artifact import quantization_of
from quern.core.machine.parallel import available_threads
from quern.core.machine.temporary import temporary_folder
from quern.core.recipe import Recipe, load_recipe, profile_names
from quern.engines._cpu_weights import MappedWeights, unsupported
from quern.formats.base import reader_of
from quern.pipeline.forecasting import short_quantization
from quern.pipeline.forecasting.counted import Case, case_of
from quern.pipeline.forecasting.random_artifact import write_random_artifact
from quern.pipeline.forecasting.subject import open_subject

SHAPE = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "max_position_embeddings": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "vocab_size": 2048, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 1, "num_attention_heads": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
PROMPT = 256
ROUNDED = ("compact", "balanced", "fast", "rtn4", "float8", "nvfp4", "q4_0", "q4_k_m", "q8_0", "iq2_s", "iq3_s")
"""Recipes whose rounding is timed: among them every kind of codec but for those of which nobody shares the encoder."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--clock", type=float, required=True)
    parser.add_argument("--description")
    parser.add_argument("--least", action="store_true")
    parser.add_argument("--recipes", default=",".join(ROUNDED))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    middle = min if options.least else statistics.median
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    source = f"benchmarks/hardware_file.py {options.name}{' --least' * options.least}, {date}"

    def measured(value: float) -> dict[str, Any]:
        return {"value": float(f"{value:.4g}"), "basis": "measured", "source": source}

    found, threads = probe(measure=False), available_threads()
    if options.least:
        short_quantization.clock = lambda: time.process_time() / threads
    rates = measured_rates([threads])
    kernels, prompts = kernel_rates(middle)
    rounding, product = rounding_times(options.recipes.split(","), threads)
    float32 = rates["gemm_gop_s"]["float32"][str(threads)]
    machine = {
        "description": options.description or f"{found['cpu_model']}, {threads} cores",
        "kind": "cpu", "cores": threads, "clock_ghz": options.clock, "instruction_set": found["kernels_in_use"],
        "memory": {"value": found["ram_bytes"], "basis": "measured", "source": source},
        "usable_memory": {
            "value": 0.9, "basis": "published", "source": "quern's cpu engine plans with .9 of the free memory",
        },
        "read": measured(rates["read_bandwidth_gb_s"][str(threads)]),
        "read_share": {"value": 1.0, "basis": "measured", "source": "what was measured is what a program reads"},
        "products": {
            name: measured(by[str(threads)]) for name, by in rates["gemm_gop_s"].items() if by is not None
        },
        "kernels": {kind: measured(rate) for kind, rate in sorted(kernels.items())},
        "prompt_kernels": {kind: measured(rate) for kind, rate in sorted(prompts.items())},
        "rounding": {kind: measured(each) for kind, each in sorted(rounding.items())},
        "calibration_share": measured(product / 1e9 / float32),
    }  # fmt: skip
    parsed(machine, options.name)
    path = options.out or Path(f"src/quern/hardware/{options.name}.json")
    path.write_text(json.dumps(machine, indent=1) + "\n", "utf-8")
    print(path)


def shipped() -> list[Recipe]:
    """The shipped recipes that say what each matrix becomes."""
    return [one for name in profile_names() if (one := load_recipe(name)).allocation is None]


def kernel_rates(middle: Callable[[Iterable[float]], float]) -> tuple[dict[str, float], dict[str, float]]:
    """By kind: 10^9 bytes/s with one token, and 10^9 operations/s with a prompt, of one thread."""
    decode: dict[str, float] = {}
    prompt: dict[str, float] = {}
    with temporary_folder("kernels") as folder:
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text(json.dumps(SHAPE), "utf-8")
        subject = open_subject(folder / "model")
        for recipe in shipped():
            case = case_of(subject, recipe)
            if any(unsupported(one.scheme) for one in case.plan.quantized().values()):
                continue
            timed_kinds(folder / recipe.name, case, decode, prompt, middle)
    return decode, prompt


def timed_kinds(
    folder: Path,
    case: Case,
    decode: dict[str, float],
    prompt: dict[str, float],
    middle: Callable[[Iterable[float]], float],
) -> None:
    """Time what is new in one recipe, on the largest matrix of each kind."""
    shapes = case.architecture.module_shapes()
    largest: dict[str, str] = {}
    for module, plan in case.plan.items():
        kind, size = kernel_kind(plan), np.prod(shapes[f"{module}.weight"])
        if kind not in decode and size > np.prod(shapes.get(f"{largest.get(kind)}.weight", (0,))):
            largest[kind] = module
    if not largest:
        return
    recipe = case.recipe.model_copy(update={"format": "quern", "storage": "plain"})
    path = write_random_artifact(folder, dict(SHAPE), recipe)
    checkpoint = open_checkpoint(path)
    reader = reader_of(quantization_of(checkpoint.config), architecture_of(dict(SHAPE)))
    weights = MappedWeights(checkpoint, {} if reader is None else reader.plan())
    for kind, module in largest.items():
        rows, columns = shapes[f"{module}.weight"]
        matrix = weights.matrix(module, (rows, columns), 64)
        random = np.random.default_rng(0)
        one, many = (random.standard_normal((count, columns)).astype(np.float32) for count in (1, PROMPT))
        decode[kind] = matrix.bytes / middle(_native.time_multiply([matrix], one, 1, 40)) / 1e9
        prompt[kind] = 2 * PROMPT * rows * columns / middle(_native.time_multiply([matrix], many, 1, 5)) / 1e9
        print(f"{kind}: {decode[kind]:.2f} GB/s, prompts {prompt[kind]:.1f} Gop/s", flush=True)


def rounding_times(names: Iterable[str], threads: int) -> tuple[dict[str, float], float]:
    """By kind: nanoseconds of one thread for a weight; and the operations/s of calibration."""
    times: dict[str, float] = {}
    products = []
    with temporary_folder("rounding") as folder:
        (folder / "config.json").write_text(json.dumps(SHAPE), "utf-8")
        subject = open_subject(folder)
        for name in names:
            case = case_of(subject, load_recipe(name))
            rates = short_quantization.rates_of(case, threads)
            outer = short_quantization.outer_rate(case, threads)
            products += [rates.product] if rates.product else []
            for kind in case.work.weights:
                times.setdefault(kind, 1e9 * rates.weight * threads)
            for module in case.architecture.outer:
                if case.plan[module].quantized and outer:
                    times.setdefault(rounding_kind(case.plan[module]), 1e9 * outer * threads)
            print(
                f"{name}: {1e9 * rates.weight * threads:.1f} ns a weight, {rates.product / 1e9:.1f} Gop/s", flush=True
            )
    return times, statistics.median(products) if products else 0.0


if __name__ == "__main__":
    main()
