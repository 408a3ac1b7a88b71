"""GPTQModel on folders: ``python gptqmodel_judge.py REQUEST.json``, run in its own environment.

The request has ``folders`` and token numbers ``ids`` (one text). Beside each folder comes ``NAME.npy``: logits float32
``(time, vocabulary)``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(request: str) -> None:
    import numpy as np
    import torch
    from gptqmodel import BACKEND, GPTQModel

    asked = json.loads(Path(request).read_text("utf-8"))
    for folder in asked["folders"]:
        model = GPTQModel.load(folder, backend=BACKEND.TORCH, device="cpu").model
        with torch.inference_mode():
            logits = model(torch.tensor([asked["ids"]]), use_cache=False).logits[0].float()
        np.save(f"{folder}.npy", logits.numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
