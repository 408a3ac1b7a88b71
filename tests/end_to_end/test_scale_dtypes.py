"""Models that are the same but for the size of their weights lose the same: scales that float16 cannot hold are stored wider."""

import json
import shutil

import pytest
import torch
from artifacts import INT8, small_recipe, stored_schemes, stored_tensors
from safetensors.torch import load_file, save_file
from tiny_model import calibration_text, tiny_config, write_model

import quern.pipeline.quantize as job
from quern.comparison.row_builder import contender_of
from quern.engines.cpu import CpuEngine
from quern.engines.reference import load as load_reference
from quern.loading.fitting import open_model
from quern.pipeline.quantize import quantize

IDS = torch.randint(0, 296, (1, 60), generator=torch.Generator().manual_seed(4))
STEP = 2.0**-20
"""About a millionth; a power of two, so that nothing but the size of numbers changes."""
SMALLER = ("v_proj", "up_proj")
LARGER = ("o_proj", "down_proj")
GROUP = {"bits": 4, "granularity": "group", "group_size": 40}
SCHEMES = {
    "integers in groups": GROUP,
    "asymmetric integers": {**GROUP, "symmetric": False},
    "integers in channels": INT8,
    "trellis": {"codec": "trellis", "bits": 3},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    config = tiny_config("llama", attention_bias=False, tie_word_embeddings=False, initializer_range=0.2)
    return write_model(tmp_path_factory.mktemp("scales") / "plain", config)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(calibration_text(), "utf-8")
    return path


def rescaled(model, folder, factors):
    """A copy with the tensors whose name holds one of ``factors`` multiplied by its factor."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        for part, factor in factors.items():
            if part in name:
                tensors[name] = tensor * factor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def skewed(plain, tmp_path_factory):
    """The same function: what values and up projections lost in size, the linears behind them have."""
    factors = dict.fromkeys(SMALLER, STEP) | dict.fromkeys(LARGER, 1 / STEP)
    return rescaled(plain, tmp_path_factory.mktemp("skewed") / "model", factors)


def schemes_of(folder):
    return stored_schemes(folder)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("more", [{}, {"rounding": {"method": "gptq"}, "transforms": [{"method": "hadamard"}]}])
def test_rescaled_weights_get_the_codes_of_the_others(name, more, plain, skewed, text, tmp_path):
    """Against the original under a recipe with the same scale dtypes: rounding commutes with powers of two."""
    report = quantize(
        skewed, tmp_path / "skewed", recipe=small_recipe(weights=SCHEMES[name], **more), calibration=[text]
    )
    dtypes = {module: scheme.params.scale_dtype for module, scheme in schemes_of(tmp_path / "skewed").items()}
    assert all(dtype == "bfloat16" for module, dtype in dtypes.items() if module.endswith(SMALLER))
    assert any("store their scales as bfloat16 in place of float16" in note for note in report.notes)
    overrides = [{"pattern": module, **SCHEMES[name], "scale_dtype": dtype} for module, dtype in dtypes.items()]
    same = small_recipe(weights=SCHEMES[name], overrides=overrides, **more)
    quantize(plain, tmp_path / "plain", recipe=same, calibration=[text])
    expected, found = stored_tensors(tmp_path / "plain"), stored_tensors(tmp_path / "skewed")
    assert set(expected) == set(found)
    for part, tensor in found.items():
        module, _, kind = part.rpartition(".")
        factor = STEP if module.endswith(SMALLER) else 1 / STEP if module.endswith(LARGER) else 1.0
        assert torch.equal(tensor, expected[part] * factor if kind == "scale" else expected[part]), part
    ours, theirs = (load_reference(tmp_path / folder, dtype="float32").logits(IDS) for folder in ("skewed", "plain"))
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-4
    native = CpuEngine().load(tmp_path / "skewed", cache="float32").logits(IDS)
    assert float((native - ours).norm() / ours.norm()) < 0.05, "the cpu engine reads them too"


def test_embedding_and_head_too(plain, tmp_path):
    """The head behind a norm that makes up for it; of an embedding the rounding error is compared."""
    model = rescaled(plain, tmp_path / "model", {"lm_head": STEP, "model.norm.": 1 / STEP, "embed_tokens": STEP})
    recipe = small_recipe(weights=GROUP, embedding=GROUP, head=GROUP)
    report = quantize(model, tmp_path / "artifact", recipe=recipe)
    expected = {
        layer.linear: layer.relative_error for layer in quantize(plain, tmp_path / "plain", recipe=recipe).layers
    }
    dtypes = {module: scheme.params.scale_dtype for module, scheme in schemes_of(tmp_path / "artifact").items()}
    assert {module for module, dtype in dtypes.items() if dtype == "bfloat16"} == {"model.embed_tokens", "lm_head"}
    stored = stored_tensors(tmp_path / "artifact")
    assert stored["lm_head.scale"].dtype == stored["model.embed_tokens.scale"].dtype == torch.bfloat16
    assert len(report.notes) == 1
    assert "2 modules" in report.notes[0]
    for layer in report.layers:  # a scale that is off by 2^-9 at most changes an error by less than a twentieth
        assert layer.relative_error == pytest.approx(expected[layer.linear], rel=0.05)


def test_the_next_block_is_calibrated_on_the_embedding_that_is_stored(plain, text, tmp_path):
    model = rescaled(plain, tmp_path / "model", {"embed_tokens": STEP})
    recipe = small_recipe(weights=GROUP, embedding=GROUP, rounding={"method": "gptq"})
    quantize(model, tmp_path / "artifact", recipe=recipe, calibration=[text])
    assert schemes_of(tmp_path / "artifact")["model.embed_tokens"].params.scale_dtype == "bfloat16"


def test_a_run_that_was_cut_off_remembers_them(skewed, tmp_path, monkeypatch):
    recipe, write = small_recipe(weights=GROUP), job._write_metadata

    def fail(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "_write_metadata", fail)
    with pytest.raises(KeyboardInterrupt):
        quantize(skewed, tmp_path / "artifact", recipe=recipe)
    monkeypatch.setattr(job, "_write_metadata", write)
    report = quantize(skewed, tmp_path / "artifact", recipe=recipe)
    assert report.resumed
    whole = quantize(skewed, tmp_path / "whole", recipe=recipe)
    assert report.notes == whole.notes != []
    again = quantize(skewed, tmp_path / "whole", recipe=recipe)
    assert again.notes == ["was finished already", *whole.notes]
    assert list(contender_of(open_model(tmp_path / "whole")).notes) == whole.notes, "comparisons show it too"
    assert (tmp_path / "artifact/config.json").read_bytes() == (tmp_path / "whole/config.json").read_bytes()


@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_says_it_module_by_module(symmetric, plain, tmp_path):
    pytest.importorskip("compressed_tensors")
    factors = {f"layers.1.{part}": STEP for part in ("self_attn.v_proj", "mlp.up_proj")}
    factors |= {f"layers.1.{part}": 1 / STEP for part in ("self_attn.o_proj", "mlp.down_proj")}
    model = rescaled(plain, tmp_path / "model", factors)
    recipe = small_recipe(weights={**GROUP, "group_size": 32, "symmetric": symmetric})
    for format in ("quern", "compressed-tensors"):
        quantize(model, tmp_path / format, recipe=recipe, format=format)
    ours = load_reference(tmp_path / "quern", dtype="float32").logits(IDS)
    theirs = load_reference(tmp_path / "compressed-tensors", dtype="float32").logits(IDS)
    # Their weights become bfloat16, the model's dtype, which keeps 8 bits of each.
    assert float((ours - theirs).norm() / ours.norm()) < 0.05
    config = json.loads((tmp_path / "compressed-tensors/config.json").read_text())["quantization_config"]
    said = {group["weights"]["scale_dtype"] for group in config["config_groups"].values()}
    assert said == ({"torch.float16", "torch.bfloat16"} if symmetric else {None})


def test_ordinary_weights_keep_what_the_recipe_says(plain, tmp_path):
    report = quantize(plain, tmp_path / "artifact", recipe=small_recipe(weights=GROUP))
    assert report.notes == []
    assert {scheme.params.scale_dtype for scheme in schemes_of(tmp_path / "artifact").values()} == {"float16"}
