"""The measure of CONTRIBUTING.md, added to a copy of the package as one file: everything that shows figures shows it."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import other_copy
import pytest
from tiny_model import tiny_config, write_model

from quern.core.results import load_results

ROOT = Path(__file__).resolve().parents[2]
FILE = "src/quern/evaluation/measures/entropy.py"
CODE = re.search(rf"`{FILE}`:\n\n```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.DOTALL)[1]
COMMANDS = """
import json, sys
from quern.cli.main import app

for arguments in json.loads(sys.argv[1]):
    assert app(arguments, standalone_mode=False) in (None, 0)
    print("=====")
"""
TEXTS = ("one.txt", "two.txt", "three.txt")
HOW_MUCH = (*(word for name in TEXTS for word in ("--text", name)), "--tokens", "100", "--no-speed", "--threads", "1")


def sources(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the package with one file more, a model, and a text."""
    folder = tmp_path_factory.mktemp("measure")
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    before = sources(folder / "src")
    (folder / FILE).write_text(CODE, "utf-8")
    after = sources(folder / "src")
    assert after.keys() - before.keys() == {str(Path(FILE).relative_to("src"))}
    assert before.items() <= after.items()
    other_copy.prefer(folder / "src")
    write_model(folder / "model", tiny_config())
    for name in TEXTS:
        (folder / name).write_text(f"the words of {name} are a document of their own", "utf-8")
    return folder


def run(folder: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder / "src"), "COLUMNS": "300"}
    ended = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def shown(copy) -> list[str]:
    """What evaluate and compare print."""
    commands = [
        ["evaluate", "model", *HOW_MUCH],
        ["compare", "model", "-o", "out", "--recipes", "rtn4", "--calibration", "one.txt", *HOW_MUCH],
    ]
    return run(copy, "-c", COMMANDS, json.dumps(commands)).split("=====\n")


@pytest.fixture(scope="module")
def rows(copy, shown) -> list[dict]:
    """The rows of results.json, as plain data."""
    return json.loads((copy / "out" / "results.json").read_text("utf-8"))["rows"]


def written(row: dict) -> str:
    return f"{row['figures']['entropy']['value']:.3g}"


def test_evaluate_shows_it(shown, rows):
    (line,) = [line for line in shown[0].splitlines() if "Entropy" in line]
    assert line.split()[-1] in {written(row) for row in rows if row["kind"] == "unquantized"}


def test_compare_writes_it_for_every_row(copy, shown, rows):
    assert [set(row["figures"]) for row in rows] == [{"entropy"}] * len(rows)
    for row in rows:
        figure = row["figures"]["entropy"]
        low, high = figure["interval"]
        assert low < figure["value"] < high < np.log(tiny_config()["vocab_size"])
        assert figure["unit"] == "nats/token"
    values = {row["kind"]: row["figures"]["entropy"]["value"] for row in rows}
    assert values["quern"] != values["unquantized"]
    without_the_measure = load_results(copy / "out" / "results.json")
    assert [row.figures["entropy"].value for row in without_the_measure.rows] == [
        row["figures"]["entropy"]["value"] for row in rows
    ]


def test_compare_shows_it(shown, rows):
    table = shown[1].split("Places.")[0]
    assert "Entropy," in table
    for row in rows:
        assert any(row["name"] in line and written(row) in line for line in table.splitlines())


def test_the_report_has_a_column_of_it(copy, shown):
    page = (copy / "out" / "report.html").read_text("utf-8")
    assert '<th scope="col" data-key="entropy" data-better="low">' in page
    assert "Mean entropy of the predictions" in page
    data = json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)[1])
    assert {"key": "entropy", "label": "Entropy", "unit": "nats/token", "better": "low", "kind": "number"} in data[
        "columns"
    ]
    assert all(
        row["ranges"]["entropy"][0] < row["values"]["entropy"] < row["ranges"]["entropy"][1] for row in data["rows"]
    )


def test_the_page_of_results_gets_its_line(copy):
    for name in ("tools/update_results_page.py", "docs/results.md"):
        (copy / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    run(copy, "tools/update_results_page.py")
    old, new = ((folder / "docs/results.md").read_text("utf-8").splitlines() for folder in (ROOT, copy))
    (line,) = [line for line in new if line not in old]
    assert line == (
        "| `entropy` | nats/token | low | `figures.entropy` | Mean entropy of the predictions, with its 95 % interval. |"
    )
    assert len(new) == len(old) + 1


UNIFORM = """
import numpy, torch
from pathlib import Path
from fake_model import VOCABULARY, FakeModel
from quern.evaluation.measures.base import MEASURES, Given
from quern.evaluation.texts import Window, Windows, save_windows

windows = tuple(Window(number // 2, numpy.arange(2, 6 + number)) for number in range(4))
save_windows(Path("w.npz"), Windows(windows, ()))
steps = []
measure = MEASURES.get("entropy")
raw = measure.run(FakeModel(torch.zeros(VOCABULARY, VOCABULARY)), Given(advance=steps.append, windows_file="w.npz"))
print(VOCABULARY, sum(steps), [row[:2] for row in raw], measure.summarize(raw, 0).value)
"""


def test_a_uniform_model_has_the_entropy_of_its_vocabulary(copy):
    environment = {**os.environ, "PYTHONPATH": f"{copy / 'src'}:{ROOT / 'tests'}"}
    ended = subprocess.run([sys.executable, "-c", UNIFORM], cwd=copy, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    vocabulary, steps, value = re.fullmatch(r"(\d+) (\d+) \[.*\] (\S+)\n", ended.stdout).groups()
    assert "[(0, 3), (0, 4), (1, 5), (1, 6)]" in ended.stdout
    assert steps == "22"
    assert float(value) == pytest.approx(np.log(int(vocabulary)), rel=1e-12)
