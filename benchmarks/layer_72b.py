"""One decoder layer of Qwen2-72B's shape: time and peak memory of calibrated 4-bit quantization.

    python benchmarks/layer_72b.py [WORK_FOLDER]

Random bf16 weights; 16 sequences of 512 tokens; GPTQ, 4 bits symmetric, group 128, min-max ranges. Needs about 5 GB of
disk. Target: at most 8 minutes and 8 GB on two cores.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from measured import quantize_in_child, write_result
from synthetic import write_checkpoint

RECIPE = Path(__file__).parent / "recipes" / "gptq4-g128-plain.yaml"


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="quern-72b-"))
    model = folder / "model"
    if not model.exists():
        write_checkpoint(model, hidden=8192, intermediate=29568, heads=64, key_value_heads=8, layers=1)
    shutil.rmtree(folder / "artifact", ignore_errors=True)
    found = quantize_in_child(model=str(model), output=str(folder / "artifact"), recipe=str(RECIPE), fresh=True)
    print(f"{found['seconds']:.0f} s, peak resident memory {found['peak_rss_bytes'] / 1e9:.2f} GB")
    print(write_result("layer_72b", {"recipe": RECIPE.read_text("utf-8"), "shape": "Qwen2-72B, one layer", **found}))


if __name__ == "__main__":
    main()
