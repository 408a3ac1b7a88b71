"""How text is cut into words before merging: the rules that llama.cpp knows, and which of them a tokenizer follows.

A GGUF names the rule (``tokenizer.ggml.pre``). llama.cpp's converter finds the name by what a tokenizer makes of one text:
the SHA-256 of its token numbers is looked up in a list, because nothing in a checkpoint says it. The text and the list
(``pre_tokenizers.tsv``: hash, name) are those of llama-cpp-python 0.3.36. Vocabularies of which llama.cpp's makers never
heard are not in it, although most follow a usual rule; these are known by the regular expressions in ``tokenizer.json``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

CHECK_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis con"
    "catenated) ✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 "
    "3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо на Български "
    "''''''```````\"\"\"\"......!!!!!!?????? "
    "I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
"""What tokenizers are told apart by."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r"[^\r\n\p{L}\p{N}]?{0}*{1}+{2}|[^\r\n\p{L}\p{N}]?{0}+{1}*{2}"


def _cased(ending: str) -> str:
    """Words in which small letters follow capitals, with ``ending`` after them."""
    return _CASED.replace("{0}", _UPPER).replace("{1}", _LOWER).replace("{2}", ending)


class Rule(NamedTuple):
    """How text is cut into words, and what goes with it."""

    cuts: tuple[str, ...]
    """Regular expressions, one after another; what they match is set apart."""
    whole_words: bool = False
    """Whether a word that is a token is taken as it is, without merging."""
    begins: bool = False
    """Whether a text begins with the BOS token where the file does not say."""
    composed: bool = False
    """Whether text is brought into Unicode's composed form first."""


RULES = {
    ("gpt-2", "default", "phi-2", "mpt", "olmo", "jais", "gigachat", "a.x-4.0", "mellum", "exaone4"): Rule((_GPT2,)),
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"): Rule((r"\p{N}", _GPT2)),
    ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "midm-2.0", "lfm2"): Rule(
        (_WORDS + r"|\p{N}{1,3}" + _REST,), whole_words=True, begins=True
    ),
    ("dbrx", "smaug-bpe"): Rule((_WORDS + r"|\p{N}{1,3}" + _REST,)),
    ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"): Rule((_WORDS + r"|\p{N}" + _REST,), composed=True),
    ("stablelm2", "hunyuan", "solar-open"): Rule((_WORDS + r"|\p{N}" + _REST,)),
    ("qwen35",): Rule(
        (
            _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
            r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        composed=True,
    ),
    ("tekken",): Rule(
        (_cased("") + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",), whole_words=True, begins=True
    ),
    ("gpt-4o", "llama4", "kanana2"): Rule(
        (_cased(_CONTRACTIONS + "?") + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",)
    ),
    ("deepseek-coder",): Rule(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
}
"""By the names that llama.cpp gives them (``tokenizer.ggml.pre``)."""


@cache
def _by_hash() -> Mapping[str, str]:
    lines = Path(__file__).with_name("pre_tokenizers.tsv").read_text("utf-8").splitlines()
    return dict(line.split("\t") for line in lines)


def known_names() -> list[str]:
    """All names that ``tokenizer.ggml.pre`` may have, sorted."""
    return sorted({*_by_hash().values(), *(name for names in RULES for name in names)})


def check_hash(ids: Sequence[int]) -> str:
    """The hash of what a tokenizer makes of ``CHECK_TEXT``."""
    return hashlib.sha256(str(list(ids)).encode()).hexdigest()


def name_of_hash(digest: str) -> str | None:
    """llama.cpp's name for the rule of a tokenizer with this hash; None for one that it has not seen."""
    return _by_hash().get(digest)


def rule_named(name: str) -> Rule | None:
    """The rule of that name, as far as it is read here."""
    return next((rule for names, rule in RULES.items() if name in names), None)


def name_of_description(tokenizer: Mapping[str, Any]) -> str | None:
    """The name of the rule that a ``tokenizer.json`` describes word for word; None where it is none of those here."""
    if (cuts := _cuts(tokenizer.get("pre_tokenizer") or {})) is None:
        return None
    whole_words = bool(tokenizer["model"].get("ignore_merges", False))
    composed = "NFC" in str(tokenizer.get("normalizer"))
    found = [(names[0], rule) for names, rule in RULES.items() if (rule.cuts, rule.whole_words) == (cuts, whole_words)]
    # llama.cpp composes nothing; where two rules differ in that alone either will do.
    return next((name for name, rule in found if rule.composed == composed), found[0][0] if found else None)


def _cuts(described: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The regular expressions of a byte-level pre-tokenizer, one after another; None for another kind."""
    steps = described.get("pretokenizers", [described])
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    cuts: list[str] = []
    for step in steps[:-1]:
        plain = step.get("behavior") == "Isolated" and not step.get("invert")
        if step.get("type") == "Split" and plain and "Regex" in step["pattern"]:
            cuts.append(step["pattern"]["Regex"])
        elif step.get("type") == "Digits" and step.get("individual_digits"):
            cuts.append(r"\p{N}")
        else:
            return None
    return (*cuts, *([_GPT2] if steps[-1].get("use_regex", True) else []))
