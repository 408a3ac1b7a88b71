"""What a row of AutoRound says about how little it was tuned."""

import sys
import types

import numpy as np
from safetensors.numpy import save_file

from quern.peers.base import PEERS, ToolJob


class Tool:
    """Stands for ``auto_round.AutoRound``: writes into a folder of its own choice."""

    def __init__(self, model, tokenizer, **settings):
        self.settings = settings

    def quantize_and_save(self, folder, format):
        from pathlib import Path

        saved = Path(folder) / "w4g64"
        saved.mkdir(parents=True)
        save_file({"model.layers.0.mlp.up_proj.qweight": np.zeros((4, 4), np.int32)}, saved / "model.safetensors")
        return None, [str(saved)]


def test_the_row_says_that_it_ran_a_quarter_of_the_standard(tmp_path, monkeypatch):
    tool, transformers = types.ModuleType("auto_round"), types.ModuleType("transformers")
    tool.AutoRound = Tool
    transformers.AutoTokenizer = types.SimpleNamespace(from_pretrained=lambda path: None)
    monkeypatch.setitem(sys.modules, "auto_round", tool)
    monkeypatch.setitem(sys.modules, "transformers", transformers)
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "artifact"
    output.mkdir()
    peer = PEERS.get("auto-round")()
    job = ToolJob(
        model=tmp_path, output=output, variant=peer.variant("int4-g64"), sequences=np.zeros((2, 8), np.int64),
        text=tmp_path, threads=1, seed=0,
    )  # fmt: skip
    peer.quantize(job)
    assert (output / "model.safetensors").is_file()
    (remark,) = peer.remarks(job.variant)
    assert remark.startswith("tuned for 50 iterations with batches of 4")
    assert "standard is 200 iterations with batches of 8" in remark
