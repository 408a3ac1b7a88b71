"""Tokens per second with guesses and without: speculative decoding of one text, in one run that takes turns.

    python benchmarks/speculation.py [MODEL] [--draft MODEL] [--draft-tokens 8] [--prompts 6] [--tokens 192] [--rounds 3]
                                     [--temperature 0] [--text FILE ...] [--threads N]

Prompts are beginnings of held-out Python (or of ``--text``), which the model continues. Every prompt is continued without
guesses, with those of the text itself (``ngram``) and with those of ``--draft``, one after the other, in an order that
changes from round to round; the texts must be equal. What counts is a prompt's ratio to the same prompt without guesses in
the same round: the median of all, with the extremes. Passes over the weights and the share of right guesses do not depend
on the machine.

Beside that: how long a pass takes with several tokens in it, against one. Guesses pay where that grows slowly.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from measured import write_result
from section_script import BUNDLED

from quern.checkpoint.tokenizer import load_tokenizer
from quern.engines.cpu import CpuEngine, CpuModel
from quern.evaluation.heldout import held_out_text
from quern.generation.generate import continued
from quern.generation.sampling import Sampler, SamplingOptions
from quern.generation.speculation.opening import SpeculationOptions, open_speculation
from quern.loading.fitting import open_model
from quern.texts.tokens import text_ids

NONE, NGRAM, DRAFT = "none", "ngram", "draft"
PROMPT_TOKENS = 256
PASSES = (1, 2, 4, 8, 12, 16, 24, 32)
"""Tokens of a pass."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(BUNDLED))
    parser.add_argument("--draft")
    parser.add_argument("--draft-tokens", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--text", nargs="+", default=[], type=Path)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    checkpoint = open_model(options.model)
    model, tokenizer = CpuEngine().load(checkpoint.path, threads=options.threads), load_tokenizer(checkpoint.path)
    prompts = _prompts(options, tokenizer)
    asked = {NONE: SpeculationOptions(), NGRAM: SpeculationOptions(NGRAM, tokens=options.draft_tokens)}
    if options.draft is not None:
        asked[DRAFT] = SpeculationOptions(draft=options.draft, tokens=options.draft_tokens)
    draft = None if options.draft is None else CpuEngine().load(options.draft, threads=options.threads)
    runs = {name: _Contender(model, tokenizer, each, options, draft) for name, each in asked.items()}
    for run in runs.values():
        run(prompts[0][:16], 8, 0)
        run.reset()
    for number in range(options.rounds):
        for seed, prompt in enumerate(prompts):
            names = list(runs) if (number + seed) % 2 == 0 else list(reversed(runs))
            texts = {name: runs[name](prompt, options.tokens, seed) for name in names}
            if any(text != texts[NONE] for text in texts.values()):
                raise SystemExit(f"the texts after prompt {seed} differ")
    rows = [run.row(name, runs[NONE]) for name, run in runs.items()]
    passes = _passes(model, prompts[0], options.rounds)
    for row in rows:
        print(
            f"{row['name']:6} {row['ratio']:5.2f} times ({row['least']:.2f} to {row['most']:.2f})  {row['passes']} passes, "
            f"{row['written']} tokens  {row['accepted']} of {row['drafted']} guesses right"
        )
    print("a pass of n tokens takes, against one: " + ", ".join(f"{n}: {ratio:.2f}" for n, ratio in passes.items()))
    chosen = {name: getattr(options, name) for name in ("draft_tokens", "prompts", "tokens", "rounds", "temperature")}
    content = {"model": checkpoint.path.name, **chosen, "rows": rows, "passes": passes}
    print(write_result("speculation", content))


class _Contender:
    """Continues prompts in one way, and keeps count."""

    def __init__(
        self,
        model: CpuModel,
        tokenizer: Any,
        asked: SpeculationOptions,
        options: argparse.Namespace,
        draft: CpuModel | None,
    ) -> None:
        self._model, self._sampling = model, SamplingOptions(options.temperature)
        self._open: Callable[[], Any] = lambda: open_speculation(
            asked, model, tokenizer, lambda checkpoint: draft or model
        )
        self.reset()

    def reset(self) -> None:
        """Forget what was counted."""
        self.seconds: list[float] = []
        self.drafted = self.accepted = self.written = self.passes = 0

    def __call__(self, prompt: list[int], tokens: int, seed: int) -> list[int]:
        speculation, session, sampler = self._open(), self._model.start(), Sampler(self._sampling, seed)
        session.feed(prompt[:-1])
        begin = time.perf_counter()
        text = list(continued(session, prompt, tokens, sampler, frozenset(), speculation))
        self.seconds.append(time.perf_counter() - begin)
        accepted = 0 if speculation is None else speculation.counts.accepted
        self.drafted += 0 if speculation is None else speculation.counts.drafted
        self.accepted += accepted
        self.written += len(text)
        self.passes += len(text) - accepted
        return text

    def row(self, name: str, plain: _Contender) -> dict[str, Any]:
        """Its counts, and how many times as fast it was as without guesses."""
        ratios = [theirs / ours for ours, theirs in zip(self.seconds, plain.seconds, strict=True)]
        return {
            "name": name,
            "ratio": statistics.median(ratios),
            "least": min(ratios),
            "most": max(ratios),
            "written": self.written,
            "passes": self.passes,
            "drafted": self.drafted,
            "accepted": self.accepted,
        }


def _prompts(options: argparse.Namespace, tokenizer: Any) -> list[list[int]]:
    """Beginnings of texts, ``PROMPT_TOKENS`` long."""
    texts = [path.read_text("utf-8") for path in options.text] or [text for _, text in held_out_text()]
    encoded = (text_ids(tokenizer, text[: 16 * PROMPT_TOKENS]) for text in texts)
    found = [ids[:PROMPT_TOKENS] for ids in encoded if len(ids) >= PROMPT_TOKENS][: options.prompts]
    if not found:
        raise SystemExit(f"no text has {PROMPT_TOKENS} tokens")
    return found


def _passes(model: CpuModel, prompt: Sequence[int], rounds: int) -> dict[int, float]:
    """How many times as long as a pass of one token one of several takes, behind a prompt; medians of passes in turns."""
    session = model.start()
    session.feed(list(prompt))
    seconds: dict[int, list[float]] = {count: [] for count in PASSES}
    for _ in range(10 * rounds):
        for count in PASSES:
            begin = time.perf_counter()
            session.feed_drafted([prompt[0]], list(prompt[1:count]))
            seconds[count].append(time.perf_counter() - begin)
            session.rewind(len(prompt))
    single = statistics.median(seconds[1])
    return {count: statistics.median(taken) / single for count, taken in seconds.items()}


if __name__ == "__main__":
    main()
