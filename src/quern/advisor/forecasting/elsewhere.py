"""Figures of a machine that is not here: its hardware file, and what runtimes and kernels are known to reach.

quern's own kernels were measured on a machine whose file ships (``REFERENCE``); on other processors with the same
vectors they go by cores and clock, as far as memory allows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quern.advisor.forecasting import running
from quern.advisor.forecasting.kinds import PLAIN
from quern.advisor.forecasting.machines import Machine, load_machine
from quern.advisor.forecasting.operations import Work
from quern.advisor.forecasting.quantizing import Term, at_rate, quantize_seconds
from quern.advisor.forecasting.results import Foretold
from quern.advisor.forecasting.runtimes import known, reach_of

REFERENCE = "server-2-core"
"""The shipped hardware file with measured kernels."""
CACHE_SHARE = 0.5
"""Of its bandwidth that attention reads keys and values at: they are decoded in smaller pieces than weights."""


@dataclass(frozen=True)
class Load:
    """What running one model takes, counted."""

    read: Mapping[str, int]
    """By kind of weights: bytes that a token reads."""
    weights: int
    """Bytes of the artifact."""
    operations: int
    """Of one token in all blocks."""
    cache: Mapping[str, int]
    """Bytes of the keys and values of one token, by precision."""
    context: int
    """Tokens."""
    most: int
    """Tokens that the model reads."""
    prompt: int


def nothing(unit: str, why: str) -> Foretold:
    """A figure that is not known."""
    return Foretold.model_validate({"value": None, "unit": unit, "basis": "predicted", "derivation": why})


def decode_of(runtime: str, machine: Machine, load: Load) -> Foretold:
    """Tokens/s behind the prompt."""
    parts = []
    for kind, size in load.read.items():
        rate = _decode_rate(runtime, machine, kind)
        if isinstance(rate, str):
            return nothing("tokens/s", rate)
        parts.append(running.Part(kind, size, *rate))
    cache = next(iter(load.cache.values()), 0) * load.prompt
    return running.decode(parts, cache, CACHE_SHARE * machine.bandwidth, "predicted")


def prefill_of(runtime: str, machine: Machine, load: Load) -> Foretold:
    """Tokens/s of a prompt; of several kinds of weights the slowest one's rate is taken for all."""
    slowest: tuple[float, str] | None = None
    for kind in load.read:
        if kind == PLAIN and len(load.read) > 1:
            continue
        rate = _prefill_rate(runtime, machine, kind)
        if isinstance(rate, str):
            return nothing("tokens/s", rate)
        slowest = rate if slowest is None or rate[0] < slowest[0] else slowest
    if slowest is None:
        return nothing("tokens/s", "it has no weights")
    return running.prefill(load.operations, *slowest, "predicted")


def memory_of(runtime: str, load: Load) -> Foretold:
    """Bytes while it runs."""
    cache = next(iter(load.cache.values()), 0) * load.context
    return running.run_memory(_overhead(runtime), load.weights, cache, load.context, runtime, "predicted")


def contexts_of(runtime: str, machine: Machine, load: Load) -> dict[str, Foretold]:
    """Longest text by precision of keys and values."""
    return running.contexts(machine.limit, _overhead(runtime), load.weights, load.cache, load.most, "predicted")


def seconds_of(machine: Machine, work: Work, tokens: int) -> Foretold:
    """To quantize with quern on the machine's processors."""
    if machine.kind != "cpu":
        return nothing("seconds", "quern rounds on processors, and the file says nothing of those beside this GPU")
    reference = _reference(machine)
    if isinstance(reference, str) or reference.calibration_share is None:
        return nothing("seconds", reference if isinstance(reference, str) else "no rounding was measured yet")
    if "float32" not in machine.products:
        return nothing("seconds", "the file names no rate of products in float32")
    product = 1e9 * reference.calibration_share.value * machine.products["float32"].value
    terms = [
        at_rate("calibration", tokens * (work.token_operations + work.head_operations), product, "op"),
        at_rate("error feedback", work.feedback_operations, product, "op"),
    ]
    scale = machine.cores * machine.clock_ghz / reference.clock_ghz
    missing = []
    for kind, count in (work.weights + work.outer_weights).items():
        if kind not in reference.rounding:
            missing.append(kind)
            continue
        each = reference.rounding[kind].value
        formula = f"{count / 1e9:.3g} G weights x {each:g} ns / ({machine.cores} cores x {machine.clock_ghz:g} / "
        terms.append(Term(kind, 1e-9 * each * count / scale, f"{formula}{reference.clock_ghz:g} GHz)"))
    if missing:
        return nothing("seconds", f"how long rounding takes was not measured for {', '.join(missing)}")
    return quantize_seconds(terms, "predicted")


def _overhead(runtime: str) -> int:
    return next((found.value for name, found in known().overhead.items() if name == runtime), 0)


def _reference(machine: Machine) -> Machine | str:
    """The machine whose kernels were measured; or why they say nothing of this one."""
    if machine.kernels:
        return machine
    name, reference = load_machine(REFERENCE)
    if machine.kind != "cpu":
        return "quern's own kernels run on processors"
    if machine.instruction_set != reference.instruction_set:
        return (
            f"quern's kernels were measured with {reference.instruction_set} ({name}), and this machine has "
            f"{machine.instruction_set}"
        )
    return reference


def _decode_rate(runtime: str, machine: Machine, kind: str) -> tuple[float, str] | str:
    if runtime != "quern":
        found = reach_of(runtime, machine.kind, kind)
        unknown = f"nothing is known of {kind} weights in {runtime} on {machine.kind}"
        return unknown if found is None else found.decode_rate(machine)
    reference = _reference(machine)
    if isinstance(reference, str):
        return reference
    if kind == PLAIN and kind not in reference.kernels:
        return machine.bandwidth, f"{machine.read_share.value:g} of {machine.read.value:g} GB/s"
    if kind not in reference.kernels:
        return f"quern's kernel for {kind} was not measured in {REFERENCE}"
    each = reference.kernels[kind].value * machine.clock_ghz / reference.clock_ghz
    if 1e9 * each * machine.cores < machine.bandwidth:
        return 1e9 * each * machine.cores, f"{machine.cores} cores at {each:.3g} GB/s"
    return machine.bandwidth, f"{machine.read_share.value:g} of {machine.read.value:g} GB/s"


def _prefill_rate(runtime: str, machine: Machine, kind: str) -> tuple[float, str] | str:
    if runtime != "quern":
        found = reach_of(runtime, machine.kind, kind)
        rate = None if found is None else found.prefill_rate(machine)
        return (
            f"nothing is known of prompts with {kind} weights in {runtime} on {machine.kind}" if rate is None else rate
        )
    reference = _reference(machine)
    if isinstance(reference, str):
        return reference
    if kind not in reference.prompt_kernels:
        return f"quern's kernel for prompts with {kind} weights was not measured in {REFERENCE}"
    each = reference.prompt_kernels[kind].value * machine.clock_ghz / reference.clock_ghz
    return 1e9 * each * machine.cores, f"{machine.cores} cores at {each:.3g} Gop/s"
