"""The same ggml type, the same llama.cpp: files of quern beside those of llama-quantize with its importance matrix.

    python benchmarks/gguf_types.py FOLDER [--types q4_0 iq4_nl ...] [-o RESULT.json]
        [--model MODEL --calibration FILE --text FILE]

Needs llama.cpp (``quern peers install llama.cpp``). Both sides calibrate on the same text, have one type for all linears and
Q6_K for embedding and head (Q8_0 where rows are no whole super-blocks), and are run by libllama on the same held-out tokens;
the loss is the mean KL divergence to what libllama makes of the unquantized model, by default the bundled one on Python.
FOLDER keeps what was made for one model and text, so that the same command goes on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import quern
from quern.advisor.hardware import probe
from quern.checkpoint.files import read_json
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
MOST_CHARACTERS = 1_000_000
"""Of a file of text: more than these tokens have."""
SUPER_BLOCK = 256


@dataclass(frozen=True)
class Subject:
    """A model, with what to calibrate and to score it on; None: what the bundled model was kept from, and held out."""

    model: Path = MODEL
    calibration: Path | None = None
    text: Path | None = None

    @classmethod
    def given(cls, options: argparse.Namespace) -> Subject:
        return cls(options.model, options.calibration, options.text)

    def texts(self, folder: Path) -> tuple[Path, list[list[int]]]:
        """The file to calibrate on, and held-out token numbers."""
        tokenizer, file = load_tokenizer(self.model), folder / "cal.txt"
        if not file.is_file():
            ids = tokenizer.encode(_read(self.calibration, training_calibration_text))
            file.write_text(tokenizer.decode(ids[: TOKENS + 600]), "utf-8")
        ids = tokenizer.encode(_read(self.text, held_out_text))[: SEQUENCES * LENGTH]
        return file, [ids[start : start + LENGTH] for start in range(0, len(ids), LENGTH)]

    def named(self) -> dict[str, str | None]:
        """Names of the files of text."""
        return {"calibration": self.calibration and self.calibration.name, "scored": self.text and self.text.name}

    def outer_kind(self) -> str:
        """llama.cpp's type for embedding and head: where rows are no whole super-blocks, what it falls back to."""
        width = read_json(self.model / "config.json")["hidden_size"]
        return "q8_0" if width % SUPER_BLOCK else "q6_K"


def _read(file: Path | None, usual: Callable[[], Iterable[tuple[str, str]]]) -> str:
    return "\n".join(text for _, text in usual()) if file is None else file.read_text("utf-8")[:MOST_CHARACTERS]


def subject_options(parser: argparse.ArgumentParser) -> None:
    """What ``Subject.given`` reads."""
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--calibration", type=Path, metavar="FILE")
    parser.add_argument("--text", type=Path, metavar="FILE")


class Llama:
    """llama.cpp's programs."""

    def __init__(self) -> None:
        self.environment = Environment.of("llama.cpp")
        if self.environment.installed() is None:
            raise SystemExit("llama.cpp is not installed; run: quern peers install llama.cpp")
        self.folder = self.environment.prefix / "llama.cpp" / "bin"

    def run(self, *command: str) -> None:
        subprocess.run(command, env=self.environment.variables(), check=True, stdout=subprocess.DEVNULL)

    def quantized(self, folder: Path, source: Path, text: Path, kind: str, outer: str | None) -> Path:
        """llama-quantize's file: of one type, with ``outer`` for embedding and head; or its mix of that name, with None."""
        mark = "" if outer else "mix_"
        matrix, file = folder / "imatrix.gguf", folder / f"llama_{mark}{kind.upper()}.gguf"
        if not matrix.is_file():
            settings = ("-c", str(CHUNK), "--no-ppl", "-o", str(matrix), "-t", "1")
            self.run(str(self.folder / "llama-imatrix"), "-m", str(source), "-f", str(text), *settings)
        if not file.is_file():
            pure = ("--pure", "--token-embedding-type", outer, "--output-tensor-type", outer) if outer else ()
            tool = (str(self.folder / "llama-quantize"), *pure, "--imatrix", str(matrix))
            self.run(*tool, str(source), str(file), FILE_TYPES.get(kind, kind.upper()), "1")
        return file

    def logits(self, folder: Path, files: list[Path], ids: list[list[int]]) -> None:
        """``NAME.npy`` beside each file that has none."""
        missing = [str(file) for file in files if not Path(f"{file}.npy").is_file()]
        if not missing:
            return
        request = folder / "request.json"
        request.write_text(json.dumps({"files": missing, "ids": ids, "texts": []}), "utf-8")
        python = (str(self.environment.python), "-P", "-s", str(JUDGE), str(Path(quern.__file__).parent))
        self.run(*python, str(self.folder), str(request))


def divergence(reference: Path, file: Path) -> tuple[float, tuple[float, float] | None]:
    """Mean KL divergence in nats a token, and its 95 % interval over sequences."""
    pairs = zip(*(np.load(f"{each}.npy", mmap_mode="r") for each in (reference, file)), strict=True)
    nats = np.stack([_nats(log_softmax(first), log_softmax(second)) for first, second in pairs])
    found = weighted_mean(nats.sum(1), np.full(len(nats), nats.shape[1]), seed=0)
    return float(nats.mean()), found.interval


def _nats(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return (np.exp(first) * (first - second)).sum(-1)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def write_rows(output: Path | None, subject: Subject, llama: Llama, rows: list[dict[str, Any]]) -> None:
    """The result file, where one is asked for."""
    if output is None:
        return
    result = {
        "model": subject.model.resolve().name, "texts": subject.named(),
        "date": datetime.date.today().isoformat(), "quern": quern.__version__,
        "llama_cpp_python": llama.environment.installed().version, "processor": probe(measure=False)["cpu_model"],
        "calibration_tokens": TOKENS, "scored": {"sequences": SEQUENCES, "tokens": LENGTH}, "rows": rows,
    }  # fmt: skip
    output.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--types", nargs="+", choices=TYPES, default=TYPES)
    parser.add_argument("-o", "--output", type=Path)
    subject_options(parser)
    given = parser.parse_args()
    folder, subject = given.folder, Subject.given(given)
    folder.mkdir(parents=True, exist_ok=True)
    llama, (text, ids) = Llama(), subject.texts(folder)
    source = folder / "src.gguf"
    if not source.is_file():
        export(subject.model, source)
    pairs = {}
    for kind in given.types:
        ours = folder / f"{kind}.gguf"
        quantize(subject.model, ours, recipe=kind, format="gguf", calibration=[text], cache=folder / "cache", threads=1)
        pairs[kind] = ours, llama.quantized(folder, source, text, kind, subject.outer_kind())
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
    write_rows(given.output, subject, llama, rows)


if __name__ == "__main__":
    main()
