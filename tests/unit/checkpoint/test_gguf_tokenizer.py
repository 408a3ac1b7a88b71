"""The tokenizer in a GGUF gives the tokens of the tokenizer that it was made of."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import gguf
import pytest
from bad_files import corpus
from gguf_model import write_gguf
from tiny_model import calibration_text, tiny_config, write_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from quern.checkpoint.gguf.tokenizer import load_gguf_tokenizer
from quern.checkpoint.tokenizer import copy_tokenizer, load_tokenizer
from quern.core.errors import BadFileError, UserError
from quern.generation.generate import generate
from quern.loading.fitting import open_model

TEXTS = [
    "", " ", "def f(x):\n\treturn x + 12345  # it's\n\n\n", "Ünïcödé e\u0301 \u00e9, 你好世界 🎉🏳️‍🌈", "<end>a<think> b</think><end>",
    "HELLO World's I'LL we've 3.14159 007", "\r\n \r\n\t\t x", "a\u00a0b\u2028c", "   leading", "trailing   ", "\x00\x7f",
]  # fmt: skip


def texts() -> list[str]:
    """The ones above, and 40 random ones of their characters and of source text."""
    generator, letters = random.Random(5), sorted({*"".join(TEXTS), *calibration_text()[:3000]})
    return [*TEXTS, *("".join(generator.choices(letters, k=generator.randrange(60))) for _ in range(40))]


def trained(splits: list[Any], **options: Any) -> Tokenizer:
    """A byte-level BPE tokenizer of 350 tokens whose words are cut by ``splits``."""
    tokenizer = Tokenizer(models.BPE(**options))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, last])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=350, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([calibration_text()[:20_000], *TEXTS], trainer)
    tokenizer.add_special_tokens([AddedToken("<end>", special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return tokenizer


def write(path: Path, tokenizer: Tokenizer, pre: str, **metadata: Any) -> Path:
    """A GGUF that holds ``tokenizer``, and a model that is not looked at."""
    data = json.loads(tokenizer.to_str())
    words = {index: token for token, index in data["model"]["vocab"].items()}
    added = {entry["id"]: entry for entry in data["added_tokens"]}

    def extra(writer: gguf.GGUFWriter) -> None:
        count = max([*words, *added]) + 1
        tokens = [added[i]["content"] if i in added else words[i] for i in range(count)]
        kinds = [(3 if added[i]["special"] else 4) if i in added else 1 for i in range(count)]
        for name, value, kind, inner in (
            ("tokens", [*tokens, "[PAD]"], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING),
            ("token_type", [*kinds, 5], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32),
            (
                "merges",
                [" ".join(m) for m in data["model"]["merges"]],
                gguf.GGUFValueType.ARRAY,
                gguf.GGUFValueType.STRING,
            ),
        ):
            writer.add_key_value(f"tokenizer.ggml.{name}", value, kind, inner)
        writer.add_tokenizer_pre(pre)
        for name, value in metadata.items():
            key = f"tokenizer.{name}" if name == "chat_template" else f"tokenizer.ggml.{name}"
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))

    return _gguf_with(path, extra, "gpt2")


def _gguf_with(path: Path, extra: Any, model: str) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def split(regex: str) -> Any:
    return pre_tokenizers.Split(Regex(regex), "isolated")


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
"""The rule as the tokenizers library has it. It turns bytes into letters too, and so must come last."""
# As these models' own tokenizer.json has them.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"\p{N}| ", r"\p{N}{1,3}| ")
RULES = {"qwen2": [split(QWEN2)], "llama-bpe": [split(LLAMA3)]}


@pytest.mark.parametrize("pre", RULES)
def test_byte_level_tokenizers_are_rebuilt(pre, tmp_path):
    original = trained(RULES[pre], ignore_merges=pre == "llama-bpe")
    if pre == "qwen2":
        original.normalizer = normalizers.NFC()
    path = write(tmp_path / "m.gguf", original, pre, add_bos_token=False)
    ours, theirs = load_tokenizer(path), PreTrainedTokenizerFast(tokenizer_object=original)
    for text in texts():
        ids = theirs(text).input_ids
        assert ours(text).input_ids == ids
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.convert_tokens_to_ids("<end>") == theirs.convert_tokens_to_ids("<end>")
    assert "[PAD]" not in ours.get_vocab()


@pytest.mark.parametrize(
    ("pre", "digits"), [("gpt-2", []), ("smollm", [pre_tokenizers.Digits(individual_digits=True)])]
)
def test_rules_that_the_library_has_itself(pre, digits, tmp_path):
    original = trained([])
    original.pre_tokenizer = pre_tokenizers.Sequence([*digits, GPT2])
    ours = load_tokenizer(write(tmp_path / "m.gguf", original, pre))
    for text in texts():
        assert ours(text).input_ids == original.encode(text).ids


def test_what_begins_and_ends_a_text(tmp_path):
    original = trained(RULES["qwen2"])
    end = original.token_to_id("<end>")
    plain = original.encode("abc").ids

    def ids(pre: str, **metadata: Any) -> list[int]:
        return load_tokenizer(write(tmp_path / "m.gguf", original, pre, **metadata))("abc").input_ids

    assert ids("qwen2", bos_token_id=end) == plain
    assert ids("qwen2", bos_token_id=end, add_bos_token=True) == [end, *plain]
    assert ids("llama-bpe", bos_token_id=end) == [end, *plain]
    assert ids("llama-bpe", bos_token_id=end, add_bos_token=False) == plain
    assert ids("llama-bpe") == plain  # there is none to begin with
    assert ids("qwen2", eos_token_id=end, add_eos_token=True) == [*plain, end]


def test_special_tokens_and_the_chat_template(tmp_path):
    original = trained(RULES["qwen2"])
    end, think = original.token_to_id("<end>"), original.token_to_id("<think>")
    template = "{% for m in messages %}{{ m['content'] }}<end>{% endfor %}"
    path = write(
        tmp_path / "m.gguf", original, "qwen2", eos_token_id=end, padding_token_id=think, chat_template=template
    )
    tokenizer = load_tokenizer(path)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<end>", "<think>", None)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x<end>"
    (tmp_path / "copy").mkdir()
    copy_tokenizer(path, tmp_path / "copy")
    copied = load_tokenizer(tmp_path / "copy")
    assert (copied.eos_token, copied.chat_template) == ("<end>", template)
    assert all(copied(text).input_ids == tokenizer(text).input_ids for text in texts())


def sentence_piece(path: Path, spaced: bool) -> tuple[Path, Tokenizer]:
    """A SentencePiece BPE: its GGUF, and the same pieces put together by hand."""
    trainer_input = trained([])
    space = "\N{LOWER ONE EIGHTH BLOCK}"
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted({letter if letter != " " else space for letter in calibration_text()[:3000] if letter >= " "})
    words = [
        piece.replace("Ġ", space) for piece in trainer_input.get_vocab() if 2 <= len(piece) <= 6 and piece.isascii()
    ]
    grown = sorted(
        {word[:end] for word in [*words, space + "def", space + "return"] for end in range(2, len(word) + 1)}
    )
    merged = [piece for piece in grown if set(piece) <= {*letters}]
    pieces += [*merged, *letters]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(merged) + len(letters))]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (len(merged) + len(letters))]

    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_token_list(pieces)
        writer.add_token_scores(scores)
        writer.add_token_types(kinds)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        writer.add_add_space_prefix(spaced)

    known = {piece: index for index, piece in enumerate(pieces)}
    ranked = [
        (scores[known[p]], p[:cut], p[cut:]) for p in merged for cut in range(1, len(p))
        if p[:cut] in known and p[cut:] in known
    ]  # fmt: skip
    merges = [(left, right) for _, left, right in sorted(ranked, key=lambda item: -item[0])]
    theirs = Tokenizer(models.BPE(known, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    prefix = [normalizers.Prepend(space)] if spaced else []
    theirs.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", space)])
    theirs.add_special_tokens(["<unk>", "<s>", "</s>"])
    theirs.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)])
    return _gguf_with(path, extra, "llama"), theirs


@pytest.mark.parametrize("spaced", [True, False])
def test_sentence_piece_is_rebuilt(spaced, tmp_path):
    path, theirs = sentence_piece(tmp_path / "m.gguf", spaced)
    ours = load_tokenizer(path)
    for text in [*texts(), "return x", "a</s>b"]:
        assert ours(text).input_ids == theirs.encode(text).ids
        if "</s>" not in text and text.isprintable() and not text.endswith(" "):
            assert ours.decode(ours(text).input_ids, skip_special_tokens=True) == text
    assert len(ours("return x").input_ids) < len("return x")


def test_an_unknown_rule_is_refused_with_the_known_ones(tmp_path):
    path = write(tmp_path / "m.gguf", trained(RULES["qwen2"]), "zap")
    with pytest.raises(UserError, match=r"by the rule 'zap' .*known: .*llama-bpe.*Give the model's folder"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: None, "has no tokens"),
        (lambda w: w.add_array("tokenizer.ggml.tokens", [1, 2]), "must be an array of str"),
        (lambda w: (w.add_token_list(["a"]), w.add_token_types([1, 1])), "1 tokens and kinds of 2"),
        (lambda w: (w.add_token_list(["a"]), w.add_token_merges(["ab"])), "'ab', which is no pair"),
        (lambda w: (w.add_token_list(["a"]), w.add_token_merges(["a b"])), "cannot be loaded"),
    ],
)
def test_a_damaged_tokenizer_is_refused(change, says, tmp_path):
    with pytest.raises(BadFileError, match=says):
        load_tokenizer(_gguf_with(tmp_path / "m.gguf", change, "gpt2"))


@pytest.mark.parametrize("model", ["bert", "t5"])
def test_other_kinds_of_tokenizers_are_refused(model, tmp_path):
    with pytest.raises(UserError, match=f"has a tokenizer '{model}'; those that are read"):
        load_gguf_tokenizer(_gguf_with(tmp_path / "m.gguf", lambda writer: writer.add_token_list(["a"]), model))


def test_scores_are_needed_for_pieces(tmp_path):
    with pytest.raises(BadFileError, match="2 tokens and scores of 0"):
        load_tokenizer(_gguf_with(tmp_path / "m.gguf", lambda writer: writer.add_token_list(["a", "b"]), "llama"))


def test_every_end_is_in_the_configuration(tmp_path):
    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_eot_token_id(5)
        writer.add_eom_token_id(2)

    path = corpus.write_gguf(tmp_path / "m.gguf", corpus.weights(), corpus.CONFIG, extra=extra)
    assert open_model(path).config["eos_token_id"] == [2, 5]


def test_a_gguf_continues_text_as_its_folder_does(tmp_path):
    folder = write_model(tmp_path / "model", tiny_config("qwen2", torch_dtype="float32"))
    (path,) = write_gguf(folder, tmp_path / "m.gguf")
    assert list(generate(path, "def f(", max_tokens=12)) == list(generate(folder, "def f(", max_tokens=12))


def test_nothing_is_printed(tmp_path, capfd):
    folder = write_model(tmp_path / "model", tiny_config("llama"))
    (path,) = write_gguf(folder, tmp_path / "m.gguf", kind=gguf.GGMLQuantizationType.Q8_0)
    for engine in ("cpu", "reference"):
        list(generate(path, "def f(", max_tokens=2, engine=engine))
    assert capfd.readouterr() == ("", "")
