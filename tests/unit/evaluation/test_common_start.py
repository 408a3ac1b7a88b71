"""Where the options of an item begin: no option gets a piece of the prompt for nothing, or pays for it alone."""

import itertools
import math
import random
from types import SimpleNamespace

import pytest
import torch
from fake_model import FakeModel, FakeTokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from quern.core.errors import UserError
from quern.evaluation.choice import ChoiceSet, Item, common_start, encode_choices
from quern.evaluation.lm_eval import Requests

LETTERS = "abc  \n.é"
SIZE = 90


def trained(kind: str, bos: bool) -> PreTrainedTokenizerFast:
    """A small BPE tokenizer. ``merging`` joins over spaces and lines, as one without a pre-tokenizer does."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=kind == "metaspace"))
    special, alphabet = ["<s>", "</s>", "<unk>"], list(LETTERS)
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    elif kind == "metaspace":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        alphabet.append("▁")
    draw = random.Random(kind)
    corpus = ["".join(draw.choices(LETTERS, k=40)) for _ in range(300)]
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE, special_tokens=special, initial_alphabet=alphabet, show_progress=False, max_token_length=5
    )
    tokenizer.train_from_iterator(corpus, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def items(seed: int, count: int):
    """Prompts that end anywhere, also in a space or inside a word; options none of which begins another."""
    draw = random.Random(seed)
    while count:
        prompt = "".join(draw.choices(LETTERS, k=draw.randrange(6)))
        options = {"".join(draw.choices(LETTERS, k=draw.randrange(1, 5))) for _ in range(draw.randrange(2, 9))}
        if len(options) > 1 and not any(b.startswith(a) for a, b in itertools.permutations(options, 2)):
            yield prompt, tuple(sorted(options))
            count -= 1


def model():
    generator = torch.Generator().manual_seed(3)
    return FakeModel(torch.randn(SIZE + 20, SIZE + 20, generator=generator) * 3)


def likelihood(table, ids, first):
    log_p = torch.log_softmax(table.double(), -1)
    return sum(float(log_p[ids[t - 1], ids[t]]) for t in range(first, len(ids)))


@pytest.fixture(params=list(itertools.product(["bytes", "metaspace", "merging"], [False, True])), ids=str)
def tokenizer(request):
    return trained(*request.param)


# The probabilities of some tens of tokens are multiplied and summed in double: an error of some 1e-14.
ROUNDING = 1e-12


def test_probabilities_of_disjoint_options_add_up_to_at_most_one(tokenizer):
    table, across = model().table, 0
    for prompt, options in items(0, 300):
        found = encode_choices(
            [ChoiceSet("set", (Item(prompt, options, 0),), "")], tokenizer, vocabulary_size=len(tokenizer)
        )
        (first,) = {option.first for option in found}
        assert len({tuple(option.ids[:first]) for option in found}) == 1
        across += first < len(tokenizer.encode(prompt, add_special_tokens=False))
        total = sum(math.exp(likelihood(table, option.ids.tolist(), option.first)) for option in found)
        assert total <= 1 + ROUNDING
    assert across, "some prompts end inside a token"


def test_so_do_those_of_lm_evals_requests(tokenizer):
    adapter = Requests(model(), tokenizer)
    asked = [
        SimpleNamespace(args=(prompt, option), doc_id=number, task_name="task")
        for number, (prompt, options) in enumerate(items(1, 300))
        for option in options
    ]
    random.Random(2).shuffle(asked)
    totals: dict[int, float] = {}
    for request, (value, _) in zip(asked, adapter.loglikelihood(asked), strict=True):
        assert value < 0
        totals[request.doc_id] = totals.get(request.doc_id, 0.0) + math.exp(value)
    assert max(totals.values()) <= 1 + ROUNDING


class Merging(FakeTokenizer):
    """``bc`` is one token."""

    def encode(self, text, **rest):
        return super().encode(text.replace("bc", "z"), **rest)


def test_an_option_across_the_seam_moves_the_start_of_all():
    options = encode_choices(
        [ChoiceSet("set", (Item("ab", ("cd", "e"), 0),), "")], Merging(adds_bos=False), vocabulary_size=40
    )
    assert [(option.ids.tolist(), option.first) for option in options] == [([2, 27, 5], 1), ([2, 3, 6], 1)]


def test_a_prompt_of_one_token_that_an_option_swallows_gets_a_token_in_front():
    options = encode_choices(
        [ChoiceSet("set", (Item("b", ("cd", "e"), 0),), "")], Merging(adds_bos=False), vocabulary_size=40
    )
    assert [(option.ids.tolist(), option.first) for option in options] == [([0, 27, 5], 1), ([0, 3, 6], 1)]
    table = model()
    answers = Requests(table, Merging(adds_bos=False)).loglikelihood(
        [SimpleNamespace(args=("b", "cd")), SimpleNamespace(args=("b", "e"))]
    )
    expected = [likelihood(table.table, [0, 27, 5], 1), likelihood(table.table, [0, 3, 6], 1)]
    assert [value for value, _ in answers] == pytest.approx(expected, rel=1e-12)


def test_documents_with_the_same_context_do_not_move_each_others_start():
    adapter = Requests(model(), Merging())
    requests = [SimpleNamespace(args=("ab", text), doc_id=number) for number, text in ((0, "e"), (0, "f"), (1, "cd"))]
    together = [value for value, _ in adapter.loglikelihood(requests)]
    alone = [value for part in (requests[:2], requests[2:]) for value, _ in adapter.loglikelihood(part)]
    assert together == alone


def test_a_context_that_is_too_long_is_cut_alike_for_all_of_its_options():
    table = model()
    adapter = Requests(table, FakeTokenizer())
    asked = [SimpleNamespace(args=("xy" * 100, text)) for text in ("a", "a" * 40)]
    adapter.loglikelihood(asked)
    assert table.batches == [(2, table.maximum_length)]


def test_a_continuation_without_tokens_is_refused():
    with pytest.raises(UserError, match="adds no token"):
        Requests(model(), FakeTokenizer()).loglikelihood([SimpleNamespace(args=("ab", "!"))])


def test_tokenizers_habits_at_both_ends():
    """One token begins a text that spells it, and the token that a tokenizer puts behind texts is not fed."""
    adapter, spoken = Requests(model(), trained("bytes", bos=True)), []
    adapter._score = lambda inputs, scored: spoken.extend(inputs) or [(0.0, True)] * len(inputs)
    adapter.loglikelihood([SimpleNamespace(args=(text, "b")) for text in ("aaa.", "<s>aaa.")])
    assert spoken[0].tolist() == spoken[1].tolist()
    assert spoken[0].tolist().count(0) == 1
    assert 1 not in spoken[0]


@pytest.mark.parametrize(
    ("encodings", "start"),
    [([], 0), ([[]], 0), ([[1, 2]], 2), ([[1, 2], [1]], 1), ([[1, 2, 3], [1, 2, 4], [1, 5]], 1), ([[1], [2]], 0)],
)
def test_common_start(encodings, start):
    for order in itertools.permutations(encodings):
        assert common_start(order) == start
