"""Our numbers under the names that other tools read: `vllm:` names, and DCGM's two of energy."""

import socket
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, UnknownMetricFamily
from prometheus_client.registry import Collector

from server import __version__
from server.config import ServerConfig
from server.metrics import Metrics

ENGINE = "0"
LABELS = ("model_name", "engine")


def make_metrics(config: ServerConfig) -> Metrics:
    """The server's metrics with the views that `--metrics-compat` asks for."""
    metrics = Metrics(__version__)
    if "vllm" in config.metrics_compat.split(","):
        metrics.views.append(VllmNames(metrics, config.target_id))
    if "dcgm" in config.metrics_compat.split(","):
        metrics.views.append(DcgmNames(metrics))
    return metrics


def _sums(metric: Collector, *labels: str, suffix: str = "") -> dict[tuple[str, ...], float]:
    """The samples whose name ends so, summed over all but these labels."""
    sums: dict[tuple[str, ...], float] = {}
    for family in metric.collect():
        for sample in family.samples:
            if sample.name.endswith(suffix):
                key = tuple(sample.labels[label] for label in labels)
                sums[key] = sums.get(key, 0.0) + sample.value
    return sums


class VllmNames(Collector):
    """What `vllm bench serve`, aiperf and routers for vLLM look for, summed over methods."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics = metrics
        self._model = model

    def collect(self) -> Iterator[Metric]:
        metrics = self._metrics
        yield self._gauge("num_requests_running", metrics.requests_running)
        yield self._gauge("num_requests_waiting", metrics.requests_waiting)
        yield self._cache_usage()
        yield self._counter("prompt_tokens", metrics.prompt_tokens)
        yield self._counter("generation_tokens", metrics.generation_tokens)
        yield self._counter("prefix_cache_queries", metrics.admitted_prompt_tokens)
        yield self._counter("prefix_cache_hits", metrics.cached_prompt_tokens)
        yield self._drafts()
        yield self._counter("spec_decode_num_draft_tokens", metrics.draft_tokens)
        yield self._counter("spec_decode_num_accepted_tokens", metrics.accepted_tokens)
        yield self._counter(
            "spec_decode_num_accepted_tokens_per_pos", metrics.accepted_by_position, "position"
        )

    def _gauge(self, name: str, metric: Collector) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", f"As mmtad_{name.removeprefix('num_')}.", labels=LABELS)
        for (model,), value in _sums(metric, "model").items():
            family.add_metric((model, ENGINE), value)
        return family

    def _counter(self, name: str, metric: Collector, *labels: str) -> Metric:
        own_name = name.removeprefix("spec_decode_num_").replace("_per_pos", "_by_position")
        own_name = own_name.replace("_queries", "_query_tokens").replace("_hits", "_hit_tokens")
        family = CounterMetricFamily(f"vllm:{name}", f"As mmtad_{own_name}_total.", labels=(*LABELS, *labels))
        for (model, *values), value in _sums(metric, "model", *labels).items():
            family.add_metric((model, ENGINE, *values), value)
        return family

    def _cache_usage(self) -> Metric:
        """Of the target's caches; every worker is an engine."""
        text = "As mmtad_kv_cache_usage_ratio of the target."
        family = GaugeMetricFamily("vllm:kv_cache_usage_perc", text, labels=LABELS)
        for (worker, role), value in _sums(self._metrics.cache_usage, "worker", "role").items():
            if role == "target":
                family.add_metric((self._model, worker), value)
        return family

    def _drafts(self) -> Metric:
        """Every step that verified a draft is an observation of its accepted length."""
        text = "As mmtad_accepted_length_count."
        family = CounterMetricFamily("vllm:spec_decode_num_drafts", text, labels=LABELS)
        for value in _sums(self._metrics.accepted_length, suffix="_count").values():
            family.add_metric((self._model, ENGINE), value)
        return family


class DcgmNames(Collector):
    """The two series of NVIDIA's DCGM exporter from which aiperf takes energy: millijoules and watts.

    Devices are numbered in the order of their names; what is not measured is absent here, too. aiperf
    does not end where the label Hostname is missing.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        labels = ("gpu", "UUID", "device", "modelName", "Hostname")
        # DCGM's counter lacks the suffix _total, which a typed counter would be given.
        energy = UnknownMetricFamily(
            "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION", "As mmtad_energy_joules_total, in mJ.", labels=labels
        )
        power = GaugeMetricFamily(
            "DCGM_FI_DEV_POWER_USAGE", "Mean power since the last reading, in W.", labels=labels
        )
        joules = sorted(_sums(self._metrics.energy, "device", "source", suffix="_total").items())
        for number, ((device, source), value) in enumerate(joules):
            names = (str(number), device, device, source, socket.gethostname())
            energy.add_metric(names, 1000 * value)
            if device in self._metrics.watts:
                power.add_metric(names, self._metrics.watts[device])
        yield energy
        yield power
