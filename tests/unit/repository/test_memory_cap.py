"""The script that holds caps of memory in a cgroup: that the kernel enforces it, that refusals are read, what the page says."""

import importlib
import sys
from pathlib import Path

import pytest
from tiny_model import tiny_config, write_model
from typer.testing import CliRunner

from quern.cli.main import app

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("memory_cap")


@pytest.mark.parametrize(("size", "killed"), [(1 << 20, 0), (200 << 20, 1)])
def test_a_process_beyond_the_limit_is_killed(script, size, killed):
    try:
        with script.cgroup(64 << 20) as group:
            done = group.run([sys.executable, "-S", "-c", f"x = bytearray({size}); x[::4096] = x[::4096]"])
            assert group.killed() == killed
            assert (done.returncode == 0) is (killed == 0)
    except SystemExit as error:
        pytest.skip(str(error))
    assert not group.folder.exists()


def test_the_least_cap_is_read_from_the_message(script, tmp_path):
    model = write_model(tmp_path / "model", tiny_config())
    words = ["quantize", str(model), "-o", str(tmp_path / "out"), "--recipe", "rtn4", "--memory", "1MB"]
    refused = CliRunner().invoke(app, words, env={"COLUMNS": "4000", "NO_COLOR": "1"})
    assert refused.exit_code == 2
    assert script.least_of(refused) > 50_000_000
    with pytest.raises(SystemExit, match="no least cap was told"):
        script.least_of(CliRunner().invoke(app, ["quantize", "--no-such"]))


def test_what_became_of_each_choice(script):
    row = {
        "choice": "plain", "recipe": "r", "least_cap": 1000_000_000, "refused_below": True, "survived": True,
        "killed_by_the_kernel": 0, "exit_code": 0, "peak_rss_bytes": 900_000_000,
    }  # fmt: skip
    killed = {**row, "choice": "drift", "survived": False, "killed_by_the_kernel": 1, "peak_rss_bytes": None}
    result = {
        "date": "2026-01-01", "command": "c", "shape": {"layers": 1, "hidden": 2, "intermediate": 3}, "tokens": 4,
        "threads": 2, "cgroup": 1, "rows": [row, killed],
    }  # fmt: skip
    text = script.section(result)
    assert "| plain | `r` | 1 GB | refused | finished | 900 MB | 90.0 % |" in text
    assert "| drift | `r` | 1 GB | refused | killed by the kernel |  |  |" in text
