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

from quern.comparison.artifact_size import ArtifactSize
from quern.comparison.inputs import Inputs, MeasurementSettings
from quern.comparison.row_builder import Contender, Measured
from quern.comparison.worker_process import Worker, WorkerError
from quern.core.errors import QuernError
from quern.core.machine.foreign_load import SHORTEST_S, ForeignLoad
from quern.core.machine.parallel import thread_count
from quern.core.metrics import NonFiniteError
from quern.core.progress import Progress
from quern.core.results import FOREIGN_LIMIT, Failure, Figure
from quern.evaluation.measures.base import Measure, Stage, passes, summarized

Raws = dict[str, Any]
"""What a process answered, by the name of the measure that stands for the run."""

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
    """Whether it is measured on the text and the choices too."""
    bytes_per_token: int = 0
    seconds: float = 0.0
    """That its process has worked, or was waited for."""
    rounds: list[Raws] = field(default_factory=list)
    """What it answered in each timed round that counts."""
    foreign: list[float] = field(default_factory=list)
    """Processors that others kept busy in each of these rounds."""
    figures: dict[str, Figure] = field(default_factory=dict)
    correct: list[bool] | None = None
    """Whether it answered each multiple-choice item correctly."""
    notes: tuple[str, ...] = ()

    def measured(self) -> Measured:
        """What is known of the contender, to be kept and made a row of."""
        load = median(self.foreign) if self.foreign else None
        marked = (
            (f"timed while other programs kept {load:.2f} processors busy",) if load and load > FOREIGN_LIMIT else ()
        )
        return Measured(
            bytes_per_token=self.bytes_per_token,
            figures=self.figures,
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
    settings: MeasurementSettings
    progress: Progress
    failures: list[Failure]

    @property
    def threads(self) -> int:
        """That every contender runs with."""
        return thread_count(self.settings.threads)

    def load(self, stored: Mapping[str, ArtifactSize], meanwhile: Callable[[], None]) -> None:
        """Load all, quern's own contenders at once and other tools one after another; ``meanwhile`` is called in between."""
        ours = [member for member in self.members if member.contender.kind != "peer"]
        for member in ours:
            request = self._load_request(stored[member.contender.name])
            contender = member.contender
            chosen = {} if contender.cache is None else {"cache": contender.cache}
            member.worker.send({**request, "engine": contender.engine, "dtype": self.settings.dtype, **chosen})
        meanwhile()
        for member in list(self.members):
            request = self._load_request(stored[member.contender.name])
            work = member.worker.receive if member in ours else partial(member.worker.ask, request)
            if (answer := self.attempt(member, "load", work)) is not None:
                member.bytes_per_token = answer["bytes_per_token"]
                self._check_vocabulary(member, answer["vocabulary_size"])

    def _load_request(self, stored: ArtifactSize) -> dict[str, Any]:
        return {"do": "load", "path": str(stored.path), "threads": self.settings.threads}

    def _check_vocabulary(self, member: Loaded, size: int) -> None:
        def check() -> None:
            if size != self.inputs.vocabulary:
                raise WorkerError(
                    f"its logits have {size} entries; the model's vocabulary has {self.inputs.vocabulary}"
                )

        self.attempt(member, "load", check)

    def read_memory(self) -> None:
        """The measures of memory, each one's own process alone."""
        for member in list(self.members):
            found = self.attempt(member, "measure", partial(self.figures_of, member, "memory", {}))
            member.figures.update(found or {})

    def figures_of(
        self,
        member: Loaded,
        stage: Stage,
        given: Mapping[str, Any],
        advance: Callable[[int], None] = lambda steps: None,
    ) -> dict[str, Figure]:
        """Ask the member's process for every run of ``stage``; what the measures make of the answers, by name."""
        found: dict[str, Figure] = {}
        for together in passes(stage):
            raw = ask_run(member, together, given, advance)
            found |= summarized(together, raw, self.settings.seed)
            if any(each.name == "choice" for each in together):
                member.correct = raw
        return found

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


def ask_run(
    member: Loaded,
    together: Sequence[Measure],
    given: Mapping[str, Any],
    advance: Callable[[int], None] = lambda steps: None,
) -> Any:
    """What the run that the measures ``together`` share returns in the member's process."""
    return member.worker.ask({"do": "measure", "name": together[0].name, **given}, advance)["raw"]


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
            member.figures.update(_over_rounds(member.rounds, settings.seed))
            member.notes = (*member.notes, *group.inputs.notes)
    task.done()


def _over_rounds(rounds: Sequence[Raws], seed: int) -> dict[str, Figure]:
    found: dict[str, Figure] = {}
    for together in passes("rounds"):
        found |= summarized(together, [raws[together[0].name] for raws in rounds], seed)
    return found


_Timed = tuple[Loaded, Raws]


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
        raws = group.attempt(member, "measure", partial(_time, group, member, decode_tokens))
        if raws is not None:
            rounds.append((member, raws))
        if advance is not None:
            advance()
    return rounds


def _time(group: Group, member: Loaded, decode_tokens: int) -> Raws:
    given = {"prompt": group.inputs.prompt, "decode_tokens": decode_tokens}
    return {together[0].name: ask_run(member, together, given) for together in passes("rounds")}


def score_all(group: Group, cache: dict[str, Any]) -> None:
    """As many of quern's workers at once as there are threads, each with its share of them; other tools one by one."""
    scored = [member for member in group.members if member.scored]
    ours = [member for member in scored if member.contender.kind != "peer"]
    others = [member for member in scored if member.contender.kind == "peer"]
    inputs = group.inputs
    steps = len(passes("text")) * inputs.scored_tokens + len(passes("choices")) * inputs.option_count
    task = group.progress.task("scoring", len(scored) * steps)
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
    """Measure on the text and on the choices; a model whose logits overflow gets no figure, and a note that says so."""
    worker, inputs = member.worker, group.inputs
    try:
        text = {"threads": threads, "windows_file": str(inputs.windows), **cache}
        found = group.figures_of(member, "text", text, advance)
        if inputs.options is not None:
            choices = {"threads": threads, "options_file": str(inputs.options)}
            found |= group.figures_of(member, "choices", choices, advance)
        member.figures.update(found)
    except NonFiniteError as error:
        member.correct = None
        member.notes = (*member.notes, f"accuracy not measured: {error}")
        return
    if member.contender.kind != "peer":
        member.notes = (*member.notes, *worker.ask({"do": "notes"})["notes"])
    worker.close()
