"""A process that has everything imported and forks a child for each quantization, which it may kill at a given moment.

One request is a line of JSON on stdin, its answer one on stdout. Request: ``model``, ``output``, ``recipe``, ``text``,
``threads``, and for a kill ``lines`` (of the journal to wait for) and ``delay`` (seconds after that). Answer: ``killed``,
``error`` or null, ``seconds``, and ``steps``, those in the journal when the child ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers.models.qwen2.modeling_qwen2
import transformers.models.qwen2.tokenization_qwen2  # noqa: F401 - so that the children need not

from quern.core.recipe import parse_recipe
from quern.pipeline.quantize import quantize


def journal_of(output: str) -> Path:
    return Path(output + ".quern-work") / "journal.jsonl"


def lines_of(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().split(b"\n")[:-1]
    except OSError:
        return []


def child(request: dict[str, Any], pipe: int) -> None:
    try:
        quantize(
            request["model"], request["output"], recipe=parse_recipe(request["recipe"], "request"),
            calibration=[request["text"]], threads=request["threads"],
        )  # fmt: skip
        os.write(pipe, b"null")
    except BaseException:
        os.write(pipe, json.dumps(traceback.format_exc()).encode()[:60_000])
    finally:
        os._exit(0)


def carry_out(request: dict[str, Any]) -> dict[str, Any]:
    started = time.perf_counter()
    journal, seen = journal_of(request["output"]), []
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        child(request, writing)
    os.close(writing)
    while os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        seen = lines_of(journal) or seen
        if request.get("lines") is not None and len(seen) >= request["lines"]:
            time.sleep(request["delay"])
            os.kill(process, signal.SIGKILL)
            break
        time.sleep(0.0005)
    _, status = os.waitpid(process, 0)
    seen = lines_of(journal) or seen
    said = os.read(reading, 65_536)
    os.close(reading)
    killed = os.WIFSIGNALED(status)
    return {
        "killed": killed,
        "error": None if killed else json.loads(said),
        "seconds": time.perf_counter() - started,
        "steps": [json.loads(line)["step"] for line in seen],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(carry_out(json.loads(line))), flush=True)
