"""Artifacts with rotated inputs and trellis codes: what runs is what was rounded, at any number of threads."""

import pytest
import torch
from artifacts import hashes, make_artifact, small_recipe, stored_schemes, stored_tensors

from quern.codecs.base import CODECS
from quern.core.errors import UserError
from quern.core.recipe import parse_recipe
from quern.engines.base import ENGINES
from quern.pipeline.quantize import quantize
from quern.rotation.rotation import rotate_back

IDS = torch.randint(0, 296, (2, 21), generator=torch.Generator().manual_seed(3))
ROTATED = [{"method": "hadamard"}]
CHOICES = {
    "integers": {"weights": {"bits": 4, "group_size": 32}, "transforms": ROTATED},
    "int8 activations": {
        "weights": {"bits": 8, "granularity": "channel"}, "activations": {"mode": "dynamic"}, "transforms": ROTATED,
    },
    "trellis": {"weights": {"codec": "trellis", "bits": 3, "tables": 1}, "transforms": ROTATED},
    "two tables, scaled first": {
        "weights": {"codec": "trellis", "bits": 4}, "transforms": [{"method": "smoothquant"}, *ROTATED],
        "overrides": [{"pattern": "*.o_proj", "codec": "none"}],
    },
}  # fmt: skip
GPTQ = {"rounding": {"method": "gptq"}}


@pytest.mark.parametrize("name", CHOICES)
def test_the_model_computes_with_the_rounded_weights_turned_back(name, tiny_model, tiny_text, tmp_path):
    """Rotated input times rotated weight against input times weight: float32 rounding, amplified by three blocks."""
    folder = make_artifact(tiny_model, tmp_path / "out", tiny_text, **CHOICES[name], **GPTQ)
    engine = ENGINES.get("reference")()
    plain, tensors = engine.load(tiny_model, dtype="float32").model, stored_tensors(folder)
    state = {key: tensor.float() for key, tensor in tensors.items() if key in plain.state_dict()}
    schemes = stored_schemes(folder)
    for module, scheme in schemes.items():
        codec, shape = CODECS.get(scheme.codec)(scheme), tuple(plain.get_submodule(module).weight.shape)
        decoded = codec.decode(shape, {part: tensors[f"{module}.{part}"] for part in codec.part_shapes(shape)})
        state[f"{module}.weight"] = rotate_back(decoded, tensors[f"{module}.input_signs"])
    plain.load_state_dict(state, strict=False)
    plain.tie_weights()
    loaded, expected = engine.load(folder, dtype="float32").logits(IDS), plain(IDS, use_cache=False).logits
    bound = 0.1 if "activations" in CHOICES[name] else 1e-4  # int8 activations are rounded to 1/127 of the largest
    assert bool(((loaded - expected).abs() <= bound * expected.abs().max()).all())
    # The comparison can fail: with the weights as they are stored the model is another one.
    name, scheme = next(iter(schemes.items()))
    codec, shape = CODECS.get(scheme.codec)(scheme), tuple(plain.get_submodule(name).weight.shape)
    plain.get_submodule(name).weight.data = codec.decode(
        shape, {p: tensors[f"{name}.{p}"] for p in codec.part_shapes(shape)}
    )
    wrong = plain(IDS, use_cache=False).logits
    assert not bool(((loaded - wrong).abs() <= bound * wrong.abs().max()).all())


@pytest.mark.parametrize("name", CHOICES)
def test_threads_do_not_change_a_byte(name, tiny_model, tiny_text, tmp_path):
    first = make_artifact(tiny_model, tmp_path / "1", tiny_text, threads=1, **CHOICES[name], **GPTQ)
    again = make_artifact(tiny_model, tmp_path / "3", tiny_text, threads=3, **CHOICES[name], **GPTQ)
    assert hashes(first) == hashes(again)


def test_signs_are_shared_by_the_linears_of_an_input_and_by_nothing_else(tiny_model, tiny_text, tmp_path):
    tensors = stored_tensors(make_artifact(tiny_model, tmp_path / "out", tiny_text, **CHOICES["trellis"]))
    signs = {name.removesuffix(".input_signs"): t for name, t in tensors.items() if name.endswith(".input_signs")}
    assert len(signs) == 3 * 7
    for block in range(3):
        attention, mlp = f"model.layers.{block}.self_attn", f"model.layers.{block}.mlp"
        for names in ((f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"),
                      (f"{mlp}.gate_proj", f"{mlp}.up_proj")):  # fmt: skip
            assert all(torch.equal(signs[name], signs[names[0]]) for name in names)
    different = [
        f"model.layers.{i}.{n}" for i in range(3) for n in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
    ]
    assert len({bytes(signs[name].numpy()) for name in different}) == len(different)


def test_the_seed_changes_the_signs(tiny_model, tiny_text, tmp_path):
    found = []
    for seed in (0, 1):
        recipe = small_recipe(**CHOICES["integers"])
        quantize(tiny_model, tmp_path / str(seed), recipe=recipe, calibration=[tiny_text], seed=seed, threads=1)
        found.append(stored_tensors(tmp_path / str(seed))["model.layers.0.self_attn.q_proj.input_signs"])
    assert not torch.equal(*found)


def test_signs_may_be_left_out(tiny_model, tiny_text, tmp_path):
    choices = {**CHOICES["integers"], "transforms": [{"method": "hadamard", "random_signs": False}]}
    tensors = stored_tensors(make_artifact(tiny_model, tmp_path / "out", tiny_text, **choices))
    signs = [tensor for name, tensor in tensors.items() if name.endswith(".input_signs")]
    assert len(signs) == 3 * 7
    assert not any(bool(tensor.any()) for tensor in signs)
    assert small_recipe(**choices).rotated
    assert not small_recipe(**choices).random_signs
    assert small_recipe(**CHOICES["integers"]).random_signs
    assert not small_recipe().random_signs


def test_a_rotation_alone_needs_no_calibration():
    assert not small_recipe(**CHOICES["trellis"]).needs_calibration
    assert small_recipe(**CHOICES["two tables, scaled first"]).needs_calibration
    assert small_recipe(**CHOICES["trellis"]).rotated
    assert not small_recipe().rotated


def test_a_rotation_is_named_once():
    with pytest.raises(UserError, match="transform hadamard is named twice; once is enough"):
        parse_recipe({"name": "x", "transforms": [*ROTATED, *ROTATED]}, "x")


def test_other_formats_refuse_what_they_cannot_say(tiny_model, tiny_text, tmp_path):
    for name, match in (
        ("integers", "set random_signs: false in transform hadamard"),
        ("trellis", "it stores integers and floating-point codes, not codec"),
    ):
        with pytest.raises(UserError, match=match):
            make_artifact(tiny_model, tmp_path / "out", tiny_text, format="compressed-tensors", **CHOICES[name])


def test_a_note_says_who_does_not_rotate(tiny_model, tiny_text, tmp_path):
    unsigned = [{"method": "hadamard", "random_signs": False}]
    for transforms, told in (unsigned, True), ([], False):
        recipe = small_recipe(weights={"bits": 4, "group_size": 32}, transforms=transforms, format="compressed-tensors")
        report = quantize(tiny_model, tmp_path / str(told), recipe=recipe, calibration=[tiny_text], threads=1)
        assert any("transformers drops the rotation" in note for note in report.notes) == told
