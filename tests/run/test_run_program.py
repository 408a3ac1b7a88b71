"""quern-run against the cpu engine: the same tokens and the same logits, bit for bit, whatever the weights are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from artifacts import INT8, small_recipe
from safetensors.torch import load_file, save_file
from tiny_model import tiny_config, write_model

from quern.architectures.base import ARCHITECTURES
from quern.core.errors import UserError
from quern.engines.cpu import CpuEngine
from quern.generation.generate import generate
from quern.pipeline.export import export
from quern.pipeline.quantize import quantize

PROMPT = [3, 141, 59, 26, 53, 58, 97, 93, 23, 84, 62, 64, 33, 83, 27, 95, 28, 84, 19, 71]
COUNT = 8


def written(model: Path, folder: Path) -> Path:
    return export(model, folder / "model.run", format="run").path


def expected(model: Path, count: int = COUNT, prompt=PROMPT, **options: Any) -> tuple[list[int], np.ndarray]:
    """The likeliest tokens after ``prompt`` and the logits that each was chosen by, from the cpu engine."""
    session = CpuEngine().load(model, threads=1, **options).start()
    rows, given, tokens = [], list(prompt), []
    for _ in range(count):
        rows.append(session.feed(given).numpy())
        given = [int(rows[-1].argmax())]
        tokens += given
    return tokens, np.stack(rows)


def found(program, file: Path, tmp_path: Path, *options: object, prompt=PROMPT, count: int = COUNT):
    """The same from quern-run."""
    logits = tmp_path / "logits"
    ids = ",".join(map(str, prompt))
    ended = program.run(file, "--ids", ids, "-n", count, "--tokens", "--logits", logits, *options)
    assert ended.code == 0, ended.err
    first, tokens, *_ = ended.out.decode().splitlines()
    assert first == " ".join(map(str, prompt))
    rows = np.fromfile(logits, np.float32)
    return [int(token) for token in tokens.split()], rows.reshape(len(rows) // 300, 300)


def same(program, model: Path, tmp_path: Path, *options: object, **engine: Any) -> None:
    tokens, logits = expected(model, **engine)
    mine, rows = found(program, written(model, tmp_path), tmp_path, *options)
    mine = mine[:COUNT]
    assert mine == tokens[: len(mine)]
    assert rows.tobytes() == logits[: len(rows)].tobytes()


NO_END = {"eos_token_id": None}


@pytest.mark.parametrize("family", ARCHITECTURES.names())
def test_every_family(program, family, tmp_path):
    model = write_model(tmp_path / "model", tiny_config(family, **NO_END), tokenizer=False)
    same(program, model, tmp_path)


WEIGHTS: dict[str, dict[str, Any]] = {
    "4 bits asymmetric": {"weights": {"bits": 4, "symmetric": False, "granularity": "group", "group_size": 32}},
    "8 bits, fine inputs": {"weights": {"bits": 8, "granularity": "channel"}},
    "nf4": {"weights": {"codec": "nf4", "bits": 4, "granularity": "group", "group_size": 32}},
    "trellis, rotated": {
        "weights": {"codec": "trellis", "bits": 2},
        "transforms": [{"method": "hadamard"}],
    },
    "float8": {"weights": {"codec": "float8", "bits": 8, "granularity": "channel"}},
    "static inputs": {
        "weights": {"bits": 8, "granularity": "channel"},
        "activations": {"mode": "static"},
    },
    "ggml blocks": {
        "weights": {"codec": "ggml", "type": "q4_k"},
        "changes": {"hidden_size": 256, "intermediate_size": 256},
    },
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_kind_of_weights(program, name, tmp_path, tiny_text):
    choices = dict(WEIGHTS[name])
    config = tiny_config(num_hidden_layers=1, **{**NO_END, **choices.pop("changes", {})})
    recipe = small_recipe(embedding=INT8, **choices)
    model = write_model(tmp_path / "model", config)
    artifact = quantize(model, tmp_path / "out", recipe=recipe, calibration=[tiny_text], threads=1).path
    same(program, artifact, tmp_path)


@pytest.mark.parametrize("cache", ["float32", "int8", "int4"])
def test_every_cache(program, cache, tmp_path):
    model = write_model(tmp_path / "model", tiny_config("qwen2", **NO_END), tokenizer=False)
    same(program, model, tmp_path, "--cache", cache, cache=cache)


def test_a_text_that_grows_long_goes_by_other_frequencies(program, tmp_path):
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 24,
        "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + 0.5 * i for i in range(8)],
    }  # fmt: skip
    model = write_model(tmp_path / "model", tiny_config("llama", rope_parameters=rope, **NO_END), tokenizer=False)
    assert len(PROMPT) < 24 < len(PROMPT) + COUNT
    same(program, model, tmp_path)


@pytest.fixture
def large_values(tmp_path):
    folder = write_model(tmp_path / "model", tiny_config("llama", torch_dtype="float32", **NO_END), tokenizer=False)
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if "v_proj" in name or "o_proj.weight" in name]:
        weights[name] *= 1e6 if "v_proj" in name else 1e-6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_values_that_float16_cannot_hold_are_kept_wider(program, large_values, tmp_path):
    same(program, large_values, tmp_path)


def test_a_chosen_cache_is_not_widened(program, large_values, tmp_path):
    ended = program.run(written(large_values, tmp_path), "--ids", "1,2", "--cache", "float16")
    assert ended.code == 2
    assert "exceed 65504" in ended.err


def test_the_number_of_threads_changes_nothing(program, tmp_path):
    model = write_model(tmp_path / "model", tiny_config(**NO_END), tokenizer=False)
    file = written(model, tmp_path)
    one, two = (found(program, file, tmp_path, "--threads", threads) for threads in (1, 3))
    assert one[0] == two[0]
    assert one[1].tobytes() == two[1].tobytes()


@pytest.fixture(scope="module")
def file(tiny_model, tmp_path_factory) -> Path:
    return written(tiny_model, tmp_path_factory.mktemp("run"))


SAMPLING = {
    "likeliest": {},
    "temperature": {"temperature": 1.3, "seed": 5},
    "top-k": {"temperature": 2.0, "top_k": 7, "seed": 2**40},
    "top-p": {"temperature": 0.8, "top_p": 0.7, "seed": 11},
}


@pytest.mark.parametrize("name", SAMPLING)
def test_the_same_text_as_quern_generate(program, tiny_model, file, name):
    options = SAMPLING[name]
    text = "".join(generate(tiny_model, "def é(", max_tokens=24, threads=1, **options))
    given = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", value)]
    ended = program.run(file, "-p", "def é(", "-n", 24, *given)
    assert (ended.code, ended.out.decode()) == (0, f"{text}\n")


def test_a_prompt_comes_from_stdin(program, file):
    assert program.run(file, "-n", 5, given=b"import").out == program.run(file, "-p", "import", "-n", 5).out


def test_what_was_measured_is_said_on_stderr(program, file):
    ended = program.run(file, "-p", "a", "-n", 3, "--stats")
    assert ended.err.startswith("instruction set ")
    assert "peak memory" in ended.err


REFUSED = {
    "no model": ((), "give one MODEL"),
    "two models": (("{file}", "{file}"), "give one MODEL"),
    "unknown option": (("{file}", "--frob"), "--frob"),
    "missing value": (("{file}", "-n"), "lacks its value"),
    "no number": (("{file}", "-n", "x"), "--max-tokens is 'x'"),
    "too small": (("{file}", "-n", "0"), "from 1"),
    "too large": (("{file}", "--seed", "99999999999999999999"), "--seed is"),
    "temperature": (("{file}", "-p", "a", "--temperature", "-1"), "temperature must be 0"),
    "not finite": (("{file}", "-p", "a", "--temperature", "nan"), "give a number"),
    "top-p": (("{file}", "-p", "a", "--temperature", "1", "--top-p", "0"), "top_p must be"),
    "cache": (("{file}", "-p", "a", "--cache", "int5"), "float32, float16, int8, int4"),
    "context": (("{file}", "-p", "a", "--context", "129"), "this model's context is 128"),
    "long prompt": (("{file}", "-p", "a b c d", "--context", "4"), "leaves none to continue"),
    "empty prompt": (("{file}", "-p", ""), "the prompt is empty"),
    "both prompts": (("{file}", "-p", "a", "--ids", "1"), "not both"),
    "ids": (("{file}", "--ids", "1,,2"), "--ids is ''"),
    "vocabulary": (("{file}", "--ids", "300"), "outside the vocabulary of 300"),
    "folder": (("{folder}", "-p", "a"), "quern export"),
    "missing": (("{folder}/none", "-p", "a"), "No such file"),
    "device": (("/dev/null", "-p", "a"), "not a regular file"),
    "logits": (("{file}", "-p", "a", "--logits", "{folder}"), "cannot be written"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused(program, file, name):
    arguments, reason = REFUSED[name]
    ended = program.run(*(argument.format(file=file, folder=file.parent) for argument in arguments))
    assert (ended.code, ended.out) == (2, b"")
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1
    assert reason in ended.err


def test_text_that_is_no_utf8_is_refused(program, file):
    ended = program.run(file, given=b"abc\xffd")
    assert ended.code == 2
    assert "not valid UTF-8 at byte 3" in ended.err


def test_an_instruction_set_that_there_is_not_is_refused(program, file):
    ended = program.run(file, "-p", "a", QUERN_ISA="avx1024")
    assert ended.code == 2
    assert "QUERN_ISA" in ended.err


def test_a_model_without_a_tokenizer_says_so(program, tmp_path):
    model = write_model(tmp_path / "model", tiny_config(num_hidden_layers=1), tokenizer=False)
    ended = program.run(written(model, tmp_path), "-p", "a")
    assert ended.code == 2
    assert "the model has no tokenizer" in ended.err


def test_a_file_that_quern_did_not_write_is_left_alone(tiny_model, tmp_path):
    mine = tmp_path / "mine.run"
    mine.write_text("precious")
    with pytest.raises(UserError, match="not written by quern"):
        export(tiny_model, mine, format="run")
    with pytest.raises(UserError, match=r"ends in \.run"):
        export(tiny_model, tmp_path / "model.bin", format="run")
    with pytest.raises(UserError, match="no options"):
        export(tiny_model, tmp_path / "model.run", format="run", format_options={"a": "b"})
    assert mine.read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.run"]


def test_the_same_model_gives_the_same_bytes(tiny_model, file, tmp_path):
    assert written(tiny_model, tmp_path).read_bytes() == file.read_bytes()
