"""The counters and gauges that Prometheus reads from a server."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class Metrics:
    """The metrics of one server. The gauges are computed when Prometheus reads them."""

    def __init__(self, n_waiting: Callable[[], int], n_running: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "alignez_requests", "HTTP requests.", ["path", "status"], registry=self._registry
        )
        self.prompt_tokens = Counter(
            "alignez_prompt_tokens", "Tokens of accepted prompts.", registry=self._registry
        )
        self.generated_tokens = Counter(
            "alignez_generated_tokens", "Tokens of answers that were finished.", registry=self._registry
        )
        self.cancelled = Counter(
            "alignez_cancelled_requests",
            "Requests that ended before their answers did.",
            registry=self._registry,
        )
        self.first_token_seconds = Histogram(
            "alignez_first_token_seconds",
            "From the acceptance of a streamed request to its first text, with the time in the queue.",
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
            registry=self._registry,
        )
        Gauge("alignez_waiting_requests", "Answers in the queue.", registry=self._registry).set_function(
            n_waiting
        )
        Gauge("alignez_running_requests", "Answers being written.", registry=self._registry).set_function(
            n_running
        )

    def text(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self._registry)
