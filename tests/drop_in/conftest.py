"""A copy of the package with a family, a codec, a format and a measure more, and what its commands show with them."""

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import other_copy
import pytest
from tiny_model import calibration_text, tiny_config, write_model
from warm_workers import Forking

HERE, ROOT = Path(__file__).parent, Path(__file__).resolve().parents[2]
MEASURE = "src/quern/evaluation/measures/entropy.py"
PAGE = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
DROPPED = {
    "src/quern/architectures/dots1.py": (HERE / "family.py").read_text("utf-8"),
    "src/quern/codecs/vector.py": (HERE / "codec.py").read_text("utf-8"),
    "src/quern/formats/zipped.py": (HERE / "form.py").read_text("utf-8"),
    MEASURE: re.search(rf"`{MEASURE}`:\n\n```python\n(.*?)```", PAGE, re.DOTALL)[1],
}
RECIPE = """
name: dropped
weights: {codec: vector, entries: 64, steps: 4}
overrides:
  - {pattern: "*.down_proj", codec: integer, bits: 4, group_size: 16}
  - {pattern: "*.o_proj", rounding: {method: nearest}, rotated: false}
transforms: [{method: hadamard}]
calibration: {tokens: 512, sequence_length: 64}
format: zipped
"""
COMMANDS = """
import json, sys
from contextlib import closing
from quern.cli.main import app
from quern.comparison import worker_process
from warm_workers import Forking

worker_process.subprocess = Forking()
with closing(worker_process.subprocess):
    for arguments in json.loads(sys.argv[1]):
        assert app(arguments, standalone_mode=False) in (None, 0)
        print("=====")
"""
TEXTS = ("one.txt", "two.txt", "three.txt")
HOW_MUCH = (*(word for name in TEXTS for word in ("--text", name)), "--tokens", "100", "--no-speed", "--threads", "1")
CALIBRATED = ("--calibration", "text.txt", "--threads", "1")


def config() -> dict:
    """One dense block, and one with four routed experts and a shared one."""
    return tiny_config(
        "dots1",
        num_hidden_layers=2,
        first_k_dense_replace=1,
        n_routed_experts=4,
        n_shared_experts=2,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        routed_scaling_factor=1.5,
        sliding_window=None,
    )


def sources(folder: Path) -> dict[str, str]:
    """Digests of all files of the package in ``folder``."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((folder / "src").rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="session")
def run(copy) -> Iterator[Callable[..., str]]:
    """What Python prints in the copy's folder, with the copy's package, which a process has imported already."""
    environment = {**os.environ, "PYTHONPATH": f"{copy / 'src'}:{ROOT / 'tests'}", "COLUMNS": "300"}
    with contextlib.closing(Forking(environment)) as forking:
        yield functools.partial(forking.python, copy)


@pytest.fixture(scope="session")
def copy(tmp_path_factory) -> Path:
    """The package with four files more and none changed, a model of the family, and texts."""
    folder = tmp_path_factory.mktemp("dropped")
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    before = sources(folder)
    for place, code in DROPPED.items():
        (folder / place).write_text(code, "utf-8")
    after = sources(folder)
    assert after.keys() - before.keys() == DROPPED.keys()
    assert before.items() <= after.items()
    other_copy.prefer(folder / "src")
    write_model(folder / "model", config())
    (folder / "text.txt").write_text(calibration_text()[:40_000], "utf-8")
    (folder / "dropped.yaml").write_text(RECIPE, "utf-8")
    for name in TEXTS:
        (folder / name).write_text(f"the words of {name} are a document of their own", "utf-8")
    return folder


@pytest.fixture(scope="session")
def shown(run) -> dict[str, str]:
    """What the commands print, by name; all in one process, because each would import the same."""
    commands = {
        "quantize": ["model", "--recipe", "dropped.yaml", *CALIBRATED, "-o", "out"],
        "inspect": ["out", "--json"],
        "evaluate": ["out", "--reference", "model", *HOW_MUCH],
        "compare": ["model", "--recipes", "dropped.yaml", "-o", "compared", *CALIBRATED, *HOW_MUCH[:-2]],
    }
    told = run("-c", COMMANDS, json.dumps([[name, *rest] for name, rest in commands.items()]))
    return dict(zip(commands, told.split("=====\n"), strict=False))


@pytest.fixture(scope="session")
def rows(copy, shown) -> list[dict]:
    """The rows of results.json, as plain data."""
    return json.loads((copy / "compared" / "results.json").read_text("utf-8"))["rows"]
