"""What Prometheus scrapes. Names and meaning are vLLM's where vLLM has them, so that its
dashboards work; what only Greenroom has begins with `greenroom:`.

Rates of requests are counted here; the state of an engine is read from its `stats()` at
the moment of a scrape.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

_FIRST_TOKEN = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5]
_FIRST_TOKEN += [10, 20, 40, 80, 160, 640, 2560]
_BETWEEN = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)

# path in stats(), metric, kind, help
_STATES = (
    ("running", "vllm:num_requests_running", "gauge", "Sequences in the engine's batch"),
    ("waiting", "vllm:num_requests_waiting", "gauge", "Sequences that wait for a place"),
    ("preemptions", "vllm:num_preemptions", "counter", "Sequences computed again"),
    ("counts.prompt_tokens", "vllm:prefix_cache_queries", "counter", "Prompt tokens looked up"),
    ("counts.reused_tokens", "vllm:prefix_cache_hits", "counter", "Prompt tokens found cached"),
    ("prefix_store.bytes", "greenroom:prefix_store_bytes", "gauge", "RAM that prefixes take"),
    ("prefix_store.blocks", "greenroom:prefix_store_blocks", "gauge", "Cache blocks kept in RAM"),
    ("prefix_store.kept_blocks", "greenroom:prefix_store_kept", "counter", "Blocks copied to RAM"),
    (
        "prefix_store.restored_blocks",
        "greenroom:prefix_store_restored",
        "counter",
        "Blocks copied back from RAM",
    ),
    ("experts.hits", "greenroom:expert_hits", "counter", "Expert uses served from VRAM"),
    ("experts.misses", "greenroom:expert_misses", "counter", "Expert uses served elsewhere"),
    ("experts.promotions", "greenroom:expert_promotions", "counter", "Experts moved up a tier"),
)
Stats = Callable[[], Mapping[str, Mapping[str, Any]]]


class _Engines:
    """A collector over the `stats()` of every loaded engine."""

    def __init__(self, stats: Stats) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        found = self._stats()
        for path, name, kind, text in _STATES:
            make = GaugeMetricFamily if kind == "gauge" else CounterMetricFamily
            family = make(name, text, labels=["model_name"])
            for model, stats in found.items():
                value = _at(stats, path)
                if value is not None:
                    family.add_metric([model], float(value))
            if family.samples:
                yield family
        usage = GaugeMetricFamily(
            "vllm:kv_cache_usage_perc", "Share of cache blocks held, 0 to 1", labels=["model_name"]
        )
        memory = GaugeMetricFamily(
            "greenroom:memory_bytes", "Bytes held, by part", labels=["model_name", "part"]
        )
        for model, stats in found.items():
            usage.add_metric([model], cache_usage(stats))
            for part, size in dict(stats.get("memory", {})).items():
                memory.add_metric([model, str(part)], float(size))
        yield usage
        yield memory


def _at(stats: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path, or None."""
    value: Any = stats
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def cache_usage(stats: Mapping[str, Any]) -> float:
    """The fullest cache pool's share of blocks in use, 0 to 1."""
    pools = stats.get("cache", ())
    return max((pool["held"] / pool["blocks"] for pool in pools if pool["blocks"]), default=0.0)


class Metrics:
    """Counters and histograms of one application.

    Args:
        stats: gives each loaded engine's stats by model name.
    """

    def __init__(self, stats: Stats) -> None:
        self.registry = CollectorRegistry()
        labels = ["model_name"]
        with_reason = ["model_name", "finished_reason"]
        registry = self.registry
        histogram = self._histogram
        self.first_token = histogram("time_to_first_token_seconds", _FIRST_TOKEN)
        self.between = histogram("inter_token_latency_seconds", _BETWEEN)
        self.whole = histogram("e2e_request_latency_seconds", _WHOLE)
        self.prompt_tokens = Counter(
            "vllm:prompt_tokens", "Prompt tokens", labels, registry=registry
        )
        self.generated = Counter(
            "vllm:generation_tokens", "Generated tokens", labels, registry=registry
        )
        self.finished = Counter(
            "vllm:request_success", "Finished answers", with_reason, registry=registry
        )
        self.rejected = Counter(
            "greenroom:requests_rejected", "Requests refused, by status", ["status"],
            registry=registry,
        )  # fmt: skip
        registry.register(_Engines(stats))

    def _histogram(self, name: str, buckets: Iterable[float]) -> Histogram:
        text = name.replace("_", " ")
        return Histogram(
            f"vllm:{name}", text, ["model_name"], buckets=tuple(buckets), registry=self.registry
        )

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)
