"""Opening for use: tensors and configuration fit, or every command says alike what does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import INT8, make_artifact, small_recipe
from bad_files import corpus
from safetensors.torch import load_file, save_file
from tiny_model import tiny_config, write_model

from quern.checkpoint.checkpoint import open_checkpoint
from quern.checkpoint.head import UNTIED
from quern.core.errors import BadFileError, UserError
from quern.engines.base import ENGINES
from quern.generation.chat import Chat
from quern.generation.generate import generate
from quern.loading.fitting import open_model
from quern.pipeline.compare import compare
from quern.pipeline.evaluate import evaluate
from quern.pipeline.quantize import quantize

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
QUERY = "model.layers.0.self_attn.q_proj"
IDS = torch.tensor([[1, 5, 17, 40, 95, 0, 3, 64]])


def changed(model: Path, folder: Path, change: Any = lambda tensors: None, **config: Any) -> Path:
    """A copy of ``model`` with other tensors and other values in config.json."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**said, **config}), "utf-8")
    return folder


def to_fp8(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        scale = tensors[name].float().abs().max() / 400
        tensors[name + "_scale_inv"] = scale.reshape(1, 1)
        tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)


MISFITS = {
    "fp8 weights whose configuration is lost": (to_fp8, {}, "lost its quantization_config"),
    "fewer layers than weights": (lambda tensors: None, {"num_hidden_layers": 1}, "the weights have 3 layers"),
    "a tensor missing": (lambda tensors: tensors.pop(f"{QUERY}.bias"), {}, f"'{QUERY}.bias' is missing"),
    "a tensor too many": (
        lambda tensors: tensors.update({f"{QUERY}.scale": torch.ones(1)}), {}, f"'{QUERY}.scale' is not part of",
    ),
    "another shape": (
        lambda tensors: tensors.update({f"{QUERY}.weight": torch.ones(32, 64, dtype=torch.bfloat16)}), {},
        f"'{QUERY}.weight' has shape",
    ),
    "integers": (
        lambda tensors: tensors.update({f"{QUERY}.weight": torch.ones(64, 64, dtype=torch.int8)}), {},
        f"'{QUERY}.weight' has dtype I8",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def misfits(tiny_model, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("misfits")
    return {
        name: changed(tiny_model, folder / name.replace(" ", "_"), change, **config)
        for name, (change, config, _) in MISFITS.items()
    }


USES = {
    "quantize": lambda model, out: quantize(model, out, recipe=small_recipe()),
    "evaluate": lambda model, out: evaluate(model, tokens=64),
    "compare": lambda model, out: compare(model, out, recipes=[small_recipe()]),
    "generate": lambda model, out: list(generate(model, "def", max_tokens=1)),
    "chat": lambda model, out: Chat(model),
    "reference engine": lambda model, out: ENGINES.get("reference")().load(model),
    "cpu engine": lambda model, out: ENGINES.get("cpu")().load(model),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("misfit", MISFITS)
def test_nothing_runs_that_does_not_fit(misfit, use, misfits, tmp_path):
    with pytest.raises(UserError, match="config and weights disagree") as caught:
        USES[use](misfits[misfit], tmp_path / "out")
    assert MISFITS[misfit][2] in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_model_to_compare_with_must_fit_too(misfits, tiny_model):
    with pytest.raises(UserError, match="the weights have 3 layers"):
        evaluate(tiny_model, reference=misfits["fewer layers than weights"], tokens=64)


def with_head(value: float) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[HEAD] = tensors[EMBEDDING] * value

    return change


@pytest.fixture(scope="module")
def other_head(tiny_model, tmp_path_factory) -> Path:
    """The configuration ties the head, but another one is stored."""
    return changed(tiny_model, tmp_path_factory.mktemp("head") / "model", with_head(-0.5))


def transformers_logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits


@pytest.mark.parametrize("engine", ENGINES.names())
def test_a_stored_head_is_used_though_the_configuration_ties_it(engine, other_head, tiny_model):
    options = {"cache": "float32"} if engine == "cpu" else {"dtype": "float32"}
    logits = ENGINES.get(engine)().load(other_head, **options).logits(IDS)
    expected = transformers_logits(other_head)
    # The order of float32 sums, of up to 96 terms in each of a dozen products in a row.
    assert float((logits - expected).abs().max() / expected.abs().max()) < 2e-4
    assert float((logits - transformers_logits(tiny_model)).abs().max()) > 0.1


def test_an_artifact_of_it_has_that_head(other_head, tmp_path):
    model = open_model(other_head)
    assert model.notes == (UNTIED,)
    assert model.config["tie_word_embeddings"] is False
    unquantized = {"codec": "none"}
    recipe = small_recipe(weights=unquantized, embedding=unquantized, head=unquantized)
    report = quantize(other_head, tmp_path / "out", recipe=recipe)
    assert UNTIED in report.notes
    assert torch.equal(transformers_logits(tmp_path / "out"), transformers_logits(other_head))


@pytest.mark.parametrize("change", [with_head(1.0), lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)})])
def test_a_tied_head_may_be_stored_twice_or_in_place_of_the_embedding(change, tiny_model, tmp_path):
    folder = changed(tiny_model, tmp_path / "model", change)
    model = open_model(folder)
    assert model.notes == ()
    assert model.parameters == open_model(tiny_model).parameters
    for engine in ENGINES.names():
        ours, plain = (ENGINES.get(engine)().load(path).logits(IDS) for path in (folder, tiny_model))
        assert torch.equal(ours, plain)
    quantize(folder, tmp_path / "out", recipe=small_recipe())


def test_a_head_of_another_size_is_refused(tiny_model, tmp_path):
    folder = changed(tiny_model, tmp_path / "model", lambda tensors: tensors.update({HEAD: torch.ones(10, 64)}))
    with pytest.raises(BadFileError, match=r"'lm_head\.weight' has shape \(10, 64\)"):
        open_model(folder)


def test_rotary_frequencies_of_old_checkpoints_are_let_pass(tiny_model, tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    open_model(changed(tiny_model, tmp_path / "model", lambda tensors: tensors.update({name: torch.ones(8)})))


def test_the_first_differences_are_named_and_the_rest_counted(tiny_model, tmp_path):
    config = tiny_config(num_hidden_layers=9)
    folder = write_model(tmp_path / "model", config, tokenizer=False)
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 11}))
    with pytest.raises(BadFileError, match=r"'model\.layers\.10\.input_layernorm\.weight' is missing.*; and 19 more"):
        open_model(folder)


def test_no_configuration_of_a_quantization_is_none(tiny_model, tmp_path):
    folder = changed(tiny_model, tmp_path / "model", quantization_config=None)
    quantize(folder, tmp_path / "out", recipe=small_recipe())
    assert open_model(folder).config == open_model(tiny_model).config


@pytest.fixture(scope="module")
def artifact(tiny_model, tiny_text, tmp_path_factory) -> Path:
    """Every kind of tensor that an artifact may have: static inputs are another one's."""
    folder = tmp_path_factory.mktemp("artifact") / "artifact"
    rotation = [{"method": "hadamard"}]
    return make_artifact(tiny_model, folder, tiny_text, weights={"bits": 4}, embedding=INT8, transforms=rotation)


def artifact_with(artifact: Path, folder: Path, change: Any) -> Path:
    shutil.copytree(artifact, folder)
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors*")):
        if file.suffix == ".safetensors":
            tensors |= load_file(file)
        file.unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


ARTIFACT_MISFITS = {
    "part missing": (lambda t: t.pop(f"{QUERY}.codes"), f"'{QUERY}.codes' is missing"),
    "signs missing": (lambda t: t.pop(f"{QUERY}.input_signs"), f"'{QUERY}.input_signs' is missing"),
    "bias missing": (lambda t: t.pop(f"{QUERY}.bias"), f"'{QUERY}.bias' is missing"),
    "norm missing": (lambda t: t.pop("model.norm.weight"), "'model.norm.weight' is missing"),
    "part of another shape": (lambda t: t.update({f"{QUERY}.scale": torch.ones(3, 3).half()}), "has shape"),
    "part of another dtype": (lambda t: t.update({f"{QUERY}.codes": t[f"{QUERY}.codes"].float()}), "it must be I32"),
    "weight beside its codes": (lambda t: t.update({f"{QUERY}.weight": torch.ones(64, 64)}), "is not part of"),
    "head beside a tied one": (lambda t: t.update({HEAD: torch.ones(300, 64)}), "'lm_head.weight'"),
    "layer too many": (lambda t: t.update({"model.layers.3.input_layernorm.weight": torch.ones(64)}), "have 4 layers"),
}


@pytest.mark.parametrize("misfit", ARTIFACT_MISFITS)
def test_artifacts_are_held_to_their_own_tensors(misfit, artifact, tmp_path):
    change, says = ARTIFACT_MISFITS[misfit]
    folder = artifact_with(artifact, tmp_path / "model", change)
    for use in ("evaluate", "generate", "reference engine", "cpu engine"):
        with pytest.raises(UserError) as caught:
            USES[use](folder, tmp_path / "out")
        assert says in str(caught.value)


@pytest.mark.parametrize("misfit", ["part missing", "weight beside its codes", "bias missing"])
def test_so_does_transformers_own_loader(misfit, artifact, tmp_path):
    from transformers import AutoModelForCausalLM

    change, says = ARTIFACT_MISFITS[misfit]
    folder = artifact_with(artifact, tmp_path / "model", change)
    with pytest.raises(UserError) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    assert says in str(caught.value)


def test_what_another_tool_quantized_opens_but_is_not_quantized_again(tiny_model, tmp_path):
    folder = changed(tiny_model, tmp_path / "model", quantization_config={"quant_method": "hqq", "bits": 4})
    assert open_model(folder).config["quantization_config"]["bits"] == 4
    with pytest.raises(UserError, match="already quantized, by hqq"):
        quantize(folder, tmp_path / "out")
    for engine in ENGINES.names():
        with pytest.raises(UserError, match="hqq"):
            ENGINES.get(engine)().load(folder)


def test_good_ones_fit(tmp_path):
    for model in (corpus.good_folder(tmp_path / "single"), corpus.sharded_folder(tmp_path / "sharded")):
        assert open_model(model) == open_checkpoint(model)
    assert open_model(corpus.good_gguf(tmp_path / "model.gguf")).config["tie_word_embeddings"] is False
