"""A small job in a work folder, run in processes of its own that tests kill."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from pathlib import Path

import torch

from quern.checkpoint.files import write_bytes, write_json
from quern.checkpoint.jobs.work_folder import WorkFolder, finish_removal

STEPS = 3
FINGERPRINT = {"recipe": {"bits": 4}, "seed": 1}


def run_job(folder: Path, destination: Path, pause: float = 0.0) -> None:
    """Steps that chain like blocks: each reads the last one's activations, writes a shard and new activations."""
    if destination.exists():
        finish_removal(folder, destination)
        return
    with WorkFolder.open(folder, FINGERPRINT) as work:
        for step in range(STEPS):
            if work.done(f"block {step}") is None:
                _block(work, step)
            time.sleep(pause)
            if step and work.path(_activations(step - 1)).exists():
                work.path(_activations(step - 1)).unlink()
        write_json(work.path("artifact", "config.json"), {"steps": [work.done(f"block {i}") for i in range(STEPS)]})
        work.publish(work.path("artifact"), destination)


def _activations(step: int) -> str:
    return f"activations/{step}.safetensors"


def _block(work: WorkFolder, step: int) -> None:
    if step and work.done(f"activations {step - 1}") is None:
        raise AssertionError("a finished block without its activations")
    old = work.read_tensors(f"activations/{step - 1}")["x"] if step else torch.arange(5000)
    new = (old * 31 + step) % 1009
    path = work.write_tensors(f"activations/{step}", {"x": new})
    work.finish(f"activations {step}", [path], {})
    shard = work.write_tensors(f"artifact/model-{step}", {"w": new + 1})
    work.finish(f"block {step}", [shard], {"sum": int(new.sum())})


def hashes(folder: Path) -> dict[str, str]:
    """Every file below ``folder`` with its SHA-256."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


LAST = ("index.json", "config.json", "quern.json")
NEW = {"index.json": "new index", "config.json": "new config", "quern.json": "new", "model-1": "new weights", "z": "z"}
OLD = {"index.json": "old index", "config.json": "old config", "quern.json": "old", "model-1": "old", "model-2": "old"}


def run_into(destination: Path) -> None:
    """Publishes ``NEW`` into the folder ``destination``, which exists, in place of ``OLD`` where that is there."""
    old = destination / "quern.json"
    if old.is_file() and old.read_text() == "new":
        finish_removal(destination / ".quern-work", destination)
        return
    with WorkFolder.open(destination / ".quern-work", FINGERPRINT) as work:
        if work.finish_publishing() is None:
            for name, content in NEW.items():
                write_bytes(work.path("artifact", name), content.encode())
            replaced = [name for name in OLD if (destination / name).exists()]
            work.publish(work.path("artifact"), destination, last=LAST, replaces=replaced)
        else:
            work.remove()


def run_and_die(calls: int, job, *arguments) -> None:
    """``job`` that kills itself just before its ``calls``-th change of the disk's state."""
    left = calls

    def lethal(function):
        def wrapped(*arguments, **options):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return wrapped

    for name in ("fsync", "replace", "rename", "unlink", "rmdir", "ftruncate"):
        setattr(os, name, lethal(getattr(os, name)))
    job(*arguments)
