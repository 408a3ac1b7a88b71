"""quern-run's tokenizer against the ``tokenizers`` library: the same tokens, and the same text back."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from run_programs import Program
from tiny_model import calibration_text, tiny_config, write_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from quern.checkpoint.tokenizer import load_tokenizer
from quern.pipeline.export import export
from quern.pipeline.run_files.tokenizer import CUTS, GPT2, ONE_DIGIT, THREE_DIGITS
from quern.texts.tokens import text_ids

SOURCE = Path(__file__).with_name("tokens.c")
PATTERNS = {number: pattern for pattern, number in CUTS.items()}
TEXTS = [
    "", " ", "  ", "\n", " \n ", "a", " a", "a ", "\t\tx = 1\r\n\r\n  y\n", "Hello, world! It's 12345 o'clock, WE'LL see'm.",
    "I'M DON'T 'S'T'RE'VE'LL'D 'ſ'll'x '", "   three   spaces   ", "...!?\n\n\n  next", "x²½Ⅷ٣४ 1,234.5e-6",
    "今天天气很好，我们去公园吧。１２３", "日本語テキスト、カタカナ、ひらがな", "안녕하세요 세계 한국어", "Привет, мир! Ёлка",
    "مرحبا بالعالم", "नमस्ते दुनिया", "👍🏽 👩‍👩‍👧‍👦 🇩🇪 ✈️ \U0001f9ff", "e\u0301 A\u030a \u1e9b\u0323 \u212b ﬁ \u0344 \u0958",
    "a\u0327\u0301b \u1100\u1161\u11a8 \uac00\u11a8", "\u00a0\u2003\u3000x\u2028y\u0085z\u1680", "<|end|>", "a<|end|>b <|end|> <tool>x</tool>",
    "<|en<|end|><|end|>|>", "\x00\x01\x7f\x80", "def f(x):\n    return x + 1\n\n\nclass A:\n\tpass\n", "A" * 300, " " * 200 + "b",
    "\u2581a \u2581", "https://example.org/a?b=c&d=%20e", "\ufffd", "\U0010ffff",
]  # fmt: skip
ALPHABETS = [
    "ab '\n",
    "aſ'sTlLdE 1\r\n",
    "é\u0301\u0327\u030aAe가\u1100\u1161\u11a8",
    " \t\u3000.!a0",
    "日本<|end|>1 ",
    "\u2581 a<0x41>",
]


def texts(count: int = 300) -> list[str]:
    """Those above, mixtures of few characters, any characters, and pieces of source text."""
    generator = random.Random(3)
    source = calibration_text()
    found = list(TEXTS)
    for index in range(count):
        length = generator.randrange(1, 40)
        if index % 3 == 0:
            found.append("".join(generator.choices(generator.choice(ALPHABETS), k=length)))
        elif index % 3 == 1:
            points = [
                generator.randrange(*generator.choice([(0, 0x250), (0x250, 0x3100), (0x3100, 0x110000)]))
                for _ in range(length)
            ]
            found.append("".join(chr(point) for point in points if not 0xD800 <= point < 0xE000))
        else:
            start = generator.randrange(len(source))
            found.append(source[start : start + 8 * length])
    return found


def byte_level(cut: int | None, **changes) -> Tokenizer:
    """A byte-level tokenizer like those of the families that quern knows."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=changes.get("ignore_merges", False)))
    stages = []
    if cut in (ONE_DIGIT, THREE_DIGITS):
        stages.append(pre_tokenizers.Split(Regex(PATTERNS[cut]), "isolated"))
    if "digits" in changes:
        stages.append(pre_tokenizers.Digits(individual_digits=changes["digits"]))
    stages.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut == GPT2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(stages)
    tokenizer.decoder = decoders.ByteLevel()
    if changes.get("nfc"):
        tokenizer.normalizer = normalizers.NFC()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([calibration_text()[:20_000], *TEXTS[8:25]], trainer)
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer


def characters(metaspace: bool) -> Tokenizer:
    """A vocabulary like SentencePiece's: characters, bytes where there is none, a token in front of texts."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    low_line = "\u2581"
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(low_line, prepend_scheme="first", split=True)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(low_line), normalizers.Replace(" ", low_line)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(low_line, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special[:2], show_progress=False)
    words = calibration_text()[:6000].replace("\n", " ").split(" ")
    tokenizer.train_from_iterator([f" {word}" for word in words], trainer)
    vocabulary = tokenizer.get_vocab()
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    for name in special:
        vocabulary.setdefault(name, len(vocabulary))
    model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer.model = model
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", vocabulary["<s>"])])
    return tokenizer


TOKENIZERS = {
    "gpt2": lambda: byte_level(GPT2),
    "qwen": lambda: byte_level(ONE_DIGIT, nfc=True),
    "llama 3": lambda: byte_level(THREE_DIGITS, ignore_merges=True),
    "smollm": lambda: byte_level(GPT2, digits=True),
    "runs of digits": lambda: byte_level(GPT2, digits=False),
    "no words": lambda: byte_level(None),
    "llama 2": lambda: characters(False),
    "metaspace": lambda: characters(True),
}


@pytest.fixture(scope="module")
def tokens(program: Program, tmp_path_factory) -> Path:
    """A C program that uses libquern."""
    made = tmp_path_factory.mktemp("tokens") / "tokens"
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined"]
    include = f"-I{SOURCE.parents[2] / 'csrc/include'}"
    compiler = shutil.which("gcc") or "cc"
    subprocess.run([compiler, *flags, include, "-c", SOURCE, "-o", f"{made}.o"], check=True)
    libraries = [program.folder / "libquern.a", program.folder / "libquern_core.a"]
    subprocess.run(["g++", f"{made}.o", *libraries, "-fsanitize=address,undefined", "-pthread", "-o", made], check=True)
    return made


def read(program: Path, file: Path, given: list[str]) -> list[tuple[list[int], str]]:
    """Tokens of each text, and the text that they stand for."""
    framed = b"".join(b"%d\n%s" % (len(text.encode()), text.encode()) for text in given)
    rest = subprocess.run([program, file], input=framed, capture_output=True, check=True, timeout=120).stdout
    found = []
    for _ in given:
        ids, size, rest = rest.split(b"\n", 2)
        found.append(([int(number) for number in ids.split()], rest[: int(size)].decode()))
        rest = rest[int(size) + 1 :]
    return found


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_same_tokens_and_text(tokens, name, tmp_path):
    backend = TOKENIZERS[name]()
    starts = "<s>" if backend.token_to_id("<s>") is not None else None
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=starts)
    size = max(backend.get_vocab().values()) + 1
    model = write_model(tmp_path / "model", tiny_config("llama", vocab_size=size, num_hidden_layers=1), tokenizer=False)
    theirs.save_pretrained(model)
    theirs = load_tokenizer(model)
    report = export(model, tmp_path / "model.run", format="run")
    assert report.notes == []
    given = texts()
    for text, (ids, back) in zip(given, read(tokens, report.path, given), strict=True):
        assert ids == text_ids(theirs, text), repr(text)
        decoded = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert back.removeprefix(" ") == decoded if starts else back == decoded, repr(text)


UNKNOWN = {
    "its model is WordLevel": lambda: Tokenizer(models.WordLevel({"a": 0}, unk_token="a")),
    "it cuts words by Whitespace": lambda: changed(
        pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
    ),
    r"it cuts words by \"x+\"": lambda: changed(
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex("x+"), "isolated"), pre_tokenizers.ByteLevel(False)]
        )
    ),
    "only NFC is known": lambda: changed(normalizer=normalizers.Lowercase()),
    "get a space in front": lambda: changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
}


def changed(**parts) -> Tokenizer:
    tokenizer = byte_level(GPT2)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


@pytest.mark.parametrize("reason", UNKNOWN)
def test_a_tokenizer_that_is_not_known_is_named(program, reason, tmp_path):
    model = write_model(tmp_path / "model", tiny_config("llama", vocab_size=700, num_hidden_layers=1), tokenizer=False)
    PreTrainedTokenizerFast(tokenizer_object=UNKNOWN[reason]()).save_pretrained(model)
    report = export(model, tmp_path / "model.run", format="run")
    reason = reason.replace("\\", "")
    assert reason in report.notes[0]
    ended = program.run(report.path, "-p", "a")
    assert ended.code == 2
    assert reason in ended.err
    assert program.run(report.path, "--ids", "1", "-n", 1, "--tokens").code == 0
