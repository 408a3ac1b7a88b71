"""The text that the bundled model learns from: collecting it, tokenizing it, serving it step by step.

Called by ``train_bundled_model.py``.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import sysconfig
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parents[1]
try:
    from quern.evaluation import heldout
except ModuleNotFoundError:
    sys.path.insert(0, str(ROOT / "src"))
    from quern.evaluation import heldout

__all__ = ["END", "ROOT", "TOKENS_PER_STEP", "VOCABULARY", "Stream", "heldout", "prepare"]

END = "<|endoftext|>"
# This split, to the letter, and the NFC normalizer below are what loaders assume of every Qwen2 tokenizer.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
VOCABULARY = 4096
TOKENS_PER_STEP = 4096
LIBRARY_REPEATS = 3  # how often an epoch reads the library for each time it reads the test suite
MAX_SHARED_LINES = 20  # a file with this many long lines in common with held-out text is left out


def training_documents() -> tuple[list[str], list[str]]:
    """Return the training text as (library documents, test-suite documents), in a fixed order."""
    held = heldout.held_out_text()
    held_texts = {text for _, text in held}
    held_lines = {line.strip() for _, text in held for line in text.splitlines() if len(line.strip()) >= 30}
    held_tests = {f"test_{Path(name).stem}" for name in heldout.HELD_OUT_MODULES}
    root = Path(sysconfig.get_path("stdlib"))
    library: list[str] = []
    tests: list[str] = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        names = {Path(part).stem for part in parts}
        if "site-packages" in parts or "/".join(parts) in heldout.HELD_OUT_MODULES or names & held_tests:
            continue
        if parts == ("pydoc_data", "topics.py") or parts[-1].startswith("_sysconfigdata"):
            continue  # topics come below, one by one; build variables differ on every machine
        if parts[0] == "encodings" and parts[-1].startswith(("cp", "mac_", "iso8859", "koi8")):
            continue  # tables of characters, a megabyte of them
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        shared = {line.strip() for line in text.splitlines()} & held_lines
        if not text.strip() or text in held_texts or len(shared) >= MAX_SHARED_LINES:
            continue
        is_test = bool({"test", "tests", "idle_test"} & set(parts))
        (tests if is_test else library).append(text)
    # Some help topics repeat others whole, so held-out paragraphs are cut from the training topics too.
    seen = {" ".join(part.split()) for name, text in held if ":" in name for part in text.split("\n\n")}
    for name, text in heldout.help_topics().items():
        if not heldout.topic_is_held_out(name):
            parts_kept = [part for part in text.split("\n\n") if " ".join(part.split()) not in seen]
            library.append("\n\n".join(parts_kept))
    return list(dict.fromkeys(library)), list(dict.fromkeys(tests))


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """Train the byte-level BPE tokenizer; digits stand alone, and any NFC text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


class Stream:
    """The training tokens: in each epoch shuffled documents, cut into windows that are shuffled again."""

    def __init__(self, library: list[np.ndarray], tests: list[np.ndarray], seed: int) -> None:
        self.documents = library * LIBRARY_REPEATS + tests
        self.epoch_tokens = sum(map(len, self.documents))
        self.seed = seed
        self._current: tuple[tuple[int, int], np.ndarray, np.ndarray] | None = None

    def _window(self, number: int, length: int) -> np.ndarray:
        epoch, offset = divmod(number, (self.epoch_tokens - 1) // length)
        if self._current is None or self._current[0] != (epoch, length):
            generator = np.random.default_rng([self.seed, epoch, length])
            order = generator.permutation(len(self.documents))
            tokens = np.concatenate([self.documents[i] for i in order])
            windows = generator.permutation((self.epoch_tokens - 1) // length)
            self._current = (epoch, length), tokens, windows
        _, tokens, windows = self._current
        start = windows[offset] * length
        return tokens[start : start + length + 1]

    def read(self, step: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the inputs and the targets of one step, in rows of ``length`` tokens."""
        rows = TOKENS_PER_STEP // length
        batch = np.stack([self._window(step * rows + row, length) for row in range(rows)])
        tokens = torch.from_numpy(batch.astype(np.int64))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def prepare(work: Path, seed: int) -> tuple[Stream, str]:
    """Collect and tokenize the text (once per text, kept in ``work``); return it and its fingerprint."""
    library, tests = training_documents()
    digest = hashlib.sha256(json.dumps([SPLIT, VOCABULARY, library, tests]).encode()).hexdigest()
    kept, vocabulary = work / f"tokens-{digest[:16]}.npz", work / "tokenizer.json"
    if not (kept.exists() and vocabulary.exists()):
        tokenizer = train_tokenizer(library)
        tokenizer.save(str(vocabulary))
        end = tokenizer.token_to_id(END)
        encoded = tokenizer.encode_batch(library + tests)
        arrays = [np.array([end, *encoding.ids], dtype=np.uint16) for encoding in encoded]
        partial = work / "tokens.part.npz"
        np.savez(partial, flat=np.concatenate(arrays), lengths=np.array([len(array) for array in arrays]))
        os.replace(partial, kept)
    with np.load(kept) as stored:
        arrays = np.split(stored["flat"], np.cumsum(stored["lengths"])[:-1])
    size = sum(len(text.encode()) for text in library + tests)
    print(f"text: {len(library)} library and {len(tests)} test documents, {size / 1e6:.1f} MB", flush=True)
    return Stream(arrays[: len(library)], arrays[len(library) :], seed), digest
