"""`quern quantize --memory CAP` where the kernel allows no more than CAP: does it get through, with each choice of rounding?

    python benchmarks/memory_cap.py [WORK_FOLDER] [--hidden 1536] [--intermediate 4096] [--layers 2] [--tokens 4096]
        [--choices plain drift sweep two-sided all trellis tuning] [--threads N] [--page benchmarks/README.md]
    python benchmarks/memory_cap.py --from RESULT.json --page benchmarks/README.md

Of each choice the least cap is taken from the message that refuses a smaller one; two per cent less has to be refused too,
with exit code 2 and nothing written. The same command runs with the least cap, in a memory cgroup whose hard limit is
the same number of bytes, without swap: a process that needs more is killed by the kernel. Needs Linux and the right to make
cgroups (root, version 1 or 2). What the cgroup counts besides (files in the page cache) the kernel takes back when it is
short, so that `peak` is the resident memory that quern reports. What was measured is kept in WORK_FOLDER. Exit code 1 where
a run was killed or a small cap was not refused.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measured import write_result
from pages import write_section
from rounding import CHOICES, recipe_with, write_recipe
from section_script import recipe_called
from synthetic import write_checkpoint

from quern.core.machine.parallel import available_threads
from quern.core.recipe import Recipe
from quern.core.recipe_parts import Tuning
from quern.core.text.units import bytes_text, percent_text

INTEGERS, TRELLIS = "gptq4-g64", "compact"
OTHERS = ("trellis", "tuning")
ATTEMPTS = 3
QUERN = [sys.executable, "-c", "from quern.cli.main import run; run()"]
LEAST = re.compile(r"Give at least --memory ([\d.]+)(kB|MB|GB)")
UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--intermediate", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--choices", nargs="+", default=[*CHOICES, *OTHERS], choices=[*CHOICES, *OTHERS])
    parser.add_argument("--threads", type=int, default=available_threads())
    parser.add_argument("--page", type=Path)
    parser.add_argument("--from", dest="result", type=Path)
    options = parser.parse_args()
    if options.result is None:
        with tempfile.TemporaryDirectory(prefix="quern-cap-") as temporary:
            options.result = measure(options, options.folder or Path(temporary))
        print(options.result)
    result = json.loads(options.result.read_text("utf-8"))
    text = section(result)
    if options.page:
        write_section(options.page, text)
    print(text)
    return 0 if all(row["survived"] and row["refused_below"] for row in result["rows"]) else 1


def measure(options: argparse.Namespace, folder: Path) -> Path:
    """Every choice, one after the other."""
    shape = {name: getattr(options, name) for name in ("hidden", "intermediate", "layers")}
    model = folder / f"model-{'-'.join(map(str, shape.values()))}"
    if not (model / "model.safetensors.index.json").is_file():  # written last
        heads = options.hidden // 128
        write_checkpoint(model, **shape, heads=heads, key_value_heads=max(1, heads // 4))
    asked = {"shape": shape, "tokens": options.tokens, "threads": options.threads}
    rows = []
    for choice in options.choices:
        recipe = recipe_for(options, choice)
        kept = folder / f"{choice}.json"
        known = json.loads(kept.read_text("utf-8")) if kept.is_file() else {}
        if known.get("asked") != {**asked, "recipe": recipe.to_json()}:
            known = {"asked": {**asked, "recipe": recipe.to_json()}, "row": held(options, model, folder, recipe)}
            kept.write_text(json.dumps(known), "utf-8")
        rows.append({"choice": choice, **known["row"]})
        print(json.dumps(rows[-1]), flush=True)
    return write_result("memory_cap", {**asked, "cgroup": Cgroup.version(), "rows": rows})


def recipe_for(options: argparse.Namespace, choice: str) -> Recipe:
    """The recipe of a choice, with so many calibration tokens."""
    if choice in CHOICES:
        recipe = recipe_with(INTEGERS, choice)
    else:
        recipe = recipe_called(TRELLIS if choice == "trellis" else INTEGERS)
        recipe = recipe.model_copy(update={"name": choice, "tuning": Tuning() if choice == "tuning" else None})
    calibration = recipe.calibration.model_copy(update={"tokens": options.tokens})
    return recipe.model_copy(update={"calibration": calibration})


def held(options: argparse.Namespace, model: Path, folder: Path, recipe: Recipe) -> dict[str, Any]:
    """The least cap of one recipe, whether less is refused, and what became of it within that cap."""
    output = folder / "artifact"
    shutil.rmtree(output, ignore_errors=True)
    command = [*QUERN, "quantize", str(model), "-o", str(output), "--recipe", write_recipe(folder, recipe)]
    command += ["--threads", str(options.threads), "--json"]
    least = least_of(asked(command, "1MB"))
    for _ in range(ATTEMPTS):  # what a process takes before it begins differs a little from one to the next
        with cgroup(least) as group:
            done = group.run([*command, "--memory", f"{least}B"])
            killed, usage = group.killed(), group.peak()
        if done.returncode != 2 or not LEAST.search(done.stderr):
            break
        least = least_of(done)
    finished = output.with_name("finished")
    shutil.rmtree(finished, ignore_errors=True)
    if output.exists():
        output.rename(finished)
    shutil.rmtree(f"{output}.quern-work", ignore_errors=True)
    below = asked(command, f"{round(0.98 * least)}B")
    refused = below.returncode == 2 and not output.exists() and not Path(f"{output}.quern-work").exists()
    survived = done.returncode == 0 and (finished / "quern.json").is_file()
    peak = json.loads(done.stdout)["peak_rss_bytes"] if survived else None
    return {
        "recipe": recipe.name, "least_cap": least, "refused_below": refused, "survived": survived,
        "killed_by_the_kernel": killed, "exit_code": done.returncode, "peak_rss_bytes": peak, "cgroup_peak_bytes": usage,
        **({} if survived else {"said": done.stderr[-400:]}),
    }  # fmt: skip


def least_of(refusal: subprocess.CompletedProcess[str]) -> int:
    """Bytes that the message of a refusal says would do."""
    found = LEAST.search(refusal.stderr)
    if found is None:
        raise SystemExit(f"no least cap was told: {refusal.stderr}")
    return round(float(found[1]) * UNITS[found[2]])


def asked(command: list[str], cap: str) -> subprocess.CompletedProcess[str]:
    """The command with a cap that is too small."""
    return subprocess.run([*command, "--memory", cap], capture_output=True, text=True)


@dataclass(frozen=True)
class Cgroup:
    """A memory cgroup of its own."""

    folder: Path
    names: Mapping[str, str]

    ROOT = Path("/sys/fs/cgroup")
    V1 = {"limit": "memory.limit_in_bytes", "events": "memory.oom_control", "peak": "memory.max_usage_in_bytes",
          "swap": "memory.swappiness"}  # fmt: skip
    V2 = {"limit": "memory.max", "events": "memory.events", "peak": "memory.peak", "swap": "memory.swap.max"}

    @classmethod
    def version(cls) -> int:
        """Of the memory controller."""
        return 1 if (cls.ROOT / "memory" / cls.V1["limit"]).is_file() else 2

    def write(self, name: str, value: int) -> None:
        (self.folder / self.names[name]).write_text(str(value), "ascii")

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        """The command, inside of it from its first instruction."""
        inside = ["sh", "-c", f'echo $$ > "{self.folder}/cgroup.procs" && exec "$@"', "sh", *command]
        return subprocess.run(inside, capture_output=True, text=True)

    def killed(self) -> int:
        """Processes that the kernel killed for want of memory."""
        found = re.search(r"^oom_kill (\d+)", (self.folder / self.names["events"]).read_text("ascii"), re.MULTILINE)
        return int(found[1]) if found else 0

    def peak(self) -> int | None:
        """Bytes, page cache included; older kernels with version 2 do not say."""
        path = self.folder / self.names["peak"]
        return int(path.read_text("ascii")) if path.is_file() else None


@contextmanager
def cgroup(limit: int) -> Iterator[Cgroup]:
    """A cgroup whose processes get so many bytes and no swap; removed afterwards."""
    first = Cgroup.version() == 1
    base = Cgroup.ROOT / "memory" if first else Cgroup.ROOT
    group = Cgroup(base / f"quern-cap-{os.getpid()}", Cgroup.V1 if first else Cgroup.V2)
    try:
        group.folder.mkdir()
        group.write("limit", limit)
        if (group.folder / group.names["swap"]).is_file():
            group.write("swap", 0)
    except OSError as error:
        raise SystemExit(f"no memory cgroup can be made here ({error}). Run this as root on Linux") from None
    try:
        yield group
    finally:
        group.folder.rmdir()


def section(result: Mapping[str, Any]) -> str:
    """The section of the page."""
    shape = result["shape"]
    lines = [
        f"## A memory cap that the kernel enforces, {result['date']}",
        "",
        f"`{result['command']}`: Qwen2-shaped, {shape['layers']} layers, hidden {shape['hidden']}, intermediate "
        f"{shape['intermediate']}, {result['tokens']} calibration tokens, {result['threads']} threads; each run in a memory "
        f"cgroup (version {result['cgroup']}) whose hard limit is the least cap that `quern quantize --memory` accepts.",
        "",
        "| rounding | recipe | least cap | 2 % less | within the cap | its peak | of the cap |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        became = "finished" if row["survived"] else f"ended with exit code {row['exit_code']}"
        if row["killed_by_the_kernel"]:
            became = "killed by the kernel"
        peak = row["peak_rss_bytes"]
        of_cap = ("", "") if peak is None else (bytes_text(peak), percent_text(peak / row["least_cap"]))
        refused = "refused" if row["refused_below"] else "accepted"
        lines.append(
            f"| {row['choice']} | `{row['recipe']}` | {bytes_text(row['least_cap'])} | {refused} | {became} | "
            f"{of_cap[0]} | {of_cap[1]} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
