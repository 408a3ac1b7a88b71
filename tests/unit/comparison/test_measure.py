"""Contenders measured side by side: with a fake engine in real worker processes, and one model end to end."""

import itertools
import json
import sys

import fake_model
import numpy as np
import pytest
import torch
from fake_model import VOCABULARY, FakeTokenizer, bigram_table, write_model

from quern.checkpoint.checkpoint import open_checkpoint
from quern.comparison import measure as module
from quern.comparison import row_builder
from quern.comparison.artifact_size import artifact_bytes
from quern.comparison.inputs import HELD_OUT, MeasurementSettings, prepare_inputs
from quern.comparison.measure import measure_all
from quern.comparison.row_builder import Contender, Machine, contender_of, original_of
from quern.comparison.worker_process import Launch, WorkerError
from quern.core import metrics
from quern.core.errors import BadFileError, UserError
from quern.core.results import LayerError, Row
from quern.evaluation.choice import ChoiceSet, Item
from quern.evaluation.texts import load_windows
from quern.pipeline.evaluate import evaluate
from quern.texts.source import Text

pytestmark = pytest.mark.usefixtures("quiet_machine", "warm_workers")
FAKE = Launch(command=(sys.executable, fake_model.__file__))
TEXTS = [Text.of("t", ["the quick brown fox jumps over", "the lazy dog and runs away", "0123456789 abc"])]
CHOICES = [ChoiceSet("c", tuple(Item("q", (a + b, b + a), 0) for a in "abcdef" for b in "uvwxyz"), "hash")]
SETTINGS = MeasurementSettings(
    tokens=60, window=16, threads=1, seed=5, speed_rounds=2, prompt_tokens=12, decode_tokens=4
)
HARDWARE = {
    "measured": {"read_bandwidth_gb_s": {"1": 10.0}, "gemm_gop_s": {"bfloat16": {"1": 50.0}, "int8": {"1": 70.0}}}
}
INT8 = {"name": "w8a8", "activations": {"mode": "dynamic"}}


@pytest.fixture(scope="module", autouse=True)
def entries():
    """The fake model is of no family; a token meets its one table."""
    real = row_builder.entries_per_token

    def counted(checkpoint):
        return VOCABULARY**2 if checkpoint.model_type == "fake" else real(checkpoint)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_builder, "entries_per_token", counted)
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A reference, a contender close to it and one far from it."""
    root, table = tmp_path_factory.mktemp("models"), bigram_table()
    write_model(root / "original", table)
    write_model(root / "close", table + 0.1 * bigram_table(1), quantized={"quant_method": "fake"})
    write_model(root / "far", table + 2.0 * bigram_table(1), quantized={"quant_method": "fake"})
    write_model(root / "nan", table, quantized={"quant_method": "fake"}, behaviour="nan")
    write_model(root / "die", table, quantized={"quant_method": "fake"}, behaviour="die")
    return root


def prepare(models, folder, settings=SETTINGS, **options):
    options = {"texts": TEXTS, "choices": CHOICES, "tokenizer": FakeTokenizer(adds_bos=False), **options}
    return prepare_inputs(open_checkpoint(models / "original"), folder, settings=settings, **options)


def contender(models, name, **options):
    return Contender(name=name, path=models / name, engine="fake", launch=FAKE, **options)


def measure(models, inputs, *contenders, reference=True, settings=SETTINGS, **options):
    original = contender(models, "original") if reference else None
    return measure_all(contenders, original, inputs, settings=settings, hardware=HARDWARE, **options).rows


class Counter:
    """Progress that adds up."""

    def __init__(self):
        self.bars = {}

    def task(self, description, total, done=0, work=None):
        bar = self.bars[description] = [0, total]

        class Task:
            def advance(self, steps=1):
                bar[0] += steps

            def done(self):
                pass

        return Task()

    def log(self, message):
        pass


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    """Rows of one comparison, its inputs and its progress."""
    inputs = prepare(models, tmp_path_factory.mktemp("inputs"))
    progress = Counter()
    close = contender(models, "close", kind="quern", recipe={"name": "close"}, quantize_seconds=3.5)
    rows = measure(models, inputs, close, contender(models, "far", kind="quern", recipe=INT8), progress=progress)
    return rows, inputs, progress


def logits_of(models, name, dtype="auto"):
    return fake_model.FakeEngine().load(models / name, dtype=dtype).table.numpy()


class TestRows:
    def test_names_and_provenance(self, models, run):
        rows = run[0]
        assert [row.name for row in rows] == ["original", "close", "far"]
        assert [row.recipe for row in rows] == [None, {"name": "close"}, INT8]
        assert [row.quantize_seconds for row in rows] == [None, 3.5, None]
        assert {row.engine for row in rows} == {"fake"}
        assert rows[1].artifact_sha256 == open_checkpoint(models / "close").sha256()

    def test_accuracy_is_that_of_the_logits(self, models, run):
        rows, inputs, _ = run
        reference = logits_of(models, "original", "float32")
        for row in rows:
            table, scores = logits_of(models, row.name), {}
            for window in load_windows(inputs.windows):
                now, following = window.ids[:-1], window.ids[1:]
                score = scores.setdefault(window.document, np.zeros(4))
                score += (
                    metrics.divergence_per_token(reference[now], table[now]).sum(),
                    metrics.nats_per_token(table[now], following).sum(),
                    metrics.same_top1(reference[now], table[now]).sum(),
                    len(now),
                )
            divergence, nats, agreeing, tokens = np.array(list(scores.values())).T
            expected = metrics.weighted_mean(divergence, tokens, seed=5)
            assert row.kl_mean == pytest.approx(expected.mean, rel=1e-12)
            assert row.kl_ci95 == pytest.approx(expected.interval, rel=1e-12)
            assert row.perplexity == pytest.approx(np.exp(nats.sum() / tokens.sum()), rel=1e-12)
            assert row.top1_agreement == agreeing.sum() / tokens.sum()

    def test_noise_floor_is_the_reference_as_it_is_stored(self, run):
        rows = run[0]
        assert rows[0].kl_mean == rows[1].kl_noise_floor == rows[2].kl_noise_floor
        assert 0 < rows[0].kl_mean < rows[1].kl_mean < rows[2].kl_mean
        assert rows[0].top1_agreement >= rows[1].top1_agreement > rows[2].top1_agreement

    def test_choices_are_paired(self, models, run):
        rows = run[0]
        expected = {}
        for row in rows:
            table = torch.log_softmax(torch.from_numpy(logits_of(models, row.name)).double(), -1).numpy()
            expected[row.name] = [
                self.likelihood(table, item.prompt + item.options[0])
                > self.likelihood(table, item.prompt + item.options[1])
                for item in CHOICES[0].items
            ]
            assert row.choice_accuracy == np.mean(expected[row.name])
        assert rows[0].choice_difference is None
        difference = metrics.paired_accuracy_difference(expected["far"], expected["original"], seed=5)
        assert (rows[2].choice_difference, rows[2].choice_difference_ci95) == difference
        assert difference.mean != 0

    def likelihood(self, table, text):
        ids = FakeTokenizer().encode(text, add_special_tokens=False)
        return sum(table[a, b] for a, b in itertools.pairwise(ids))

    def test_sizes_are_counted_from_files(self, models, run):
        rows = run[0]
        parameters = VOCABULARY * VOCABULARY + VOCABULARY * 4
        for row in rows:
            folder = models / row.name
            size = sum(path.stat().st_size for path in folder.iterdir())
            assert row.bytes == size
            assert row.bits_per_weight == 16.0
            original = (models / "original" / "config.json").stat().st_size + 2 * parameters
            header = 8 + int.from_bytes((models / "original" / "model.safetensors").read_bytes()[:8], "little")
            assert row.compression == pytest.approx(1 - size / (original + header), abs=1e-12)
        assert rows[0].compression == 0

    def test_speed(self, run):
        for row in run[0]:
            spread = row.speed_spread["decode_tokens_per_s"]
            assert spread.rounds == 2
            assert 0 < spread.low <= row.decode_tokens_per_s == spread.median <= spread.high
            assert row.decode_limit_fraction == pytest.approx(2 * VOCABULARY**2 * row.decode_tokens_per_s / 10e9)
            limit = 70e9 if row.name == "far" else 50e9
            assert row.prefill_limit_fraction == pytest.approx(2 * VOCABULARY**2 * row.prefill_tokens_per_s / limit)
            assert (row.limit_read_gb_s, row.limit_gemm_gop_s) == (10.0, limit / 1e9)
            assert row.limit_gemm_dtype == ("int8" if row.name == "far" else "bfloat16")
            assert row.group_speed == 1.0
            assert row.time_to_first_token_s > 0
            assert row.peak_rss_bytes > 50 << 20

    def test_results_take_the_rows(self, run):
        for row in run[0]:
            assert Row.model_validate_json(row.model_dump_json()) == row

    def test_progress_reaches_its_totals(self, run):
        bars = run[2].bars
        assert bars["timing"] == [9, 9]
        assert bars["scoring"][0] == bars["scoring"][1] == 3 * (60 + 72)
        assert bars["reference logits"] == [60, 60]

    def test_the_reference_is_computed_once(self, models, run):
        rows, inputs, _ = run
        before = {path: path.stat().st_mtime_ns for path in inputs.folder.rglob("*.npy")}
        progress = Counter()
        settings = MeasurementSettings(**{**vars(SETTINGS), "speed_rounds": 0})
        again = measure(models, inputs, contender(models, "close"), settings=settings, progress=progress)
        assert {path: path.stat().st_mtime_ns for path in inputs.folder.rglob("*.npy")} == before
        assert "reference logits" not in progress.bars
        assert (again[1].kl_mean, again[1].kl_ci95) == (rows[1].kl_mean, rows[1].kl_ci95)
        assert again[1].decode_tokens_per_s is again[1].speed_spread is again[1].decode_limit_fraction is None

    def test_one_at_a_time_gives_the_same(self, models, run, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "fits_in_memory", lambda _: False)
        inputs = prepare(models, tmp_path)
        rows = measure(models, inputs, contender(models, "close"), contender(models, "far"))
        for row, before in zip(rows, run[0], strict=True):
            assert (row.kl_mean, row.kl_ci95, row.perplexity) == (before.kl_mean, before.kl_ci95, before.perplexity)
            assert "does not fit in memory" in row.notes[0]


class Remembers:
    """A cache as a resumed comparison finds it."""

    def __init__(self):
        self.found = {}

    def load(self, contender, sha256):
        return self.found.get(contender.name)

    def save(self, contender, sha256, measured):
        self.found[contender.name] = measured


class TestStarts:
    def test_rows_of_an_earlier_start_say_what_their_fractions_refer_to(self, models, tmp_path):
        cache, inputs = Remembers(), prepare(models, tmp_path)
        (_, before) = measure(models, inputs, contender(models, "close"), cache=cache)
        slower = {"measured": {"read_bandwidth_gb_s": {"1": 5.0}, "gemm_gop_s": {"bfloat16": {"1": 25.0}}}}
        everyone = [contender(models, "close"), contender(models, "far")]
        rows = measure_all(
            everyone, contender(models, "original"), inputs, settings=SETTINGS, hardware=slower, cache=cache
        ).rows
        assert rows[1] == before
        assert [row.limit_read_gb_s for row in rows] == [10.0, 10.0, 5.0]
        assert [row.limit_gemm_gop_s for row in rows] == [50.0, 50.0, 25.0]
        for row in rows:
            read = 2 * VOCABULARY**2 * row.decode_tokens_per_s
            assert row.decode_limit_fraction == pytest.approx(read / (row.limit_read_gb_s * 1e9))

    def test_a_group_says_how_fast_the_unquantized_model_was_in_it(self, models, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "MOST_TOGETHER", 1)
        cache = Remembers()
        rows = measure(models, prepare(models, tmp_path), contender(models, "close"), cache=cache)
        assert rows[0].group_speed == 1.0
        assert rows[1].group_speed > 0
        assert rows[1].group_speed == cache.found["close"].group_speed
        assert any("decoded at" in note for note in rows[1].notes) == (abs(rows[1].group_speed - 1) > 0.1)


class TestTroubles:
    def test_rounds_alternate(self, models, tmp_path, monkeypatch):
        asked = []

        class Spy(module.Worker):
            def ask(self, request, *rest):
                if "decode_tokens" in request:
                    asked.append((self.name, request["decode_tokens"]))
                return super().ask(request, *rest)

        monkeypatch.setattr(module, "Worker", Spy)
        settings = MeasurementSettings(**{**vars(SETTINGS), "decode_tokens": 6})
        measure(models, prepare(models, tmp_path), contender(models, "close"), settings=settings)
        names = [name for name, _ in asked]
        assert names == ["original", "close", "close", "original", "original", "close"]
        assert [count for _, count in asked] == [4, 4, 6, 6, 6, 6]

    def test_a_model_that_overflows_gets_a_note(self, models, tmp_path):
        rows = measure(models, prepare(models, tmp_path), contender(models, "nan"), contender(models, "close"))
        assert rows[1].kl_mean is rows[1].perplexity is rows[1].choice_accuracy is rows[1].choice_difference is None
        assert rows[1].notes[0].startswith("accuracy not measured: nan: logits holds")
        assert rows[1].decode_tokens_per_s > 0
        assert rows[2].kl_mean > 0

    def test_a_process_that_dies_is_named(self, models, tmp_path):
        with pytest.raises(WorkerError, match="die: the process that measures it ended unexpectedly"):
            measure(models, prepare(models, tmp_path), contender(models, "close"), contender(models, "die"))

    def test_without_reference_there_is_no_divergence(self, models, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "original_of", lambda _: original_of(open_checkpoint(models / "original")))
        (row,) = measure(models, prepare(models, tmp_path), contender(models, "close"), reference=False)
        assert row.kl_mean is row.kl_ci95 is row.kl_noise_floor is row.top1_agreement is row.choice_difference is None
        assert row.perplexity > 1
        assert row.choice_accuracy is not None

    def test_a_reference_that_is_another_model(self, models, tmp_path):
        small = write_model(tmp_path / "small", bigram_table()[:, :20])
        config = json.loads((small / "config.json").read_text())
        (small / "config.json").write_text(json.dumps({**config, "vocab_size": 20}))
        with pytest.raises(UserError, match=r"small has a vocabulary of 20 tokens, its reference one of 40"):
            measure(models, prepare(models, tmp_path), Contender(name="small", path=small, engine="fake", launch=FAKE))

    def test_an_artifact_of_another_checkpoint_gets_a_note(self, models, tmp_path):
        inputs, settings = prepare(models, tmp_path), MeasurementSettings(**{**vars(SETTINGS), "speed_rounds": 0})
        origin = open_checkpoint(models / "original").sha256()
        same, other = (contender(models, "close", original_sha256=sha256) for sha256 in (origin, "other"))
        rows = measure(models, inputs, same, other, settings=settings)
        assert rows[0].notes == rows[1].notes == []
        assert rows[2].notes[0].startswith("quantized from another checkpoint")

    def test_a_limit_that_was_not_measured(self):
        assert Machine.of(None, 2) == Machine(None, {})
        assert Machine.of({"measured": None}, 2) == Machine(None, {})
        assert Machine.of(HARDWARE, 2) == Machine(None, {})
        assert Machine.of({"measured": {"gemm_gop_s": {"int8": None}}}, 1) == Machine(None, {})
        assert Machine.of(HARDWARE, 1).read_gb_s == 10.0


class TestInputs:
    def test_sources(self, run):
        windows = load_windows(run[1].windows)
        assert sum(len(window.ids) for window in windows) == 60
        assert [(source.name, source.tokens) for source in run[1].sources] == [("t", 60 - len(windows))]
        assert run[1].sources[0].sha256 == TEXTS[0].sha256

    def test_windows_and_prompt_fit_the_context(self, models, tmp_path):
        settings = MeasurementSettings(tokens=100, window=1000, prompt_tokens=1000, decode_tokens=10)
        inputs = prepare(models, tmp_path, settings, texts=[Text.of("t", ["a" * 200])])
        assert max(len(window.ids) for window in load_windows(inputs.windows)) == 64
        assert len(inputs.prompt) == 54
        assert inputs.notes == ("timed with a prompt of 54 tokens, what the context leaves room for",)

    def test_held_out_text_is_the_default(self, models, tmp_path):
        inputs = prepare(models, tmp_path, texts=(), choices=())
        assert [source.name for source in inputs.sources] == [HELD_OUT]
        assert inputs.options is None

    def test_no_room(self, models, tmp_path):
        with pytest.raises(UserError, match="64 decoded tokens leave no room"):
            prepare(models, tmp_path, MeasurementSettings(tokens=20, decode_tokens=64))

    @pytest.mark.parametrize(
        "bad",
        [
            {"tokens": 0},
            {"window": 0},
            {"speed_rounds": -1},
            {"threads": 0},
            {"decode_tokens": 0},
            {"dtype": "float16"},
        ],
    )
    def test_settings_that_make_no_sense(self, bad):
        with pytest.raises(UserError, match=next(iter(bad))):
            MeasurementSettings(**bad)

    def test_a_config_that_says_too_little(self, models, tmp_path):
        checkpoint = open_checkpoint(models / "original")
        del checkpoint.config["vocab_size"]
        with pytest.raises(UserError, match=r"config.json must say vocab_size.*None"):
            prepare_inputs(checkpoint, tmp_path, settings=SETTINGS, tokenizer=FakeTokenizer())


class TestContenderOf:
    def test_unquantized(self, models):
        found = contender_of(open_checkpoint(models / "original"))
        assert (found.name, found.recipe, found.layers) == ("original", None, ())

    def test_quantized_by_others(self, models):
        assert contender_of(open_checkpoint(models / "close")).recipe == {"quant_method": "fake"}

    def test_quantized_by_quern(self, tmp_path):
        folder = write_model(tmp_path / "mine", bigram_table(), quantized={"quant_method": "quern"})
        layer = {"linear": "up", "bits_per_weight": 4.5, "relative_error": 0.01}
        provenance = {"fingerprint": {"recipe": {"name": "balanced"}, "model_sha256": "abc"}, "layers": [layer]}
        (folder / "quern.json").write_text(json.dumps(provenance))
        found = contender_of(open_checkpoint(folder))
        assert (found.recipe, found.original_sha256) == ({"name": "balanced"}, "abc")
        assert list(found.layers) == [LayerError(**layer)]
        (folder / "quern.json").write_text("{}")
        with pytest.raises(BadFileError, match="is not what quern writes"):
            contender_of(open_checkpoint(folder))

    def test_all_that_was_written_counts(self, tmp_path):
        folder = write_model(tmp_path / "mine", bigram_table(), quantized={"quant_method": "quern"})
        before = artifact_bytes(open_checkpoint(folder))
        (folder / "extra").mkdir()
        (folder / "extra" / "more.bin").write_bytes(b"12345")
        assert artifact_bytes(open_checkpoint(folder)) == before + 5
        original = write_model(tmp_path / "original", bigram_table())
        before = artifact_bytes(open_checkpoint(original))
        (original / "other.gguf").write_bytes(b"12345")
        assert artifact_bytes(open_checkpoint(original)) == before


def test_sizes_of_the_original_from_an_artifacts_config(tiny_model, tmp_path):
    """Packed codes have other shapes; what they stand for follows from the configuration."""
    original = open_checkpoint(tiny_model)
    config = json.loads((tiny_model / "config.json").read_text())
    for path in tiny_model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "quern"}}))
    expected, found = original_of(original), original_of(open_checkpoint(tmp_path))
    assert (found.parameters, found.block_parameters) == (expected.parameters, expected.block_parameters)
    assert found.parameters == original.parameters == sum(original.info(name).elements for name in original.names())
    # A head of 8 + N bytes lies before the tensors of a file, and the two config.json differ in length.
    assert found.bf16_bytes == pytest.approx(expected.bf16_bytes, abs=4096)


def test_evaluate_one_model_end_to_end(tiny_model, tmp_path):
    """With the real engine and tokenizer: an unquantized model is its own reference."""
    choices = tmp_path / "items.jsonl"
    choices.write_text(
        '{"sentence_good": "ab", "sentence_bad": "zq"}\n{"prompt": "a", "choices": ["b", "c"], "answer": 1}\n'
    )
    text = tmp_path / "text.txt"
    text.write_text("Some text that a model can read, and a little more of it so that it suffices." * 3)
    rows = {
        engine: evaluate(
            tiny_model,
            texts=[text],
            choices=[choices],
            tokens=80,
            threads=1,
            speed_rounds=1,
            prompt_tokens=20,
            decode_tokens=4,
            engine=engine,
        )
        for engine in ("reference", "auto")
    }
    row = rows["reference"]
    assert rows["auto"].engine == "cpu"
    assert rows["auto"].kl_noise_floor == row.kl_noise_floor
    assert 0 < rows["auto"].kl_mean < row.kl_noise_floor, "float32 on the same weights is nearer than bfloat16"
    assert rows["auto"].decode_tokens_per_s > 0
    assert row.name == tiny_model.name
    assert row.recipe is None
    assert 0 < row.kl_mean == row.kl_noise_floor < 0.05
    assert row.kl_ci95 is None, "one document"
    assert row.top1_agreement > 0.8
    assert (row.bits_per_weight, row.compression) == (16.0, 0.0)
    assert row.perplexity > 1
    assert row.choice_accuracy in (0.0, 0.5, 1.0)
    assert 0 < row.decode_limit_fraction < 1
    assert row.prefill_limit_fraction > 0
