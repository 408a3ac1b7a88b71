"""Generation against transformers' own, and its refusals."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import tiny_config, write_model

from quern.core.errors import UserError
from quern.generation.generate import generate

PROMPT = "abc"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """No token ends a text; in float32, because two ways to the same greedy text need logits without ties."""
    config = tiny_config(torch_dtype="float32", eos_token_id=None)
    return write_model(tmp_path_factory.mktemp("generate") / "model", config)


@pytest.fixture(scope="module")
def by_transformers(model):
    """Twenty greedy tokens of transformers' own loop."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    told = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=0)
    return tokenizer, told[0, ids.shape[1] :].tolist()


def test_greedy_text_is_that_of_transformers(model, by_transformers):
    tokenizer, tokens = by_transformers
    assert "".join(generate(model, PROMPT, max_tokens=20)) == tokenizer.decode(tokens)


def test_fewer_tokens_are_a_beginning(model, by_transformers):
    tokenizer, tokens = by_transformers
    assert "".join(generate(model, PROMPT, max_tokens=1)) == tokenizer.decode(tokens[:1])


def test_the_seed_decides_sampled_text(model):
    def text(seed):
        return "".join(generate(model, PROMPT, max_tokens=20, temperature=3.0, seed=seed))

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_ends_at_an_end_token(model, by_transformers, tmp_path):
    tokenizer, tokens = by_transformers
    stop = tokens[3]
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [999, stop]}))
    text = "".join(generate(folder, PROMPT, max_tokens=20))
    assert text == tokenizer.decode(tokens[: tokens.index(stop)])


def test_ends_when_the_context_is_full(model):
    prompt = "~" * (128 - 4)  # one token each, 128 is the context
    text = "".join(generate(model, prompt, max_tokens=1000))
    assert text == "".join(generate(model, prompt, max_tokens=4))
    assert text != "".join(generate(model, prompt, max_tokens=3))


@pytest.mark.parametrize(
    ("prompt", "options", "said"),
    [
        ("~" * 128, {}, "128 tokens"),
        ("", {}, "empty"),
        ("\udcff", {}, "UTF-8"),
        ("x", {"max_tokens": 0}, "max_tokens"),
        ("x", {"temperature": -1}, "temperature"),
    ],
)
def test_refusals_come_before_the_first_piece(model, prompt, options, said):
    with pytest.raises(UserError, match=said):
        generate(model, prompt, **options)


def test_no_tokenizer(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(UserError, match="tokenizer"):
        generate(folder, "x")


def test_notes_are_told_once(tmp_path, caplog):
    """Values that float16 cannot hold: the cache turns wider on the first step, and says so."""
    folder = write_model(tmp_path / "model", tiny_config(torch_dtype="float32", eos_token_id=None))
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if "v_proj" in name or "o_proj.weight" in name]:
        weights[name] = weights[name] * (1e5 if "v_proj" in name else 1e-5)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    notes: list[str] = []
    text = "".join(generate(folder, PROMPT, max_tokens=5, engine="cpu", tell=notes.append))
    assert text == "".join(generate(folder, PROMPT, max_tokens=5, engine="cpu", cache="float32"))
    assert len(notes) == 1
    assert "kept as float32" in notes[0]
    with caplog.at_level("WARNING", "quern"):
        "".join(generate(folder, PROMPT, max_tokens=1, engine="cpu"))
    assert [record.getMessage() for record in caplog.records] == notes


def test_the_reference_engine_is_named_where_it_runs_in_place_of_the_other(tmp_path):
    folder = write_model(tmp_path / "model", tiny_config(torch_dtype="float32", hidden_act="relu"))
    notes: list[str] = []
    generate(folder, PROMPT, max_tokens=1, tell=notes.append)
    assert len(notes) == 1
    assert "reference engine, which is slower than the cpu engine" in notes[0]
    assert "config.json asks for 'relu'" in notes[0]
