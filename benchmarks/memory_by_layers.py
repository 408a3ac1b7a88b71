"""Peak memory of quantizing does not depend on the number of layers.

    python benchmarks/memory_by_layers.py

Qwen2-shaped random checkpoints of 4 and 16 layers and equal width, quantized by ``gptq4-g64`` (Fisher token weights,
so that all stages run). With one thread every block allocates the same in the same order; with several the peak
also depends on which of their large steps happen to meet, and more layers mean more chances. Target: within 5 %.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from measured import quantize_in_child, write_result
from synthetic import write_checkpoint

from quern.core.machine.parallel import available_threads

RECIPE = Path(__file__).parent / "recipes" / "gptq4-g64.yaml"


def main() -> None:
    rows, ratios = [], {}
    with tempfile.TemporaryDirectory(prefix="quern-layers-") as folder:
        models = {layers: write_model(Path(folder, f"model-{layers}"), layers) for layers in (4, 16)}
        for threads in (1, available_threads()):
            peaks = []
            for layers, model in models.items():
                output = str(Path(folder, f"artifact-{layers}-{threads}"))
                found = quantize_in_child(model=str(model), output=output, recipe=str(RECIPE), threads=threads)
                rows.append({"layers": layers, "threads": threads, **found})
                peaks.append(found["peak_rss_bytes"])
                print(
                    f"{threads} threads, {layers:2d} layers: {peaks[-1] / 1e6:.0f} MB, {found['seconds']:.0f} s",
                    flush=True,
                )
            ratios[str(threads)] = peaks[1] / peaks[0]
    print("ratio by threads:", {threads: round(ratio, 3) for threads, ratio in ratios.items()})
    print(write_result("memory_by_layers", {"rows": rows, "ratios": ratios}))


def write_model(folder: Path, layers: int) -> Path:
    return write_checkpoint(folder, hidden=1024, intermediate=2816, heads=16, key_value_heads=4, layers=layers)


if __name__ == "__main__":
    main()
