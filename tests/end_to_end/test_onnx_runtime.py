"""Stock ONNX Runtime runs what quern writes, and computes what quern's reference engine computes.

It is the one that ``quern peers install onnxruntime`` installs; where it is not installed these tests are skipped.
"""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artifacts import small_recipe
from schemes import gaussian
from tiny_model import tiny_config, write_model

import quern
from quern.codecs.base import CODECS
from quern.core.errors import UserError
from quern.core.packed import PackedLinear, QuantizedWeight
from quern.core.plan import LinearPlan
from quern.core.recipe_parts import ROTATION, Activations, Transform
from quern.core.scheme import CodecScheme, parse_scheme
from quern.engines._modules import QuantizedEmbedding, QuantizedLinear
from quern.engines.base import ENGINES
from quern.formats.onnx import DATA
from quern.formats.onnx_files.graph import Graph
from quern.formats.onnx_files.products import Products, held, problems
from quern.peers.environment import Environment
from quern.pipeline.export import export
from quern.pipeline.quantize import quantize
from quern.rotation.rotation import pack_signs

BUNDLED = Path(__file__).resolve().parents[2] / "models" / "python-7m"
JUDGE = Path(__file__).resolve().parents[1] / "onnx_judge.py"
IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(3))
PROMPT = 16
EPS = 2.0**-24
Ask = Callable[..., dict[str, dict[str, np.ndarray[Any, Any]]]]


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> Callable[..., None]:
    """Runs ``onnx_judge.py``."""
    try:
        environment = Environment.of("onnxruntime")
        installed = environment.installed()
    except UserError as error:  # pragma: no cover - the adapter is part of quern
        pytest.skip(str(error))
    if installed is None:
        pytest.skip("onnxruntime is not installed (quern peers install onnxruntime)")

    def run(**request: Any) -> None:
        file = tmp_path_factory.mktemp("judge") / "request.json"
        usual = {"products": [], "folders": [], "ids": IDS.tolist(), "prompt": PROMPT, "generate": []}
        file.write_text(json.dumps(usual | request), "utf-8")
        command = [str(environment.python), "-P", "-s", str(JUDGE), str(Path(quern.__file__).parent), str(file)]
        ended = subprocess.run(command, env=environment.variables(), capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr[-3000:]
        assert "warning" not in ended.stderr.lower(), ended.stderr[-3000:]

    return run


# Single matrices, on given inputs

SHAPE = (24, 96)
PACKED: dict[str, dict[str, Any]] = {
    "4 bits, groups of 32": {"bits": 4, "group_size": 32},
    "4 bits, asymmetric, groups of 32": {"bits": 4, "symmetric": False, "group_size": 32},
    "4 bits, asymmetric, a short last group": {"bits": 4, "symmetric": False, "group_size": 64},
    "4 bits, scales in bfloat16, groups of 16": {"bits": 4, "group_size": 16, "scale_dtype": "bfloat16"},
    "4 bits, groups of 48 in blocks of 16": {"bits": 4, "symmetric": False, "group_size": 48},
    "4 bits, channels": {"bits": 4, "granularity": "channel", "scale_dtype": "float32"},
    "4 bits, asymmetric, channels": {"bits": 4, "symmetric": False, "granularity": "channel"},
    "4 bits, one scale": {"bits": 4, "granularity": "tensor"},
    "5 bits, asymmetric, one scale": {"bits": 5, "symmetric": False, "granularity": "tensor"},
    "8 bits, blocks": {"bits": 8, "granularity": "block", "group_size": 16},
    "8 bits, channels": {"bits": 8, "granularity": "channel"},
    "8 bits, asymmetric, groups of 32": {"bits": 8, "symmetric": False, "group_size": 32},
    "2 bits, groups of 32": {"bits": 2, "group_size": 32},
    "2 bits, asymmetric, groups of 16": {"bits": 2, "symmetric": False, "group_size": 16},
    "3 bits, groups of 32": {"bits": 3, "group_size": 32},
    "1 bit, groups of 96": {"bits": 1, "group_size": 96},
    "7 bits, groups of 32": {"bits": 7, "group_size": 32},
}
INT8: dict[str, dict[str, Any]] = {
    "8 bits, channels": PACKED["8 bits, channels"],
    "8 bits, one scale": {"bits": 8, "granularity": "tensor"},
    "4 bits, channels": PACKED["4 bits, channels"],
}


def rounded(scheme: CodecScheme, shape: tuple[int, int]) -> QuantizedWeight:
    codec, weight = CODECS.get(scheme.codec)(scheme), gaussian(*shape)
    encoder = codec.encoder(weight, weight, refit=False)
    encoder.round_all(weight)
    return QuantizedWeight(scheme, shape, codec.join([encoder.parts()]))


def product_model(path: Path, linear: PackedLinear, plan: LinearPlan, level: int, embedding: bool = False) -> Path:
    """A model of one matrix: ``x`` float32 ``(1, time, columns)``, or token numbers ``(1, time)``, to one output."""
    assert list(problems(plan, linear.weight.shape, embedding)) == []
    tensors = io.BytesIO()
    graph = Graph(tensors, path.name + ".data")
    products = Products(graph, level)
    names = products.store("m", held("m", linear))
    if embedding:
        inputs = graph.input("x", torch.int64, ["batch", "time"])
        output = products.embedding("m", linear.weight.shape, plan, names, inputs)
    else:
        inputs = graph.input("x", torch.float32, ["batch", "time", linear.weight.shape[1]])
        output = products.linear("m", linear.weight.shape, plan, names, inputs)
    graph.output(output, torch.float32, ["batch", "time", linear.weight.shape[0 if not embedding else 1]])
    Path(f"{path}.data").write_bytes(tensors.getvalue())
    path.write_bytes(graph.model("quern", "test", {}))
    return path


def module_of(linear: PackedLinear, plan: LinearPlan) -> QuantizedLinear:
    """The reference engine's module of the same."""
    weight, rotated = linear.weight, linear.input_signs is not None
    module = QuantizedLinear(weight.scheme, weight.shape, False, torch.float32, plan.activations.mode, rotated)
    state = dict(weight.parts)
    if linear.input_scale is not None:
        state["input_scale"] = torch.tensor(linear.input_scale)
    if linear.input_signs is not None:
        state["input_signs"] = linear.input_signs
    module.load_state_dict(state)
    return module


def inputs_of(columns: int) -> torch.Tensor:
    """Float32 ``(1, 7, columns)``, the sizes of tokens apart by powers of two, one of them all zero."""
    found = gaussian(7, columns, seed=5) * 2.0 ** torch.arange(-3, 4)[:, None]
    found[3] = 0
    return found[None]


@pytest.fixture(scope="module")
def outputs(judge, tmp_path_factory):
    """For each case of single matrices what ONNX Runtime computes, all by one process."""
    folder = tmp_path_factory.mktemp("products")
    cases: dict[str, tuple[Path, QuantizedLinear, torch.Tensor]] = {}
    signs = pack_signs(np.random.default_rng(0).random(SHAPE[1]) < 0.5)
    ones, many = torch.eye(SHAPE[1])[None], inputs_of(SHAPE[1])

    def add(name: str, keys: dict[str, Any], x: torch.Tensor, level: int = 1, **further: Any) -> None:
        scheme, mode = parse_scheme(keys), further.get("mode", "none")
        linear = PackedLinear(rounded(scheme, SHAPE), mode, further.get("scale"), further.get("signs"))
        rotation = Transform(method=ROTATION) if "signs" in further else None
        plan = LinearPlan(scheme, rotation=rotation, activations=Activations(mode=mode))
        path = product_model(folder / f"{len(cases)}.onnx", linear, plan, level)
        np.save(f"{path}.npy", x.numpy())
        cases[name] = path, module_of(linear, plan), x

    for name, keys in PACKED.items():
        add(f"{name}: values", keys, ones)
        add(f"{name}: level 1", keys, many)
        add(f"{name}: level 4", keys, many, level=4)
    for name, keys in INT8.items():
        add(f"{name}: dynamic", keys, many, mode="dynamic")
        add(f"{name}: static", keys, many, mode="static", scale=0.037)
    add("rotated: level 1", PACKED["4 bits, groups of 32"], many, signs=signs)
    add("rotated: dynamic", INT8["8 bits, channels"], many, signs=signs, mode="dynamic")
    judge(products=[str(path) for path, _, _ in cases.values()])
    found = {name: torch.from_numpy(np.load(f"{path}.npy")) for name, (path, _, _) in cases.items()}
    return {name: (found[name], module, x) for name, (_, module, x) in cases.items()}


@pytest.mark.parametrize("name", PACKED)
def test_stored_values_are_the_same_to_the_last_bit(outputs, name):
    """Of each column alone, by inputs that are 1 there and 0 elsewhere."""
    found, module, _ = outputs[f"{name}: values"]
    assert torch.equal(found[0].T, module.decoded(torch.float32))


@pytest.mark.parametrize("name", PACKED)
def test_products_agree(outputs, name):
    """Two orders of K products in float32 differ by at most (K + 4) eps sum_k |x_k w_k| (Higham 2002, section 3.1). Level 4
    rounds the inputs of each block to steps of at most 1/127 of its greatest, so by at most 1/254 of it (and eps of a
    division), of which that of the row is taken here; and it adds codes before it takes their zero point off, so that
    what it adds has up to 2^bits scales, at most four times the greatest weight."""
    found, module, x = outputs[f"{name}: level 1"]
    expected, weight = module(x), module.decoded(torch.float32).abs()
    bound = (SHAPE[1] + 4) * EPS * (x.abs() @ weight.T)
    assert bool(((found - expected).abs() <= bound).all())
    coarse, _, _ = outputs[f"{name}: level 4"]
    wide = bound + x.abs().amax(-1, keepdim=True) / 253 * weight.sum(1)
    wide = wide + (SHAPE[1] + 4) * EPS * 4 * weight.max() * x.abs().sum(-1, keepdim=True)
    assert bool(((coarse - expected).abs() <= wide).all())
    if PACKED[name]["bits"] > 2:  # of 2 bits it has such kernels for some sizes of blocks
        assert not bool(((coarse - expected).abs() <= bound).all())  # it does round them, and the comparison can fail


@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("name", INT8)
def test_int8_products_are_the_same_to_the_last_bit(outputs, name, mode):
    """Integers are added exactly, and scales multiplied in one order."""
    found, module, x = outputs[f"{name}: {mode}"]
    assert torch.equal(found, module(x))


def test_rotated_inputs_agree(outputs):
    """Ours adds in log2 B steps, theirs sums two times sqrt(B) products: of each rotated value at most 2 B eps of
    sum |x| / sqrt(B) over the block, before K products are summed. In int8 a value may round to either of two steps too."""
    for name in ("rotated: level 1", "rotated: dynamic"):
        found, module, x = outputs[name]
        block = SHAPE[1] & -SHAPE[1]
        spread = (
            x.abs().unflatten(-1, (-1, block)).sum(-1, keepdim=True).expand(1, 7, -1, block).flatten(-2) / block**0.5
        )
        weight = module.decoded(torch.float32).abs()
        bound = (2 * block + SHAPE[1] + 4) * EPS * (spread @ weight.T)
        if name.endswith("dynamic"):
            bound = bound + spread.amax(-1, keepdim=True) / 127 * weight.amax(1)  # one value of a token, one step
        assert bool(((found - module(x)).abs() <= bound).all())
        module.input_signs[0] ^= 1
        assert not bool(((found - module(x)).abs() <= bound).all())


EMBEDDINGS = {
    "8 bits, channels": {"bits": 8, "granularity": "channel"},
    "4 bits, asymmetric, an odd number of blocks": {"bits": 4, "symmetric": False, "group_size": 32},
    "3 bits, one scale": {"bits": 3, "granularity": "tensor"},
    "2 bits, asymmetric": {"bits": 2, "symmetric": False, "group_size": 16},
}


def test_rows_of_embeddings_are_the_same_to_the_last_bit(judge, tmp_path):
    ids, cases = torch.tensor([[0, 5, 23, 5]]), {}
    for name, keys in EMBEDDINGS.items():
        scheme = parse_scheme(keys)
        weight = rounded(scheme, SHAPE)
        path = tmp_path / f"{len(cases)}.onnx"
        cases[name] = product_model(path, PackedLinear(weight), LinearPlan(scheme), 1, embedding=True), weight
        np.save(f"{path}.npy", ids.numpy())
    judge(products=[str(path) for path, _ in cases.values()])
    for name, (path, weight) in cases.items():
        module = QuantizedEmbedding(weight.scheme, SHAPE, torch.float32)
        module.load_state_dict(weight.parts)
        assert torch.equal(torch.from_numpy(np.load(f"{path}.npy")), module(ids)), name


# Whole models

FAMILIES = {
    "llama": tiny_config("llama", tie_word_embeddings=False, torch_dtype="float32"),
    "llama without biases": tiny_config("llama", attention_bias=False),
    "llama 3": tiny_config("llama", torch_dtype="float16", rope_parameters={
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16, "rope_theta": 10000.0}),
    "yarn": tiny_config("qwen2", rope_parameters={
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}),
    "mistral": tiny_config("mistral"),
    "mistral with a window": tiny_config("mistral", sliding_window=7),
    "qwen2": tiny_config("qwen2"),
    "qwen2 untied": tiny_config("qwen2", tie_word_embeddings=False),
    "qwen3": tiny_config("qwen3"),
}  # fmt: skip
TIMES = 8
"""By how much the error of another float32 evaluation may exceed that of ours; both are some sums of some 100 roundings."""


def logits(path: Path, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Of the reference engine in float32, or with all arithmetic but that of the rotary angles in float64."""
    model = ENGINES.get("reference")().load(path, dtype="float32").model.to(dtype)
    for module in model.modules():
        if isinstance(module, QuantizedEmbedding):
            module.dtype = dtype
    with torch.no_grad():
        return model(ids, use_cache=False).logits.double()


def agree(found: dict[str, np.ndarray[Any, Any]], path: Path, ids: torch.Tensor) -> None:
    """That all of a judge's logits are as near to the exact ones as float32 allows."""
    exact = logits(path, ids, torch.float64)
    bound = TIMES * (logits(path, ids, torch.float32) - exact).abs().max()
    assert 0 < bound < 1e-3 * exact.abs().max()
    for way in ("whole", "steps", "shared"):
        difference = (torch.from_numpy(found[way]).double() - exact).abs().max()
        assert bool(difference <= bound), (way, float(difference), float(bound))


def test_every_family_computes_the_same(judge, tmp_path):
    """At once and token by token, with a past that grows and with one that is a buffer; unquantized and in 4 bits."""
    models, folders = {}, {}
    recipe = small_recipe(weights={"bits": 4, "symmetric": False, "group_size": 32}, transforms=[{"method": "hadamard"}],
                          embedding={"bits": 8, "granularity": "channel"}, head={"bits": 4, "group_size": 64})  # fmt: skip
    for number, (name, config) in enumerate(FAMILIES.items()):
        model = write_model(tmp_path / str(number), config, seed=number)
        packed = tmp_path / f"{number}-packed"
        quantize(model, packed, recipe=recipe, threads=1)
        for kind, source in (("", model), (" packed", packed)):
            models[name + kind], folders[name + kind] = source, tmp_path / f"{source.name}-onnx"
            export(source, folders[name + kind], format="onnx", format_options={"accuracy-level": "1"})
    judge(folders=[str(folder) for folder in folders.values()])
    for name, folder in folders.items():
        agree(np.load(f"{folder}.npz"), models[name], IDS)


def test_a_wrong_number_would_show(judge, tmp_path):
    """One bit of one code of the last matrix in the file, the head's."""
    model = write_model(tmp_path / "model", FAMILIES["qwen2 untied"])
    recipe = small_recipe(weights={"bits": 4, "group_size": 32}, head={"bits": 8, "granularity": "channel"})
    quantize(model, tmp_path / "packed", recipe=recipe, threads=1)
    for name in ("right", "wrong"):
        export(tmp_path / "packed", tmp_path / name, format="onnx", format_options={"accuracy-level": "1"})
    data = bytearray((tmp_path / "wrong" / DATA).read_bytes())
    data[-2 * 300 - 40] ^= 8  # scales of 300 rows in float16 come last
    (tmp_path / "wrong" / DATA).write_bytes(data)
    judge(folders=[str(tmp_path / name) for name in ("right", "wrong")])
    agree(np.load(tmp_path / "right.npz"), tmp_path / "packed", IDS)
    with pytest.raises(AssertionError):
        agree(np.load(tmp_path / "wrong.npz"), tmp_path / "packed", IDS)


def test_the_bundled_model_runs_in_onnxruntime_and_genai(judge, tmp_path):
    """By its own default, inputs of packed weights in int8; onnxruntime-genai continues with the likeliest tokens."""
    recipe = small_recipe(weights={"bits": 4, "group_size": 32}, embedding={"bits": 8, "granularity": "channel"})
    quantize(BUNDLED, tmp_path / "packed", recipe=recipe, threads=1)
    for level in ("1", "4"):
        export(tmp_path / "packed", tmp_path / level, format="onnx", format_options={"accuracy-level": level})
    folders = [str(tmp_path / level) for level in ("1", "4")]
    judge(folders=folders, generate=folders)
    agree(found := np.load(tmp_path / "1.npz"), tmp_path / "packed", IDS)
    assert {"MatMulNBits", "GatherBlockQuantized", "GroupQueryAttention"} <= set(found["operators"])
    session, tokens = ENGINES.get("reference")().load(tmp_path / "packed", dtype="float32").start(), []
    last = session.feed(IDS[0, :PROMPT].tolist())
    for _ in range(len(found["greedy"])):
        tokens.append(int(last.argmax()))
        last = session.feed(tokens[-1:])
    assert found["greedy"].tolist() == tokens
    exact = logits(tmp_path / "packed", IDS, torch.float64).log_softmax(-1)
    coarse = torch.from_numpy(np.load(tmp_path / "4.npz")["whole"]).double().log_softmax(-1)
    assert 1e-8 < float((exact.exp() * (exact - coarse)).sum(-1).mean()) < 2e-3  # inputs with errors of some 2^-8
