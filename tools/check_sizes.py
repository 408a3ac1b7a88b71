"""Line budgets: files people can read in one sitting, functions that fit on a screen.

Prints a warning above the soft limit and exits with 1 above the hard one. An entry in ``ALLOWED`` needs a reason.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

FOLDERS = ("src", "csrc", "tools", "benchmarks", "tests")
SUFFIXES = {".py", ".sh", ".js", ".css", ".html", ".h", ".cc", ".cpp", ".cu"}
SOFT, HARD, HARD_TESTS, HARD_FUNCTION = 300, 500, 600, 80

ALLOWED: dict[str, str] = {}
"""Path from the repository's root (for a function: ``path:name``) to the reason why it may be longer."""


def sources(root: Path) -> list[Path]:
    """Every source file below the checked folders, sorted."""
    files = (file for folder in FOLDERS for file in (root / folder).rglob("*"))
    return sorted(f for f in files if f.suffix in SUFFIXES and f.is_file() and ".egg-info" not in str(f))


def long_functions(path: Path, name: str) -> list[str]:
    """One line for each Python function above the limit that the allow-list does not name."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"), str(path))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > HARD_FUNCTION and f"{name}:{node.name}" not in ALLOWED:
                found.append(f"{name}:{node.name}: {lines} lines, a function may have {HARD_FUNCTION}")
    return found


def check(root: Path) -> tuple[list[str], list[str]]:
    """Warnings and errors for the repository at ``root``."""
    warnings, errors = [], []
    for path in sources(root):
        name = path.relative_to(root).as_posix()
        lines = len(path.read_text("utf-8").splitlines())
        hard = HARD_TESTS if name.startswith("tests/") else HARD
        if lines > hard and name not in ALLOWED:
            errors.append(f"{name}: {lines} lines, the limit is {hard}")
        elif lines > SOFT and not name.startswith("tests/"):
            warnings.append(f"{name}: {lines} lines, {SOFT} are better")
        if path.suffix == ".py":
            errors += long_functions(path, name)
    errors += [
        f"{entry}: allowed, but it is gone" for entry in ALLOWED if not (root / entry.partition(":")[0]).is_file()
    ]
    return warnings, errors


def main() -> int:
    """Check the repository that this file lies in."""
    warnings, errors = check(Path(__file__).resolve().parent.parent)
    for line in warnings:
        print(f"warning: {line}")
    for line in errors:
        print(f"error: {line}")
    print(f"sizes: {len(errors)} errors, {len(warnings)} warnings")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
