"""The page on other tools' checkpoints names every method that is read, and both READMEs lead to it."""

from __future__ import annotations

import re
from pathlib import Path

from quern.checkpoint.foreign.base import FOREIGN

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs/foreign.md").read_text("utf-8")


def test_every_method_has_a_line():
    assert set(re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE)) == {"quant_method", *FOREIGN.names()}


def test_the_readmes_lead_there():
    for name in ("README.md", "README.zh-CN.md"):
        assert "(docs/foreign.md)" in (ROOT / name).read_text("utf-8")
