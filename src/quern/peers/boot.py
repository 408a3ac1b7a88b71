"""Starts an adapter in its tool's environment: ``python -P boot.py NAME``.

Run by path with the environment's own Python. quern is not installed there; this makes its modules importable from where
they lie, without the rest of quern's environment and without ``quern/__init__.py``, which would teach transformers to
load quern's artifacts.
"""

import sys
import types
from pathlib import Path

package = types.ModuleType("quern")
package.__path__ = [str(Path(__file__).resolve().parent.parent)]
sys.modules["quern"] = package

from quern.peers.worker import main  # noqa: E402 - quern is known only now

main(sys.argv[1])
