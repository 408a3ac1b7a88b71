"""What runtimes are known to reach of a machine: ``runtimes.json``, each figure with its source."""

from __future__ import annotations

import functools
import json
from importlib import resources

from pydantic import BaseModel, ConfigDict

from quern.advisor.forecasting.machines import VECTOR_BITS, Bytes, Machine, Rate, Share
from quern.advisor.forecasting.results import MachineKind
from quern.core.results import Target

FILE = "runtimes.json"
_256 = VECTOR_BITS["avx2"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Reach(_Strict):
    """Of one runtime, on one kind of machine, with some kinds of weights."""

    runtime: Target
    kind: MachineKind
    weights: tuple[str, ...]
    """What the kinds of weights begin with (``kinds.kernel_kind``)."""
    decode: Share
    """Of the bandwidth that the machine's file gives."""
    prefill: Share | None
    """Of the machine's products in ``prefill_dtype``."""
    prefill_dtype: str | None
    thread_gb_s_per_ghz: Rate | None = None
    """What one thread decodes at most with vectors of 256 bits, for each GHz; null where the bandwidth alone counts."""
    thread_gop_s_per_ghz: Rate | None = None
    """The same of prompts, where there is no ``prefill``."""

    def decode_rate(self, machine: Machine) -> tuple[float, str]:
        """Bytes/s, and the formula."""
        rate = self.decode.value * machine.bandwidth
        said = f"{self.decode.value:g} of {machine.bandwidth / 1e9:g} GB/s"
        if self.thread_gb_s_per_ghz is None:
            return rate, said
        each = self.thread_gb_s_per_ghz.value * machine.clock_ghz * VECTOR_BITS[machine.instruction_set] / _256
        threads = 1e9 * machine.cores * each
        if threads >= rate:
            return rate, said
        return threads, f"{machine.cores} cores at {each:.3g} GB/s"

    def prefill_rate(self, machine: Machine) -> tuple[float, str] | None:
        """Operations/s, and the formula; None where nothing is known."""
        if self.prefill is not None:
            product = next((rate for name, rate in machine.products.items() if name == self.prefill_dtype), None)
            if product is None:
                return None
            return 1e9 * self.prefill.value * product.value, f"{self.prefill.value:g} of {product.value:,.0f} Gop/s"
        if self.thread_gop_s_per_ghz is None:
            return None
        each = self.thread_gop_s_per_ghz.value * machine.clock_ghz * VECTOR_BITS[machine.instruction_set] / _256
        return 1e9 * machine.cores * each, f"{machine.cores} cores at {each:.3g} Gop/s"


class Known(_Strict):
    """The whole file."""

    runtimes: tuple[Reach, ...]
    overhead: dict[Target, Bytes]
    """What a runtime takes besides weights, keys and values."""


@functools.cache
def known() -> Known:
    """The file."""
    text = (resources.files("quern.advisor.forecasting") / FILE).read_text("utf-8")
    return Known.model_validate(json.loads(text))


def reach_of(runtime: str, kind: MachineKind, weights: str) -> Reach | None:
    """What is known; the longest beginning of ``weights`` counts."""
    fitting = [
        (len(beginning), entry)
        for entry in known().runtimes
        if (entry.runtime, entry.kind) == (runtime, kind)
        for beginning in entry.weights
        if weights.startswith(beginning)
    ]
    return max(fitting, key=lambda pair: pair[0])[1] if fitting else None
