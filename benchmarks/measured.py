"""Run one quantization in a process of its own; its wall-clock time and its peak resident memory."""

from __future__ import annotations

import datetime
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from quern.advisor.hardware import probe

RESULTS = Path(__file__).parent / "results"

CHILD = """
import json, sys
from quern.pipeline.quantize import quantize
request = json.loads(sys.stdin.read())
report = quantize(**request)
print(json.dumps({"seconds": report.seconds, "peak_rss_bytes": report.peak_rss_bytes, "bytes": report.bytes,
                  "bits_per_weight": report.bits_per_weight}))
"""


def quantize_in_child(**request: Any) -> dict[str, Any]:
    """``quern.quantize(**request)`` (plain JSON values) in a fresh process."""
    done = subprocess.run([sys.executable, "-c", CHILD], input=json.dumps(request), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found["largest_child_rss_bytes"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return found


def write_result(theme: str, content: dict[str, Any]) -> Path:
    """``results/<theme>_<cpu>_<date>.json`` with hardware and date."""
    hardware = probe()
    cpu = "".join(c if c.isalnum() else "-" for c in str(hardware["cpu_model"] or "cpu")).strip("-")
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    path = RESULTS / f"{theme}_{cpu}_{date}.json"
    RESULTS.mkdir(exist_ok=True)
    record = {"command": _command(), "date": date, "load": os.getloadavg(), "hardware": hardware}
    path.write_text(json.dumps({**record, **content}, indent=2) + "\n", "utf-8")
    return path


def _command() -> str:
    """The command line; of folders on this machine only their names."""
    return " ".join(["python", *(Path(word).name if word.startswith("/") else word for word in sys.argv)])
