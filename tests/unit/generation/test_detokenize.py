"""Streaming text: pieces join to the whole, and never hold half a character."""

import random

import pytest
import tokenizers
from tokenizers import decoders

from quern.generation.detokenize import Detokenizer


def decode_bytes(ids):
    """One token a byte, as byte-level tokenizers have; 256 and above are special tokens that show nothing."""
    return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


def decode_words(ids):
    """SentencePiece's habit: a word carries the space before it, which goes at the start of a text."""
    return "".join(f" {chr(97 + i)}" for i in ids).removeprefix(" ")


def pieces(decode, context, ids):
    detokenizer = Detokenizer(decode, context)
    return [*(detokenizer.push(i) for i in ids), detokenizer.finish()]


@pytest.mark.parametrize("text", ["plain", "Mühle", "磨盘", "a🌾b", "e\u0301", "", "🇩🇪\n\t"])
@pytest.mark.parametrize("prompt", ["", "é磨"])
def test_whole_characters_only(text, prompt):
    said = pieces(decode_bytes, prompt.encode(), text.encode())
    assert "".join(said) == text
    assert not any("\ufffd" in piece for piece in said)


def test_an_unfinished_character_comes_at_the_end():
    said = pieces(decode_bytes, b"", "x磨".encode()[:-1])
    assert said == ["x", "", "", "\ufffd"]


def test_bytes_that_never_become_text_do_not_stop_the_rest():
    said = pieces(decode_bytes, b"", b"\xffok")
    assert "".join(said) == "\ufffdok"


def test_a_replacement_character_of_the_text_itself():
    assert "".join(pieces(decode_bytes, b"", "a\ufffdb".encode())) == "a\ufffdb"
    assert "".join(pieces(decode_bytes, b"", "a\ufffd".encode())) == "a\ufffd"


def test_leading_spaces_depend_on_the_prompt():
    assert pieces(decode_words, [0], [1, 2]) == [" b", " c", ""]
    assert pieces(decode_words, [], [1, 2]) == ["b", " c", ""]


def test_special_tokens_show_nothing():
    assert pieces(decode_bytes, b"p", [300, 97, 300, 98]) == ["", "a", "", "b", ""]


def test_random_bytes_join_to_what_decoding_at_once_gives():
    source = random.Random(5)
    for _ in range(200):
        ids = [source.randrange(256) for _ in range(30)]
        assert "".join(pieces(decode_bytes, b"", ids)) == decode_bytes(ids)


def byte_fallback_tokenizer():
    """As SentencePiece models with byte fallback are converted: 0 is special, then 256 bytes, then pieces."""
    vocabulary = {"<s>": 0, **{f"<0x{byte:02X}>": 1 + byte for byte in range(256)}}
    vocabulary |= {piece: 257 + number for number, piece in enumerate(("▁a", "b", "▁the"))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def byte_level_tokenizer():
    """One token a byte; 0 is special."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, **{letter: 1 + number for number, letter in enumerate(alphabet)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


TOKENIZERS = {"byte level": byte_level_tokenizer(), "byte fallback": byte_fallback_tokenizer()}
WHOLE = {
    "byte level": TOKENIZERS["byte level"].encode("Mühle 磨盘 🌾b").ids,
    "byte fallback": [257, 258, 259, *(1 + byte for byte in "磨🌾".encode()), 257],
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_whole_characters_come_as_from_the_librarys_own_stream(name):
    tokenizer, ids = TOKENIZERS[name], [0, *WHOLE[name], 0]
    stream = decoders.DecodeStream(skip_special_tokens=True)
    theirs = [stream.step(tokenizer, token) or "" for token in ids]
    assert pieces(tokenizer.decode, [], ids) == [*theirs, ""]
    assert "".join(theirs) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_unfinished_end_and_a_prompt_that_ends_in_a_character(name):
    """Where the library's stream says nothing, or what the prompt said."""
    tokenizer, ids = TOKENIZERS[name], WHOLE[name]
    cut = ids.index(next(token for token in ids if tokenizer.decode([token]) == "\ufffd")) + 1
    said = pieces(tokenizer.decode, [], ids[:cut])
    assert said[-1] == "\ufffd"
    assert "".join(said) == tokenizer.decode(ids[:cut])
    assert "".join(pieces(tokenizer.decode, ids[:cut], ids[cut:])).endswith(tokenizer.decode(ids[-1:])[-1])


def test_bytes_that_are_no_character_end_nothing():
    tokenizer = TOKENIZERS["byte fallback"]
    ids = [257, 258, 0xFF, 0xFE, 258, 259]
    assert "".join(pieces(tokenizer.decode, [], ids)) == "ab" + "\ufffd\ufffd" + "b the"
