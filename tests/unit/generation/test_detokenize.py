"""Streaming text: pieces join to the whole, and never hold half a character."""

import random

import pytest

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
