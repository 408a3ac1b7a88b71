"""What a config.json may ask of a decoder beyond the ordinary: activations, windows of single layers, rotary frequencies that
depend on the text's length, values beyond half precision. Both engines, whole texts and sessions.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import calibration_text, tiny_config, write_model
from transformers import AutoModelForCausalLM

from quern import _native
from quern.core.errors import UserError
from quern.engines.cpu import ACTIVATIONS, CpuEngine
from quern.engines.reference import load as load_reference
from quern.evaluation.batches import batched_logits

IDS = torch.randint(0, 296, (1, 100), generator=torch.Generator().manual_seed(4))
# Sums of up to 96 float32 terms carry 96 x 2^-24 = 6e-6; about 30 of them follow each other in three blocks.
FLOAT32 = 2e-4
SWITCH = 64
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": SWITCH,
    "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + 0.5 * i for i in range(8)],
}  # fmt: skip
MIXED = {
    "use_sliding_window": True, "sliding_window": 16, "num_hidden_layers": 3,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
}  # fmt: skip
VARIANTS = {
    **{name: ("llama", {"hidden_act": name}) for name in ACTIVATIONS},
    "mixed windows": ("qwen2", MIXED),
    "mixed windows, normed heads": ("qwen3", MIXED),
    "windows everywhere": ("qwen3", {**MIXED, "layer_types": ["sliding_attention"] * 3}),
    "a window that its family ignores": ("llama", {"sliding_window": 8}),
    "longrope": ("llama", {"rope_parameters": LONGROPE}),
    "longrope with its own factor": ("qwen2", {"rope_parameters": {**LONGROPE, "attention_factor": 1.3}}),
    "dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}),
}


def difference(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.fixture(params=VARIANTS)
def folder(request, tmp_path):
    family, changes = VARIANTS[request.param]
    return write_model(tmp_path / "model", tiny_config(family, torch_dtype="float32", initializer_range=0.2, **changes))


@pytest.mark.parametrize("length", [SWITCH, 100])
def test_whole_texts_are_those_of_transformers(folder, length):
    ids = IDS[:, :length]
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(folder)(ids, use_cache=False).logits
    assert difference(load_reference(folder).logits(ids), expected) == 0
    assert difference(CpuEngine().load(folder, cache="float32").logits(ids), expected) < FLOAT32


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_instruction_sets_agree_bit_for_bit(activation, tmp_path):
    """An inner width that is no multiple of 16; mixed windows and long frequencies too."""
    changes = {"hidden_act": activation, "intermediate_size": 90, "rope_parameters": LONGROPE, **MIXED}
    config = tiny_config("qwen2", torch_dtype="float32", initializer_range=0.2, **changes)
    folder, before = write_model(tmp_path / "model", config, tokenizer=False), _native.isa()
    expected = CpuEngine().load(folder, threads=1).logits(IDS)
    try:
        for isa in _native.isas():
            _native.use_isa(isa)
            assert torch.equal(CpuEngine().load(folder, threads=2).logits(IDS), expected), isa
    finally:
        _native.use_isa(before)


@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_sessions_give_what_the_whole_text_gives(folder, engine):
    """Fed in pieces, past a window and past a switch of frequencies, rewound in front of both, and fed again."""
    model = CpuEngine().load(folder, cache="float32") if engine == "cpu" else load_reference(folder)
    ids = IDS[0].tolist()

    def check(logits, length):
        whole = model.logits(IDS[:, :length])[0, -1]
        if engine == "cpu":
            assert torch.equal(logits, whole)
        else:
            assert difference(logits, whole) < FLOAT32

    session = model.start()
    check(session.feed(ids[:40]), 40)
    check(session.feed(ids[40:62]), 62)
    for length in range(63, 68):
        check(session.feed([ids[length - 1]]), length)
    session.rewind(30)
    assert session.length == 30
    check(session.feed(ids[30:33]), 33)
    check(session.feed(ids[33:90]), 90)
    session.rewind(0)
    check(session.feed(ids[:5]), 5)


@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_short_texts_of_a_batch_keep_their_own_frequencies(engine, tmp_path):
    """A batch pads its shorter texts; with longrope a text's length decides how it is computed."""
    config = tiny_config("llama", torch_dtype="float32", initializer_range=0.2, rope_parameters=LONGROPE)
    folder = write_model(tmp_path / "model", config)
    model = CpuEngine().load(folder, cache="float32") if engine == "cpu" else load_reference(folder)
    texts = [IDS[0, :length].numpy() for length in (90, SWITCH, 12, SWITCH + 1)]
    found = dict(batched_logits(model, texts))
    for number, text in enumerate(texts):
        assert difference(torch.from_numpy(found[number]), model.logits(torch.from_numpy(text)[None])[0]) < FLOAT32


LARGE = 1e5


@pytest.fixture
def large_values(tmp_path):
    """Values a hundred thousand times as large, and a projection behind them that takes it back."""

    def make(dtype):
        folder = write_model(tmp_path / dtype, tiny_config("llama", torch_dtype=dtype))
        weights = load_file(folder / "model.safetensors")
        for name in [name for name in weights if "v_proj" in name or "o_proj.weight" in name]:
            size = LARGE if "v_proj" in name else 1 / LARGE
            # Clamped, so that no float16 weight overflows itself.
            weights[name] = (weights[name].float() * size).clamp(-65000, 65000).to(weights[name].dtype)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


@pytest.mark.parametrize("together", [True, False])
def test_values_that_float16_cannot_hold_are_kept_wider(large_values, together):
    folder = large_values("float32")
    model, exact = CpuEngine().load(folder), CpuEngine().load(folder, cache="float32")
    expected = exact.logits(IDS)
    assert difference(expected, load_reference(folder, dtype="float32").logits(IDS)) < FLOAT32
    if together:
        found = model.logits(torch.cat([IDS, IDS]))
        assert torch.equal(found, torch.cat([expected, expected]))
    else:
        session = model.start()
        assert torch.equal(session.feed(IDS[0, :30].tolist()), expected[0, 29])
        assert torch.equal(session.feed(IDS[0, 30:].tolist()), expected[0, -1])
    assert len(model.notes) == 1
    assert "exceed 65504" in model.notes[0]
    assert "kept as float32" in model.notes[0]
    assert exact.notes == []


def test_a_step_keeps_those_wider_that_need_it(large_values):
    """Text 0 overflows in the first step, text 1 in the second: its first token is embedded as zeros."""
    folder = large_values("float32")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][7] = 0
    for name in weights:
        if name.endswith(".bias"):
            weights[name] = torch.zeros_like(weights[name])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model, exact = CpuEngine().load(folder), CpuEngine().load(folder, cache="float32")
    texts = [IDS[0, :30].tolist(), [7]]
    opened, sessions = [model.open() for _ in texts], [exact.start() for _ in texts]
    for step, wide in ((texts, [True, False]), ([[5], [6]], [True, True])):
        found = model.step(list(zip(opened, step, strict=True)))
        assert [sequence.cache.wide for sequence in opened] == wide
        for row, session, ids in zip(found, sessions, step, strict=True):
            assert torch.equal(row, session.feed(ids))
    assert len(model.notes) == 1


def test_a_chosen_cache_that_overflows_is_named_with_the_option(large_values):
    folder = large_values("float32")
    for run in (lambda m: m.logits(IDS), lambda m: m.start().feed([1, 2])):
        with pytest.raises(UserError, match=r"exceed 65504.*float16 key/value cache\. Give cache=.float32. or int8"):
            run(CpuEngine().load(folder, cache="float16"))
    loss = difference(CpuEngine().load(folder, cache="int8").logits(IDS), load_reference(folder).logits(IDS))
    assert loss < 0.1, "int8 has scales of its own"


@pytest.mark.usefixtures("quiet_machine", "warm_workers")
def test_an_evaluation_shows_the_note(large_values, tmp_path):
    from quern.evaluation.texts import Text
    from quern.pipeline.evaluate import evaluate

    folder = large_values("float32")
    row = evaluate(folder, texts=[Text.of("text", [calibration_text()[:400]])], tokens=64, window=32, speed_rounds=0)
    assert row.kl_mean < 1e-3, "as the reference engine, which needs no cache"
    assert [note for note in row.notes if "kept as float32" in note]


def test_ordinary_values_leave_no_note(tmp_path):
    folder = write_model(tmp_path / "model", tiny_config("llama", torch_dtype="float16"))
    for model in (CpuEngine().load(folder), load_reference(folder)):
        model.logits(IDS)
        model.start().feed([1, 2, 3])
        assert model.notes == []


@pytest.mark.parametrize("together", [True, False])
def test_the_reference_engine_leaves_float16_where_it_overflows(large_values, together):
    folder = large_values("float16")
    expected = load_reference(folder, dtype="float32").logits(IDS)[0, -1]
    model = load_reference(folder)
    if together:
        found = model.logits(IDS)[0, -1]
    else:
        session = model.start()
        session.feed(IDS[0, :60].tolist())
        found = session.feed(IDS[0, 60:].tolist())
    assert difference(found, expected) < FLOAT32
    assert model.notes == ["float16 arithmetic overflowed (its greatest number is 65504), so the model ran in float32"]
