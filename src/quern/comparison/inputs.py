"""What is put before every contender: windows of text, choices, a prompt. The same token ids for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.tokenizer import load_tokenizer
from quern.core.errors import UserError
from quern.core.machine.parallel import thread_count
from quern.core.results import TextSource
from quern.evaluation.choice import ChoiceSet, encode_choices, read_choices, save_options
from quern.evaluation.heldout import held_out_text
from quern.evaluation.reference_cache import ReferenceKey, check_reference_room
from quern.evaluation.speed import prompt_of
from quern.evaluation.texts import cut_windows, save_windows
from quern.texts.source import Text, TextFile, each, read_text
from quern.texts.tokens import Tokenizer

HELD_OUT = "held-out text of the Python standard library"


@dataclass(frozen=True, kw_only=True)
class MeasurementSettings:
    """How much is measured."""

    tokens: int = 4096
    """Tokens of text to score."""
    window: int = 1024
    """Longest run of tokens that a model sees at once; less where its context is shorter."""
    dtype: str = "auto"
    """Dtype of the contenders' activations; ``auto``: as each one's config says."""
    threads: int | None = None
    """CPU threads; None for all cores."""
    seed: int = 0
    speed_rounds: int = 3
    """Timed rounds of each contender, after one to warm up; 0 to leave speed out."""
    prompt_tokens: int = 256
    """Prompt of a timed round; shorter where prompt and decoded tokens do not fit the context."""
    decode_tokens: int = 32

    def __post_init__(self) -> None:
        for name in ("tokens", "window", "prompt_tokens", "decode_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be 1 or more; got {getattr(self, name)}")
        if self.speed_rounds < 0:
            raise UserError(f"speed_rounds must not be below 0; got {self.speed_rounds}")
        thread_count(self.threads)
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise UserError(f"unknown dtype {self.dtype!r}; known: auto, float32, bfloat16")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Files and token ids that workers get."""

    folder: Path
    """Where the files lie, and where reference logits are cached."""
    windows: Path
    windows_sha256: str
    scored_tokens: int
    sources: tuple[TextSource, ...]
    """The texts behind the windows, for ``results.json``."""
    options: Path | None
    """None where no choices were given."""
    option_count: int
    vocabulary: int
    """Of the model: how many logits every contender must give."""
    prompt: tuple[int, ...]
    notes: tuple[str, ...]

    @property
    def taken(self) -> tuple[str, ...]:
        """What was taken of texts that are files of records."""
        return tuple(source.taken for source in self.sources if source.taken)

    def check_room(self, key: ReferenceKey) -> None:
        """Raise ``UserError`` where the reference logits under ``key`` will not fit the disk."""
        check_reference_room(self.folder, key, scored=self.scored_tokens, vocabulary_size=self.vocabulary)


def prepare_inputs(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    texts: Sequence[str | Path | Text] = (),
    choices: Sequence[str | Path | ChoiceSet] = (),
    settings: MeasurementSettings,
    tokenizer: Tokenizer | None = None,
) -> Inputs:
    """Tokenize texts and choices with the tokenizer of ``checkpoint`` and write them into ``folder``.

    ``texts`` are files, or texts in memory; without any, held-out files of the running Python. ``tokenizer``: in place
    of the checkpoint's own. Raises ``UserError`` for what cannot be scored.
    """
    tokenizer = tokenizer or load_tokenizer(checkpoint.path)
    vocabulary, context = _whole(checkpoint, "vocab_size"), _whole(checkpoint, "max_position_embeddings")
    loaded: list[Text | TextFile] = [text if isinstance(text, Text) else read_text(text) for text in each(texts)]
    windows = cut_windows(
        loaded or [_held_out()],
        tokenizer,
        vocabulary_size=vocabulary,
        tokens=settings.tokens,
        window=min(settings.window, context),
    )
    save_windows(folder / "windows.npz", windows)
    sets = [item if isinstance(item, ChoiceSet) else read_choices(item) for item in each(choices)]
    options = encode_choices(sets, tokenizer, vocabulary_size=vocabulary, context=context) if sets else []
    if options:
        save_options(folder / "options.npz", options)
    prompt_tokens = min(settings.prompt_tokens, context - settings.decode_tokens)
    if prompt_tokens < 1:
        raise UserError(
            f"{settings.decode_tokens} decoded tokens leave no room for a prompt in a context of {context} tokens. "
            "Ask for fewer decode_tokens"
        )
    shortened = prompt_tokens < settings.prompt_tokens
    return Inputs(
        folder=folder,
        windows=folder / "windows.npz",
        windows_sha256=windows.sha256(),
        scored_tokens=sum(len(window.ids) for window in windows.windows),
        sources=windows.sources,
        options=folder / "options.npz" if options else None,
        option_count=len(options),
        vocabulary=vocabulary,
        prompt=tuple(prompt_of(prompt_tokens, vocabulary, seed=settings.seed)),
        notes=(f"timed with a prompt of {prompt_tokens} tokens, what the context leaves room for",)
        if shortened
        else (),
    )


def reference_key(engine: str, model_sha256: str, inputs: Inputs, settings: MeasurementSettings) -> ReferenceKey:
    """Under which the logits of an unquantized model lie in the cache."""
    return ReferenceKey(
        model_sha256=model_sha256,
        texts_sha256=tuple(source.sha256 for source in inputs.sources),
        windows_sha256=inputs.windows_sha256,
        tokens=settings.tokens,
        window=settings.window,
        dtype="float32",
        engine=engine,
    )


def _held_out() -> Text:
    try:
        return Text.of(HELD_OUT, [text for _, text in held_out_text()])
    except FileNotFoundError as error:
        raise UserError(f"no text was given, and {error}. Give text to score") from None


def _whole(checkpoint: Checkpoint, key: str) -> int:
    value = checkpoint.config.get(key)
    if type(value) is not int or value < 1:
        raise UserError(f"{checkpoint.path}: config.json must say {key} as a number above 0; it says {value!r}")
    return value
