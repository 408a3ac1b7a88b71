"""The tokenizer in a GGUF's metadata, as a tokenizer of the ``tokenizers`` library.

A GGUF holds the vocabulary (texts, scores, kinds), merges, the numbers of special tokens, and the name of the rule that cuts
text into words before merging, which llama.cpp knows as a regular expression. Two models of tokenizers are read, those of
the Llama, Mistral and Qwen families: byte-level BPE (``gpt2``) and SentencePiece's BPE (``llama``). A rule that is not
known is refused: another cut gives other tokens, which only looks like a worse model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quern.checkpoint.gguf.header import read_gguf_header
from quern.checkpoint.gguf.pre_tokenizers import RULES, Rule, rule_named
from quern.checkpoint.panics import panics_as_errors
from quern.core.errors import BadFileError, UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

PREFIX = "tokenizer.ggml."
ARRAYS = frozenset(PREFIX + name for name in ("tokens", "scores", "token_type", "merges"))
"""Keys of the arrays that make up a tokenizer."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of tokens."""
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_ENDS = ("eot", "eom")
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_INSTEAD = "Give the model's folder, which holds its tokenizer.json"


def load_gguf_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file (of a split one: its first part), with its special tokens and chat template.

    Raises ``UserError`` for a kind of tokenizer that is not read, ``BadFileError`` where the file contradicts itself.
    """
    return tokenizer_of(path, read_gguf_header(path, ARRAYS).metadata)


def tokenizer_of(path: Path, metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer that the ``metadata`` of ``path`` describe, of whose arrays ``ARRAYS`` are kept. Raises as above."""
    model = metadata.get(PREFIX + "model")
    if model not in ("gpt2", "llama"):
        raise UserError(
            f"{path} has {'no tokenizer' if model is None else f'a tokenizer {str(model)[:40]!r}'}; those that are read "
            f"from a GGUF are gpt2 (byte-level BPE) and llama (SentencePiece). {_INSTEAD}"
        )
    tokens, kinds = _vocabulary(path, metadata)
    rule = _rule(path, metadata) if model == "gpt2" else Rule((), begins=True)
    try:
        with panics_as_errors():
            tokenizer = (
                _byte_level(path, metadata, tokens, kinds, rule)
                if model == "gpt2"
                else _sentence_piece(path, metadata, tokens, kinds)
            )
            return _finished(metadata, tokenizer, tokens, kinds, rule.begins)
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception for what makes no sense
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise BadFileError(path, f"its tokenizer cannot be loaded: {first}", _INSTEAD) from None


def _array(path: Path, metadata: Mapping[str, Any], name: str, kind: type) -> tuple[Any, ...]:
    found = metadata.get(PREFIX + name, ())
    if not isinstance(found, tuple) or not all(type(value) is kind for value in found):
        raise BadFileError(path, f"metadata {PREFIX + name!r} must be an array of {kind.__name__}", _INSTEAD)
    return found


def _vocabulary(path: Path, metadata: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Texts and kinds of all tokens."""
    tokens = _array(path, metadata, "tokens", str)
    kinds = _array(path, metadata, "token_type", int) or (NORMAL,) * len(tokens)
    if not tokens:
        raise BadFileError(path, "its tokenizer has no tokens", _INSTEAD)
    if len(kinds) != len(tokens):
        raise BadFileError(path, f"its tokenizer has {len(tokens)} tokens and kinds of {len(kinds)}", _INSTEAD)
    return tokens, kinds


def _rule(path: Path, metadata: Mapping[str, Any]) -> Rule:
    name = metadata.get(PREFIX + "pre", "default")
    if isinstance(name, str) and (rule := rule_named(name)) is not None:
        return rule
    known = ", ".join(sorted(name for names in RULES for name in names))
    raise UserError(
        f"{path} cuts text into words by the rule {str(name)[:40]!r} (tokenizer.ggml.pre), which is not known; known: "
        f"{known}. {_INSTEAD}"
    )


def _ids(tokens: tuple[str, ...], kinds: tuple[int, ...]) -> dict[str, int]:
    """Number of every token that text can become; ``UNUSED`` ones only fill the embedding's rows."""
    return {token: index for index, token in enumerate(tokens) if kinds[index] != UNUSED}


def _byte_level(
    path: Path, metadata: Mapping[str, Any], tokens: tuple[str, ...], kinds: tuple[int, ...], rule: Rule
) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    merges = [_pair(path, merge) for merge in _array(path, metadata, "merges", str)]
    tokenizer = Tokenizer(models.BPE(vocab=_ids(tokens, kinds), merges=merges, ignore_merges=rule.whole_words))
    cuts = [pre_tokenizers.Split(Regex(cut), behavior="isolated") for cut in rule.cuts]
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, bytes_of_words])
    tokenizer.decoder = decoders.ByteLevel()
    if rule.composed:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _pair(path: Path, merge: str) -> tuple[str, str]:
    """The two parts; the first one may itself begin with a space."""
    at = merge.find(" ", 1)
    if at < 0:
        raise BadFileError(path, f"its tokenizer has the merge {merge[:40]!r}, which is no pair", _INSTEAD)
    return merge[:at], merge[at + 1 :]


def _sentence_piece(
    path: Path, metadata: Mapping[str, Any], tokens: tuple[str, ...], kinds: tuple[int, ...]
) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = _array(path, metadata, "scores", float)
    if len(scores) != len(tokens):
        raise BadFileError(path, f"its tokenizer has {len(tokens)} tokens and scores of {len(scores)}", _INSTEAD)
    vocabulary = _ids(tokens, kinds)
    unknown = metadata.get(PREFIX + "unknown_token_id", kinds.index(UNKNOWN) if UNKNOWN in kinds else None)
    model = models.BPE(
        vocab=vocabulary,
        merges=merges_of_scores(vocabulary, scores, kinds),
        unk_token=tokens[unknown] if type(unknown) is int and 0 <= unknown < len(tokens) else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    spaced = metadata.get(PREFIX + "add_space_prefix", True) is not False
    first = [normalizers.Prepend(SPACE)] if spaced else []
    tokenizer.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", SPACE)])
    last = [decoders.Strip(" ", 1, 0)] if spaced else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    )
    return tokenizer


def merges_of_scores(
    vocabulary: dict[str, int], scores: tuple[float, ...], kinds: tuple[int, ...]
) -> list[tuple[str, str]]:
    """SentencePiece merges whichever pair gives the piece of the highest score; the first piece wins a tie."""
    ranked = []
    for piece, index in vocabulary.items():
        if kinds[index] in (NORMAL, USER_DEFINED):
            halves = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
            pairs = [(left, right) for left, right in halves if left in vocabulary and right in vocabulary]
            ranked += [(-scores[index], index, vocabulary[left], left, right) for left, right in pairs]
    return [(left, right) for _, _, _, left, right in sorted(ranked)]


def _finished(
    metadata: Mapping[str, Any], tokenizer: Tokenizer, tokens: tuple[str, ...], kinds: tuple[int, ...], begins: bool
) -> PreTrainedTokenizerFast:
    """With special tokens, what is put before and behind a text, and the chat template."""
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    def special(name: str) -> str | None:
        index = metadata.get(f"{PREFIX}{name}_token_id")
        return tokens[index] if type(index) is int and 0 <= index < len(tokens) else None

    named = {key: token for key, name in SPECIAL.items() if (token := special(name)) is not None}
    ends = {token for name in _ENDS if (token := special(name)) is not None}
    control = {token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL}
    wanted = control | ends | set(named.values())
    # Numbers must stay what they are, so tokens are added in their order; each has its place in the vocabulary already.
    numbers = _ids(tokens, kinds)
    for token in sorted(numbers, key=numbers.__getitem__):
        if token and (token in wanted or kinds[numbers[token]] == USER_DEFINED):
            added = AddedToken(token, normalized=False, special=token in wanted)
            tokenizer.add_special_tokens([added]) if token in wanted else tokenizer.add_tokens([added])
    bos, eos = named.get("bos_token"), named.get("eos_token")
    before = bos if metadata.get(PREFIX + "add_bos_token", begins) is True else None
    behind = eos if metadata.get(PREFIX + "add_eos_token", False) is True else None
    if before is not None or behind is not None:
        around = [*([before] if before else []), "$A", *([behind] if behind else [])]
        again = [piece.replace("$A", "$B:1") for piece in around]
        ids = [(token, numbers[token]) for token in {before, behind} if token is not None]
        tokenizer.post_processor = processors.TemplateProcessing(single=around, pair=around + again, special_tokens=ids)
    template = metadata.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=template if isinstance(template, str) else None,
        clean_up_tokenization_spaces=False,
        **named,
    )
