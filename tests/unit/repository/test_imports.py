"""What imports what: `import quern` is light, the metrics need numpy only, the layers hold."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import other_copy
import pytest

import quern

ROOT = Path(__file__).resolve().parents[3]
HEAVY = ("torch", "transformers", "numpy", "pydantic", "yaml", "rich", "typer", "safetensors", "gguf")


def python(code: str) -> str:
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return ended.stdout.strip()


def test_import_loads_nothing_heavy():
    assert python(f"import sys, quern; print([name for name in {HEAVY} if name in sys.modules])") == "[]"


def test_help_of_the_command_line_does_not_load_torch():
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom quern.cli.main import app\n"
        "assert CliRunner().invoke(app, ['quantize', '--help']).exit_code == 0\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    assert python(code) == "False False"


@pytest.mark.parametrize("name", sorted(set(quern.__all__) - {"__version__"}))
def test_public_names_are_there(name):
    assert callable(getattr(quern, name))
    assert name in dir(quern)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(AttributeError, match=r"quantise.*quantize"):
        quern.quantise  # noqa: B018


def test_versions_agree():
    assert quern.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]


def imported_packages(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." if node.level else (node.module or "").split(".")[0])
    return found


def test_metrics_need_numpy_only():
    found = imported_packages(ROOT / "src/quern/core/metrics.py") - set(sys.stdlib_module_names)
    assert found <= {"numpy", "quern"}
    assert "numpy" in found


def contracts(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-c",
        "import sys; from importlinter.cli import lint_imports_command as run; sys.exit(run())",
    ]
    config = str(ROOT / ".importlinter")
    return subprocess.run(
        [*command, "--no-logo", "--no-cache", "--config", config],
        capture_output=True,
        text=True,
        cwd=folder,
        env={"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin"},
        timeout=120,
    )


def test_layers_hold():
    ended = contracts(ROOT / "src")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert re.search(r"[1-9]\d* kept, 0 broken", ended.stdout)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("core/seeds.py", "import quern.codecs.base"),
        ("codecs/integer.py", "import quern.formats.base"),
        ("formats/quern.py", "def late():\n    import quern.engines.reference"),
        ("core/metrics.py", "import torch"),
        ("generation/generate.py", "import rich"),
    ],
)
def test_a_breach_is_found(tmp_path, module, line):
    """The check itself: a copy of the package with one import upwards, sideways or of a forbidden library."""
    shutil.copytree(ROOT / "src" / "quern", tmp_path / "quern", ignore=shutil.ignore_patterns("__pycache__"))
    other_copy.prefer(tmp_path)
    with (tmp_path / "quern" / module).open("a", encoding="utf-8") as file:
        file.write(f"\n\n{line}\n")
    ended = contracts(tmp_path)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "BROKEN" in ended.stdout


def test_a_new_package_needs_a_layer(tmp_path):
    shutil.copytree(ROOT / "src" / "quern", tmp_path / "quern", ignore=shutil.ignore_patterns("__pycache__"))
    other_copy.prefer(tmp_path)
    (tmp_path / "quern" / "novelty").mkdir()
    (tmp_path / "quern" / "novelty" / "__init__.py").touch()
    assert contracts(tmp_path).returncode == 1


def private_imports(package: Path) -> list[str]:
    """Imports of a name or module with an underscore in front from a folder other than the importer's own."""
    found = []
    for path in sorted(package.rglob("*.py")):
        own = path.relative_to(package).parent.as_posix()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("quern"):
                continue
            parts = node.module.split(".")[1:]
            for alias in node.names:
                places = [*parts, alias.name]
                for depth, name in enumerate(places):
                    private = name.startswith("_") and not name.startswith("__") and name != "_native"
                    if private and "/".join(places[:depth]) != own:
                        found.append(f"{path.relative_to(package)}: {node.module} {alias.name}")
    return found


def test_what_an_underscore_marks_stays_in_its_folder(tmp_path):
    """The compiled module, whose underscore says that it is no part of the public interface, is for every layer."""
    assert private_imports(ROOT / "src" / "quern") == []
    (tmp_path / "cli").mkdir()
    (tmp_path / "cli" / "x.py").write_text("def f():\n    from quern.engines._build import build\n", "utf-8")
    assert private_imports(tmp_path) == ["cli/x.py: quern.engines._build build"]


def test_codecs_and_formats_load_where_gguf_is_not_installed():
    """As in vLLM's environment, which the plug-in goes into without quern's dependencies."""
    code = (
        "import sys; sys.modules['gguf'] = None\n"
        "from quern.codecs.base import CODECS\n"
        "from quern.formats.base import FORMATS\n"
        "assert 'ggml' in CODECS.names() and 'quern' in FORMATS.names()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
