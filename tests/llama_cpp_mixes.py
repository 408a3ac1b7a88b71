"""What llama-quantize makes of models by its mixes: ``python tests/llama_cpp_mixes.py [MIX...]`` writes that of ``MODELS`` into
``golden/llama_cpp_mixes.json``, for all of quern's mixes or those that are named. It takes minutes, and llama.cpp
(``quern peers install llama.cpp``)."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from mix_types import MODELS, in_short
from tiny_model import write_model

from quern.checkpoint.gguf.header import read_gguf_header
from quern.core.recipe import MIXES
from quern.peers.environment import Environment
from quern.pipeline.export import export

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tests" / "golden" / "llama_cpp_mixes.json"


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


def main(mixes: list[str]) -> None:
    table = json.loads(TABLE.read_text("utf-8")) if TABLE.is_file() else {}
    for name, config in MODELS.items():
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            source, programs = folder / "source.gguf", Programs(folder)
            export(write_model(folder / "model", config), source)
            found = {mix: programs.types(source, mix) for mix in mixes or MIXES.names()}
            table[name] = dict(sorted({**table.get(name, {}), **found}.items()))
        print(name)
    TABLE.write_text(json.dumps(table, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
