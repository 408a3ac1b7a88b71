"""Which linear gets which type: llama.cpp's mixes by llama-quantize and by quern, and quern's allocation at the same bytes.

    python benchmarks/gguf_mixes.py FOLDER [--mixes q3_k_m q4_k_m ...] [-o RESULT.json]
        [--model MODEL --calibration FILE --text FILE]

As ``gguf_types.py``: the same calibration text, the same llama.cpp, the same held-out tokens. llama-quantize makes each mix
with its importance matrix; quern makes the mix of that name, and what recipe ``auto-gguf`` chooses for a file of as many
bytes at most as its own mix has.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gguf_types import Llama, Subject, divergence, subject_options, write_rows

from quern.core.allocation import Target
from quern.core.recipe import load_recipe
from quern.pipeline.export import export
from quern.pipeline.quantize import quantize

MIXES = ("q3_k_m", "q4_k_m")
ALLOCATION = "auto-gguf"
WAYS = ("llama_quantize", "mix", "allocation")


def made(folder: Path, subject: Subject, llama: Llama, text: Path, mix: str) -> dict[str, Path]:
    """The three files of a mix, by ``WAYS``."""
    given: dict[str, Any] = {"format": "gguf", "calibration": [text], "cache": folder / "cache", "threads": 1}
    ours, allocated = folder / f"{mix}.gguf", folder / f"allocated_{mix}.gguf"
    quantize(subject.model, ours, recipe=mix, **given)
    recipe = load_recipe(ALLOCATION).targeting(Target(bytes=ours.stat().st_size))
    quantize(subject.model, allocated, recipe=recipe, **given)
    theirs = llama.quantized(folder, folder / "src.gguf", text, mix, None)
    return dict(zip(WAYS, (theirs, ours, allocated), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mixes", nargs="+", default=MIXES)
    parser.add_argument("-o", "--output", type=Path)
    subject_options(parser)
    given = parser.parse_args()
    folder, subject = given.folder, Subject.given(given)
    folder.mkdir(parents=True, exist_ok=True)
    llama, (text, ids) = Llama(), subject.texts(folder)
    if not (source := folder / "src.gguf").is_file():
        export(subject.model, source)
    files = {mix: made(folder, subject, llama, text, mix) for mix in given.mixes}
    llama.logits(folder, [source, *(file for ways in files.values() for file in ways.values())], ids)
    rows = []
    for mix, ways in files.items():
        row: dict[str, Any] = {"name": mix}
        for name, file in ways.items():
            kl, interval = divergence(source, file)
            row[name] = {"kl": kl, "interval": interval, "bytes": file.stat().st_size}
        rows.append(row)
        print(f"{mix:8}", "  ".join(f"{name} {row[name]['kl']:.5f} ({row[name]['bytes']:,} bytes)" for name in WAYS))
    write_rows(given.output, subject, llama, rows)


if __name__ == "__main__":
    main()
