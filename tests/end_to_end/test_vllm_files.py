"""Stock vLLM and stock GPTQModel load what quern writes, and compute what quern's reference engine computes.

vLLM is the one that ``python tools/install_vllm.py`` installs, GPTQModel that of ``quern peers install gptqmodel``; where one is
not installed its tests are skipped.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artifacts import small_recipe
from repository_tools import load_tool

import quern
from quern.checkpoint.tokenizer import load_tokenizer
from quern.core.errors import UserError
from quern.engines import vllm_hook
from quern.engines.base import ENGINES
from quern.peers.environment import Environment
from quern.pipeline.quantize import quantize

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "models" / "python-7m"
VLLM, GPTQMODEL = ROOT / "tests" / "vllm_judge.py", ROOT / "tests" / "gptqmodel_judge.py"
PROMPT = "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"
GREEDY = 8
GROUPS = {"bits": 4, "group_size": 64}
ZERO_POINTS = {**GROUPS, "symmetric": False}
KEPT = {"overrides": [{"pattern": "*.down_proj", "codec": "none"}]}
EXPORTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq": ("gptq", {"weights": GROUPS}),
    "gptq with linears kept": ("gptq", {"weights": GROUPS, **KEPT}),
    "awq": ("awq", {"weights": ZERO_POINTS}),
    "awq symmetric": ("awq", {"weights": GROUPS}),
    "compressed-tensors": ("compressed-tensors", {"weights": GROUPS}),
    "compressed-tensors asymmetric": ("compressed-tensors", {"weights": ZERO_POINTS}),
    "compressed-tensors W8A8": (
        "compressed-tensors",
        {"weights": {"bits": 8, "granularity": "channel"}, "activations": {"mode": "dynamic"}},
    ),
}
NOISE = 3
"""How many times the mean change of log-probability by bfloat16 arithmetic a runtime may differ. Weights of a wrong order lie
hundreds of times beyond."""


def made(folder: Path, names: list[str]) -> dict[str, Path]:
    paths = {}
    for number, name in enumerate(names):
        format, choices = EXPORTS[name]
        paths[name] = folder / f"{number:02d}"
        quantize(BUNDLED, paths[name], recipe=small_recipe(**choices), format=format, threads=1)
    return paths


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    return load_tokenizer(BUNDLED).encode(PROMPT)


def logits_of(folder: Path, ids: list[int], dtype: str = "float32") -> torch.Tensor:
    return ENGINES.get("reference")().load(folder, dtype=dtype).logits(torch.tensor([ids]))[0].double()


def of_tokens(logits: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """The log-probability of each token of a text but the first."""
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def ask_vllm(paths: dict[str, Path], folder: Path, prompt: list[int], dtype: str, *plug_in: str) -> dict[str, Any]:
    """What vLLM says of each folder. Skips where it is not installed."""
    python = load_tool("install_vllm").interpreter()
    if python is None:
        pytest.skip("vLLM is not installed (python tools/install_vllm.py)")
    request = folder / "request.json"
    asked = {"folders": [str(path) for path in paths.values()], "ids": [prompt], "greedy": GREEDY, "top": 1}
    request.write_text(json.dumps({**asked, "dtype": dtype}), "utf-8")
    command = [str(python), "-P", "-s", str(VLLM), str(request), *plug_in]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    said = {name: json.loads(Path(f"{path}.vllm.json").read_text("utf-8")) for name, path in paths.items()}
    assert {name: one["error"] for name, one in said.items() if "error" in one} == {}
    return said


def check_greedy(tokens: list[int], folder: Path, prompt: list[int]) -> None:
    """Of two that are nearly alike either may win."""
    logits = logits_of(folder, [*prompt, *tokens])[len(prompt) - 1 : -1]
    for place, token in enumerate(tokens):
        assert float(logits[place].max() - logits[place, token]) < 0.15


def test_vllm_computes_what_the_reference_engine_does(prompt, tmp_path):
    paths = made(tmp_path, list(EXPORTS))
    for name, said in ask_vllm(paths, tmp_path, prompt, "bfloat16").items():
        exact = of_tokens(logits_of(paths[name], prompt), prompt)
        noise = (of_tokens(logits_of(paths[name], prompt, "bfloat16"), prompt) - exact).abs().mean()
        found = (torch.tensor(said["logprobs"][0]).double() - exact).abs().mean()
        assert found < NOISE * noise, (name, float(found), float(noise))
        check_greedy(said["tokens"], paths[name], prompt)


ROTATED = {"transforms": [{"method": "hadamard"}]}
OWN: dict[str, dict[str, Any]] = {
    "integers": {"weights": ZERO_POINTS, "embedding": {"bits": 8, "granularity": "channel"}, **ROTATED},
    "trellis": {"weights": {"codec": "trellis"}, "overrides": [{"pattern": "*.v_proj", "codec": "none"}], **ROTATED},
    "floats": {"weights": {"codec": "float8"}},
}
"""Artifacts of format quern: rotations, an embedding that is the head as well, and one of three joined linears unquantized."""


def test_vllm_serves_querns_own_format_by_the_plug_in(prompt, tmp_path):
    """In float32, where both sum the same products in another order: 8 blocks of it change a log-probability by some 1e-6."""
    paths = {name: tmp_path / name for name in OWN}
    for name, choices in OWN.items():
        quantize(BUNDLED, paths[name], recipe=small_recipe(**choices), threads=1)
    for name, said in ask_vllm(paths, tmp_path, prompt, "float32", str(Path(quern.__file__).parent)).items():
        exact = of_tokens(logits_of(paths[name], prompt), prompt)
        assert (torch.tensor(said["logprobs"][0]).double() - exact).abs().mean() < 1e-4, name
        check_greedy(said["tokens"], paths[name], prompt)


def test_the_plug_in_is_an_entry_point():
    """And neither its name nor ``import quern`` needs vLLM."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"quern": "quern.engines.vllm_hook:register"}
    assert callable(vllm_hook.register)
    assert "vllm" not in sys.modules


def test_gptqmodel_computes_what_the_reference_engine_does(prompt, tmp_path):
    """Its kernels, on the folders of both layouts; transformers loads both through it."""
    try:
        environment = Environment.of("gptqmodel")
        installed = environment.installed()
    except UserError as error:  # pragma: no cover - the adapter is part of quern
        pytest.skip(str(error))
    if installed is None:
        pytest.skip("GPTQModel is not installed (quern peers install gptqmodel)")
    paths = made(tmp_path, [name for name in EXPORTS if EXPORTS[name][0] in ("gptq", "awq")])
    request = tmp_path / "request.json"
    request.write_text(json.dumps({"folders": [str(path) for path in paths.values()], "ids": prompt}), "utf-8")
    ended = subprocess.run(
        [str(environment.python), "-P", "-s", str(GPTQMODEL), str(request)],
        env=environment.variables(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    for name, path in paths.items():
        exact = of_tokens(logits_of(path, prompt), prompt)
        noise = (of_tokens(logits_of(path, prompt, "bfloat16"), prompt) - exact).abs().mean()
        theirs = torch.from_numpy(np.load(f"{path}.npy")).double()
        found = (of_tokens(theirs, prompt) - exact).abs().mean()
        assert found < NOISE * noise, (name, float(found), float(noise))


def test_a_wrong_layout_would_show(prompt, tmp_path):
    """Nibbles in another order lie far beyond the bound."""
    from safetensors.torch import load_file, save_file

    path = made(tmp_path, ["awq"])["awq"]
    exact = of_tokens(logits_of(path, prompt), prompt)
    noise = (of_tokens(logits_of(path, prompt, "bfloat16"), prompt) - exact).abs().mean()
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith("qweight"):
                octets = tensor.view(torch.uint8)
                tensors[name] = (octets << 4 | octets >> 4).view(torch.int32)
        save_file(tensors, file, metadata={"format": "pt"})
    assert (of_tokens(logits_of(path, prompt), prompt) - exact).abs().mean() > 30 * NOISE * noise
