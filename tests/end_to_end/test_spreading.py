"""Work in pieces that are handed all they read and hand back all they make: the bytes are those of one process."""

import pytest
from artifacts import INT8, hashes, small_recipe
from tiny_model import tiny_config, write_model
from travelling_workers import TravellingWorkers

from quern.core.machine.parallel import workers_made_by
from quern.pipeline.planning.plan import plan
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

PIECES = {
    "everything": {"_look", "run_alone", "_gradients", "_sum_of_tile", "_piece"},
    "whole groups": {"_look", "run_alone", "_gradients", "_sum_of_tile", "_round_group"},
    "trellis": {"_look", "run_alone", "_gradients", "_sum_of_tile", "_round_group"},
    "nearest": {"_slab"},
    "tuning": {"_look", "run_alone", "_gradients", "_sum_of_tile", "_slab"},
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
    assert PIECES[name] <= set(TravellingWorkers.pieces)


def test_losses_of_candidates_are_those_of_one_process(tiny_model, tiny_text, tmp_path):
    candidates = [{"bits": bits, "group_size": 32} for bits in (2, 3, 8)]
    recipe = small_recipe(
        allocation={"candidates": candidates, "outer": [INT8], "target": {"bits": 4}},
        rounding={"method": "gptq"},
        transforms=[{"method": "hadamard"}],
        calibration={"tokens": 256, "sequence_length": 32, "token_weight": "fisher"},
    )
    alone = plan(tiny_model, recipe=recipe, calibration=[tiny_text], threads=1, cache=tmp_path / "alone")
    with workers_made_by(TravellingWorkers):
        spread = plan(tiny_model, recipe=recipe, calibration=[tiny_text], threads=2, cache=tmp_path / "spread")
    assert [(one.choice, one.loss) for one in alone.matrices] == [(one.choice, one.loss) for one in spread.matrices]
    assert {"_loss", "_look", "_gradients", "_sum_of_tile"} <= set(TravellingWorkers.pieces)
