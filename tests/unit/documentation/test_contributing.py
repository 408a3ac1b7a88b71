"""CONTRIBUTING.md, followed word for word in a copy of the package; a tiny model has the bundled one's name there."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import other_copy
import pytest
from tiny_model import tiny_config, write_model

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
NAMED_BLOCK = re.compile(r"`([\w/]+\.(?:py|yaml))`:\n\n```\w+\n(.*?)```", re.DOTALL)
FILES = dict(NAMED_BLOCK.findall(PAGE))
CODEC, TEST, RECIPE = "src/quern/codecs/power_of_two.py", "tests/unit/codecs/test_power_of_two.py", "shifts.yaml"
MEASURE = "src/quern/evaluation/measures/entropy.py"  # tests/drop_in/test_new_measure.py follows its steps


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The repository as a contributor has it after the walk-through."""
    folder = tmp_path_factory.mktemp("contributor")
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "tests/contract", "requirements"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
    for name in ("pyproject.toml", *(path.name for path in (ROOT / "tests").glob("*.py"))):
        source = ROOT / name if (ROOT / name).is_file() else ROOT / "tests" / name
        shutil.copy(source, folder / source.relative_to(ROOT))
    other_copy.prefer(folder / "src")
    write_model(folder / "models" / "python-7m", tiny_config(max_position_embeddings=1024))
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")
    return folder


def run(folder: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder / "src"), "COLUMNS": "200"}
    ended = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def quern(folder: Path, *arguments: str) -> str:
    return run(folder, "-c", "from quern.cli.main import run; run()", *arguments)


def test_the_page_names_its_files():
    assert set(FILES) == {CODEC, TEST, RECIPE, MEASURE}


def test_step_2_the_codec_is_known(copy):
    assert "power_of_two" in json.loads(quern(copy, "recipes", "--json"))["choices"]["codec"]


def test_step_3_the_commands(copy):
    block = re.search(r"```sh\n(quern quantize.*?)```", PAGE, re.DOTALL)[1]
    told = [quern(copy, *shlex.split(line)[1:]) for line in block.splitlines()]
    assert len(told) == 3
    assert "power_of_two" in told[1]


def test_step_4_the_tests(copy):
    told = run(copy, "-m", "pytest", "-q", TEST)
    assert "2 passed" in told


@pytest.mark.skipif(
    not any((ROOT / "tests/contract").glob("test_*codec*.py")), reason="no contract tests of codecs yet"
)
def test_step_4_the_contract(copy):
    contracts = [str(path.relative_to(ROOT)) for path in (ROOT / "tests/contract").glob("test_*codec*.py")]
    told = run(copy, "-m", "pytest", "-v", "-k", "power_of_two", *contracts)
    assert re.search(r"[1-9]\d* passed", told)


def test_the_code_is_as_clean_as_the_rest(copy):
    ruff = Path(sys.executable).with_name("ruff")
    if not ruff.is_file():
        pytest.skip("ruff is not installed beside this Python")
    for command in (["format", "--check"], ["check"]):
        ended = subprocess.run([ruff, *command, CODEC, TEST, MEASURE], cwd=copy, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout
