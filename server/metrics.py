"""Every metric of the server: names, labels, buckets. Only `server.pool` and the HTTP edge record.

Labels come from closed sets: the served ids, the methods, finish reasons, error codes, route
templates. Ratios are for recording rules, for example

    acceptance rate   rate(mmtad_accepted_tokens_total[5m]) / rate(mmtad_draft_tokens_total[5m])
    block efficiency  rate(mmtad_generation_tokens_total[5m]) / rate(mmtad_decode_steps_total[5m])
    tokens per second rate(mmtad_generation_tokens_total[1m])
    prefix cache hits rate(mmtad_prefix_cache_hit_tokens_total[5m])
                      / rate(mmtad_prefix_cache_query_tokens_total[5m])
"""

import collections
import itertools
from collections.abc import Iterable

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from server.messages import EnergyEvent, GenerationStats, ReadyEvent, StepStatsEvent

NAMESPACE = "mmtad"
CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST

# OpenTelemetry's bounds for time to first token and time per output token, in seconds.
FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
)  # fmt: skip
PER_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
REQUEST_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0)
SEQUENCE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
NODE_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
# A small model's token on a CPU up to a long answer of a large one on several GPUs, in joules.
ENERGY_BUCKETS = tuple(factor * 10.0**power for power in range(-3, 5) for factor in (1, 3))
LENGTH_BUCKETS = tuple(range(17))
MAX_PRESETS = 64  # with names of their own; clients choose depth and width
OTHER = "other"
LOWEST_LOG_PROB = -9999.0  # what -inf is written as, so that no sum is lost to it
LOG_PROB_BUCKETS = (-10.0, -5.0, -3.0, -2.0, -1.5, -1.0, -0.75, -0.5, -0.25, -0.1, 0.0)


def token_buckets(max_model_len: int = 4096) -> tuple[int, ...]:
    """1, 2, 5, 10, ... up to the context."""
    steps = (factor * 10**power for power in itertools.count() for factor in (1, 2, 5))
    return (*itertools.takewhile(lambda bound: bound < max_model_len, steps), max_model_len)


class Metrics:
    """The registry of one server; nothing here is shared between servers in one process."""

    def __init__(self, version: str) -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.views: list[Collector] = []  # the same numbers under other names, after our own
        self.watts: dict[str, float] = {}  # by device, over its last reading
        self._presets: set[str] = set()
        self._define_requests()
        self._define_latencies()
        self._define_decoding()
        self._define_energy()
        self._define_workers()
        Info("build", "Version of the server.", namespace=NAMESPACE, registry=self.registry).info(
            {"version": version}
        )

    def exposition(self) -> bytes:
        return b"".join(generate_latest(each) for each in (self.registry, *self.views))

    def _gauge(self, name: str, text: str, labels: Iterable[str]) -> Gauge:
        return Gauge(name, text, labels, namespace=NAMESPACE, registry=self.registry)

    def _counter(self, name: str, text: str, labels: Iterable[str]) -> Counter:
        return Counter(name, text, labels, namespace=NAMESPACE, registry=self.registry)

    def _histogram(
        self, name: str, text: str, buckets: Iterable[float], labels: Iterable[str] = ("method",)
    ) -> Histogram:
        return Histogram(
            name, text, labels, namespace=NAMESPACE, registry=self.registry, buckets=tuple(buckets)
        )

    def _define_requests(self) -> None:
        by_method = ("model", "method")
        self.requests_running = self._gauge("requests_running", "Sequences that hold a row.", ("model",))
        self.requests_waiting = self._gauge("requests_waiting", "Sequences that wait for a row.", ("model",))
        self.reserved_tokens = self._gauge(
            "reserved_tokens", "Prompt tokens and max_tokens of accepted requests.", ("model",)
        )
        self.requests = self._counter(
            "requests", "Prompts that ended, by how.", (*by_method, "finish_reason")
        )
        self.rejected = self._counter(
            "requests_rejected", "Requests refused without a token, by error code.", ("reason",)
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of ended requests.", by_method)
        self.generation_tokens = self._counter(
            "generation_tokens", "Delivered tokens of ended requests.", by_method
        )
        self.request_prompt_tokens = self._histogram(
            "request_prompt_tokens", "Prompt tokens per prompt.", token_buckets()
        )
        self.request_generation_tokens = self._histogram(
            "request_generation_tokens", "Delivered tokens per prompt.", token_buckets()
        )
        self.http_requests = self._counter(
            "http_requests", "HTTP requests by route template and status.", ("route", "status")
        )
        self.loop_lag_seconds = self._histogram(
            "event_loop_lag_seconds", "How late the API process's event loop ran a timer.", LAG_BUCKETS, ()
        )

    def _define_latencies(self) -> None:
        self.first_token_seconds = self._histogram(
            "time_to_first_token_seconds", "First token minus arrival.", FIRST_TOKEN_BUCKETS
        )
        self.per_token_seconds = self._histogram(
            "time_per_output_token_seconds",
            "(End minus first token) / (output tokens - 1), per choice.",
            PER_TOKEN_BUCKETS,
        )
        self.inter_token_seconds = self._histogram(
            "inter_token_latency_seconds",
            "Gap between events of one choice; an event may carry several tokens.",
            PER_TOKEN_BUCKETS,
        )
        self.request_seconds = self._histogram(
            "request_duration_seconds", "End minus arrival.", REQUEST_BUCKETS
        )
        self.queue_seconds = self._histogram(
            "request_queue_seconds", "Time until the request got a row.", FIRST_TOKEN_BUCKETS
        )

    def _define_decoding(self) -> None:
        by_method = ("model", "method")
        self.decode_steps = self._counter(
            "decode_steps", "Steps that delivered tokens of a sequence.", by_method
        )
        self.draft_tokens = self._counter("draft_tokens", "Depth proposed, summed over steps.", by_method)
        self.accepted_tokens = self._counter("accepted_tokens", "Drafted tokens accepted.", by_method)
        self.accepted_by_position = self._counter(
            "accepted_tokens_by_position", "Steps that accepted beyond this depth.", (*by_method, "position")
        )
        self.accepted_length = self._histogram(
            "accepted_length", "Tokens accepted per draft-and-verify step.", LENGTH_BUCKETS
        )
        self.step_sequences = self._histogram(
            "step_sequences", "Sequences decoded together in a step.", SEQUENCE_BUCKETS
        )
        self.step_tree_nodes = self._histogram(
            "step_tree_nodes", "Nodes per sequence of a step's tree.", NODE_BUCKETS
        )
        self.preset_steps = self._counter(
            "preset_steps", "Engine steps by method, depth and width of the decoded group.", ("preset",)
        )
        by_pass = (*by_method, "role", "phase")
        self.forward_seconds = self._counter("forward_seconds", "Device seconds of model passes.", by_pass)
        self.forward_passes = self._counter("forward_passes", "Model passes.", by_pass)
        self.cached_prompt_tokens = self._counter(
            "prefix_cache_hit_tokens", "Prompt tokens that a cache held when they were admitted.", ("model",)
        )
        self.admitted_prompt_tokens = self._counter(
            "prefix_cache_query_tokens", "Prompt tokens that were looked for in the caches.", ("model",)
        )
        self.log_prob_per_token = self._histogram(
            "target_logprob_per_token",
            "Mean target log-probability of a prompt's delivered tokens, in nats.",
            LOG_PROB_BUCKETS,
        )
        self.cache_usage = self._gauge(
            "kv_cache_usage_ratio", "Committed share of the cache.", ("worker", "role")
        )

    def _define_energy(self) -> None:
        """A series appears with its first joule: what is not measured is absent, never zero."""
        self.energy_available = self._gauge(
            "energy_available", "1 while the worker's energy counters can be read.", ("worker",)
        )
        self.energy = self._counter(
            "energy_joules", "Energy that the counters of a device showed.", ("device", "source")
        )
        self.idle_energy = self._counter(
            "idle_energy_joules", "The part of it in which no request was worked for.", ("device",)
        )
        self.request_energy = self._counter(
            "request_energy_joules", "The rest, by the requests it went to.", ("model", "method", "phase")
        )
        self.energy_per_request = self._histogram(
            "energy_per_request_joules", "Energy of one prompt with all its choices.", ENERGY_BUCKETS
        )
        self.energy_per_token = self._histogram(
            "energy_per_token_joules", "Energy of one prompt over its delivered tokens.", ENERGY_BUCKETS
        )

    def _define_workers(self) -> None:
        self.worker_up = self._gauge("worker_up", "1 when the worker is ready.", ("worker",))
        self.worker_restarts = self._counter("worker_restarts", "Workers lost and replaced.", ("worker",))
        self.out_of_memory = self._counter(
            "out_of_memory", "Engine steps for which the device had no memory left.", ("worker",)
        )
        self.draft_enabled = self._gauge("draft_enabled", "1 while the worker uses its draft.", ("worker",))
        self.load_seconds = self._gauge(
            "model_load_seconds", "Seconds the model's weights took to load.", ("worker", "role")
        )

    def record_ready(self, event: ReadyEvent, worker: str) -> None:
        self.worker_up.labels(worker).set(1)
        self.energy_available.labels(worker).set(event.energy_source is not None)
        for role, seconds in event.role_load_seconds.items():
            self.load_seconds.labels(worker, role).set(seconds)

    def record_step(self, event: StepStatsEvent, worker: str, model: str) -> None:
        """`model` is the target's id: a step may serve several names of one pair."""
        self.draft_enabled.labels(worker).set(event.draft_enabled)
        for role, share in event.cache_usage.items():
            self.cache_usage.labels(worker, role).set(share)
        for forward in event.forward:
            labels = (model, forward.method, forward.role, forward.phase)
            self.forward_seconds.labels(*labels).inc(forward.seconds)
            self.forward_passes.labels(*labels).inc(forward.num_passes)
        self.cached_prompt_tokens.labels(model).inc(event.cached_prompt_tokens)
        self.out_of_memory.labels(worker).inc(event.out_of_memory)
        self.admitted_prompt_tokens.labels(model).inc(event.prompt_tokens)
        if event.method is not None:
            self.step_sequences.labels(event.method).observe(event.num_sequences)
            if event.num_tree_nodes:
                self.step_tree_nodes.labels(event.method).observe(event.num_tree_nodes)
        if event.preset is not None:
            self.preset_steps.labels(self._preset_label(event.preset)).inc()

    def _preset_label(self, preset: str) -> str:
        if len(self._presets) < MAX_PRESETS:
            self._presets.add(preset)
        return preset if preset in self._presets else OTHER

    def record_energy(self, event: EnergyEvent, worker: str, model: str) -> None:
        """`model` is the target's id, as of steps."""
        self.energy_available.labels(worker).set(event.available)
        for device, used in event.raw.items():
            self.energy.labels(device, event.source).inc(used / 1e6)
            if event.seconds > 0:
                self.watts[device] = used / 1e6 / event.seconds
        for device, used in event.idle.items():
            self.idle_energy.labels(device).inc(used / 1e6)
        for method, phase, used in event.attributed:
            self.request_energy.labels(model, method, phase).inc(used / 1e6)

    def record_end(self, stats: GenerationStats, reason: str, model: str, method: str) -> None:
        """One prompt ended; `reason` is the most notable of its choices' finish reasons."""
        self.requests.labels(model, method, reason).inc()
        self.prompt_tokens.labels(model, method).inc(stats.prompt_tokens)
        self.generation_tokens.labels(model, method).inc(stats.completion_tokens)
        self.request_prompt_tokens.labels(method).observe(stats.prompt_tokens)
        self.request_generation_tokens.labels(method).observe(stats.completion_tokens)
        self.queue_seconds.labels(method).observe(stats.queue_seconds)
        self.decode_steps.labels(model, method).inc(stats.num_steps)
        self._record_speculation(stats, model, method)
        energy = stats.energy
        if energy and energy.prefill_microjoules is not None and energy.decode_microjoules is not None:
            joules = (energy.prefill_microjoules + energy.decode_microjoules) / 1e6
            self.energy_per_request.labels(method).observe(joules)
            if stats.completion_tokens:
                self.energy_per_token.labels(method).observe(joules / stats.completion_tokens)
        if stats.completion_tokens and method != "draft":
            self.log_prob_per_token.labels(method).observe(
                max(stats.log_prob_sum / stats.completion_tokens, LOWEST_LOG_PROB)
            )

    def _record_speculation(self, stats: GenerationStats, model: str, method: str) -> None:
        """A long answer has hundreds of steps, and many may end at once: labels are looked up once."""
        steps = stats.speculation
        self.draft_tokens.labels(model, method).inc(sum(step.num_draft_tokens for step in steps))
        self.accepted_tokens.labels(model, method).inc(sum(step.num_accepted_tokens for step in steps))
        lengths = self.accepted_length.labels(method)
        by_position: collections.Counter[int] = collections.Counter()
        for step in steps:
            lengths.observe(step.num_accepted_tokens)
            by_position.update(range(step.num_accepted_tokens))
        for position, count in by_position.items():
            self.accepted_by_position.labels(model, method, str(position)).inc(count)
