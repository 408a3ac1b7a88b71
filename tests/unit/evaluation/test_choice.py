"""Minimal pairs and multiple choice."""

import itertools
import json

import numpy as np
import pytest
import torch
from fake_model import VOCABULARY, FakeModel, FakeTokenizer, bigram_table

from quern.core.errors import BadFileError, UserError
from quern.core.metrics import NonFiniteError
from quern.evaluation.choice import (
    ChoiceSet,
    Item,
    encode_choices,
    load_options,
    read_choices,
    save_options,
    score_options,
)

PAIR = {"sentence_good": "cats sleep", "sentence_bad": "cats sleeps", "UID": "agreement"}
QUESTION = {"prompt": "two and two is ", "choices": ["five", "four", "three"], "answer": 1}


def items(*choices):
    return [ChoiceSet("set", choices, "hash")]


def encode(sets, tokenizer=None, vocabulary_size=VOCABULARY):
    return encode_choices(sets, tokenizer or FakeTokenizer(), vocabulary_size=vocabulary_size)


@pytest.fixture
def write(tmp_path):
    def function(*lines):
        path = tmp_path / "items.jsonl"
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return path

    return function


class TestReading:
    def test_both_forms(self, write):
        found = read_choices(write(PAIR, "", QUESTION))
        assert found.name == "items.jsonl"
        assert found.items == (
            Item("", ("cats sleep", "cats sleeps"), 0),
            Item("two and two is ", ("five", "four", "three"), 1),
        )

    @pytest.mark.parametrize(
        ("line", "problem"),
        [
            ("{", "not JSON"),
            ("[1]", "is a JSON list"),
            ("null", "is a JSON NoneType"),
            ({"sentence_good": "a"}, "options that are not all texts"),
            ({"sentence_good": "a", "sentence_bad": ""}, "options that are not all texts"),
            ({"sentence_good": "a", "sentence_bad": 3}, "options that are not all texts"),
            ({"sentence_good": "a", "sentence_bad": "a"}, "at least two options that differ"),
            ({}, "no text under prompt"),
            ({"prompt": 1, "choices": ["a", "b"], "answer": 0}, "no text under prompt"),
            ({"prompt": "", "choices": "ab", "answer": 0}, "options that are not all texts"),
            ({"prompt": "", "choices": ["a"], "answer": 0}, "at least two options"),
            ({"prompt": "", "choices": ["a", "b"], "answer": 2}, "answer 2; .* 0 to 1"),
            ({"prompt": "", "choices": ["a", "b"], "answer": -1}, "answer -1"),
            ({"prompt": "", "choices": ["a", "b"], "answer": True}, "answer True"),
            ({"prompt": "", "choices": ["a", "b"], "answer": "0"}, "answer '0'"),
            ({"prompt": "", "choices": ["a", "b"]}, "answer None"),
        ],
    )
    def test_a_bad_line_is_named_by_its_number(self, write, line, problem):
        with pytest.raises(BadFileError, match=f"line 3 .*{problem}") as caught:
            read_choices(write(PAIR, QUESTION, line, PAIR))
        assert "sentence_good" in str(caught.value).split("Each line is")[1]

    def test_unusable_files(self, tmp_path, write):
        with pytest.raises(BadFileError, match="no items"):
            read_choices(write("", " "))
        with pytest.raises(BadFileError, match="cannot be read"):
            read_choices(tmp_path / "none")
        (tmp_path / "latin").write_bytes(b"\xe9")
        with pytest.raises(BadFileError, match="not UTF-8"):
            read_choices(tmp_path / "latin")


class TestEncoding:
    def test_prompt_and_option_are_told_apart(self):
        options = encode(items(Item("ab", ("cd", "e"), 1)))
        assert [option.ids.tolist() for option in options] == [[0, 2, 3, 4, 5], [0, 2, 3, 6]]
        assert [option.first for option in options] == [3, 3]
        assert [option.right for option in options] == [False, True]

    def test_without_prompt_everything_counts(self):
        for tokenizer in (FakeTokenizer(adds_bos=True), FakeTokenizer(adds_bos=False)):
            option = encode(items(Item("", ("ab", "c"), 0)), tokenizer)[0]
            assert (option.ids.tolist(), option.first) == ([0, 2, 3], 1)

    def test_end_of_text_stands_in_for_a_missing_beginning(self):
        option = encode(items(Item("", ("ab", "c"), 0)), FakeTokenizer(adds_bos=False, bos=None))[0]
        assert (option.ids.tolist(), option.first) == ([1, 2, 3], 1)

    def test_neither(self):
        tokenizer = FakeTokenizer(adds_bos=False, bos=None, eos=None)
        with pytest.raises(UserError, match="neither"):
            encode(items(Item("", ("ab", "c"), 0)), tokenizer)
        assert encode(items(Item("x", ("ab", "c"), 0)), tokenizer)[0].first == 1

    def test_a_token_across_the_seam_belongs_to_the_option(self):
        class Merging(FakeTokenizer):
            def encode(self, text, **rest):
                return super().encode(text.replace("bc", "z"), **rest)

        option = encode(items(Item("ab", ("cd", "e"), 0)), Merging())[0]
        assert (option.ids.tolist(), option.first) == ([0, 2, 27, 5], 2)

    def test_an_option_of_no_tokens(self):
        with pytest.raises(UserError, match="item 1: option '!' adds no token"):
            encode(items(Item("ab", ("!", "c"), 0)))

    def test_longer_than_the_context(self):
        sets = [
            ChoiceSet("short", (Item("a", ("b", "c"), 0),), ""),
            ChoiceSet("long", (Item("ab", ("cde", "c"), 0),), ""),
        ]
        encode_choices(sets, FakeTokenizer(), vocabulary_size=100, context=6)
        with pytest.raises(
            UserError, match="long, item 1: prompt and option have 6 tokens, and the model's context is 5"
        ):
            encode_choices(sets, FakeTokenizer(), vocabulary_size=100, context=5)

    def test_outside_the_vocabulary(self):
        with pytest.raises(UserError, match="has token 27"):
            encode(items(Item("ab", ("z", "c"), 0)), vocabulary_size=20)

    def test_round_trip_through_a_file(self, tmp_path):
        options = encode(items(Item("ab", ("cd", "e"), 1), Item("", ("x", "yz"), 0)))
        save_options(tmp_path / "o.npz", options)
        for a, b in zip(load_options(tmp_path / "o.npz"), options, strict=True):
            assert (a.item, a.right, a.first) == (b.item, b.right, b.first)
            assert (a.ids == b.ids).all()


class TestScoring:
    def test_against_a_plain_loop(self):
        random = np.random.default_rng(9)
        letters = list(FakeTokenizer.letters[:30])
        choices = [
            Item("".join(random.choice(letters, 4)), tuple("".join(random.choice(letters, n)) for n in (3, 5, 2)), 2)
            for _ in range(40)
        ]
        model = FakeModel(bigram_table())
        log_p = torch.log_softmax(model.table.double(), -1)
        expected = []
        for choice in choices:
            totals = []
            for option in choice.options:
                ids = FakeTokenizer().encode(choice.prompt[-1] + option, add_special_tokens=False)
                totals.append(sum(float(log_p[a, b]) for a, b in itertools.pairwise(ids)))
            expected.append(int(np.argmax(totals)) == 2)
        advanced = []
        assert score_options(model, encode(items(*choices)), advanced.append) == expected
        assert sum(advanced) == 120
        assert 0 < sum(expected) < 40

    def test_swapped_labels_swap_the_answers(self):
        pairs = [Item("q", (a, b), 0) for a, b in (("ab", "ba"), ("xy", "zw"), ("01", "23"))]
        swapped = [Item("q", pair.options, 1) for pair in pairs]
        model = FakeModel(bigram_table())
        forward = score_options(model, encode(items(*pairs)))
        assert score_options(model, encode(items(*swapped))) == [not right for right in forward]

    def test_a_tie_is_wrong(self):
        model = FakeModel(torch.zeros(VOCABULARY, VOCABULARY))
        assert score_options(model, encode(items(Item("q", ("ab", "cd"), 0), Item("q", ("a", "cd"), 0)))) == [
            False,
            True,
        ]

    def test_sets_are_numbered_through(self):
        sets = [ChoiceSet(name, (Item("q", ("ab", "ba"), 0),), name) for name in "xy"]
        assert [option.item for option in encode(sets)] == [0, 0, 1, 1]
        assert len(score_options(FakeModel(bigram_table()), encode(sets))) == 2

    def test_not_finite(self):
        table = bigram_table()
        table[2, 3] = float("nan")
        with pytest.raises(NonFiniteError):
            score_options(FakeModel(table), encode(items(Item("a", ("b", "c"), 0))))

    def test_nothing(self):
        with pytest.raises(UserError, match="no items"):
            score_options(FakeModel(bigram_table()), [])
