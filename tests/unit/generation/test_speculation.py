"""Guesses: where they come from, how many there are, and that texts are those without them."""

import json
import shutil

import numpy as np
import pytest
from tiny_model import tiny_config, write_model

from quern.core.errors import UserError
from quern.engines.cpu import CpuEngine
from quern.generation.chat import Chat
from quern.generation.generate import continuation, continued, generate
from quern.generation.sampling import Sampler, SamplingOptions
from quern.generation.speculation.continuation import speculated
from quern.generation.speculation.draft_model import DraftModel
from quern.generation.speculation.drafter import Asked
from quern.generation.speculation.ngram import FEWEST, LONGEST, NgramDrafter, follows
from quern.generation.speculation.pace import FIRST, LONGEST_REST, MISSES, SHORTEST_REST, Pace, pays
from quern.generation.speculation.speculation import FULL_PASS, Speculation

NO_END = frozenset([999])


def follows_plainly(ids, count):
    best, start = FEWEST - 1, None
    for place in range(1, len(ids)):
        length = 0
        while length < min(place, LONGEST) and ids[place - 1 - length] == ids[-1 - length]:
            length += 1
        if length > best or (length == best and start is not None):
            best, start = length, place
    if start is None:
        return []
    grown = list(ids)
    for place in range(count):
        grown.append(grown[start + place])
    return grown[len(ids) :]


def test_what_followed_the_longest_repetition_and_of_those_the_latest():
    draw = np.random.default_rng(0)
    for trial in range(300):
        ids = draw.integers(0, 2 + trial % 5, draw.integers(1, 60))
        assert follows(ids, 7) == follows_plainly(ids.tolist(), 7)
    assert follows(np.array([1, 2, 3, 1, 2, 4, 9, 1, 2]), 2) == [4, 9]
    assert follows(np.array([5, 6, 5, 6, 5, 6]), 5) == [5, 6, 5, 6, 5]
    assert follows(np.array([1, 2, 3, 2]), 3) == []


def test_the_pace_grows_with_right_guesses_and_rests_after_wrong_ones():
    pace, sizes = Pace(12), []
    for _ in range(3):
        sizes.append(pace.size)
        pace.tell(pace.size, pace.size)
    assert [*sizes, pace.size] == [FIRST, 2 * FIRST, 12, 12]
    pace.tell(12, 3)
    assert pace.size == 4
    rests = []
    for _ in range(9):
        while pace.size:
            pace.tell(pace.size, 0)
        rest = 0
        while pace.size == 0:
            pace.tell(0, 0)
            rest += 1
        rests.append(rest)
    assert rests == [min(SHORTEST_REST << power, LONGEST_REST) for power in range(9)]
    pace.tell(1, 1)
    for _ in range(MISSES):
        assert pace.size
        pace.tell(1, 0)
    assert pace.size == 0


def test_what_pays_depends_on_how_many_write():
    """Tokens per third of the time that one takes: n in (n + 2) without guesses, more with them where they pay."""
    for writing in range(1, 9):
        for drafted in range(1, 9):
            for accepted in range(drafted + 1):
                gained = (writing + accepted) / (writing + 2 + drafted) - writing / (writing + 2)
                assert pays(drafted, accepted, writing) == (gained > -1e-12)
    assert pays(3, 1, 1)
    assert not pays(4, 1, 1)
    assert not pays(4, 3, 8)


class Constant:
    """Guesses zeros, as many as are asked for."""

    def propose(self, asked):
        self.counts = [one.count for one in asked]
        return [[0] * one.count for one in asked]

    def forget(self, key):
        pass


def test_guesses_fill_a_pass_and_no_more():
    drafter, sampler = Constant(), Sampler(SamplingOptions(), 0)
    speculation = Speculation(drafter, 8)
    asked = [Asked(key, [1, 2], 100, sampler) for key in range(5)]
    assert [len(draft) for draft in speculation.propose(asked, busy=5)] == [2] * 5
    assert speculation.propose(asked, busy=FULL_PASS - 4) == [[]] * 5
    assert speculation.propose(asked[:1], busy=256) == [[]]
    assert speculation.propose([Asked(9, [1], 3, sampler), Asked(10, [1], 0, sampler)], 2) == [[0] * 3, []]
    assert drafter.counts == [3]
    assert speculation.propose([], 0) == []
    short = Speculation(drafter, 8, switch_length=4)
    assert [len(short.propose([Asked(0, [1] * length, 9, sampler)], 1)[0]) for length in (1, 3, 4, 5)] == [3, 1, 0, 4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """No token ends a text."""
    config = tiny_config(eos_token_id=None, max_position_embeddings=256)
    return write_model(tmp_path_factory.mktemp("speculation") / "model", config)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Smaller, with weights of its own, a shorter context, and more logits than there are tokens."""
    config = tiny_config(num_hidden_layers=1, vocab_size=320, max_position_embeddings=128)
    return write_model(tmp_path_factory.mktemp("speculation") / "other", config, seed=3)


@pytest.fixture(scope="module")
def model(folder):
    return CpuEngine().load(folder, threads=1)


def drafters(model, folder, other):
    yield NgramDrafter()
    for path in (folder, other):
        yield DraftModel(CpuEngine().load(path, threads=1), model.vocabulary_size)


def text(seed, length=40):
    return np.random.default_rng(seed).integers(0, 250, length).tolist()


@pytest.mark.parametrize(
    "options", [SamplingOptions(), SamplingOptions(1.0), SamplingOptions(0.3, 20, 0.9)], ids=["greedy", "plain", "cut"]
)
def test_texts_are_those_without_guesses(model, folder, other, options):
    for drafter in drafters(model, folder, other):
        speculation = Speculation(drafter, 6)
        for seed in range(3):
            ids = text(seed)
            expected = list(continuation(model.start(), ids, 100, Sampler(options, seed), NO_END))
            session, key = model.start(), object()
            found = speculated(session, ids, 100, Sampler(options, seed), NO_END, speculation, key)
            assert list(found) == expected
            end = frozenset([expected[30]])
            session = model.start()
            found = speculated(session, ids, 100, Sampler(options, seed), end, speculation, object())
            assert list(found) == expected[: expected.index(expected[30])]
            assert session.length <= len(ids) + expected.index(expected[30])
            speculation.forget(key)
        assert 0 <= speculation.counts.accepted <= speculation.counts.drafted


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_drafts_for_itself_is_always_right(model, folder, temperature):
    """Also with a temperature: it draws with the numbers that the text will be drawn with."""
    speculation = Speculation(DraftModel(CpuEngine().load(folder, threads=1), 300), 8)
    sampler = Sampler(SamplingOptions(temperature), 5)
    assert len(list(speculated(model.start(), text(1), 90, sampler, NO_END, speculation, 0))) == 90
    assert speculation.counts.accepted == speculation.counts.drafted > 60


def test_the_draft_model_reads_beginnings_once_in_pieces_and_makes_room(model, folder, monkeypatch):
    drafting = CpuEngine().load(folder, threads=1)
    monkeypatch.setattr("quern.engines._cpu_pool.free_memory", lambda: 14 * drafting.pool._page_bytes)  # twelve pages
    drafter, sampler, fed, step = DraftModel(drafting, 300), Sampler(SamplingOptions(), 0), [], drafting.step
    monkeypatch.setattr(drafting, "step", lambda batch: fed.append([len(ids) for _, ids in batch]) or step(batch))
    monkeypatch.setattr("quern.generation.speculation.draft_model.PROMPT_TOKENS", 64)
    long = text(1, 100)
    assert drafter.propose([Asked(1, long, 3, sampler)]) == [[]]
    (draft,) = drafter.propose([Asked(1, long, 3, sampler)])
    assert draft == list(continuation(model.start(), long, 3, Sampler(SamplingOptions(), 0), NO_END))
    assert fed == [[64], [36], [1], [1]]
    assert drafter.propose([Asked(1, [*long, draft[0], 299], 1, sampler)])[0]
    drafter.forget(1)
    drafter.forget("never asked about")
    fed.clear()
    assert len(drafter.propose([Asked(2, [*long[:90], 7], 2, sampler)])[0]) == 2
    assert fed == [[91 - 80], [1]]  # five pages are there
    fed.clear()
    assert drafter.propose([Asked(3, text(2, 60), 1, sampler), Asked(4, text(3, 30), 1, sampler)])[0]
    assert len(drafter._prefixes) == 0  # the finished text went for them
    assert drafter.propose([Asked(5, text(4, 250), 10, sampler)]) == [[]]  # no context
    assert drafter.propose([Asked(5, [310], 1, sampler)]) == [[]]  # no such token


def test_where_the_session_is_full_the_text_ends(model):
    session, speculation = model.start(), Speculation(NgramDrafter())
    ids = text(2, 200)
    found = list(continued(session, ids, 1000, Sampler(SamplingOptions(), 0), NO_END, speculation))
    assert found == list(continuation(model.start(), ids, 1000, Sampler(SamplingOptions(), 0), NO_END))
    assert len(found) == 56


def test_generate_and_its_refusals(folder, other, tmp_path):
    plain = "".join(generate(folder, "abcabcabc", max_tokens=60))
    assert "".join(generate(folder, "abcabcabc", max_tokens=60, speculate="ngram")) == plain
    assert "".join(generate(folder, "abcabcabc", max_tokens=60, draft=str(other), draft_tokens=3)) == plain
    for options, said in (
        ({"speculate": "ngrm"}, "ngram"),
        ({"speculate": "ngram", "draft": str(other)}, "one of them"),
        ({"draft_tokens": 0, "speculate": "ngram"}, "1 to 15"),
    ):
        with pytest.raises(UserError, match=said):
            generate(folder, "x", **options)
    strange = shutil.copytree(other, tmp_path / "strange")
    tokenizer = json.loads((strange / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (strange / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="another tokenizer: token .* 'a', is token .* there"):
        generate(folder, "x", draft=str(strange))


def test_a_conversation_is_the_one_without_guesses(folder, tmp_path):
    talking = shutil.copytree(folder, tmp_path / "model")
    settings = json.loads((talking / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (talking / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    answers = []
    for options in ({}, {"speculate": "ngram"}, {"draft": str(talking)}):
        chat = Chat(talking, max_tokens=30, seed=3, **options)
        stopped = chat.reply("one")
        answer = [next(stopped), next(stopped)]
        stopped.close()
        answers.append((answer, "".join(chat.reply("two two two")), "".join(chat.reply("three"))))
    assert answers[0] == answers[1] == answers[2]


def test_guesses_make_no_text_a_long_one(tmp_path):
    """Texts of more than 64 tokens have other rotary frequencies, all of their positions."""
    scaling = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64,
        "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + 0.5 * i for i in range(8)],
    }  # fmt: skip
    config = tiny_config("llama", initializer_range=0.2, rope_parameters=scaling, eos_token_id=None)
    folder = write_model(tmp_path / "model", config)
    plain = "".join(generate(folder, "abcd" * 10, max_tokens=60))
    assert "".join(generate(folder, "abcd" * 10, max_tokens=60, speculate="ngram")) == plain
    assert "".join(generate(folder, "abcd" * 10, max_tokens=60, draft=str(folder))) == plain
