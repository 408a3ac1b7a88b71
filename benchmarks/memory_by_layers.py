"""Peak memory of quantizing does not depend on the number of layers.

    python benchmarks/memory_by_layers.py

Qwen2-shaped random checkpoints of 4 and 16 layers and equal width, with the shipped recipe ``balanced`` (Fisher token
weights, so that all stages run). Target: within 5 %.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from measured import quantize_in_child, write_result
from synthetic import write_checkpoint


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory(prefix="quern-layers-") as folder:
        for layers in (4, 16):
            model = write_checkpoint(
                Path(folder, f"model-{layers}"),
                hidden=1024,
                intermediate=2816,
                heads=16,
                key_value_heads=4,
                layers=layers,
            )
            found = quantize_in_child(
                model=str(model), output=str(Path(folder, f"artifact-{layers}")), recipe="balanced"
            )
            rows.append({"layers": layers, **found})
            print(f"{layers:3d} layers: {found['peak_rss_bytes'] / 1e6:.0f} MB, {found['seconds']:.0f} s", flush=True)
    ratio = rows[1]["peak_rss_bytes"] / rows[0]["peak_rss_bytes"]
    print(f"ratio {ratio:.3f}")
    print(write_result("memory_by_layers", {"rows": rows, "ratio": ratio}))


if __name__ == "__main__":
    main()
