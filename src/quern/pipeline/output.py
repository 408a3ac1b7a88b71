"""The output folder of the main job: whether it is free, holds the same job's result, or must not be touched."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from quern.checkpoint.files import read_json
from quern.checkpoint.output_place import OutputFolder, output_folder
from quern.checkpoint.tokenizer import COPIED
from quern.checkpoint.work_folder import check_work_folder, differences, publication
from quern.core.artifact import PROVENANCE
from quern.core.errors import BadFileError, UserError, option

INDEX, CONFIG = "model.safetensors.index.json", "config.json"
COMPLETE_WITH = (INDEX, CONFIG, PROVENANCE)
"""Files by which a folder counts as a whole artifact: loaders look for the first two, quern for the last."""
_TEMPLATES = "additional_chat_templates"
"""Folder that transformers writes for the tokenizer of some GGUF files."""


def output_target(output: str | Path, model: str | Path, fresh: bool) -> OutputFolder:
    """Where the artifact goes, tried out. Raises ``UserError`` where it cannot, or must not, be written."""
    target = output_folder(output, model)
    holds_artifact = _provenance(target.path) is not None
    if target.entries() and not holds_artifact and publication(target.work) is None:
        raise UserError(f"{target.path} exists and is not an artifact of quern. Choose another output folder")
    if holds_artifact and not fresh:
        return target  # it is looked at, not written to
    target.refuse_others(_own_names(target), "Move it away or choose another output folder")
    check_work_folder(target.work)
    return target.tried()


def finished_layers(target: OutputFolder, fingerprint: dict[str, Any], fresh: bool) -> list[dict[str, Any]] | None:
    """Errors of all layers of the artifact that an earlier run of the same job finished, or None.

    Raises ``UserError`` for the result of another job.
    """
    if fresh or (provenance := _provenance(target.path)) is None:
        return None
    then, layers = provenance
    if changed := differences(then, fingerprint):
        raise UserError(
            f"{target.path} holds the result of another job. {changed}\n"
            f"Choose another output folder, or pass {option('fresh=True', '--fresh')} to replace it"
        )
    return layers


def provenance_notes(folder: Path) -> list[str]:
    """What should be known of how an artifact's weights are stored, as it was noted when they were made."""
    try:
        return [str(note) for note in read_json(folder / PROVENANCE)["notes"]]
    except (BadFileError, KeyError, TypeError):  # of an older version
        return []


def artifact_names(folder: Path) -> set[str]:
    """Names in ``folder`` that belong to an artifact of quern's there; none without its ``quern.json``."""
    if _provenance(folder) is None:
        return set()
    shards: set[str] = set()
    with suppress(BadFileError, KeyError, TypeError, ValueError):  # shards that nothing names are not taken for quern's
        shards = {str(name) for name in dict(read_json(folder / INDEX)["weight_map"]).values()}
    with suppress(BadFileError, KeyError, TypeError):  # artifacts of older versions name none
        shards |= {str(name) for name in list(read_json(folder / PROVENANCE)["files"])}
    names = {*COMPLETE_WITH, *COPIED, *shards}
    found = {name for name in names if "/" not in name and (folder / name).is_file()}
    return found | {name for name in (_TEMPLATES,) if (folder / name).is_dir()}


def _own_names(target: OutputFolder) -> set[str]:
    """Those of an artifact, and those that a publication which was stopped has put there or was to replace."""
    moving = publication(target.work)
    return artifact_names(target.path) | (set() if moving is None else {*moving["order"], *moving["replaces"]})


def _provenance(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """Fingerprint and layers of what ``quern.json`` describes; None where there is none or it is none of quern's."""
    try:
        found = read_json(folder / PROVENANCE)
        return dict(found["fingerprint"]), list(found["layers"])
    except (BadFileError, KeyError, TypeError, ValueError):
        return None
