"""[`Metrics`]: what is counted, for Prometheus, under the names of Text Embeddings Inference where it has them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


class Metrics:
    """The counters of one server, in a registry of their own.

    Counters of requests have the label `method`: `predict` or `embed`.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name, text, labels, registry=self.registry, buckets=buckets)

        self.requests = counter("te_request_count", "Requests for answers that were read.", "method")
        self.successes = counter("te_request_success", "Requests that were answered.", "method")
        self.failures = counter("te_request_failure", "Requests that were not, by status.", "method", "err")
        self.predict_count = counter("te_predict_count", "Texts to predict.")
        self.predict_success = counter("te_predict_success", "Texts that were predicted.")
        self.embed_count = counter("te_embed_count", "Texts to embed.")
        self.embed_success = counter("te_embed_success", "Texts that were embedded.")
        self.duration = histogram("te_request_duration", "Seconds of an answered request.", _SECONDS, "method")
        self.tokenization = histogram("te_request_tokenization_duration", "Seconds of its tokenization.", _SECONDS)
        self.queue_seconds = histogram("te_request_queue_duration", "Seconds that a text waited.", _SECONDS)
        self.inference = histogram("te_request_inference_duration", "Seconds of a batch.", _SECONDS)
        self.batch_size = histogram("te_batch_next_size", "Texts in a batch.", _COUNTS)
        self.batch_tokens = histogram("te_batch_next_tokens", "Tokens in a batch, without padding.", _TOKENS)
        self.batch_tasks = histogram("bitfit_batch_tasks", "Tasks in a batch.", _COUNTS)
        self._queue_size = Gauge("te_queue_size", "Texts that wait.", registry=self.registry)
        self._tasks = Gauge("bitfit_tasks", "Tasks that are served.", registry=self.registry)
        start = Gauge(
            "bitfit_start_time_seconds", "When the server was made, since the epoch.", registry=self.registry
        )
        start.set(time.time())
        self._resident = Gauge("bitfit_resident_tasks", "Those of them that are in memory.", registry=self.registry)

    def watch(self, *, queue: Callable[[], int], tasks: Callable[[], int], resident: Callable[[], int]) -> None:
        """Reads sizes when they are asked for."""
        self._queue_size.set_function(queue)
        self._tasks.set_function(tasks)
        self._resident.set_function(resident)

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        # The client adds `_total` to the names of counters, and a time of creation to each; the names of Text
        # Embeddings Inference have neither.
        lines = generate_latest(self.registry).decode().splitlines()
        kept = [line for line in lines if "_created" not in line.partition("{")[0]]
        return ("\n".join(re.sub(r"\b(te_\w+?)_total\b", r"\1", line) for line in kept) + "\n").encode()
