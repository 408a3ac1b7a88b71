"""The output of the main job, a folder or one file: is it free, or the same job's result, or to be left alone?"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from quern.checkpoint.files import read_json
from quern.checkpoint.jobs.fingerprint import differences
from quern.checkpoint.jobs.output_place import OutputFile, OutputFolder, output_folder
from quern.checkpoint.jobs.work_folder import WorkFolder, check_work_folder, publication
from quern.checkpoint.tokenizer import COPIED
from quern.core.artifact import PROVENANCE, Finding
from quern.core.errors import BadFileError, UserError, option
from quern.core.results import TunedBlock
from quern.formats.base import FORMATS, UNNAMED, artifact_files, file_provenance
from quern.loading.fitting import open_model

INDEX, CONFIG = "model.safetensors.index.json", "config.json"
COMPLETE_WITH = (INDEX, CONFIG, PROVENANCE)
"""Files by which a folder counts as a whole artifact: loaders look for the first two, quern for the last."""
_TEMPLATES = "additional_chat_templates"
"""Folder that transformers writes for the tokenizer of some GGUF files."""


Target = OutputFolder | OutputFile
"""Where an artifact goes."""


def output_target(output: str | Path, model: str | Path, fresh: bool, format: str | None = None) -> Target:
    """Where the artifact of a ``format`` goes, or of one that is a folder where nobody can choose; tried out. Raises
    ``UserError`` where it cannot, or must not, be written."""
    suffix = None if format is None else FORMATS.get(format).suffix
    if suffix is not None:
        if not str(output).lower().endswith(suffix):
            raise UserError(
                f"format {format} writes one file, whose name ends in {suffix}; the output is {str(output)!r}"
            )
        file = OutputFile.of(output, model, lambda path: file_provenance(path) is not None)
        check_work_folder(file.work)
        return file
    _refuse_file_names(output, format)
    target = output_folder(output, model)
    holds_artifact = _provenance(target.path) is not None
    if target.entries() and not holds_artifact and publication(target.work) is None:
        raise UserError(f"{target.path} exists and is not an artifact of quern. Choose another output folder")
    if holds_artifact and not fresh:
        return target  # it is looked at, not written to
    target.refuse_others(_own_names(target), "Move it away or choose another output folder")
    check_work_folder(target.work)
    return target.tried()


def _refuse_file_names(output: str | Path, format: str | None) -> None:
    """Raise ``UserError`` for a folder that is to be called like the file of another format."""
    for name in FORMATS:
        suffix = FORMATS.get(name).suffix
        if suffix is not None and str(output).lower().endswith(suffix) and not Path(output).is_dir():
            writes = "what is written is" if format is None else f"format {format} writes"
            instead = "" if format is None else f"Add {option(f'format={name!r}', f'--format {name}')}, or choose"
            raise UserError(
                f"{str(output)!r} is the name of a file of format {name}, and {writes} a folder. "
                f"{instead or 'Choose'} another output"
            )


def publish(work: WorkFolder, target: Target, fresh: bool) -> None:
    """Put the finished artifact where it was asked for, and remove the work folder."""
    artifact = work.path("artifact")
    if isinstance(target, OutputFile):
        _publish_files(work, artifact, target.path, fresh)
        return
    replaced = artifact_names(target.path) if fresh else ()
    work.publish(artifact, target.path, last=COMPLETE_WITH, replaces=replaced)


def _publish_files(work: WorkFolder, artifact: Path, path: Path, fresh: bool) -> None:
    """The one file of the artifact as ``path``; or its parts beside each other, called after it, the first one last."""
    older = artifact_files(path)
    if len(made := sorted(artifact.iterdir())) == 1 and not [file for file in older if file != path]:
        work.publish_file(made[0], path, replaces=fresh or _is_empty(path))
        return
    named = [path.stem + file.name.removeprefix(UNNAMED) for file in made] if made[1:] else [path.name]
    replaced = dict.fromkeys(file.name for file in (*older, path) if fresh or _is_empty(file))
    work.publish_parts(dict(zip(named, made, strict=True)), path, named[0], list(replaced))


def _is_empty(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == 0


def opened_by(output: Path) -> Path:
    """What the artifact at ``output`` is opened by: the first part of one that lies in several files."""
    files = [] if output.is_dir() else artifact_files(output)
    return files[0] if files else output


def artifact_size(artifact: Path) -> int:
    """Bytes of an artifact's files."""
    files = [path for path in artifact.iterdir() if path.is_file()] if artifact.is_dir() else artifact_files(artifact)
    return sum(path.stat().st_size for path in files)


def tensor_bytes(artifact: Path, format: str) -> int:
    """Bytes of the tensors of an artifact in ``format``."""
    if (said := FORMATS.get(format).tensor_bytes(artifact)) is not None:
        return said
    opened = open_model(artifact.resolve())
    return sum(opened.info(name).stored_bytes for name in opened.names())


def finished_layers(target: Target, fingerprint: dict[str, Any], fresh: bool) -> list[dict[str, Any]] | None:
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


def provenance_notes(artifact: Path) -> list[str]:
    """What should be known of how an artifact's weights are stored, as it was noted when they were made."""
    try:
        return [*(str(note) for note in _said(artifact)["notes"]), *health_notes(artifact)]
    except (BadFileError, KeyError, TypeError):  # of an older version
        return []


def health_notes(artifact: Path) -> list[str]:
    """What the health gate found where an artifact was made, and what was stored otherwise because of it."""
    try:
        return [Finding.model_validate(one).text for one in _said(artifact).get("health", [])]
    except (BadFileError, KeyError, TypeError, ValueError):
        return []


def tuned_blocks(artifact: Path) -> list[TunedBlock]:
    """What tuning gained, as the finished artifact says."""
    return [TunedBlock.model_validate(block) for block in _said(artifact).get("tuning", [])]


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


def _said(artifact: Path) -> dict[str, Any]:
    """What an artifact says of what was done. Raises ``BadFileError`` for a folder without, ``KeyError`` for a file."""
    if (file := opened_by(artifact)).is_file():
        if (found := file_provenance(file)) is None:
            raise KeyError(file.name)
        return found
    return read_json(artifact / PROVENANCE)


def _provenance(artifact: Path) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """Fingerprint and layers of what an artifact describes; None where there is none or it is none of quern's."""
    try:
        found = _said(artifact)
        return dict(found["fingerprint"]), list(found["layers"])
    except (BadFileError, KeyError, TypeError, ValueError):
        return None
