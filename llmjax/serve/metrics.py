"""Counters and times of the server, in Prometheus's text format, under the names that vLLM made usual.

No label has a text of a user.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 600.0)


class Metrics:
    """The metrics of one server, which do not share the process's registry."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"llmjax_{name}", about, labels, registry=registry)

        def seconds(name: str, about: str) -> Histogram:
            return Histogram(f"llmjax_{name}", about, buckets=SECONDS, registry=registry)

        self.running = Gauge("llmjax_num_requests_running", "Texts that are written or wait", registry=registry)
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self.generation_tokens = counter("generation_tokens", "Tokens that were written")
        self.cached_tokens = counter("prefix_cache_hits", "Tokens of prompts that were not computed again")
        self.finished = counter("request_success", "Texts that ended", "finished_reason")
        self.requests = counter("http_requests", "Requests", "route", "status")
        self.first_token = seconds("time_to_first_token_seconds", "From arrival to the first token")
        self.each_token = seconds("time_per_output_token_seconds", "Between tokens of a text")
        self.whole = seconds("e2e_request_latency_seconds", "From arrival to the end of an answer")

    def text(self) -> bytes:
        """The metrics in the text format."""
        return generate_latest(self._registry)
