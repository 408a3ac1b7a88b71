"""Line budgets: files people can read in one sitting, functions that fit on a screen, folders that are about one thing.

Prints a warning above the soft limit and exits with 1 above the hard one. An entry in ``ALLOWED`` needs a reason.
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections import Counter
from pathlib import Path

FOLDERS = ("src", "csrc", "tools", "benchmarks", "tests")
SUFFIXES = {".py", ".sh", ".js", ".css", ".html", ".h", ".cc", ".cpp", ".cu"}
SOFT, HARD_FUNCTION = 300, 80
HARD = {"src": 400, "tests": 600}
"""Lines that a file may have, by the first folder of its path; elsewhere ``HARD_ELSEWHERE``."""
HARD_ELSEWHERE = 500
PACKAGE = "src/quern"
HARD_FOLDER = 2200
"""Lines of the Python files that lie in one folder of the package, those in folders within it not counted."""
ANY_SIZE = ("src/quern/peers",)
"""Folders that grow by a file for each thing added."""
MEDIAN_FUNCTION = 8
"""Half of the package's functions are shorter than this."""

ALLOWED: dict[str, str] = {}
"""Path from the repository's root (for a function: ``path:name``) to the reason why it may be longer."""


def sources(root: Path) -> list[Path]:
    """Every source file below the checked folders, sorted."""
    files = (file for folder in FOLDERS for file in (root / folder).rglob("*"))
    return sorted(f for f in files if f.suffix in SUFFIXES and f.is_file() and ".egg-info" not in str(f))


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Its lines, from ``def`` to the last one."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def long_functions(path: Path, name: str) -> list[str]:
    """One line for each Python function above the limit that the allow-list does not name."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"), str(path))):
        if isinstance(node, FUNCTIONS) and length(node) > HARD_FUNCTION and f"{name}:{node.name}" not in ALLOWED:
            found.append(f"{name}:{node.name}: {length(node)} lines, a function may have {HARD_FUNCTION}")
    return found


def large_folders(root: Path) -> list[str]:
    """One line for each folder of the package with more lines of Python than one may have."""
    sizes: Counter[str] = Counter()
    for path in (root / PACKAGE).rglob("*.py"):
        sizes[path.parent.relative_to(root).as_posix()] += len(path.read_text("utf-8").splitlines())
    return [
        f"{folder}: {lines} lines of Python, a folder may have {HARD_FOLDER}; it holds more than one thing"
        for folder, lines in sorted(sizes.items())
        if lines > HARD_FOLDER and not folder.startswith(ANY_SIZE)
    ]


def median_function(root: Path) -> float:
    """Median length of the package's functions in lines, from ``def`` to the last one; 0 where there are none."""
    trees = (ast.parse(path.read_text("utf-8"), str(path)) for path in (root / PACKAGE).rglob("*.py"))
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]
    return statistics.median([length(node) for node in functions]) if functions else 0


def check(root: Path) -> tuple[list[str], list[str]]:
    """Warnings and errors for the repository at ``root``."""
    warnings, errors = [], []
    for path in sources(root):
        name = path.relative_to(root).as_posix()
        lines = len(path.read_text("utf-8").splitlines())
        hard = HARD.get(name.split("/")[0], HARD_ELSEWHERE)
        if lines > hard and name not in ALLOWED:
            errors.append(f"{name}: {lines} lines, the limit is {hard}")
        elif lines > SOFT and not name.startswith("tests/"):
            warnings.append(f"{name}: {lines} lines, {SOFT} are better")
        if path.suffix == ".py":
            errors += long_functions(path, name)
    errors += [
        f"{entry}: allowed, but it is gone" for entry in ALLOWED if not (root / entry.partition(":")[0]).is_file()
    ]
    errors += large_folders(root)
    if (median := median_function(root)) >= MEDIAN_FUNCTION:
        errors.append(f"{PACKAGE}: the median function has {median:g} lines; fewer than {MEDIAN_FUNCTION} are wanted")
    return warnings, errors


def main() -> int:
    """Check the repository that this file lies in."""
    root = Path(__file__).resolve().parent.parent
    warnings, errors = check(root)
    for line in warnings:
        print(f"warning: {line}")
    for line in errors:
        print(f"error: {line}")
    print(f"sizes: {len(errors)} errors, {len(warnings)} warnings; median function: {median_function(root):g} lines")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
