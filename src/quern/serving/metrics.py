"""Figures of a running server in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from quern.serving.model import ServedModel
from quern.serving.scheduler import Scheduler

CONTENT_TYPE = CONTENT_TYPE_LATEST
_COUNTERS: dict[str, tuple[str, Callable[[Scheduler], float]]] = {
    "quern_requests": ("Requests that were taken.", lambda one: one.counts.requests),
    "quern_requests_refused": ("Requests that found the queue full.", lambda one: one.counts.refused),
    "quern_prompt_tokens": (
        "Tokens of prompts and of embedded texts that were read.",
        lambda one: one.counts.prompt_tokens,
    ),
    "quern_cached_tokens": (
        "Tokens of prompts that were there from other texts.",
        lambda one: one.counts.cached_tokens,
    ),
    "quern_written_tokens": ("Tokens of answers.", lambda one: one.counts.written_tokens),
    "quern_drafted_tokens": ("Guesses of what follows.", lambda one: one.drafts.drafted),
    "quern_accepted_tokens": ("Guesses that were right.", lambda one: one.drafts.accepted),
    "quern_steps": ("Passes over the weights.", lambda one: one.counts.steps),
    "quern_preempted": ("Requests that gave way and began again.", lambda one: one.counts.preempted),
}
_GAUGES: dict[str, tuple[str, Callable[[Scheduler], float]]] = {
    "quern_running": ("Requests that are being answered.", lambda one: one.running),
    "quern_waiting": ("Requests that wait.", lambda one: one.waiting),
    "quern_kept_texts": ("Finished texts that are kept for others.", lambda one: one.kept),
}


def exposition(models: Sequence[ServedModel]) -> bytes:
    """All figures, by model."""
    registry = CollectorRegistry()
    registry.register(_Figures(models))
    return generate_latest(registry)


class _Figures(Collector):
    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._models = models

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        for kind, figures in ((CounterMetricFamily, _COUNTERS), (GaugeMetricFamily, _GAUGES)):
            for name, (help_text, value) in figures.items():
                family = kind(name, help_text, labels=["model"])
                for model in self._models:
                    family.add_metric([model.name], value(model.scheduler))
                yield family
