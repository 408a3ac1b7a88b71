"""A source whose weights were rounded before: that this stays, and how the artifact's size compares with its."""

from __future__ import annotations

import re

import gguf
from artifacts import small_recipe
from gguf_model import write_gguf
from tiny_model import tiny_config, write_model

from quern.pipeline.quantize import quantize

WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


def notes(tmp_path, kind: gguf.GGMLQuantizationType) -> tuple[float, list[str]]:
    """The share that an artifact takes of a GGUF's bytes, and what quantizing says."""
    folder = write_model(tmp_path / "model", tiny_config(**WIDE))
    (source,) = write_gguf(folder, tmp_path / "m.gguf", kind=kind)
    report = quantize(source, tmp_path / kind.name, recipe=small_recipe(weights={"bits": 4}))
    again = quantize(source, tmp_path / kind.name, recipe=small_recipe(weights={"bits": 4}))
    assert [note for note in again.notes if "finished already" not in note] == report.notes
    return report.bytes / source.stat().st_size, report.notes


def test_both_sizes_are_said_where_the_source_was_rounded(tmp_path):
    share, said = notes(tmp_path, gguf.GGMLQuantizationType.Q8_0)
    assert re.search(r"m\.gguf were rounded before, to 8\.\d bits each \(Q8_0\): what that cost stays", said[0])
    assert f"the artifact is smaller by {1 - share:.1%} than that" in said[1]
    assert "Compression is measured against the weights in bf16" in said[1]


def test_a_larger_artifact_says_so(tmp_path):
    share, said = notes(tmp_path, gguf.GGMLQuantizationType.Q4_0)
    assert share > 1
    assert f"the artifact is larger by {share - 1:.1%} than that" in said[1]


def test_a_source_of_whole_floats_needs_no_word(tmp_path):
    for kind in (gguf.GGMLQuantizationType.BF16, gguf.GGMLQuantizationType.F32):
        assert notes(tmp_path / kind.name, kind)[1] == []
