"""The CPU engine against the reference engine, on every family and every kind of weight that it reads."""

import json
import shutil

import numpy as np
import pytest
import torch
from artifacts import INT8, small_recipe
from safetensors.torch import load_file, save_file
from tiny_model import ROUTED, tiny_config, write_model

from quern import _native
from quern.architectures.base import ARCHITECTURES
from quern.checkpoint.checkpoint import open_checkpoint
from quern.core.errors import BadFileError, UserError
from quern.engines._cpu_weights import INPUT_GROUP
from quern.engines._modules import QuantizedEmbedding, QuantizedLinear
from quern.engines.base import engine_for
from quern.engines.cpu import CpuEngine
from quern.engines.reference import load as load_reference
from quern.pipeline.quantize import quantize

IDS = torch.randint(0, 296, (2, 100), generator=torch.Generator().manual_seed(4))
# Sums of up to 96 float32 terms carry 96 x 2^-24 = 6e-6; about 30 of them follow each other in three blocks.
FLOAT32 = 2e-4


def load(path, **options):
    return CpuEngine().load(path, **options)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


ROTARY = {
    "default": {"rope_theta": 10000.0, "rope_type": "default"},
    "linear": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_theta": 10000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
}  # fmt: skip


@pytest.mark.parametrize("family", ARCHITECTURES.names())
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False, "num_key_value_heads": 1, "head_dim": 32}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_unquantized_models_give_the_reference_logits(family, changes, dtype, tmp_path):
    model = write_model(tmp_path / "model", tiny_config(family, torch_dtype=dtype, **changes))
    assert (
        difference(load(model, cache="float32").logits(IDS), load_reference(model, dtype="float32").logits(IDS))
        < FLOAT32
    )


# Of the logits' size: what rounding keys and values costs, 2^-12 of each number or 1 / 254 or 1 / 16 of the greatest, amplified
# by three blocks. Biases that are added on the wrong side of a norm cost a third.
CACHES = {"float32": FLOAT32, "float16": 2e-3, "int8": 0.03, "int4": 0.2}


@pytest.mark.parametrize("family", ARCHITECTURES.names())
@pytest.mark.parametrize("cache", CACHES)
def test_every_kind_of_cache_gives_the_reference_logits(family, cache, tmp_path):
    """Biases a hundred times larger than the keys, so that it shows where they are added."""
    changes = {"num_experts_per_tok": 4} if family in ROUTED else {}  # all, so that rounding changes no choice
    config = tiny_config(family, torch_dtype="float32", initializer_range=0.1, **changes)
    folder = write_model(tmp_path / "model", config)
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith("k_proj.bias"):
            weights[name] = 2 * torch.randn(len(tensor), generator=torch.Generator().manual_seed(6))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    ours, theirs = load(folder, cache=cache).logits(IDS), load_reference(folder).logits(IDS)
    assert float((ours - theirs).norm() / theirs.norm()) < CACHES[cache]


@pytest.mark.parametrize("scaling", ROTARY)
def test_rotary_scaling_variants(scaling, tmp_path):
    config = tiny_config("llama", torch_dtype="float32", rope_parameters=ROTARY[scaling])
    model = write_model(tmp_path / "model", config)
    assert difference(load(model, cache="float32").logits(IDS), load_reference(model).logits(IDS)) < FLOAT32


@pytest.mark.parametrize("window", [1, 20, 64, 200])
def test_sliding_window(window, tmp_path):
    model = write_model(tmp_path / "model", tiny_config("mistral", torch_dtype="float32", sliding_window=window))
    loaded = load(model, cache="float32")
    together = loaded.logits(IDS)
    assert difference(together, load_reference(model).logits(IDS)) < FLOAT32
    session = loaded.start()
    assert torch.equal(torch.stack([session.feed([int(token)]) for token in IDS[0]]), together[0])


def test_a_batch_keeps_to_windows_and_pages(tmp_path):
    """Windows of 20 positions over pages of 16, some of which another sequence had before."""
    folder = write_model(tmp_path / "model", tiny_config("mistral", torch_dtype="float32", sliding_window=20))
    loaded, texts = load(folder), IDS.tolist()
    kept, gone = loaded.open(), loaded.open()
    loaded.step([(kept, texts[0][:17]), (gone, texts[1][:50])])
    gone.close()
    later = loaded.open()
    first = loaded.step([(later, texts[1][:33]), (kept, texts[0][17:40])])
    second = loaded.step([(kept, texts[0][40:41]), (later, texts[1][33:35])])
    for text, ends, found in ((texts[0], (40, 41), (first[1], second[0])), (texts[1], (33, 35), (first[0], second[1]))):
        session, start = load(folder).start(), 0
        for end, row in zip(ends, found, strict=True):
            assert torch.equal(session.feed(text[start:end]), row)
            start = end


WEIGHTS = {
    "4 bits asymmetric": {"bits": 4, "symmetric": False, "granularity": "group", "group_size": 32},
    "4 bits symmetric, group tail": {"bits": 4, "granularity": "group", "group_size": 40},
    "4 bits channel": {"bits": 4, "granularity": "channel"},
    "4 bits asymmetric tensor": {"bits": 4, "symmetric": False, "granularity": "tensor"},
    "8 bits channel": {"bits": 8, "granularity": "channel"},
    "8 bits group, bfloat16 scales": {"bits": 8, "granularity": "group", "group_size": 32, "scale_dtype": "bfloat16"},
    "3 bits asymmetric": {"bits": 3, "symmetric": False, "granularity": "group", "group_size": 32, "scale_dtype": "float32"},
    "6 bits": {"bits": 6, "granularity": "channel"},
}  # fmt: skip


def with_quantized_inputs(model, group_of):
    """The reference model with what the kernels do in front of a product: inputs to int8 per token and group."""

    def hook(module, arguments):
        x = arguments[0].float()
        group = group_of(module)
        padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))
        scale = padded.abs().amax(-1, keepdim=True) / 127
        rounded = (padded / scale.clamp(min=1e-30)).round() * scale
        return (rounded.flatten(-2)[..., : x.shape[-1]],)

    for module in model.model.modules():
        if isinstance(module, QuantizedLinear):
            module.register_forward_pre_hook(hook)
    return model


@pytest.mark.parametrize("name", WEIGHTS)
def test_integer_weights_and_int8_inputs(name, tmp_path, tiny_text):
    source = write_model(tmp_path / "model", tiny_config(torch_dtype="float32", initializer_range=0.1))
    scheme = WEIGHTS[name]
    recipe = small_recipe(weights=scheme, embedding=INT8, rounding={"method": "nearest"})
    artifact = quantize(source, tmp_path / "out", recipe=recipe, threads=1).path
    ours = load(artifact, cache="float32").logits(IDS)
    plain = load_reference(artifact, dtype="float32")
    exact = plain.logits(IDS)
    judge = with_quantized_inputs(plain, lambda m: scheme.get("group_size") or INPUT_GROUP)
    # The tied head is an embedding there: its inputs stay exact, so the comparison is of what enters it.
    embedding = judge.model.get_input_embeddings()
    assert isinstance(embedding, QuantizedEmbedding)
    theirs = judge.logits(IDS)
    noise = float((theirs - exact).norm() / exact.norm())
    assert noise < 0.2
    if scheme["bits"] == 8:  # inputs of two int8 numbers: a step of 1 / 127^2 of the greatest, in every product
        assert float((ours - exact).norm() / exact.norm()) < 2e-3 < noise
    else:
        # A float32 rounding may move an input across a tie, one step of 127 in about one of a thousand.
        assert float((ours - theirs).norm() / theirs.norm()) < 0.01
    assert engine_for(open_checkpoint(artifact)) == "cpu"


def test_one_large_input_does_not_drown_the_others_of_the_head(tmp_path):
    """Only a final norm that makes one channel a thousand times larger; the head reads the norm's outputs."""
    source = write_model(
        tmp_path / "model", tiny_config(torch_dtype="float32", hidden_size=256, tie_word_embeddings=False)
    )
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"][70] = 1000.0
    weights["lm_head.weight"][:, 70] = 0.0
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    unquantized = {"codec": "none"}
    recipe = small_recipe(weights=unquantized, embedding=unquantized, head=INT8, rounding={"method": "nearest"})
    artifact = quantize(source, tmp_path / "out", recipe=recipe, threads=1).path
    ours, theirs = load(artifact, cache="float32").logits(IDS), load_reference(artifact, dtype="float32").logits(IDS)
    # A quarter of the inputs share the large one's scale: 1000 / 127, and 1000 / 127^2 for what that leaves over, which is
    # a step of .06 in numbers of about 1 and so an error of .06 / sqrt(12) in that quarter. With one int8 number for each
    # input, the quarter would round to zero.
    assert float((ours - theirs).norm() / theirs.norm()) < 0.02


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("cpu") / "model", tiny_config(torch_dtype="float32"))


@pytest.fixture(scope="module")
def artifact(model, tmp_path_factory):
    recipe = small_recipe(weights=WEIGHTS["4 bits asymmetric"], embedding=INT8, rounding={"method": "nearest"})
    return quantize(model, tmp_path_factory.mktemp("cpu") / "out", recipe=recipe, threads=1).path


@pytest.mark.parametrize("cache", CACHES)
def test_one_token_at_a_time_is_the_prompt_at_once(artifact, cache):
    loaded = load(artifact, cache=cache)
    together = loaded.logits(IDS)
    session = loaded.start()
    assert torch.equal(torch.stack([session.feed([int(token)]) for token in IDS[0]]), together[0])
    session = loaded.start()
    session.feed(IDS[0, :33].tolist())
    assert torch.equal(session.feed(IDS[0, 33:].tolist()), together[0, -1])


@pytest.mark.parametrize("cache", CACHES)
def test_sequences_of_a_batch_do_not_know_each_other(artifact, cache):
    loaded = load(artifact, cache=cache)
    lengths = [1, 40, 17]
    sequences = [IDS.flatten()[:n].tolist() for n in lengths]
    opened = [loaded.open() for _ in sequences]
    first = loaded.step(list(zip(opened, sequences, strict=True)))
    second = loaded.step(list(zip(opened, [[5], [6], [7]], strict=True)))
    for index, sequence in enumerate(sequences):
        session = loaded.start()
        assert torch.equal(session.feed(sequence), first[index])
        assert torch.equal(session.feed([5 + index]), second[index])


@pytest.mark.parametrize("cache", CACHES)
def test_threads_and_instruction_sets_do_not_change_a_bit(artifact, cache):
    expected = load(artifact, threads=1, cache=cache).logits(IDS)
    assert torch.equal(load(artifact, threads=3, cache=cache).logits(IDS), expected)
    before = _native.isa()
    try:
        for isa in _native.isas():
            _native.use_isa(isa)
            assert torch.equal(load(artifact, threads=2, cache=cache).logits(IDS), expected), isa
    finally:
        _native.use_isa(before)


def test_a_large_key_bias_does_not_use_up_the_int8_cache(tmp_path):
    """Against a cache that quantizes keys with their bias: a bias of a hundred takes 127 steps, the keys themselves three."""
    folder = write_model(tmp_path / "model", tiny_config(torch_dtype="float32", initializer_range=0.1))
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith("k_proj.bias"):
            weights[name] = torch.where(torch.arange(len(tensor)) % 5 == 0, 100.0, tensor)
        if "q_proj" in name:  # or the scores of such keys are a lottery that the largest wins
            weights[name] = tensor / 30
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    exact = load(folder, cache="float32").logits(IDS)

    def through_eight_bits(module, arguments, output):
        heads = output.unflatten(-1, (-1, 16))
        scale = heads.abs().amax(-1, keepdim=True) / 127
        return ((heads / scale).round() * scale).flatten(-2)

    error = {}
    for kinds in (("v_proj",), ("v_proj", "k_proj")):
        plain = load_reference(folder)
        for module_name, module in plain.model.named_modules():
            if module_name.endswith(kinds):
                module.register_forward_hook(through_eight_bits)
        error[kinds[-1]] = float((plain.logits(IDS) - exact).norm())
    ours = float((load(folder, cache="int8").logits(IDS) - exact).norm())
    assert error["k_proj"] > 1.2 * error["v_proj"], "keys with their bias must show in this test"
    assert ours < 1.1 * error["v_proj"], "what is left is the values' rounding"


def test_context_and_vocabulary_are_checked(model):
    loaded = load(model)
    session = loaded.start()
    with pytest.raises(UserError, match=r"129 tokens do not fit: this model's context is 128\. Shorten the prompt"):
        session.feed([1] * 129)
    session.feed([1] * 128)
    with pytest.raises(UserError, match="129 tokens do not fit"):
        session.feed([1])
    for token in (-1, 300):
        with pytest.raises(UserError, match=f"token {token} is outside the model's vocabulary of 300 tokens"):
            loaded.start().feed([token])


def test_artifacts_are_checked_before_kernels_read_them(artifact, tmp_path):
    broken = shutil.copytree(artifact, tmp_path / "broken")
    shard = next(path for path in sorted(broken.glob("*.safetensors")) if "00002" in path.name)
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith("down_proj.codes"))
    save_file({**tensors, name: tensors[name][:, :-1].contiguous()}, shard)
    with pytest.raises(BadFileError, match=r"down_proj\.codes' has shape .*, the config calls for"):
        load(broken)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_act": "relu"}, "it knows the activations silu, swish, gelu, .*; config.json asks for 'relu'"),
        ({"rope_parameters": {"rope_type": "proportional", "factor": 2.0, "rope_theta": 1e4}}, "rotary scalings"),
    ],
)
def test_what_it_does_not_know_it_leaves_to_the_reference(changes, reason, tmp_path):
    folder = write_model(tmp_path / "model", tiny_config("llama", torch_dtype="float32", **changes))
    assert engine_for(open_checkpoint(folder)) == "reference"
    with pytest.raises(UserError, match=reason):
        engine_for(open_checkpoint(folder), "cpu")
    with pytest.raises(UserError, match=reason):
        load(folder)


def test_another_layout_in_the_artifact_is_refused(artifact, tmp_path):
    newer = shutil.copytree(artifact, tmp_path / "newer")
    config = json.loads((newer / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (newer / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="format version 99"):
        load(newer)


def test_matrices_check_their_arrays():
    def matrix(**changes):
        values = {
            "kind": "integer4", "rows": 4, "columns": 16, "codes": np.zeros(32, np.uint8),
            "scale": np.zeros(16, np.uint8), "group": 8,
        }  # fmt: skip
        return _native.Matrix(**{**values, **changes})

    matrix()
    for changes, message in (
        ({"codes": np.zeros(31, np.uint8)}, "codes has 31 bytes; this matrix needs 32"),
        ({"scale": np.zeros(15, np.uint8)}, "scale has 15 bytes"),
        ({"scale": None}, "integer4 needs scales"),
        ({"group": 17}, "a group has 1 to 16 columns"),
        ({"kind": "nibble"}, "unknown kind of matrix 'nibble'"),
        ({"zeros": np.zeros(4, np.uint8)}, "zeros has 4 bytes; this matrix needs 8"),
        ({"table": np.zeros(16, np.int8)}, "integer4 has no table"),
        ({"kind": "codebook4"}, "codebook4 needs a table"),
        ({"kind": "integer8", "codes": np.zeros(64, np.uint8), "zeros": np.zeros(8, np.uint8)}, "has no zero points"),
        ({"rows": 0}, "at least one row"),
        ({"scale": np.zeros(17, np.uint8)[1:]}, "scale must begin at a multiple of 2 bytes"),
        ({"zeros": np.zeros(9, np.uint8)[1:]}, "zeros must begin at a multiple of 4 bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            matrix(**changes)
