"""What a response says about itself: usage and `metrics`, summed over its choices."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from server import __version__
from server.admission import Job
from server.config import ServerConfig
from server.logprobs import LOWEST_LOG_PROB
from server.messages import GenerationStats, SpeculationStep
from server.speculation import applied, drafts

USER_CHARACTERS = 16


def system_fingerprint(config: ServerConfig) -> str:
    digest = hashlib.sha256(fingerprint_source(config).encode()).hexdigest()
    return f"mmtad-{__version__}-{digest[:8]}"


def fingerprint_source(config: ServerConfig) -> str:
    """What the hash in `system_fingerprint` stands for: all that decides what is generated."""
    relevant = {"model", "speculative_config", "dtype", "device", "max_model_len", "seed"}
    return json.dumps(config.model_dump(mode="json", include=relevant), sort_keys=True)


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


@dataclass(slots=True)
class Report:
    """Collects a request's clocks and the statistics of its ended commands; monotonic seconds."""

    job: Job
    first_token: float | None = None
    last_token: float | None = None
    stats: list[GenerationStats] = field(default_factory=list)

    def note_tokens(self, now: float) -> None:
        self.first_token = self.first_token or now
        self.last_token = now

    @property
    def prompt_tokens(self) -> int:
        return sum(len(command.prompt_ids) for command in self.job.commands)

    @property
    def completion_tokens(self) -> int:
        return sum(stats.completion_tokens for stats in self.stats)

    def usage(self) -> dict[str, Any]:
        """Once every command has ended."""
        cached_tokens = sum(stats.cached_tokens for stats in self.stats)
        return {
            **usage(self.prompt_tokens, self.completion_tokens),
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        }

    def log_fields(self) -> dict[str, Any]:
        """What the request's line in the log says: numbers and names, `user` as a hash.

        Tokens are left out while they are not all counted, as when the client has left.
        """
        request = self.job.request
        fields: dict[str, Any] = {
            "model": self.job.served_model,
            "method": self.job.decoding.method,
            "stream": bool(request.stream),
            "prompt_tokens": self.prompt_tokens,
        }
        if len(self.stats) == len(self.job.commands):
            fields["completion_tokens"] = self.completion_tokens
            fields |= {name: value for name, value in self._times().items() if value is not None}
        if request.user is not None:
            fields["user"] = hashlib.sha256(request.user.encode()).hexdigest()[:USER_CHARACTERS]
        return fields

    def metrics(self) -> dict[str, Any]:
        """The body's `metrics`: times in milliseconds, null where there is nothing to tell."""
        return {
            **self._times(),
            "speculative_decoding": self._speculation(),
            "target_logprob_mean": self._log_prob_mean(),
            "energy": self._energy(),
            "speculative": applied(self.job.decoding) | self._presets(),
            "seed": self.job.seed,
        }

    def _presets(self) -> dict[str, Any]:
        """Of a request whose shape might change: how many steps took each."""
        if not self.job.decoding.adaptive:
            return {}
        return {"presets": dict(sum((Counter(stats.presets) for stats in self.stats), Counter()))}

    def _energy(self) -> dict[str, Any] | None:
        """Joules of the whole request; null, never 0, where any of it was not measured or not seen."""
        used = [stats.energy for stats in self.stats if stats.energy is not None]
        if not used or len(used) < len(self.stats):
            return None
        limited = any(each.resolution_limited for each in used)
        prefill = _sum(each.prefill_microjoules for each in used)
        decode = _sum(each.decode_microjoules for each in used)
        total = _sum((prefill, decode))
        tokens = self.completion_tokens
        return {
            "joules": _joules(total, limited),
            "joules_per_output_token": _joules(total, limited, tokens) if tokens else None,
            "prefill_joules": _joules(prefill, limited),
            "source": used[0].source,
            "devices": sorted({device for each in used for device in each.devices}),
            "resolution_limited": limited,
        }

    def _times(self) -> dict[str, float | None]:
        first, last = self.first_token, self.last_token
        times: dict[str, float | None] = {
            "queue_time_ms": _milliseconds(min((stats.queue_seconds for stats in self.stats), default=0.0)),
            "time_to_first_token_ms": None,
            "generation_time_ms": None,
            "tokens_per_second": None,
        }
        if first is None or last is None:
            return times
        times["time_to_first_token_ms"] = _milliseconds(first - self.job.arrived)
        times["generation_time_ms"] = _milliseconds(last - first)
        # The first tokens fall on the first mark: the rest took the time between the marks.
        later_tokens = self.completion_tokens - sum(command.n for command in self.job.commands)
        if last > first and later_tokens > 0:
            times["tokens_per_second"] = round(later_tokens / (last - first), 3)
        return times

    def _log_prob_mean(self) -> float | None:
        if not self.job.decoding.uses_target or not self.completion_tokens:
            return None
        mean = sum(stats.log_prob_sum for stats in self.stats) / self.completion_tokens
        return max(mean, LOWEST_LOG_PROB)

    def _speculation(self) -> dict[str, Any] | None:
        """vLLM's object: drafted counts depth, accepted is what the rule took, before truncation."""
        detail = self.job.request.options.metrics or "summary"
        if detail == "none" or not drafts(self.job.decoding):
            return None
        steps = [step for stats in self.stats for step in stats.speculation]
        summary = summarise(steps, self.job.decoding.preset.depth)
        return summary | _per_step(steps) if detail == "detailed" else summary


def summarise(steps: list[SpeculationStep], depth: int) -> dict[str, Any]:
    drafted = sum(step.num_draft_tokens for step in steps)
    accepted = sum(step.num_accepted_tokens for step in steps)
    histogram = [0] * (max([depth, *(step.num_accepted_tokens for step in steps)]) + 1)
    for step in steps:
        histogram[step.num_accepted_tokens] += 1
    return {
        "mean_acceptance_length": 1 + accepted / len(steps) if steps else None,
        "draft_acceptance_rate": accepted / drafted if drafted else None,
        "acceptance_histogram": histogram,
        "num_spec_steps": len(steps),
        "num_accepted_draft_tokens": accepted,
        "num_draft_tokens": drafted,
        "num_spec_tokens": depth,
    }


def _per_step(steps: list[SpeculationStep]) -> dict[str, Any]:
    return {
        "accepted_tokens_per_step": [step.num_accepted_tokens for step in steps],
        "draft_tokens_per_step": [step.num_draft_tokens for step in steps],
        "num_draft_nodes": [step.num_draft_nodes for step in steps],
        "preset_per_step": [step.preset for step in steps],
    }


def _sum(values: Iterable[int | None]) -> int | None:
    """None where one of them is not known."""
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)


def _joules(microjoules: int | None, limited: bool, tokens: int = 1) -> float | None:
    """Two significant digits where the counter is too coarse for more."""
    if microjoules is None:
        return None
    joules = microjoules / 1e6 / tokens
    return float(f"{joules:.2g}" if limited else f"{joules:.6g}")


def _milliseconds(seconds: float) -> float:
    return round(1000 * seconds, 3)
