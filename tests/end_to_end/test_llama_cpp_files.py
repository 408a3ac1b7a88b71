"""Stock llama.cpp loads what quern writes, and computes what quern's decoder computes.

It is the one that ``quern peers install llama.cpp`` compiles from llama-cpp-python's source distribution, which takes
minutes; where it is not installed these tests are skipped.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from artifacts import small_recipe
from safetensors.torch import load_file, save_file
from tiny_model import tiny_config, write_model

import quern
from quern.checkpoint.gguf.names import interleave_rows
from quern.checkpoint.tokenizer import load_tokenizer
from quern.codecs.blocks.types import TYPES
from quern.core.errors import UserError
from quern.engines.base import ENGINES
from quern.peers.environment import Environment
from quern.pipeline.export import export
from quern.pipeline.quantize import quantize

BUNDLED = Path(__file__).resolve().parents[2] / "models" / "python-7m"
JUDGE = Path(__file__).resolve().parents[1] / "llama_judge.py"
IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(3))
TEXTS = [
    "",
    "def f(x):\n\treturn x + 12345  # it's\n\n\n",
    "Ünïcödé é, 你好 🎉",
    "HELLO World's I'LL 3.14",
    "  two  spaces ",
]
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 64, "initializer_range": 0.05}
FAMILIES = {
    "llama": tiny_config("llama", tie_word_embeddings=False, torch_dtype="float32", **WIDE),
    "llama without biases": tiny_config("llama", attention_bias=False, torch_dtype="float32", **WIDE),
    "llama 3": tiny_config("llama", attention_bias=False, torch_dtype="float32", **WIDE, rope_parameters={
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16, "rope_theta": 10000.0}),
    "yarn": tiny_config("qwen2", torch_dtype="float32", **WIDE, rope_parameters={
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}),
    "mistral": tiny_config("mistral", torch_dtype="float32", **WIDE),
    "qwen2": tiny_config("qwen2", torch_dtype="float32", **WIDE),
    "qwen3": tiny_config("qwen3", attention_bias=False, torch_dtype="float32", **WIDE),
    "mixtral": tiny_config("mixtral", torch_dtype="float32", **WIDE),
    "qwen2_moe": tiny_config("qwen2_moe", tie_word_embeddings=False, torch_dtype="float32", **WIDE),
    "qwen3_moe": tiny_config("qwen3_moe", num_experts=12, num_experts_per_tok=5, torch_dtype="float32", **WIDE),
}  # fmt: skip
LEAST, MOST = 2e-9, {"F32": 2e-6, "blocks": 2e-3}
"""Mean KL divergences between two runtimes. llama.cpp keeps keys and values in float16, and multiplies blocks by inputs that
it rounds to 8 bits (a relative error of some 2^-8 each); another order of rows or nibbles gives divergences near 1. Below the
least it would not be two runtimes."""


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """Runs files through llama.cpp: by name logits, greedy tokens, and the tokens of ``TEXTS``."""
    try:
        environment = Environment.of("llama.cpp")
        installed = environment.installed()
    except UserError as error:  # pragma: no cover - the adapter is part of quern
        pytest.skip(str(error))
    if installed is None:
        pytest.skip("llama.cpp is not installed (quern peers install llama.cpp)")

    def run(
        files: dict[str, Path], ids: torch.Tensor = IDS
    ) -> dict[str, tuple[torch.Tensor, list[int], list[list[int]]]]:
        request = tmp_path_factory.mktemp("judge") / "request.json"
        asked = {"files": [str(file) for file in files.values()], "ids": ids.tolist(), "texts": TEXTS}
        request.write_text(json.dumps(asked), "utf-8")
        command = [str(environment.python), "-P", "-s", str(JUDGE), str(Path(quern.__file__).parent)]
        command += [str(environment.prefix / "llama.cpp" / "bin"), str(request)]
        ended = subprocess.run(command, env=environment.variables(), capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr[-3000:]
        found = {}
        for name, file in files.items():
            said = json.loads(Path(f"{file}.json").read_text("utf-8"))
            found[name] = torch.from_numpy(np.load(f"{file}.npy")), said["greedy"], said["texts"]
        return found

    return run


def divergence(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Mean KL divergence in nats a token."""
    first, second = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
    return float((first.exp() * (first - second)).sum(-1).mean())


def decoded(path: Path, ids: torch.Tensor = IDS) -> torch.Tensor:
    return ENGINES.get("reference")().load(path, dtype="float32").logits(ids)


def test_every_family_computes_the_same(ask, tmp_path):
    """Unquantized, in float32: what is left is llama.cpp's float16 cache, and whatever a wrong conversion would do."""
    files, models = {}, {}
    for number, (name, config) in enumerate(FAMILIES.items()):
        models[name] = write_model(tmp_path / str(number), config, seed=number)
        files[name] = tmp_path / f"{number}.gguf"
        export(models[name], files[name])
    for name, (logits, _, texts) in ask(files).items():
        assert LEAST / 1e3 < divergence(decoded(models[name]), logits) < MOST["F32"], name
        assert texts == [load_tokenizer(models[name]).encode(text) for text in TEXTS], name


def test_a_wrong_layout_would_show(wide_model, tmp_path):
    """Rows of q and k in the other order, and halves of blocks changed, lie far beyond the bounds."""
    for wrong, least in ((_rows, 1e3 * MOST["F32"]), (_halves, 100 * MOST["blocks"])):
        model = write_model(tmp_path / wrong.__name__, FAMILIES["llama"])
        tensors = {name: wrong(name, tensor) for name, tensor in load_file(model / "model.safetensors").items()}
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        assert divergence(decoded(wide_model), decoded(model)) > least


def _rows(name: str, tensor: torch.Tensor) -> torch.Tensor:
    heads = 4 if "q_proj" in name else 2 if "k_proj" in name else None
    return tensor if heads is None else interleave_rows(tensor, heads).contiguous()


def _halves(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if "proj.weight" not in name:
        return tensor
    return tensor.view(len(tensor), -1, 2, 16).flip(2).reshape(tensor.shape).contiguous()


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("wide") / "model", FAMILIES["llama"])


def test_every_type_computes_what_quern_decodes(ask, wide_model, tmp_path):
    files = {}
    for name in TYPES:
        scheme = {"codec": "ggml", "type": name}
        files[name] = tmp_path / f"{name}.gguf"
        recipe = small_recipe(weights=scheme, embedding=scheme, head=scheme)
        quantize(wide_model, files[name], recipe=recipe, format="gguf", threads=1)
    schemes = {"mxfp4": {"codec": "mxfp4"}, "asymmetric": {"symmetric": False, "group_size": 64}, "six": {"bits": 6, "granularity": "channel"}}  # fmt: skip
    for name, scheme in schemes.items():
        folder, files[name] = tmp_path / name, tmp_path / f"{name}.gguf"
        quantize(wide_model, folder, recipe=small_recipe(weights=scheme, head=scheme), threads=1)
        export(folder, files[name])
    for name, (logits, _, _) in ask(files).items():
        assert LEAST < divergence(decoded(files[name]), logits) < MOST["blocks"], name


def test_types_of_experts_compute_what_quern_decodes(ask, tmp_path):
    """Whose choices int8 inputs move here and there: the bound is ten times as wide."""
    files = {}
    inner = dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 256)
    wide = {**WIDE, **inner, "num_hidden_layers": 1}
    for family, kind in (("mixtral", "q8_0"), ("qwen2_moe", "q5_0"), ("qwen3_moe", "q4_k")):
        model, files[f"{family} {kind}"] = tmp_path / f"{family} {kind}", tmp_path / f"{family} {kind}.gguf"
        write_model(model, tiny_config(family, tie_word_embeddings=False, torch_dtype="float32", **wide))
        scheme = {"codec": "ggml", "type": kind}
        recipe = small_recipe(weights=scheme, embedding=scheme, head=scheme, rounding={"method": "nearest"})
        quantize(model, files[f"{family} {kind}"], recipe=recipe, format="gguf", threads=1)
    for name, (logits, greedy, _) in ask(files).items():
        assert LEAST < divergence(decoded(files[name]), logits) < 10 * MOST["blocks"], name
        ours = ENGINES.get("cpu")().load(files[name], threads=1)
        assert divergence(decoded(files[name]), ours.logits(IDS)) < 10 * MOST["blocks"], name
        session = ours.start()
        last = session.feed(IDS[0].tolist())
        for token in greedy:
            assert float(last.max() - last[token]) < 0.1, "of two that are nearly alike either may win"
            last = session.feed([token])


def test_the_bundled_model_says_the_same_in_llama_cpp(ask, tmp_path):
    """Greedy tokens of the file are those of quern's reference engine, and llama.cpp cuts text as the model's tokenizer."""
    file = tmp_path / "model.gguf"
    recipe = small_recipe(weights={"codec": "ggml", "type": "q4_0"}, embedding={"codec": "ggml", "type": "q8_0"})
    quantize(BUNDLED, file, recipe=recipe, format="gguf", threads=1)
    prompt = load_tokenizer(BUNDLED).encode("class Stack:\n    def __init__(self):\n")
    (found,) = ask({"bundled": file}, torch.tensor([prompt])).values()
    logits, greedy, texts = found
    ids = list(prompt)
    engine = ENGINES.get("reference")().load(file, dtype="float32")
    for token in greedy:
        last = engine.logits(torch.tensor([ids]))[0, -1]
        assert float(last.max() - last[token]) < 0.1  # of two that are nearly alike either may win
        ids.append(token)
    assert divergence(decoded(file, torch.tensor([prompt])), logits) < MOST["blocks"]
    assert texts == [load_tokenizer(BUNDLED).encode(text) for text in TEXTS]


def test_parts_are_loaded_by_the_first(ask, wide_model, tmp_path):
    scheme = {"codec": "ggml", "type": "q4_0"}
    given = {"recipe": small_recipe(weights=scheme, embedding=scheme, head=scheme), "format": "gguf", "threads": 1}
    quantize(wide_model, tmp_path / "whole.gguf", **given)
    report = quantize(wide_model, tmp_path / "parts.gguf", format_options={"shard-size": "200KB"}, **given)
    assert report.path.name.startswith("parts-00001-of-")
    found = ask({"whole": tmp_path / "whole.gguf", "parts": report.path})
    assert torch.equal(found["whole"][0], found["parts"][0])
