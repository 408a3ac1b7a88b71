"""Scripts outside of the package are run rarely: what they import from it and from each other must be there."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = sorted([*ROOT.glob("benchmarks/*.py"), *ROOT.glob("tools/*.py")])


def imported(tree: ast.Module) -> list[tuple[str, str]]:
    """Module and name of everything that is imported by ``from module import name``."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    return [(str(node.module), alias.name) for node in nodes for alias in node.names]


def defined(file: Path) -> set[str]:
    """Names that a script has at its top level, those that it imports included."""
    names: set[str] = set()
    for node in ast.parse(file.read_text("utf-8")).body:
        for part in ast.walk(node) if isinstance(node, ast.If | ast.Try) else [node]:
            if isinstance(part, ast.FunctionDef | ast.ClassDef):
                names.add(part.name)
            elif isinstance(part, ast.Import | ast.ImportFrom):
                names.update(alias.asname or alias.name for alias in part.names)
            elif isinstance(part, ast.Assign | ast.AnnAssign):
                targets = part.targets if isinstance(part, ast.Assign) else [part.target]
                names.update(one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name))
    return names


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_a_script_imports_is_there(script):
    missing = []
    for module, name in imported(ast.parse(script.read_text("utf-8"))):
        beside = script.with_name(f"{module}.py")
        if beside.is_file():
            found = name in defined(beside)
        elif module.split(".")[0] == "quern":
            found = hasattr(importlib.import_module(module), name) or (
                importlib.util.find_spec(f"{module}.{name}") is not None
            )
        else:
            continue
        if not found:
            missing.append(f"{module}.{name}")
    assert missing == []
