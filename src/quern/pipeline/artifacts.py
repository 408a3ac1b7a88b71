"""The artifacts of a comparison: quern's own are made here, other tools' in ``peers.py``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.files import read_json, write_json
from quern.comparison.row_builder import Contender
from quern.core.progress import Progress
from quern.core.recipe import Recipe
from quern.engines.base import engine_for
from quern.loading.fitting import open_model
from quern.pipeline.output import provenance_notes
from quern.pipeline.quantize import quantize
from quern.texts.source import Text


@dataclass(frozen=True, kw_only=True)
class ArtifactRequest:
    """What the making of all artifacts of one comparison shares."""

    checkpoint: Checkpoint
    model_sha256: str
    folder: Path
    """Of the comparison; artifacts go into ``artifacts/``."""
    calibration: Sequence[str | Path | Text]
    calibration_tokens: int
    """Of other tools; recipes say their own."""
    memory: int | None
    threads: int | None
    seed: int
    fresh: bool
    progress: Progress


def make_artifact(making: ArtifactRequest, recipe: Recipe, engine: str) -> Contender:
    """Quantize by one recipe, or find that it was done; how long it took is kept beside the artifact."""
    artifact = making.folder / "artifacts" / recipe.name
    if making.fresh or not artifact.is_dir():
        making.progress.log(f"quantizing by {recipe.name}")
    timing = artifact.with_name(f"{recipe.name}.json")
    report = quantize(
        making.checkpoint.path,
        artifact,
        recipe=recipe,
        calibration=making.calibration,
        memory=making.memory,
        seed=making.seed,
        fresh=making.fresh,
        threads=making.threads,
        cache=making.folder / "cache",
        progress=making.progress,
    )
    made = open_model(artifact)
    sha256 = made.sha256()
    if report.seconds is not None and not report.resumed:
        record = {"quantize_seconds": report.seconds, "quantize_peak_rss_bytes": report.peak_rss_bytes}
        write_json(timing, {"artifact_sha256": sha256, **record})
    known = read_json(timing) if timing.is_file() else {}
    known = known if known.get("artifact_sha256") == sha256 else {}
    return Contender(
        name=recipe.name,
        path=artifact,
        kind="quern",
        recipe=report.recipe.to_json(),  # what an allocation decided
        quantize_seconds=known.get("quantize_seconds"),
        quantize_peak_rss_bytes=known.get("quantize_peak_rss_bytes"),
        layers=tuple(report.layers),
        tuning=tuple(report.tuning),
        engine=engine_for(made, engine),
        sha256=sha256,
        notes=tuple(provenance_notes(artifact)),
    )
