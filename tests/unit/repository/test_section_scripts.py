"""Scripts of benchmarks/ that measure a model in several ways: what they refuse before they measure, and sections of partial
results."""

import argparse
import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def result_of(*stages):
    rows = [
        {"recipe": "compact", "stage": stage, "seed": 0, "bytes": 1000, "texts": {"held-out": {"kl": kl}}}
        for stage, kl in stages
    ]
    return {
        "model": "m", "date": "2026-01-01", "hardware": {"cpu_model": "a processor"}, "calibration": [], "passes": 1,
        "train_tokens": 512, "tokens": 128, "rows": rows,
    }  # fmt: skip


def test_shares_are_those_of_plain_and_missing_where_that_is(module):
    section = module("least_loss").section
    assert "| 0.4 | 0.1 (0.25) |" in section(result_of(("plain", 0.4), ("medium", 0.1)))
    assert "| 0.1 | 0.05 |" in section(result_of(("medium", 0.1), ("high", 0.05)))


@pytest.mark.parametrize(
    ("script", "options", "said"),
    [
        ("least_loss", ["--stages", "plain", "trained"], "trained goes on from high, which is to be named too"),
        ("least_loss", ["--stages"], "expected at least one argument"),
        ("least_loss", ["--text", "wiki.txt"], "'wiki.txt' is no NAME=FILE"),
        ("training", ["--text", "wiki=/none/wiki.txt"], "there is no such file"),
        ("tuning", ["--recipes"], "expected at least one argument"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_is_measured(
    module, monkeypatch, capsys, script, options, said
):
    monkeypatch.setattr(sys, "argv", [script, *options])
    with pytest.raises(SystemExit) as ended:
        module(script).main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_what_was_measured_of_another_artifact_is_measured_again(module, monkeypatch, tmp_path):
    """The folder's artifacts may have been removed and made anew, of other calibration text."""
    training = module("training")
    measured, text = [], []

    class Made:
        bits_per_weight, bytes, steps, best_step, notes, seconds = 4.0, 1000, 1, 1, (), 1.0

    def make(model, path, **given):
        path.mkdir(exist_ok=True)
        (path / "quern.json").write_text(json.dumps({"fingerprint": {"calibration_sha256": text[-1]}}))
        return Made

    monkeypatch.setattr(training.quern, "quantize", make)
    monkeypatch.setattr(training.quern, "train", make)
    monkeypatch.setattr(training, "divergence", lambda *given: measured.append(given) or {"kl": 0.1})
    options = argparse.Namespace(
        output=tmp_path, text=[], tokens=128, model="m", calibration=[], calibration_tokens=None, compute_dtype="auto",
        train="codes", train_tokens=512, passes=1, threads=1)  # fmt: skip
    for calibrated, known in (("one", 2), ("one", 2), ("two", 4)):
        text.append(calibrated)
        training.row(options, "rtn4")
        assert len(measured) == known
