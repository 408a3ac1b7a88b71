"""Hardware files: what is known of a machine that need not be here, each figure with its source."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from quern.advisor.forecasting.results import MachineKind
from quern.checkpoint.files import read_json
from quern.core.errors import BadFileError, UserError
from quern.core.text.suggest import did_you_mean

PACKAGE = "quern.hardware"
_LIMIT = 1 << 20
"""Bytes of a hardware file."""
InstructionSet = Literal["scalar", "neon", "avx2", "avx512", "amx"]
"""The widest that the processor has and some runtime's kernels use."""
VECTOR_BITS = {"scalar": 64, "neon": 128, "avx2": 256, "avx512": 512, "amx": 512}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Source = Annotated[str, Field(min_length=8, max_length=600)]
Basis = Literal["published", "measured"]


class Bytes(_Strict):
    """An amount of memory."""

    value: Annotated[int, Field(ge=256 << 20, le=1 << 50)]
    basis: Basis
    source: Source


class Rate(_Strict):
    """10^9 bytes or operations a second."""

    value: Annotated[float, Field(ge=0.05, le=1e7)]
    basis: Basis
    source: Source


class Share(_Strict):
    """A fraction of another figure."""

    value: Annotated[float, Field(ge=0.01, le=4)]
    basis: Basis
    source: Source


class Nanoseconds(_Strict):
    """Of one thread, for one weight."""

    value: Annotated[float, Field(ge=0.001, le=1e6)]
    basis: Basis
    source: Source


class Machine(_Strict):
    """One hardware file. ``docs/forecast.md`` documents the fields."""

    description: Annotated[str, Field(min_length=1, max_length=300)]
    kind: MachineKind
    cores: Annotated[int, Field(ge=1, le=4096)]
    """Of the processor, or of what computes beside the GPU."""
    clock_ghz: Annotated[float, Field(ge=0.1, le=10)]
    instruction_set: InstructionSet
    memory: Bytes
    """Of RAM, or of the GPU."""
    usable_memory: Share
    """Of ``memory`` that a model may take."""
    read: Rate
    """10^9 bytes/s at which ``memory`` is read."""
    read_share: Share
    """Of ``read`` that a program reaches; 1 where ``read`` was measured by one."""
    products: dict[Literal["float32", "float16", "bfloat16", "int8"], Rate]
    """10^9 operations/s of matrix products with all cores."""
    kernels: dict[Annotated[str, Field(max_length=60)], Rate] = {}
    """By kind of weights: 10^9 bytes of codes a second that one thread of quern's kernels multiplies with one token."""
    prompt_kernels: dict[Annotated[str, Field(max_length=60)], Rate] = {}
    """By kind of weights: 10^9 operations/s that one thread of quern's kernels reaches with a prompt of 512 tokens."""
    rounding: dict[Annotated[str, Field(max_length=60)], Nanoseconds] = {}
    """By kind of weights and rounding: what one thread takes to round a weight, its share of no product counted."""
    calibration_share: Share | None = None
    """Of ``products`` that the passes of a calibration reach."""

    @model_validator(mode="after")
    def _check(self) -> Machine:
        if not self.products:
            raise ValueError("products must name at least one arithmetic")
        return self

    @property
    def limit(self) -> int:
        """Bytes that a model may take."""
        return int(self.memory.value * self.usable_memory.value)

    @property
    def bandwidth(self) -> float:
        """Bytes/s that a program reads."""
        rate: float = 1e9 * self.read.value * self.read_share.value
        return rate


def machine_names() -> list[str]:
    """The shipped hardware files, sorted."""
    found = resources.files(PACKAGE).iterdir()
    return sorted(file.name.removesuffix(".json") for file in found if file.name.endswith(".json"))


def load_machine(name_or_path: str | Path) -> tuple[str, Machine]:
    """Name and content of a shipped hardware file, or of one given by its path.

    Raises ``UserError`` for a name that is neither, ``BadFileError`` with the field for values that no machine has.
    """
    text = str(name_or_path)
    if text in machine_names():
        data = json.loads((resources.files(PACKAGE) / f"{text}.json").read_text("utf-8"))
        return text, parsed(data, text)
    path = Path(text)
    if not path.is_file():
        names = machine_names()
        raise UserError(
            f"hardware {text!r} is neither a file nor one of {', '.join(names)}{did_you_mean(text, names)}. Give one of "
            "these names, or the path of a JSON file with the fields that docs/forecast.md lists"
        )
    return path.stem, parsed(read_json(path, _LIMIT), path)


def parsed(data: object, source: str | Path) -> Machine:
    """The machine that ``data`` describes. Raises ``BadFileError`` that names the first field at fault and its range."""
    try:
        return Machine.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        came = first["input"]
        shown = f"; it is {str(came)[:40]!r}" if isinstance(came, int | float | str) else ""
        allowed = first["msg"][0].lower() + first["msg"][1:]
        raise BadFileError(
            source, f"{where}: {allowed}{_range(first)}{shown}", "docs/forecast.md lists the fields and their ranges"
        ) from None


def _range(error: Any) -> str:
    """The whole range of a number that is outside of it."""
    ranges = {
        "memory": "268435456 to 2^50 bytes", "read": "0.05 to 10^7", "products": "0.05 to 10^7", "kernels": "0.05 to 10^7",
        "prompt_kernels": "0.05 to 10^7", "usable_memory": "0.01 to 4", "read_share": "0.01 to 4",
        "calibration_share": "0.01 to 4", "rounding": "0.001 to 10^6", "cores": "1 to 4096", "clock_ghz": "0.1 to 10",
    }  # fmt: skip
    field = error["loc"][0] if error["loc"] else ""
    bounded = error["type"] in ("greater_than_equal", "less_than_equal")
    return f" (allowed: {ranges[field]})" if bounded and field in ranges else ""
