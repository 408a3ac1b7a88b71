"""Work in pieces that are handed all they read and hand back all they make: the bytes are those of one process."""

import pytest
from artifacts import INT8, hashes, small_recipe
from tiny_model import tiny_config, write_model
from travelling_workers import TravellingWorkers

from quern.core.machine.parallel import workers_made_by
from quern.pipeline.quantize import quantize

EVERYTHING = {"method": "gptq", "target": "drift", "sweeps": 1, "two_sided": True}
SCALED = [{"method": "smoothquant"}, {"method": "awq"}, {"method": "hadamard"}]
OUTER = {"embedding": INT8, "head": INT8}
GRID = {"bits": 4, "group_size": 20}
RECIPES = {
    "everything": {"weights": GRID, "rounding": EVERYTHING, "transforms": SCALED, **OUTER},
    "whole groups": {"weights": GRID, "rounding": EVERYTHING, "transforms": SCALED[2:]},
    "trellis": {"weights": {"codec": "trellis", "bits": 2, "window": 6, "tables": 1}, "rounding": {"method": "gptq"}},
    "nearest": {"weights": {"codec": "nf4", "group_size": 40}},
    "tuning": {"weights": GRID, "rounding": {"method": "gptq"}, "tuning": {"passes": 1}},
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_bytes_are_those_of_one_process(name, tiny_text, tmp_path, monkeypatch):
    model, recipe = (
        write_model(tmp_path / "model", tiny_config(tie_word_embeddings=False)),
        small_recipe(**RECIPES[name]),
    )
    if name not in ("whole groups", "trellis"):
        for module in ("pipeline.blockwise.blocks", "quantization.rounding.base"):
            monkeypatch.setattr(f"quern.{module}.SLAB", 32)  # so that there are several of a matrix
    quantize(model, tmp_path / "alone", recipe=recipe, calibration=[tiny_text], threads=1)
    with workers_made_by(TravellingWorkers):
        quantize(model, tmp_path / "spread", recipe=recipe, calibration=[tiny_text], threads=2)
    assert hashes(tmp_path / "alone") == hashes(tmp_path / "spread")
    print(TravellingWorkers.pieces)
