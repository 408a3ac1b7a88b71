"""Token weights that recipes of one comparison share: same bytes, honest time, nothing taken over that does not fit."""

import pytest
from artifacts import hashes, small_recipe

from quern.checkpoint.files import read_json, write_json
from quern.core.errors import BadFileError
from quern.core.recipe import Recipe
from quern.pipeline.blockwise import sensitivity
from quern.pipeline.quantize import quantize
from quern.quantization.arithmetic import arithmetic


def recipe(bits: int, **calibration) -> Recipe:
    found = small_recipe(weights={"bits": bits}, rounding={"method": "gptq"})
    weighted = found.calibration.model_copy(update={"token_weight": "fisher", **calibration})
    return found.model_copy(update={"calibration": weighted})


def test_a_second_recipe_takes_them_over_and_counts_their_time(tiny_model, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    alone = quantize(tiny_model, tmp_path / "alone", recipe=recipe(3), threads=1)
    quantize(tiny_model, tmp_path / "first", recipe=recipe(4), cache=cache, threads=1)
    (folder,) = cache.iterdir()
    assert 0 < read_json(folder / "timing.json")["seconds"] < 60
    write_json(folder / "timing.json", {"seconds": 5000.0})
    monkeypatch.setattr(sensitivity, "_compute", lambda job: pytest.fail("they were computed again"))
    second = quantize(tiny_model, tmp_path / "second", recipe=recipe(3), cache=cache, threads=1)
    assert second.seconds > 5000 > alone.seconds
    assert hashes(second.path) == hashes(alone.path)


def test_other_tokens_have_their_own(tiny_model, tmp_path):
    cache = tmp_path / "cache"
    for seed in (0, 1):
        quantize(tiny_model, tmp_path / f"seed{seed}", recipe=recipe(4), cache=cache, seed=seed, threads=1)
    quantize(tiny_model, tmp_path / "fewer", recipe=recipe(4, tokens=32), cache=cache, threads=1)
    assert len(list(cache.iterdir())) == 3


def test_one_that_does_not_fit_is_refused_by_name(tiny_model, tmp_path):
    cache = tmp_path / "cache"
    quantize(tiny_model, tmp_path / "first", recipe=recipe(4), cache=cache, threads=1)
    quantize(tiny_model, tmp_path / "fewer", recipe=recipe(4, tokens=32), cache=cache, threads=1)
    first, other = sorted(cache.iterdir(), key=lambda folder: -(folder / "0000.safetensors").stat().st_size)
    (first / "0000.safetensors").write_bytes((other / "0000.safetensors").read_bytes())
    with pytest.raises(BadFileError, match=f"token weights of this model. Remove {first}"):
        quantize(tiny_model, tmp_path / "second", recipe=recipe(3), cache=cache, threads=1)
    (first / "0000.safetensors").write_bytes(b"short")
    with pytest.raises(BadFileError, match="0000.safetensors"):
        quantize(tiny_model, tmp_path / "third", recipe=recipe(3), cache=cache, threads=1)


def test_another_arithmetic_has_its_own(tiny_model, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    quantize(tiny_model, tmp_path / "first", recipe=recipe(4), cache=cache, threads=1)
    for number, changed in enumerate(({"torch": "1.0"}, {"kernels_instruction_set": "zap"}), start=2):
        monkeypatch.setattr(sensitivity, "arithmetic", lambda changed=changed: {**arithmetic(), **changed})
        quantize(tiny_model, tmp_path / f"other{number}", recipe=recipe(4), cache=cache, threads=1)
        assert len(list(cache.iterdir())) == number
