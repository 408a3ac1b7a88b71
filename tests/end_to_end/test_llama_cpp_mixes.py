"""Mixes by llama.cpp's names: files whose tensors have the types that llama-quantize gives them, and its ``file_type``.

Skipped where llama.cpp is not installed (``quern peers install llama.cpp``).
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from mix_types import MODELS, in_short
from tiny_model import write_model

from quern.checkpoint.gguf.header import read_gguf_header
from quern.core.errors import UserError
from quern.core.recipe import MIXES, Recipe, parse_recipe, profile_names
from quern.peers.environment import Environment
from quern.pipeline.export import export
from quern.pipeline.quantize import quantize

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "models" / "python-7m"
TABLE = json.loads((ROOT / "tests" / "golden" / "llama_cpp_mixes.json").read_text("utf-8"))
SHIPPED = sorted(set(MIXES.names()) & set(profile_names()) - {"iq4_nl", "iq4_xs", "q2_k", "q4_0", "q6_k", "q8_0"})


class Programs:
    """llama-imatrix and llama-quantize."""

    def __init__(self, folder: Path) -> None:
        self.environment, self.folder = Environment.of("llama.cpp"), folder

    def run(self, program: str, *options: str) -> None:
        command = [str(self.environment.prefix / "llama.cpp" / "bin" / program), *options]
        ended = subprocess.run(command, env=self.environment.variables(), capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr[-2000:]

    def types(self, source: Path, mix: str) -> dict[str, object]:
        """What llama-quantize makes of every matrix of ``source``."""
        matrix, file = self.folder / "imatrix.gguf", self.folder / f"{mix}.gguf"
        if not matrix.is_file():
            text = self.folder / "text.txt"
            text.write_text((ROOT / "README.md").read_text("utf-8")[:3000], "utf-8")
            settings = ("-c", "32", "--chunks", "2", "--no-ppl", "-t", "1")
            self.run("llama-imatrix", "-m", str(source), "-f", str(text), "-o", str(matrix), *settings)
        self.run("llama-quantize", "--imatrix", str(matrix), str(source), str(file), mix.upper(), "1")
        return types(file)


def types(file: Path) -> dict[str, object]:
    """Of every matrix of a file, in short, and its ``file_type``."""
    from gguf import GGMLQuantizationType

    header = read_gguf_header(file)
    kinds = {
        name: GGMLQuantizationType(tensor.kind).name.lower()
        for name, tensor in header.tensors.items()
        if len(tensor.shape) > 1
    }
    return {"file_type": header.metadata["general.file_type"], **in_short(kinds)}


def nearest(mix: str) -> Recipe:
    """The mix without calibration, which its types do not depend on."""
    return parse_recipe(
        {"name": "x", "mix": mix, "rounding": {"method": "nearest"}, "calibration": {"token_weight": "none"}}, "x"
    )


@pytest.fixture
def programs(tmp_path):
    try:
        installed = Environment.of("llama.cpp").installed()
    except UserError as error:  # pragma: no cover - the adapter is part of quern
        pytest.skip(str(error))
    if installed is None:
        pytest.skip("llama.cpp is not installed (quern peers install llama.cpp)")
    return Programs(tmp_path)


def test_the_bundled_model_is_mixed_as_by_llama_quantize(programs, tmp_path):
    source = tmp_path / "source.gguf"
    export(BUNDLED, source)
    for mix in SHIPPED:
        ours = tmp_path / f"ours_{mix}.gguf"
        quantize(BUNDLED, ours, recipe=nearest(mix), format="gguf", threads=1)
        assert types(ours) == programs.types(source, mix), mix


def test_the_table_is_what_llama_quantize_makes(programs, tmp_path):
    model = "qwen3, 24 layers, 4 heads of 1"
    source = tmp_path / "source.gguf"
    export(write_model(tmp_path / "model", MODELS[model]), source)
    for mix in ("q3_k_m", "q4_k_s", "iq4_xs"):
        assert programs.types(source, mix) == TABLE[model][mix], mix


def test_files_say_llama_cpps_number_of_their_mix(tmp_path):
    """Without llama.cpp: by the table."""
    name = "llama, 16 layers, 4 heads of 4"
    model = write_model(tmp_path / "model", MODELS[name])
    for mix in ("q3_k_l", "q4_k_m", "q5_k_s"):
        file = tmp_path / f"{mix}.gguf"
        quantize(model, file, recipe=nearest(mix), format="gguf", threads=1)
        assert types(file) == TABLE[name][mix]
