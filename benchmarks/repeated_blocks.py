"""An artifact with more blocks than were quantized: finished blocks are repeated under other names, for timing alone.

Of a model of 80 blocks some are quantized, the others take as long; what comes out has the bytes and the layout of the
whole, and computes nonsense. Repeated blocks are copies in files of their own: decoding reads each from its own memory, as
it would the true ones.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from quern.checkpoint.files import read_json
from quern.checkpoint.folder import CONFIG, INDEX
from quern.checkpoint.safetensors_file import METADATA, read_header, read_tensors, write_safetensors
from quern.core.artifact import PROVENANCE


def repeat(source: Path, target: Path, layers: int) -> int:
    """Make of the artifact ``source`` (format ``quern``, a shard a stage) one of ``layers`` blocks; how many were copied.

    Goes on where an earlier call was stopped: a shard is there whole or not at all, and ``config.json`` is written last.
    """
    config, places = read_json(source / CONFIG), read_json(source / INDEX)["weight_map"]
    true = int(config["num_hidden_layers"])
    target.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for stage in range(layers + 2):
        block = stage - 1
        last = stage == layers + 1
        file = _shard(stage, layers)
        own = _shard(true + 1 if last else 0 if stage == 0 else block % true + 1, true)
        if not (target / file).is_file():
            _put(source / own, target / file, block % true, block if 0 < stage <= layers else block % true)
        weight_map |= dict.fromkeys(read_header(target / file), file)
    total = sum(info.stored_bytes for file in set(weight_map.values()) for info in read_header(target / file).values())
    _write(target / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    for path in source.iterdir():
        if path.is_file() and path.name not in {*places.values(), INDEX, CONFIG, PROVENANCE}:
            shutil.copyfile(path, target / path.name)
    provenance = read_json(source / PROVENANCE)
    note = (
        f"blocks {true} to {layers - 1} repeat blocks 0 to {true - 1}: good for measuring time and memory, nothing else"
    )
    _write(target / PROVENANCE, {**provenance, "notes": [*provenance["notes"], note]} if layers > true else provenance)
    quantization = {**config["quantization_config"], "modules": _modules(config, true, layers)}
    _write(target / CONFIG, {**config, "num_hidden_layers": layers, "quantization_config": quantization})
    return max(0, layers - true)


def _shard(stage: int, layers: int) -> str:
    return f"model-{stage + 1:05d}-of-{layers + 2:05d}.safetensors"


def _put(source: Path, target: Path, old: int, new: int) -> None:
    """A shard under the names of block ``new``; a link where these are the same."""
    if old != new:
        named = {_renamed(name, new): tensor for name, tensor in read_tensors(source).items()}
        write_safetensors(target, named, METADATA)
        return
    try:
        os.link(source, target)
    except OSError:  # another disk
        unfinished = target.with_suffix(".part")
        shutil.copyfile(source, unfinished)
        os.replace(unfinished, target)


def _renamed(name: str, block: int) -> str:
    """``model.layers.3.mlp...`` of another block."""
    before, layers, rest = name.partition(".layers.")
    return f"{before}{layers}{block}.{rest.partition('.')[2]}"


def _modules(config: dict[str, Any], true: int, layers: int) -> dict[str, Any]:
    """What config.json says of every module."""
    found: dict[str, Any] = {}
    for name, said in config["quantization_config"]["modules"].items():
        if ".layers." not in name:
            found[name] = said
            continue
        block = int(name.partition(".layers.")[2].partition(".")[0])
        found |= {_renamed(name, index): said for index in range(block, layers, true)}
    return dict(sorted(found.items()))


def _write(path: Path, content: dict[str, Any]) -> None:
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(content, indent=1), "utf-8")
    os.replace(unfinished, path)
