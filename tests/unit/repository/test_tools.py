"""The repository's own tools: sizes, the virtual environment's script, the Makefile, the CI script."""

import importlib.util
import os
import shlex
import shutil
import subprocess
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def load(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sizes(monkeypatch):
    module = load("tools/check_sizes.py")
    monkeypatch.setattr(module, "ALLOWED", {})
    return module


def write(path: Path, lines: int, text: str = "x = 1"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n" * lines)


@pytest.mark.parametrize(
    ("name", "lines", "warned", "failed"),
    [
        ("src/quern/a.py", 300, False, False),
        ("src/quern/a.py", 301, True, False),
        ("src/quern/a.py", 400, True, False),
        ("src/quern/a.py", 401, False, True),
        ("csrc/kernels/a.cc", 500, True, False),
        ("csrc/kernels/a.cc", 501, False, True),
        ("src/quern/report/page.js", 401, False, True),
        ("tools/a.py", 501, False, True),
        ("tests/test_a.py", 600, False, False),
        ("tests/test_a.py", 601, False, True),
        ("docs/a.py", 9999, False, False),
    ],
)
def test_file_limits(sizes, tmp_path, name, lines, warned, failed):
    write(tmp_path / name, lines)
    warnings, errors = sizes.check(tmp_path)
    assert (bool(warnings), bool(errors)) == (warned, failed)


def test_function_limit(sizes, tmp_path):
    body = "    pass\n"
    (tmp_path / "src").mkdir()
    (tmp_path / "src/a.py").write_text("def fits():\n" + body * 79 + "\ndef too_long():\n" + body * 80)
    assert sizes.check(tmp_path) == ([], ["src/a.py:too_long: 81 lines, a function may have 80"])


def test_folder_limit(sizes, tmp_path):
    """Files that lie in the folder itself count, and those of other tools may be as many as there are tools."""
    for folder in ("codecs", "codecs/more", "peers", "peers/adapters"):
        for number in range(8 if "peers" not in folder else 9):
            write(tmp_path / f"src/quern/{folder}/a{number}.py", 275)
    assert sizes.check(tmp_path) == ([], [])
    write(tmp_path / "src/quern/codecs/more/b.py", 1)
    (error,) = sizes.check(tmp_path)[1]
    assert error.startswith("src/quern/codecs/more: 2201 lines of Python, a folder may have 2200")


def test_functions_are_short_in_the_middle(sizes, tmp_path):
    write(tmp_path / "src/quern/a.py", 1, "def short():\n" + "    pass\n" * 3)
    for number, lines in enumerate((7, 7, 20)):
        write(tmp_path / f"src/quern/b{number}.py", 1, "async def f():\n" + "    pass\n" * (lines - 1))
    assert sizes.median_function(tmp_path) == 7
    assert sizes.check(tmp_path) == ([], [])
    write(tmp_path / "src/quern/c.py", 1, "def f():\n" + "    pass\n" * 8)
    write(tmp_path / "src/quern/d.py", 1, "def f():\n" + "    pass\n" * 8)
    assert sizes.check(tmp_path)[1] == ["src/quern: the median function has 8 lines; fewer than 8 are wanted"]
    assert sizes.median_function(tmp_path / "nothing") == 0


def test_allowed_files_pass_and_entries_must_exist(sizes, tmp_path, monkeypatch):
    write(tmp_path / "src/table.py", 900)
    monkeypatch.setattr(sizes, "ALLOWED", {"src/table.py": "a table", "src/gone.py": "was a table"})
    assert sizes.check(tmp_path)[1] == ["src/gone.py: allowed, but it is gone"]


def create_venv(tmp_path: Path, pythons: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the script with only these programs (name: shell text) on PATH."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for tool in ("bash", "env"):
        (programs / tool).symlink_to(shutil.which(tool))
    for name, text in pythons.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    return subprocess.run(
        [ROOT / "tools/create_venv.sh", tmp_path / "venv"], capture_output=True, text=True, env={"PATH": str(programs)}
    )


OLD = 'case "$*" in *version_info*) exit 1;; esac'
WITHOUT_VENV = 'case "$*" in *ensurepip*) exit 1;; *"print("*) echo 3.12;; esac'
GOOD = 'case "$*" in *"-m venv"*) echo "$0 makes ${@: -1}";; esac'


@pytest.mark.parametrize("pythons", [{}, {"python3": OLD}])
def test_no_python_that_is_new_enough(tmp_path, pythons):
    ended = create_venv(tmp_path, pythons)
    assert ended.returncode == 1
    assert "no Python 3.11 or newer" in ended.stderr
    assert "apt install" in ended.stderr


def test_python_without_venv(tmp_path):
    ended = create_venv(tmp_path, {"python3": WITHOUT_VENV})
    assert ended.returncode == 1
    assert "apt install python3-venv" in ended.stderr
    assert "python3.12-venv" in ended.stderr


def test_the_first_good_python_is_taken(tmp_path):
    ended = create_venv(tmp_path, {"python3": OLD, "python3.12": GOOD, "python3.11": GOOD})
    assert ended.returncode == 0
    assert ended.stdout.strip() == f"{tmp_path}/bin/python3.12 makes {tmp_path}/venv"


def test_make_lists_its_targets():
    told = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [line.split()[1] for line in told.splitlines()] == (
        [
            "help",
            "install",
            "demo",
            "test",
            "test-quick",
            "check",
            "format",
            "run",
            "readme",
            "messages",
            "messages-compile",
            "lock",
            "lock-peers",
            "test-latest",
            "test-lowest",
            "clean",
        ]
    )


@pytest.mark.parametrize(("check", "test", "code"), [(0, 0, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)])
def test_ci_runs_both_halves_and_is_honest(tmp_path, check, test, code):
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci/run")
    (tmp_path / "Makefile").write_text(f"check:\n\t@echo checked; exit {check}\ntest:\n\t@echo 7 passed; exit {test}\n")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    ended = subprocess.run([tmp_path / ".ci/run"], capture_output=True, text=True, cwd="/", env=environment)
    assert ended.returncode == code
    assert "checked" in ended.stdout
    assert "7 passed" in ended.stdout


def test_the_longest_files_come_first():
    """As long as they exist; what is not named keeps its place."""
    conftest = load("tests/conftest.py")
    paths = [ROOT / "tests" / name for name in conftest.LONGEST]
    assert [path for path in paths if not path.is_file()] == []
    others = [ROOT / "tests/a.py", ROOT / "tests/b.py"]
    items = [types.SimpleNamespace(path=path) for path in (others[0], *reversed(paths), others[1])]
    conftest.pytest_collection_modifyitems(items)
    assert [item.path for item in items] == [*paths, *others]


def test_the_quick_tour_names_tests_that_exist():
    command = ["make", "--no-print-directory", "--dry-run", "--old-file", ".venv/.installed-dev", "test-quick"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in told.splitlines() if "pytest" in line]
    named = [word.split("::")[0] for word in shlex.split(line) if word.startswith("tests/")]
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []
