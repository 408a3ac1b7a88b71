"""The work on one group of loaded contenders: interleaved timing, peak memory, scoring."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

from quern.comparison.artifact_size import Stored
from quern.comparison.inputs import Inputs, Settings
from quern.comparison.row_builder import Contender, Measured
from quern.comparison.worker_process import Worker, WorkerError
from quern.core.errors import QuernError
from quern.core.foreign_load import SHORTEST_S, ForeignLoad
from quern.core.metrics import NonFiniteError
from quern.core.parallel import thread_count
from quern.core.progress import Progress
from quern.core.results import FOREIGN_LIMIT, Failure
from quern.evaluation.accuracy import Accuracy, DocumentScore, summarize_scores
from quern.evaluation.speed import SpeedRound, summarize_rounds

WARM_UP_TOKENS = 4
"""Decoded in the round that is not timed."""
REPEATS = 2
"""Rounds at most that are timed again because others kept the machine busy."""


@dataclass
class Loaded:
    """A contender with its process, and what it has answered so far."""

    contender: Contender
    worker: Worker
    scored: bool = True
    """Whether its accuracy is measured too."""
    bytes_per_token: int = 0
    peak_rss_bytes: int = 0
    seconds: float = 0.0
    """That its process has worked, or was waited for."""
    rounds: list[SpeedRound] = field(default_factory=list)
    foreign: list[float] = field(default_factory=list)
    accuracy: Accuracy | None = None
    correct: list[bool] | None = None
    notes: tuple[str, ...] = ()

    def measured(self) -> Measured:
        """All of it."""
        load = median(self.foreign) if self.foreign else None
        marked = (
            (f"timed while other programs kept {load:.2f} processors busy",) if load and load > FOREIGN_LIMIT else ()
        )
        return Measured(
            bytes_per_token=self.bytes_per_token,
            speed=summarize_rounds(self.rounds) if self.rounds else None,
            peak_rss_bytes=self.peak_rss_bytes,
            accuracy=self.accuracy,
            correct=self.correct,
            foreign_load=load,
            seconds=self.seconds,
            notes=(*self.notes, *marked),
        )

    @contextmanager
    def stopwatch(self) -> Iterator[None]:
        """Adds the time of its body to ``seconds``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started


@dataclass
class Group:
    """Contenders that are in memory together. Another tool that fails leaves the group and becomes a failure."""

    members: list[Loaded]
    inputs: Inputs
    settings: Settings
    progress: Progress
    failures: list[Failure]

    @property
    def threads(self) -> int:
        """That every contender runs with."""
        return thread_count(self.settings.threads)

    def load(self, stored: Mapping[str, Stored], meanwhile: Callable[[], None]) -> None:
        """Load all, quern's own contenders at once and other tools one after another; ``meanwhile`` is done meanwhile."""
        ours = [member for member in self.members if member.contender.kind != "peer"]
        for member in ours:
            request = self._load_request(stored[member.contender.name])
            member.worker.send({**request, "engine": member.contender.engine, "dtype": self.settings.dtype})
        meanwhile()
        for member in list(self.members):
            request = self._load_request(stored[member.contender.name])
            work = member.worker.receive if member in ours else partial(member.worker.ask, request)
            if (answer := self.attempt(member, "load", work)) is not None:
                member.bytes_per_token = answer["bytes_per_token"]
                self._check_vocabulary(member, answer["vocabulary_size"])

    def _load_request(self, stored: Stored) -> dict[str, Any]:
        return {"do": "load", "path": str(stored.path), "threads": self.settings.threads}

    def _check_vocabulary(self, member: Loaded, size: int) -> None:
        def check() -> None:
            if size != self.inputs.vocabulary:
                raise WorkerError(
                    f"its logits have {size} entries; the model's vocabulary has {self.inputs.vocabulary}"
                )

        self.attempt(member, "load", check)

    def read_peaks(self) -> None:
        """Peak memory so far."""
        for member in list(self.members):
            answer = self.attempt(member, "measure", partial(member.worker.ask, {"do": "peak"}))
            if answer is not None:
                member.peak_rss_bytes = answer["peak_rss_bytes"]

    def attempt(self, member: Loaded, stage: Any, work: Callable[[], Any]) -> Any:
        """What ``work`` returns; None where another tool failed at it, which then is out. quern's own failures raise."""
        try:
            with member.stopwatch():
                return work()
        except QuernError as error:
            tool = member.contender.tool
            if tool is None:
                raise
            member.worker.kill()
            self.members.remove(member)
            self.failures.append(Failure(name=member.contender.name, tool=tool.name, stage=stage, reason=str(error)))
            return None


def alternate_rounds(group: Group) -> None:
    """``speed_rounds`` rounds of each timed contender after one to warm up, in another order every time.

    A sweep over all of them in which other programs kept processors busy is repeated, at most ``REPEATS`` times. Sweeps
    that are too short to tell share one look at what others did.
    """
    settings = group.settings
    turns = [member for member in group.members if member.contender.timed and settings.speed_rounds]
    if not turns:
        return
    task = group.progress.task("timing", len(turns) * (settings.speed_rounds + 1))
    _sweep(group, turns, min(settings.decode_tokens, WARM_UP_TOKENS), task.advance)
    sweeps: list[_Sweep] = []
    most = settings.speed_rounds + REPEATS
    while (wanted := min(settings.speed_rounds - _quiet(sweeps), most - len(sweeps))) > 0:
        load = ForeignLoad([member.worker.process_id for member in turns if member in group.members])
        rounds: list[list[_Timed]] = []
        while not rounds or (len(rounds) < wanted and load.seconds < SHORTEST_S):
            turns = [*turns[1:], *turns[:1]]
            again = len(sweeps) + len(rounds) >= settings.speed_rounds
            rounds.append(_sweep(group, turns, settings.decode_tokens, None if again else task.advance))
        foreign = load.processors()
        sweeps += [_Sweep(each, foreign) for each in rounds]
    for sweep in sorted(sweeps, key=lambda sweep: sweep.foreign)[: settings.speed_rounds]:
        for member, measured in sweep.rounds:
            member.rounds.append(measured)
            member.foreign.append(sweep.foreign)
    for member in group.members:
        if member.rounds:
            member.notes = (*member.notes, *group.inputs.notes)
    task.done()


_Timed = tuple[Loaded, SpeedRound]


@dataclass(frozen=True)
class _Sweep:
    """One timed round of every contender."""

    rounds: list[_Timed]
    foreign: float
    """Processors that others kept busy."""

    @property
    def disturbed(self) -> bool:
        return self.foreign > FOREIGN_LIMIT


def _quiet(sweeps: Sequence[_Sweep]) -> int:
    return sum(not sweep.disturbed for sweep in sweeps)


def _sweep(
    group: Group, turns: Sequence[Loaded], decode_tokens: int, advance: Callable[[], None] | None
) -> list[_Timed]:
    rounds: list[_Timed] = []
    for member in turns:
        if member not in group.members:
            continue
        request = {"do": "speed_round", "prompt": group.inputs.prompt, "decode_tokens": decode_tokens}
        answer = group.attempt(member, "measure", partial(member.worker.ask, request))
        if answer is not None:
            rounds.append((member, SpeedRound(**answer["round"])))
        if advance is not None:
            advance()
    return rounds


def score_all(group: Group, cache: dict[str, Any]) -> None:
    """As many of quern's workers at once as there are threads, each with its share of them; other tools one by one."""
    scored = [member for member in group.members if member.scored]
    ours = [member for member in scored if member.contender.kind != "peer"]
    others = [member for member in scored if member.contender.kind == "peer"]
    inputs = group.inputs
    task = group.progress.task("scoring", len(scored) * (inputs.scored_tokens + inputs.option_count))
    at_once = min(len(ours), group.threads) or 1

    def score_ours(member: Loaded) -> None:
        with member.stopwatch():
            _score(group, member, cache, group.threads // at_once, task.advance)

    with ThreadPoolExecutor(at_once) as pool:
        try:
            list(pool.map(score_ours, ours))
        except BaseException:
            for member in ours:  # or the pool would wait for their answers
                member.worker.kill()
            raise
    for member in others:
        group.attempt(member, "measure", partial(_score, group, member, cache, group.threads, task.advance))
    task.done()


def _score(group: Group, member: Loaded, cache: dict[str, Any], threads: int, advance: Callable[[int], None]) -> None:
    """Accuracy on the text and on the choices; a model whose logits overflow gets none, and a note that says so."""
    worker, inputs = member.worker, group.inputs
    try:
        request = {"do": "accuracy", "threads": threads, "windows": str(inputs.windows), **cache}
        answer = worker.ask(request, advance)
        documents = [DocumentScore(**document) for document in answer["documents"]]
        if inputs.options is not None:
            request = {"do": "choice", "threads": threads, "options": str(inputs.options)}
            member.correct = worker.ask(request, advance)["correct"]
        member.accuracy = summarize_scores(documents, seed=group.settings.seed)
    except NonFiniteError as error:
        member.correct = None
        member.notes = (*member.notes, f"accuracy not measured: {error}")
        return
    if member.contender.kind != "peer":
        member.notes = (*member.notes, *worker.ask({"do": "notes"})["notes"])
    worker.close()
