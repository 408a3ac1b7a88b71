"""What `quern export` takes for layers of a 72B's width: seconds, peak memory, and whether memory grows with layers.

    python benchmarks/export_layers.py [WORK_FOLDER] [--layers 1 3] [--recipe FILE] [--formats gguf gptq]
        [--format-option KEY=VALUE...]

Blocks of Qwen2.5-72B's shape with few words, drawn at random, are quantized by a recipe that needs no text (not timed); each
export runs in a process of its own. ``baseline_rss_bytes``: of that process before it exports. Artifacts stay in
WORK_FOLDER. Needs about 1.5 GB of disk for each layer at 4 bits, with what is written.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measured import quantize_in_child, write_result

MODEL, VOCABULARY = "qwen2.5-72b", 512
SYNTHETIC = Path(__file__).parents[1] / "tools" / "make_synthetic_checkpoint.py"

CHILD = """
import json, sys
from quern.core.machine.memory import peak_rss
from quern.pipeline.export import export
request = json.loads(sys.stdin.read())
before = peak_rss()
report = export(**request)
print(json.dumps({"seconds": report.seconds, "baseline_rss_bytes": before, "peak_rss_bytes": report.peak_rss_bytes,
                  "bytes": report.bytes}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--layers", nargs="+", type=int, default=[1, 3])
    parser.add_argument("--recipe", default=str(Path(__file__).parent / "recipes" / "nearest4-g32.yaml"))
    parser.add_argument("--formats", nargs="+", default=["gguf", "gptq"])
    parser.add_argument("--format-option", nargs="*", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    if options.folder is None:
        with tempfile.TemporaryDirectory(prefix="quern-export-") as folder:
            measure(options, Path(folder))
    else:
        measure(options, options.folder)


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Every format at every number of layers."""
    choices = dict(choice.split("=", 1) for choice in options.format_option)
    rows = []
    for layers in options.layers:
        artifact = quantized(folder, options.recipe, layers)
        for name in options.formats:
            output = folder / f"exported-{layers}.{name}"
            given = {"artifact": str(artifact), "output": str(output), "format": name, "fresh": True}
            found = export_in_child(**given, format_options=choices if name == "gguf" else {})
            rows.append({"layers": layers, "format": name, **found})
            peak, before = found["peak_rss_bytes"] / 1e6, found["baseline_rss_bytes"] / 1e6
            print(
                f"{name}, {layers} layers: {found['seconds']:.1f} s, {found['bytes'] / 1e6:.0f} MB, peak resident memory "
                f"{peak:.0f} MB of which {before:.0f} before",
                flush=True,
            )
    shape = {"model": MODEL, "vocabulary": VOCABULARY}
    print(write_result("export_layers", {**shape, "recipe": Path(options.recipe).stem, "rows": rows}))


def quantized(folder: Path, recipe: str, layers: int) -> Path:
    """An artifact of so many layers."""
    model, artifact = folder / f"model-{layers}", folder / f"{Path(recipe).stem}-{layers}"
    if not (artifact / "quern.json").is_file():
        size = ["--layers", str(layers), "--vocabulary", str(VOCABULARY)]
        subprocess.run([sys.executable, str(SYNTHETIC), MODEL, str(model), *size], check=True, stdout=subprocess.PIPE)
        quantize_in_child(model=str(model), output=str(artifact), recipe=recipe)
    return artifact


def export_in_child(**request: Any) -> dict[str, Any]:
    """``quern.export(**request)`` (plain JSON values) in a fresh process."""
    done = subprocess.run([sys.executable, "-c", CHILD], input=json.dumps(request), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
