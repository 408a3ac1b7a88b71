"""Writes the locks of requirements/ and of the other tools' environments, and says how other versions differ from them.

    python tools/lock.py write [--upgrade]     requirements/*.txt
    python tools/lock.py peers [--upgrade]     src/quern/peers/locks/*.txt
    python tools/lock.py resolve newest|lowest FILE [--torch torch==2.13.0]
    python tools/lock.py compare FILE          versions in FILE that are not those of requirements/dev.txt

uv resolves, for Python 3.11 and newer on every platform at once, from metadata alone. What stands in a lock already stays
as it is wherever it still fits; ``--upgrade`` takes the newest of everything. ``newest`` leaves out the upper ends of
pyproject.toml's ranges, ``lowest`` takes the lower ones. Run by ``make lock`` and its neighbours in .venv-lock.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "requirements"
PEERS = ROOT / "src/quern/peers/locks"
LEAST_PYTHON = "3.11"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
MACHINES = ("x86_64-manylinux_2_31", "aarch64-manylinux_2_31")
ALL = ("pyproject.toml", "--extra", "dev", "--group", "build")
UPPER = ("<", "<=", "==", "~=")


def run_uv(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run uv with this project's settings only."""
    command = [str(Path(sys.executable).parent / "uv"), *arguments, "--config-file", str(FOLDER / "uv.toml")]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def uv(*arguments: str) -> str:
    """What uv prints; ends the program if it fails."""
    ended = run_uv(*arguments)
    if ended.returncode:
        sys.exit(ended.stderr.strip())
    return ended.stdout


def compile_lock(output: Path, *arguments: str, upgrade: bool = False) -> None:
    """One lock with hashes. One version for all platforms and Pythons, so that what is tested is what everybody has."""
    how = ["--universal", "--python-version", LEAST_PYTHON, "--fork-strategy", "fewest", "--generate-hashes", "--quiet"]
    without = ["--no-emit-package", "torch", "--no-annotate"]
    again = ["--upgrade"] if upgrade else []
    made_by = ["--custom-compile-command", "make lock-peers" if output.parent == PEERS else "make lock"]
    uv("pip", "compile", *arguments, *how, *without, *again, *made_by, "--output-file", str(output))
    print(f"{output.relative_to(ROOT)}: {len(versions(output))} distributions")


def missing_wheels(lock: Path) -> list[str]:
    """Pythons and machines that have no wheel with a known hash for some line of the lock; nothing is installed."""
    missing = []
    for python, machine in itertools.product(PYTHONS, MACHINES):
        with tempfile.TemporaryDirectory() as target:
            where = ["--target", target, "--python-version", python, "--python-platform", machine]
            how = ["--dry-run", "--no-deps", "--require-hashes", "--only-binary", ":all:", "--requirement", str(lock)]
            ended = run_uv("pip", "install", *how, *where)
            if ended.returncode:
                cause = [line.strip() for line in ended.stderr.splitlines() if "cause:" in line] or [ended.stderr]
                missing.append(f"Python {python}, {machine}: {cause[0]}")
    return missing


def write(upgrade: bool) -> None:
    """The project's locks. The second is a part of the first, the third what made them."""
    torch, dev = str(FOLDER / "torch.txt"), str(FOLDER / "dev.txt")
    compile_lock(FOLDER / "dev.txt", *ALL, "--constraints", torch, upgrade=upgrade)
    compile_lock(FOLDER / "run.txt", "pyproject.toml", "--group", "build", "--constraints", torch, "--constraints", dev)
    compile_lock(FOLDER / "lock.txt", "--group", "lock", upgrade=upgrade)
    if missing := missing_wheels(FOLDER / "dev.txt"):
        sys.exit("\n".join(["no wheel that fits; limit the version in pyproject.toml:", *missing]))


def write_peers(upgrade: bool) -> None:
    """A lock for each adapter: what it names, and everything that this depends on."""
    sys.path.insert(0, str(ROOT / "src"))
    from quern.peers.base import BUILD, COMMON, TORCH
    from quern.peers.base import PEERS as ADAPTERS
    from quern.peers.lock import split

    PEERS.mkdir(exist_ok=True)
    for name in ADAPTERS.names():
        adapter = ADAPTERS.get(name)()
        output = PEERS / f"{name}.txt"
        os.environ.update(adapter.environment)  # metadata of a source distribution comes from running its set-up
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as wanted, tempfile.NamedTemporaryFile("w") as wheels:
            wanted.write("\n".join([TORCH, *BUILD, *COMMON, *adapter.requirements]) + "\n")
            wanted.flush()
            compile_lock(output, wanted.name, upgrade=upgrade)
            wheels.write(split(output.read_text("utf-8"), adapter.sources)[0])
            wheels.flush()
            for place in missing_wheels(Path(wheels.name)):
                print(f"  cannot be installed on {place}")


def versions(file: Path) -> dict[str, set[str]]:
    """Versions of each distribution in a lock or another list of exact requirements."""
    found: dict[str, set[str]] = {}
    for line in file.read_text("utf-8").splitlines():
        if line and line[0] not in " #-":
            requirement = Requirement(line.removesuffix("\\"))
            (pin,) = requirement.specifier
            found.setdefault(canonicalize_name(requirement.name), set()).add(pin.version)
    return found


def without_upper(requirement: str) -> str:
    """The requirement without its upper end: ``numpy>=1.26,<3`` as ``numpy>=1.26``."""
    parsed = Requirement(requirement)
    parsed.specifier = SpecifierSet(",".join(str(one) for one in parsed.specifier if one.operator not in UPPER))
    return str(parsed)


def resolve(which: str, output: Path, torch: str) -> None:
    """The newest or the lowest versions, for this Python and machine, into ``output``, without torch."""
    pinned = (FOLDER / "torch.txt").read_text("utf-8") if not torch else torch.split("+")[0]
    with tempfile.TemporaryDirectory() as folder:
        constraint, overrides = Path(folder) / "torch.txt", Path(folder) / "overrides.txt"
        constraint.write_text(pinned, "utf-8")
        how = [
            "--constraints",
            str(constraint),
            "--no-emit-package",
            "torch",
            "--no-annotate",
            "--no-header",
            "--quiet",
        ]
        if which == "newest":
            overrides.write_text("\n".join(map(without_upper, declared())) + "\n", "utf-8")
            how += ["--overrides", str(overrides), "--upgrade"]
        else:
            how += ["--resolution", "lowest-direct"]
        python = ["--python-version", ".".join(map(str, sys.version_info[:2]))]
        output.write_text(uv("pip", "compile", *ALL, *how, *python), "utf-8")


def declared() -> list[str]:
    """What pyproject.toml asks for to run, test and build, torch apart."""
    read = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    extras = [line for lines in read["project"]["optional-dependencies"].values() for line in lines]
    every = [*read["project"]["dependencies"], *extras, *read["dependency-groups"]["build"]]
    return [line for line in every if Requirement(line).name not in ("quern", "torch")]


def compare(file: Path) -> None:
    """Print what differs from requirements/dev.txt."""
    other, lock = versions(file), versions(FOLDER / "dev.txt")
    changed = [name for name in sorted(other) if not other[name] <= lock.get(name, set())]
    print(f"{len(changed)} of {len(other)} distributions are not those of requirements/dev.txt:")
    for name in changed:
        print(f"  {name} {', '.join(lock.get(name, {'(none)'}))} -> {', '.join(other[name])}")


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("write", "peers"):
        commands.add_parser(name).add_argument("--upgrade", action="store_true")
    resolving = commands.add_parser("resolve")
    resolving.add_argument("which", choices=("newest", "lowest"))
    resolving.add_argument("--torch", default="")
    for command in (resolving, commands.add_parser("compare")):
        command.add_argument("file", type=Path)
    arguments = parser.parse_args()
    os.environ["UV_PYTHON"] = sys.executable  # not the environment that happens to lie here
    if arguments.command == "write":
        write(arguments.upgrade)
    elif arguments.command == "peers":
        write_peers(arguments.upgrade)
    elif arguments.command == "resolve":
        resolve(arguments.which, arguments.file, arguments.torch)
    else:
        compare(arguments.file)


if __name__ == "__main__":
    main()
