"""/metrics for Prometheus, from the engines' own counts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from ..engine import Engine
from .service import Service

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_COUNTERS = {
    "prompt_tokens": "tokens of prompts that were read",
    "cached_tokens": "tokens of prompts whose state was known",
    "reply_tokens": "tokens of replies",
    "requests": "prompts taken",
    "failures": "prompts that ended with an error",
    "steps": "steps of all replies together",
}


class Metrics:
    """Everything that is measured."""

    def __init__(self, service: Service):
        self._service, self._registry = service, CollectorRegistry()
        self.first_token = Histogram(
            "cumulant_first_token_seconds", "from a request to its first token",
            ["model"], buckets=BUCKETS, registry=self._registry,
        )  # fmt: skip
        self._registry.register(self)

    def collect(self) -> Iterator[Any]:
        """Called by the registry."""
        for name, what in _COUNTERS.items():
            family = CounterMetricFamily(f"cumulant_{name}", what, labels=["model"])
            for served in self._service.models.values():
                family.add_metric([served.name], getattr(served.engine.counters, name))
            yield family
        for name, what, value in (
            ("waiting_requests", "requests that wait for a slot", lambda e: e.counters.waiting),
            ("slots", "replies that can be drawn at a time", lambda e: e.slots),
            ("slots_in_use", "replies that are being drawn", lambda e: e.counters.rows),
            ("snapshots", "states of prefixes in memory", lambda e: len(e.store)),
            ("snapshot_bytes", "their size", lambda e: e.store.size),
            ("snapshot_limit_bytes", "the most that they may take", lambda e: e.store.budget),
            ("snapshots_evicted", "states that made room for others", lambda e: e.store.evicted),
            ("prefix_files", "states of prefixes in files", lambda e: _files_of(e)[0]),
            ("prefix_file_bytes", "their size", lambda e: _files_of(e)[1]),
            ("snapshot_hits", "prompts that began from a state", lambda e: e.counters.hits),
            ("snapshot_misses", "prompts that did not", lambda e: e.counters.misses),
        ):
            gauge = GaugeMetricFamily(f"cumulant_{name}", what, labels=["model"])
            for served in self._service.models.values():
                gauge.add_metric([served.name], value(served.engine))
            yield gauge

    def text(self) -> bytes:
        return bytes(generate_latest(self._registry))


def _files_of(engine: Engine) -> tuple[int, int]:
    """How many files of prefixes there are, and their bytes."""
    files = engine.store.files
    return (0, 0) if files is None else (len(files), files.size)
