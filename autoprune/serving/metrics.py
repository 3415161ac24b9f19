"""What `/metrics` tells, in the form that Prometheus reads."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from ..trace import Sample
from .job import Finished, Job

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 384, 576, 1024, 2048, 4096)


class Metrics:
    """Counters of one server."""

    def __init__(
        self,
        waiting: Callable[[], float],
        running: Callable[[], float],
        replicas: Callable[[], float],
    ) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"autoprune_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"autoprune_{name}", text, registry=self.registry, buckets=buckets)

        self.requests = counter("requests", "Requests answered, by HTTP status.", ("status",))
        self.cancelled = counter("cancelled", "Requests whose client left before the answer's end.")
        self.methods = counter("answers", "Finished answers, by pruning method.", ("method",))
        self.generated = counter("generated_tokens", "Tokens of answers.")
        self.prompt = counter("prompt_tokens", "Tokens of prompts, visual ones included.")
        self.cached = counter("cached_tokens", "Of them, those in the cache of an earlier answer.")
        self.visual = counter("visual_tokens", "Visual tokens of prompts.")
        self.spent = counter(
            "layer_tokens_spent", "Visual tokens that entered decoder layers, summed over layers."
        )
        self.saved = counter(
            "layer_tokens_saved", "Visual tokens that pruning kept out of decoder layers, likewise."
        )
        self.flops = counter("prefill_flops_spent", "FLOPs of the decoder's prefills.")
        self.flops_saved = counter("prefill_flops_saved", "FLOPs that pruning saved of them.")
        self.kv_saved = counter("kv_bytes_saved", "Bytes of KV cache that pruning saved.")
        self.budgets = histogram(
            "visual_tokens_per_layer",
            "Budgets spent: mean visual tokens entering a layer.",
            _TOKENS,
        )
        self.batches = histogram("batch_size", "Requests in a batch.", (1, 2, 4, 8, 16, 32, 64))
        self.queued = histogram("queue_seconds", "From arrival to the model.", _SECONDS)
        self.first = histogram("time_to_first_token_seconds", "From arrival.", _SECONDS)
        self.whole = histogram("request_seconds", "From arrival to the answer's end.", _SECONDS)
        for name, text, read in (
            ("queue_length", "Requests that wait for the model.", waiting),
            ("running", "Requests in the batch that runs now.", running),
            ("replicas", "Models in processes of their own; 0: it is in this one.", replicas),
        ):
            gauge = Gauge(f"autoprune_{name}", text, registry=self.registry)
            gauge.set_function(read)

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self.registry)

    def finished(self, job: Job, finished: Finished) -> None:
        """Count an answer."""
        now = time.monotonic()
        self.methods.labels(job.method_name).inc()
        self.generated.inc(finished.tokens)
        self.prompt.inc(job.prompt.length)
        self.cached.inc(job.cached_tokens)
        if not job.cached_tokens:
            self._pruned(finished.sample)
        self.queued.observe((job.started or now) - job.arrived)
        self.first.observe((job.first_token or now) - job.arrived)
        self.whole.observe(now - job.arrived)

    def _pruned(self, sample: Sample) -> None:
        """Count what a prefill spent and saved."""
        self.visual.inc(sample.num_visual)
        spent = sum(sample.tokens_per_layer)
        self.spent.inc(spent)
        self.saved.inc(max(0, sample.num_visual * len(sample.tokens_per_layer) - spent))
        self.flops.inc(sample.total_flops)
        self.flops_saved.inc(max(0.0, sample.flops_full - sample.total_flops))
        self.kv_saved.inc(max(0, sample.kv_bytes_full - sample.kv_bytes))
        if sample.num_visual:
            self.budgets.observe(sample.mean_tokens)
