"""Instructions for a weight in the loops over codes, NEON beside AVX2, counted in the compiled objects.

    python benchmarks/instruction_counts.py [--x86 build/run] [--arm build/run-aarch64]

Both are build folders of quern-run (docs/run.md). Of each kind of weights the innermost loops that multiply are looked at: a
jump back and what lies between, without another loop inside. SDOT takes 16 weights and VPMADDUBSW 32; fused
multiply-adds of vectors take 4 and 8. A kind has several loops, for groups of several sizes and for ends of rows; the one
with the fewest instructions a weight is told. It leaves out what is done once a group: scales, and on ARM adding lanes.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("integer4", "integer8", "codebook", "trellis", "bfloat16", "float32")
LINE = re.compile(r"^\s*([0-9a-f]+):\s+(\S+)\s*(.*)$")


@dataclass(frozen=True)
class Family:
    """A processor family's objects and how to read them."""

    suffix: str
    objdump: str
    taken: dict[str, int]
    """Weights that an instruction multiplies, by its name."""
    jumps: re.Pattern[str]


X86 = Family(
    "avx2", "objdump", {"vpmaddubsw": 32, "vfmadd231ps": 8, "vfmadd213ps": 8, "vfmadd132ps": 8}, re.compile(r"^j\w+$")
)
ARM = Family("neon", "aarch64-linux-gnu-objdump", {"sdot": 16, "fmla": 4}, re.compile(r"^(b\.\w+|cbn?z|tbn?z|b)$"))


def functions(path: Path, family: Family) -> list[list[tuple[int, str, str]]]:
    """Address, name and operands of the instructions of each function."""
    said = subprocess.run(
        [family.objdump, "-d", "--no-show-raw-insn", str(path)], capture_output=True, text=True, check=True
    ).stdout
    found: list[list[tuple[int, str, str]]] = []
    for line in said.splitlines():
        if line.endswith(">:"):
            found.append([])
        elif found and (match := LINE.match(line)):
            found[-1].append((int(match[1], 16), match[2], match[3]))
    return found


def loops(code: list[tuple[int, str, str]], family: Family) -> list[list[str]]:
    """Names of the instructions of each innermost loop."""
    places = {address: index for index, (address, _, _) in enumerate(code)}
    spans = []
    for index, (address, name, operands) in enumerate(code):
        target = re.search(r"\b([0-9a-f]+) <", operands)
        if family.jumps.match(name) and target and int(target[1], 16) <= address and int(target[1], 16) in places:
            spans.append((places[int(target[1], 16)], index))
    inner = [span for span in spans if not any(span[0] <= a and b <= span[1] for a, b in spans if (a, b) != span)]
    return [[name for _, name, _ in code[first : last + 1]] for first, last in inner]


def least(path: Path, family: Family) -> float | None:
    """The fewest instructions a weight of all loops that multiply; None where no loop does."""
    rates = []
    for code in functions(path, family):
        for names in loops(code, family):
            weights = sum(family.taken.get(name, 0) for name in names)
            if weights:
                rates.append(len(names) / weights)
    return min(rates, default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--x86", type=Path, default=ROOT / "build/run")
    parser.add_argument("--arm", type=Path, default=ROOT / "build/run-aarch64")
    options = parser.parse_args()
    for family in (X86, ARM):
        if shutil.which(family.objdump) is None:
            raise SystemExit(f"needs {family.objdump}")
    print("kind       NEON  AVX2  instructions a weight")
    for kind in KINDS:
        found = []
        for family, folder in ((ARM, options.arm), (X86, options.x86)):
            objects = sorted(folder.rglob(f"{kind}_{family.suffix}.cc.o"))
            if not objects:
                raise SystemExit(f"{folder} has no object of {kind} for {family.suffix}; build it first (docs/run.md)")
            found.append(least(objects[0], family))
        print(f"{kind:10}", "  ".join("   -" if rate is None else f"{rate:4.2f}" for rate in found))


if __name__ == "__main__":
    main()
