"""The same ggml type, the same llama.cpp: files of quern beside those of llama-quantize with its importance matrix.

    python benchmarks/gguf_types.py FOLDER [--types q4_0 iq4_nl ...] [-o RESULT.json]

Needs llama.cpp (``quern peers install llama.cpp``). Both sides calibrate on the same text, have one type for all linears and
Q6_K for embedding and head, and are run by libllama on the same held-out tokens; the loss is the mean KL divergence to what
libllama makes of the unquantized model. FOLDER keeps what was made, so that the same command goes on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

import quern
from quern.advisor.hardware import probe
from quern.checkpoint.tokenizer import load_tokenizer
from quern.core.metrics import weighted_mean
from quern.evaluation.heldout import held_out_text, training_calibration_text
from quern.peers.environment import Environment
from quern.pipeline.export import export
from quern.pipeline.quantize import quantize

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "python-7m"
JUDGE = ROOT / "tests" / "llama_judge.py"
TYPES = (
    "q4_0", "iq4_nl", "q4_k", "iq4_xs", "q3_k", "q2_k", "q5_k", "q6_k", "iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs",
)  # fmt: skip
FILE_TYPES = {"iq2_s": "IQ2_M"}
"""What llama-quantize calls a file of such a type, where that is not its name: its IQ2_S has IQ2_XS for most matrices."""
TOKENS, SEQUENCES, LENGTH, CHUNK = 16384, 16, 256, 512


def texts(folder: Path) -> tuple[Path, list[list[int]]]:
    """The file to calibrate on, and held-out token numbers."""
    tokenizer, file = load_tokenizer(MODEL), folder / "cal.txt"
    if not file.is_file():
        ids = tokenizer.encode("\n".join(text for _, text in training_calibration_text()))
        file.write_text(tokenizer.decode(ids[: TOKENS + 600]), "utf-8")
    ids = tokenizer.encode("\n".join(text for _, text in held_out_text()))[: SEQUENCES * LENGTH]
    return file, [ids[start : start + LENGTH] for start in range(0, len(ids), LENGTH)]


class Llama:
    """llama.cpp's programs."""

    def __init__(self) -> None:
        self.environment = Environment.of("llama.cpp")
        if self.environment.installed() is None:
            raise SystemExit("llama.cpp is not installed; run: quern peers install llama.cpp")
        self.folder = self.environment.prefix / "llama.cpp" / "bin"

    def run(self, *command: str) -> None:
        subprocess.run(command, env=self.environment.variables(), check=True, stdout=subprocess.DEVNULL)

    def quantized(self, folder: Path, source: Path, text: Path, kind: str) -> Path:
        """llama-quantize's file."""
        matrix, file = folder / "imatrix.gguf", folder / f"llama_{kind.upper()}.gguf"
        if not matrix.is_file():
            settings = ("-c", str(CHUNK), "--no-ppl", "-o", str(matrix), "-t", "1")
            self.run(str(self.folder / "llama-imatrix"), "-m", str(source), "-f", str(text), *settings)
        if not file.is_file():
            outer = ("--token-embedding-type", "q6_K", "--output-tensor-type", "q6_K")
            tool = (str(self.folder / "llama-quantize"), "--pure", "--imatrix", str(matrix), *outer)
            self.run(*tool, str(source), str(file), FILE_TYPES.get(kind, kind.upper()), "1")
        return file

    def logits(self, folder: Path, files: list[Path], ids: list[list[int]]) -> None:
        """``NAME.npy`` beside each file that has none."""
        missing = [str(file) for file in files if not Path(f"{file}.npy").is_file()]
        request = folder / "request.json"
        request.write_text(json.dumps({"files": missing, "ids": ids, "texts": []}), "utf-8")
        python = (str(self.environment.python), "-P", "-s", str(JUDGE), str(Path(quern.__file__).parent))
        self.run(*python, str(self.folder), str(request))


def divergence(reference: Path, file: Path) -> tuple[float, tuple[float, float] | None]:
    """Mean KL divergence in nats a token, and its 95 % interval over sequences."""
    first, second = (log_softmax(np.load(f"{each}.npy")) for each in (reference, file))
    nats = (np.exp(first) * (first - second)).sum(-1)
    found = weighted_mean(nats.sum(1), np.full(len(nats), nats.shape[1]), seed=0)
    return float(nats.mean()), found.interval


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--types", nargs="+", choices=TYPES, default=TYPES)
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    folder: Path = given.folder
    folder.mkdir(parents=True, exist_ok=True)
    llama, (text, ids) = Llama(), texts(folder)
    source = folder / "src.gguf"
    if not source.is_file():
        export(MODEL, source)
    pairs = {}
    for kind in given.types:
        ours = folder / f"{kind}.gguf"
        quantize(MODEL, ours, recipe=kind, format="gguf", calibration=[text], cache=folder / "cache", threads=1)
        pairs[kind] = ours, llama.quantized(folder, source, text, kind)
    llama.logits(folder, [source, *(file for pair in pairs.values() for file in pair)], ids)
    rows = []
    for kind, (ours, theirs) in pairs.items():
        row: dict[str, Any] = {"type": kind}
        for name, file in (("quern", ours), ("llama_quantize", theirs)):
            kl, interval = divergence(source, file)
            row[name] = {"kl": kl, "interval": interval, "bytes": file.stat().st_size}
        rows.append(row | {"ratio": row["quern"]["kl"] / row["llama_quantize"]["kl"]})
        losses = f"quern {row['quern']['kl']:.5f}  llama-quantize {row['llama_quantize']['kl']:.5f}"
        print(f"{kind:8} {losses}  {rows[-1]['ratio']:.2f}")
    if given.output is not None:
        result = {
            "model": str(MODEL.relative_to(ROOT)), "date": datetime.date.today().isoformat(), "quern": quern.__version__,
            "llama_cpp_python": llama.environment.installed().version, "processor": probe(measure=False)["cpu_model"],
            "calibration_tokens": TOKENS, "scored": {"sequences": SEQUENCES, "tokens": LENGTH}, "rows": rows,
        }  # fmt: skip
        given.output.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
