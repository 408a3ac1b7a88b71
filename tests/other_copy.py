"""A copy of the package that Python imports instead of the installed one."""

from __future__ import annotations

import shutil
from pathlib import Path

from quern import _native

WITHOUT_THE_INSTALLED_ONE = """
import sys

sys.meta_path[:] = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
"""
"""An editable installation finds its package before PYTHONPATH is looked at; Python runs sitecustomize after it."""


def prefer(source: Path) -> None:
    """Make ``source``, a folder that holds a copy of ``quern`` and will be on PYTHONPATH, win; adds the native part."""
    (source / "sitecustomize.py").write_text(WITHOUT_THE_INSTALLED_ONE, "utf-8")
    shutil.copy(_native.__file__, source / "quern")
