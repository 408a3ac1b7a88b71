"""What every engine promises for the artifacts that it says it runs."""

import json
from pathlib import Path

import pytest
import torch
from artifacts import INT8, make_artifact, small_recipe, stored_tensors

from quern.core.errors import UserError
from quern.core.recipe import load_recipe, profile_names
from quern.core.scheme import CodecParameters, CodecScheme
from quern.engines.base import ENGINES
from quern.formats.base import StoredModule

IDS = torch.randint(0, 296, (2, 17), generator=torch.Generator().manual_seed(5))
RECIPES = {
    "weights only": {"weights": {"bits": 4, "symmetric": False, "group_size": 32}, "embedding": {**INT8}},
    "int8 dynamic": {"weights": INT8, "activations": {"mode": "dynamic"}},
    "int8 static": {"weights": {**INT8, "granularity": "tensor"}, "activations": {"mode": "static"}},
    "W4A8 a scale a token": {"weights": {"bits": 4, "group_size": 32}, "activations": {"mode": "dynamic"}},
    "W4A8 scales by groups": {
        "weights": {"bits": 4, "group_size": 32},
        "activations": {"mode": "dynamic", "granularity": "group", "group_size": 32},
    },
    "trellis": {"weights": {"codec": "trellis", "bits": 3, "granularity": "channel", "window": 6, "tables": 1}},
    "nf4": {"weights": {"codec": "nf4", "group_size": 32}, "embedding": {"codec": "nf4"}},
    "log": {"weights": {"codec": "log", "bits": 4, "group_size": 32}, "embedding": {"codec": "log", "bits": 3}},
    "ternary": {"weights": {"codec": "log", "bits": 2, "group_size": 32}},
    "float4": {"weights": {"codec": "nvfp4"}, "embedding": {"codec": "mxfp4"}},
    "k-means": {
        "weights": {"codec": "kmeans", "bits": 3, "granularity": "group", "group_size": 32},
        "embedding": {"codec": "kmeans", "granularity": "tensor"},
    },
    "k-means of groups": {"weights": {"codec": "kmeans", "bits": 2, "granularity": "group", "group_size": 64}},
    "float8": {"weights": {"codec": "float8"}, "embedding": {"codec": "float8", "variant": "e5m2"}},
    "blocks": {
        "weights": {"codec": "float8", "granularity": "block", "group_size": 32},
        "embedding": {"bits": 4, "granularity": "block", "group_size": 32},
    },
    "unquantized": None,
}
QUANTIZED = {name for name, choices in RECIPES.items() if choices}


@pytest.fixture(scope="module")
def artifacts(tiny_model, tiny_text, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("artifacts")
    made = {name: choices and make_artifact(tiny_model, folder / name.replace(" ", "_"), tiny_text, **choices)
            for name, choices in RECIPES.items()}  # fmt: skip
    return {name: path or tiny_model for name, path in made.items()}


@pytest.fixture(params=ENGINES.names())
def engine(request):
    return ENGINES.get(request.param)()


@pytest.fixture(params=RECIPES)
def loaded(request, engine, artifacts):
    choices = RECIPES[request.param]
    if reason := engine.supports(choices and small_recipe(**choices)):
        pytest.skip(f"not supported: {reason}")
    return engine.load(artifacts[request.param], dtype="float32")


def refused(engine) -> set[str]:
    """Those of ``RECIPES`` whose tests are skipped for this engine."""
    return {name for name, choices in RECIPES.items() if engine.supports(choices and small_recipe(**choices))}


def assert_runs_something(engine):
    """The other tests skip what an engine refuses. One that refuses all must not pass for that."""
    for kind, names in {"quantized": QUANTIZED, "unquantized": RECIPES.keys() - QUANTIZED}.items():
        assert names - refused(engine), f"this engine runs none of the {kind} models: {sorted(names)}"


def test_every_engine_runs_something(engine):
    assert_runs_something(engine)


class RefusesAll(ENGINES.get("reference")):
    def supports(self, recipe):
        return "not today"


class RefusesWhatIsQuantized(ENGINES.get("reference")):
    def supports(self, recipe):
        return None if recipe is None else "not today"


@pytest.mark.parametrize("lazy", [RefusesAll, RefusesWhatIsQuantized])
def test_an_engine_that_refuses_everything_does_not_keep_the_contract(lazy):
    with pytest.raises(AssertionError, match="runs none of the"):
        assert_runs_something(lazy())


def test_what_is_skipped_is_refused(engine, artifacts):
    """What ``supports`` has a reason against does not run after all."""
    for name in refused(engine):
        with pytest.raises(UserError):
            engine.load(artifacts[name])


def test_supports_answers_none_or_a_reason(engine):
    for recipe in [None, *map(load_recipe, profile_names())]:
        answer = engine.supports(recipe)
        assert answer is None or (isinstance(answer, str) and answer)
    unknown = StoredModule(CodecScheme("zap", CodecParameters()))
    assert "zap" in engine.obstacle("quern", [unknown])


def test_the_reference_runs_everything():
    reference = ENGINES.get("reference")()
    assert [reference.supports(recipe) for recipe in [None, *map(load_recipe, profile_names())]].count(None) == 1 + len(
        profile_names()
    )


def test_model_says_what_it_is(loaded):
    assert loaded.vocabulary_size == 300
    assert loaded.maximum_length == 128


def test_logits_are_finite_float32_and_causal(loaded):
    logits = loaded.logits(IDS)
    assert logits.shape == (2, 17, 300)
    assert logits.dtype == torch.float32
    assert bool(logits.isfinite().all())
    changed = IDS.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 296
    assert torch.equal(loaded.logits(changed)[:, :-1], logits[:, :-1])


def near(first, second, relative=1e-4):
    """Equal but for the order of float32 sums: a product of another height takes another path through the library.

    Three blocks of sums of at most 96 terms and softmaxes: a few hundred eps = 6e-8 of the largest logit, times slack for their
    amplification in a random network.
    """
    return bool(((first - second).abs() <= relative * second.abs().max()).all())


@pytest.mark.parametrize("steps", [[17], [1] * 17, [9, 1, 1, 6]])
def test_feeding_piecewise_is_the_whole(loaded, steps):
    whole = loaded.logits(IDS[:1])[0]
    session, position = loaded.start(), 0
    for step in steps:
        logits = session.feed(IDS[0, position : position + step].tolist())
        position += step
        assert logits.shape == (300,)
        assert logits.dtype == torch.float32
        # An int8 activation at a tie may round otherwise once its last bit differs: a step of 1/127 of the largest.
        assert near(logits, whole[position - 1], 1e-4 if not quantizes_activations(loaded) else 5e-2)


def quantizes_activations(loaded) -> bool:
    """In torch; native products of int8 are exact, so that no tie can fall otherwise."""
    model = getattr(loaded, "model", None)
    return model is not None and any(getattr(module, "activations", "none") != "none" for module in model.modules())


def test_sessions_do_not_know_each_other(loaded):
    alone = loaded.start().feed(IDS[0].tolist())
    first, second = loaded.start(), loaded.start()
    first.feed(IDS[0, :5].tolist())
    second.feed(IDS[1].tolist())
    assert near(first.feed(IDS[0, 5:].tolist()), alone, 1e-4 if not quantizes_activations(loaded) else 5e-2)


@pytest.mark.parametrize("length", [0, 1, 6])
def test_a_rewound_session_forgets(loaded, length):
    session = loaded.start()
    session.feed(IDS[1, :6].tolist())
    session.rewind(length)
    assert session.length == length
    fresh = loaded.start()
    fresh.feed(IDS[1, :length].tolist()) if length else None
    tolerance = 1e-4 if not quantizes_activations(loaded) else 5e-2
    assert near(session.feed(IDS[0].tolist()), fresh.feed(IDS[0].tolist()), tolerance)


def alike(loaded, found, expected):
    """Bit for bit where the engine computes a batch together, which is its promise; see ``near`` for the reference."""
    if not hasattr(loaded, "model"):
        return torch.equal(found, expected)
    return near(found, expected, 1e-4 if not quantizes_activations(loaded) else 5e-2)


def test_guesses_are_read_beside_tokens_and_hidden_states_like_logits(loaded):
    whole, first, second = loaded.logits(IDS[:1])[0], loaded.open(), loaded.open()
    tolerance = 1e-4 if not quantizes_activations(loaded) else 5e-2
    rows = loaded.step([(first, IDS[0, :14].tolist()), (second, IDS[1, :2].tolist())], [3, 0])
    assert rows.shape == (5, 300)
    for row, expected in zip(rows[:4], whole[10:14], strict=True):
        assert near(row, expected, tolerance)
    first.rewind(11)
    assert near(loaded.step([(first, IDS[0, 11:].tolist())])[0], whole[-1], tolerance)
    states = loaded.hidden_states([(second, IDS[1, 2:].tolist())])
    assert states.shape == (15, loaded.hidden_size)
    assert states.dtype == torch.float32
    assert second.length == 17


def test_a_step_of_several_sequences_gives_each_its_own_logits(loaded):
    """Of different lengths, in any order; they join and leave, rewind, and grow by one token and by many."""
    texts = torch.randint(0, 296, (4, 60), generator=torch.Generator().manual_seed(7)).tolist()
    steps = [{0: 17, 2: 1, 1: 40}, {1: 1, 0: 1, 3: 23, 2: 1}, {3: 2, 2: 30}, {2: 1, 3: 1, 0: 3}]
    alone, together = [loaded.start() for _ in texts], {}
    position = [0] * len(texts)
    for number, counts in enumerate(steps):
        for index in counts:
            together.setdefault(index, loaded.open())
        pieces = {i: texts[i][position[i] : position[i] + count] for i, count in counts.items()}
        logits = loaded.step([(together[i], piece) for i, piece in pieces.items()])
        assert logits.shape == (len(counts), 300)
        for row, (index, piece) in zip(logits, pieces.items(), strict=True):
            assert alike(loaded, row, alone[index].feed(piece))
            position[index] += len(piece)
            assert together[index].length == alone[index].length == position[index]
        if number == 1:
            together[1].close()
            for session in (alone[0], together[0]):
                session.rewind(5)
            position[0] = 5


def test_a_step_that_cannot_be_is_refused_and_changes_nothing(loaded):
    first, second = loaded.open(), loaded.open()
    before = loaded.step([(first, [3, 4]), (second, [5])])
    for batch, message in (
        ([], "a step has no sequences"),
        ([(first, [1]), (first, [2])], "a step has a sequence twice"),
        ([(first, [1]), (second, [])], "sequence 1 of a step gets no tokens"),
        ([(first, [1]), (second, [1] * 128)], "129 tokens do not fit: this model's context is 128"),
    ):
        with pytest.raises(UserError, match=message):
            loaded.step(batch)
        assert (first.length, second.length) == (2, 1)
    first.rewind(1)
    assert alike(loaded, loaded.step([(first, [4])])[0], before[0])


def test_a_closed_sequence_is_refused(loaded):
    sequence = loaded.open()
    sequence.close()
    with pytest.raises(UserError, match="the sequence is closed; open another one"):
        loaded.step([(sequence, [1])])


def test_a_context_that_is_full_is_refused(loaded):
    session = loaded.start()
    session.feed([1] * 128)
    with pytest.raises(UserError, match=r"129 tokens do not fit: this model's context is 128"):
        session.feed([1])


def test_bytes_per_token_are_counted_from_the_file(engine, artifacts):
    """The tied head reads the whole table, so everything in the file is read for every token."""
    for name, choices in RECIPES.items():
        if name == "blocks" or engine.supports(choices and small_recipe(**choices)):
            continue  # in memory each row has the scales of its blocks
        tensors = stored_tensors(artifacts[name])
        stored = sum(tensor.nbytes for key, tensor in tensors.items() if not key.endswith("input_scale"))
        assert engine.load(artifacts[name]).bytes_per_token() == stored


@pytest.mark.parametrize("embedding", [{"codec": "none"}, {**INT8}])
def test_of_an_untied_embedding_a_token_reads_one_row(embedding, engine, tiny_text, tmp_path):
    from tiny_model import tiny_config, write_model

    model = write_model(tmp_path / "model", tiny_config("llama", tie_word_embeddings=False))
    choices = {"weights": {"bits": 4, "group_size": 32}, "embedding": embedding}
    if reason := engine.supports(small_recipe(**choices)):
        pytest.skip(reason)
    tensors = stored_tensors(make_artifact(model, tmp_path / "out", tiny_text, **choices))
    table = sum(tensor.nbytes for name, tensor in tensors.items() if "embed_tokens" in name)
    rest = sum(tensor.nbytes for name, tensor in tensors.items() if "embed_tokens" not in name)
    assert engine.load(tmp_path / "out").bytes_per_token() == rest + table // 300


def test_dtype_is_that_of_the_reference_engines_activations(artifacts):
    engine = ENGINES.get("reference")()
    exact = engine.load(artifacts["weights only"], dtype="float32").logits(IDS)
    rough = engine.load(artifacts["weights only"], dtype="bfloat16").logits(IDS)
    auto = engine.load(artifacts["weights only"]).logits(IDS)
    assert torch.equal(rough, auto), "the checkpoint is bfloat16"
    assert not torch.equal(rough, exact)
    assert float((rough - exact).abs().mean()) < 0.1 * float(exact.abs().mean())


# The reference engine's modules


USUAL = {"weights": {"codec": "integer", "bits": 4}, "rotated": False, "activations": "none"}


def test_what_cannot_be_loaded_is_refused(tmp_path, artifacts, tiny_model):
    engine = ENGINES.get("reference")()
    for change, match in (
        ({"quant_method": "hqq"}, "quantized by 'hqq'; this engine runs quern and compressed-tensors artifacts"),
        ({"format_version": 6}, "has quern format version 6; this quern reads versions 1, 2, 3, 4 and 5"),
        (
            {"modules": {"model.layers.0.mlp.zap": USUAL}},
            "names a module 'model.layers.0.mlp.zap'",
        ),
        ({"modules": {"model.norm": USUAL}}, "neither a linear nor an embedding"),
        ({"modules": {"model.layers.0.mlp.up_proj": {**USUAL, "weights": {"codec": "zap"}}}}, "unknown codec 'zap'"),
        (
            {"modules": {"model.layers.0.mlp.up_proj": {**USUAL, "weights": {"bits": 9}}}},
            "quantization_config is damaged",
        ),
        ({"modules": None}, "quantization_config is damaged"),
        ({"modules": {"model.layers.0.mlp.up_proj": {**USUAL, "weights": {"codec": "none"}}}}, "is damaged"),
        ({"modules": {"model.layers.0.mlp.up_proj": {**USUAL, "activations": "zap"}}}, "is damaged: .* 'zap'"),
        ({"modules": {"model.layers.0.mlp.up_proj": {**USUAL, "rotated": 1}}}, "is damaged"),
        ({"modules": {"model.layers.0.mlp.up_proj": {**USUAL, "input_group": 32}}}, "is damaged: .* is described by"),
        *(
            ({"format_version": 4, "modules": {"model.layers.0.mlp.up_proj": {**USUAL, **change}}}, match)
            for change, match in (
                ({"input_group": 32}, "has input_group 32 and activations 'none'"),
                ({"input_group": 0, "activations": "dynamic"}, "has input_group 0"),
                ({"input_group": True, "activations": "dynamic"}, "has input_group True"),
                ({"input_group": 32, "activations": "static"}, "has input_group 32 and activations 'static'"),
                (
                    {"input_group": 32, "activations": "dynamic"},
                    "groups of 32 int8 activations and asks for groups of 128",
                ),
                (
                    {"weights": {"bits": 4, "symmetric": False}, "activations": "dynamic"},
                    "has int8 activations and asks for symmetric: False",
                ),
            )
        ),
        ({"format_version": 2, "recipe": {"name": "x", "zap": 1}}, "zap: unknown key"),
    ):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for file in artifacts["weights only"].iterdir():
            (folder / file.name).symlink_to(file)
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] |= change
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=match):
            engine.load(folder)


@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.up_proj.scale", "model.norm.weight"])
def test_what_is_missing_is_not_made_up(tensor, tmp_path, artifacts):
    from safetensors.torch import load_file, save_file

    tensors = {}
    for file in artifacts["weights only"].iterdir():
        if file.suffix == ".safetensors":
            tensors |= load_file(file)
        elif "index" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    for change, match in ((None, f"'{tensor}' is missing"), (tensors[tensor].flatten()[1:], f"'{tensor}' has shape")):
        left = {name: value for name, value in tensors.items() if name != tensor}
        save_file(
            left if change is None else {**left, tensor: change}, tmp_path / "model.safetensors", {"format": "pt"}
        )
        with pytest.raises(UserError, match=match):
            ENGINES.get("reference")().load(tmp_path)


def test_unknown_engines_are_refused_with_the_known_ones():
    with pytest.raises(UserError, match="unknown engine 'zap'; known: .*reference"):
        ENGINES.get("zap")
