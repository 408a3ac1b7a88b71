"""The bundled model's first blocks: trained weights, of which quantization takes a moment."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

BUNDLED = Path(__file__).parents[1] / "models" / "python-7m"


def write_first_blocks(folder: Path, blocks: int) -> Path:
    """A Hugging Face folder with the first ``blocks`` blocks between the bundled model's own embedding and head."""
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True)
    for file in BUNDLED.glob("*.json"):
        if not file.name.endswith("index.json"):
            shutil.copy(file, folder)
    config = json.loads((BUNDLED / "config.json").read_text("utf-8"))
    config |= {"num_hidden_layers": blocks, "layer_types": config["layer_types"][:blocks]}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    stored = {name: tensor for file in BUNDLED.glob("*.safetensors") for name, tensor in load_file(file).items()}
    kept = {name: tensor for name, tensor in stored.items() if _block(name) < blocks}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _block(name: str) -> int:
    """Number of the block that a tensor belongs to; -1 for what is outside of blocks."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else -1
