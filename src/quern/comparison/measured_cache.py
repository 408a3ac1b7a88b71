"""What was measured, kept beside the artifacts, so that an interrupted comparison does not measure it again.

A file for each contender under a hash of everything that its figures depend on: the artifact's bytes, what runs it, how
much is measured on which text, the machine, quern's own compiled code, and the files that declare the measures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

import quern
from quern import _native
from quern.checkpoint.files import write_bytes
from quern.comparison.inputs import Inputs, MeasurementSettings
from quern.comparison.row_builder import Contender, Measured
from quern.core.results import METRICS_VERSION
from quern.evaluation.measures import base

_ADAPTER = TypeAdapter(Measured)


class MeasuredCache:
    """Reads and writes files in ``folder``; reads none if everything is to be made anew (``fresh``)."""

    def __init__(
        self,
        folder: Path,
        reference_sha256: str,
        inputs: Inputs,
        settings: MeasurementSettings,
        hardware: Mapping[str, Any],
        *,
        fresh: bool,
    ) -> None:
        self._folder, self._reference_sha256, self._fresh = folder, reference_sha256, fresh
        self._inputs, self._settings = inputs, settings
        self._machine = [hardware["cpu_model"], hardware["usable_cores"], hardware["gpus"]]

    def load(self, contender: Contender, sha256: str) -> Measured | None:
        """What was measured before of ``contender``, whose artifact has the hash ``sha256``; None where nothing is kept."""
        if self._fresh:
            return None
        try:
            return _ADAPTER.validate_json(self._path(contender, sha256).read_bytes())
        except (OSError, ValidationError):
            return None

    def save(self, contender: Contender, sha256: str, measured: Measured) -> None:
        """Keep what was measured of ``contender``, whose artifact has the hash ``sha256``."""
        write_bytes(self._path(contender, sha256), _ADAPTER.dump_json(measured, indent=2))

    def _path(self, contender: Contender, sha256: str) -> Path:
        depends = {
            **self._common,
            "artifact": sha256,
            "engine": contender.engine,
            "cache": contender.cache,
            "tool": None if contender.tool is None else [contender.tool.model_dump(), contender.runs_in],
            "timed": contender.timed,
        }
        name = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:24]
        return self._folder / f"{contender.name.replace('/', '-')}-{name}.json"

    @cached_property
    def _common(self) -> dict[str, Any]:
        options = self._inputs.options
        return {
            "quern": [quern.__version__, METRICS_VERSION, _sha256(Path(str(_native.__file__)))],
            "settings": vars(self._settings),
            "windows": self._inputs.windows_sha256,
            "options": None if options is None else _sha256(options),
            "reference": self._reference_sha256,
            "machine": self._machine,
            "measures": {path.name: _sha256(path) for path in sorted(Path(base.__file__).parent.glob("*.py"))},
        }


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
