"""Long texts by pieces give the tokens of the whole text, with any of the usual kinds of tokenizer."""

import itertools
import random

import pytest
from fake_model import FakeTokenizer
from tiny_model import calibration_text
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from quern.core.errors import UserError
from quern.texts import pieces, tokens
from quern.texts.pieces import cut_pieces
from quern.texts.tokens import begun, check_vocabulary, document_ids, plain_ids, text_ids

GPT4 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXT = calibration_text()[:60_000] + "\n\n  Grüße,\t你好 \U0001f600. " * 200 + "one very long line " * 400


def trained(kind):
    """BPE behind the splitting of GPT-2, of GPT-4 and its followers, or none, as in Llama 2's tokenizer."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=kind == "llama", unk_token="<unk>" if kind == "llama" else None))
    alphabet, special = sorted(pre_tokenizers.ByteLevel.alphabet()), []
    if kind == "gpt2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif kind == "gpt4":
        split = pre_tokenizers.Split(Regex(GPT4), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # for training, so that words are learned
        alphabet, special = [], ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    # Llama 2's has no token over a line end either: it spells them as bytes.
    tokenizer.train_from_iterator([TEXT.replace("\n", " ") if kind == "llama" else TEXT], trainer)
    if kind == "llama":
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("kind", ["gpt2", "gpt4", "llama"])
def test_pieces_give_the_tokens_of_the_whole(kind, monkeypatch):
    tokenizer = trained(kind)
    whole = plain_ids(tokenizer, TEXT)
    strings = [TEXT[:777], "", TEXT[777:30_000], TEXT[30_000:]]
    for size in (500, 9_999):
        monkeypatch.setattr(tokens, "cut_pieces", lambda text, size=size: cut_pieces(text, size))
        found = list(document_ids(tokenizer, strings))
        assert len(found) >= len(TEXT) // size
        assert [token for ids in found for token in ids] == whole


def test_a_text_of_one_piece_is_tokenized_as_it_is():
    asked = []

    class Recording(FakeTokenizer):
        def encode(self, text, **rest):
            asked.append(text)
            return super().encode(text, **rest)

    assert list(document_ids(Recording(), ["ab", "c"])) == [[2, 3, 4]]
    assert asked[0] == "abc"
    assert list(document_ids(FakeTokenizer(), [])) == []


@pytest.mark.parametrize("seed", range(20))
def test_cuts_lie_in_front_of_lines_and_words(seed):
    draw = random.Random(seed)
    text = "".join(draw.choices(["word", " ", "\n", "x", "  ", "\n\n", "."], k=3000))
    strings, at = [], 0
    while at < len(text):
        length = draw.randrange(1, 3000)
        strings.append(text[at : at + length])
        at += length
    found = list(cut_pieces(iter(strings), 1000))
    assert "".join(found) == text
    assert max(map(len, found)) <= 1000
    for before, after in itertools.pairwise(found):
        line = before.endswith("\n") and not before[-2:-1].isspace() and not after[0].isspace()
        word = not before[-1].isspace() and after[0] == " " and not after[1].isspace()
        assert line or word


def test_without_lines_and_words_it_is_cut_anywhere():
    assert list(cut_pieces(["a" * 25], 10)) == ["a" * 10, "a" * 10, "a" * 5]
    assert list(cut_pieces([], 10)) == list(cut_pieces([""], 10)) == []


def test_what_is_not_taken_is_not_read():
    def strings():
        yield "a " * pieces.PIECE
        pytest.fail("read on")

    assert next(document_ids(FakeTokenizer(), strings()))


def test_one_beginning_and_no_end():
    class Both(FakeTokenizer):
        def encode(self, text, *, add_special_tokens, verbose=True):
            inner = [0] if text.startswith("<s>") else []
            ids = inner + super().encode(text.removeprefix("<s>"), add_special_tokens=False)
            return [0, *ids, 1] if add_special_tokens else ids

    assert text_ids(Both(), "ab") == text_ids(Both(), "<s>ab") == [0, 2, 3]
    assert text_ids(FakeTokenizer(adds_bos=False), "ab") == [2, 3]
    assert begun([], [0, 2]) == [0, 2]


def test_only_tokens_that_occur_need_a_row():
    check_vocabulary([2, 3], FakeTokenizer(), 4)
    with pytest.raises(UserError, match=r"has token 4 .'c'.*has 4 rows"):
        check_vocabulary([2, 4], FakeTokenizer(), 4)
