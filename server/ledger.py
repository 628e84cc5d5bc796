"""What a worker remembers of each running command, so that its statistics are right at any end."""

import itertools
from collections import Counter
from dataclasses import dataclass, field

from decoding import FinishReason, Sequence, SequenceOutput
from server.messages import (
    EnergyUsage,
    FinishedEvent,
    GenerateCommand,
    GenerationStats,
    SpeculationStep,
    StepEvent,
    TokenScore,
)


@dataclass(slots=True)
class Choice:
    """One sequence: a log of its steps, from which any earlier end can still be counted."""

    sequence_id: str
    index: int
    step_sizes: list[int] = field(default_factory=list)
    speculation: list[SpeculationStep] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    num_reused: int | None = None
    decoded: FinishReason | None = None
    finished: FinishReason | None = None

    def record(self, output: SequenceOutput) -> None:
        self.log_probs.extend(output.log_probs)
        self.decoded = output.finish_reason
        self.num_reused = output.num_reused
        if output.token_ids:
            self.step_sizes.append(len(output.token_ids))
            self.speculation.append(
                SpeculationStep(
                    num_draft_tokens=output.num_draft_tokens,
                    num_accepted_tokens=output.num_accepted_tokens,
                    num_draft_nodes=output.num_draft_nodes,
                    preset=output.preset or "",
                )
            )

    def end(self, reason: FinishReason, num_tokens: int | None = None) -> None:
        """End after `num_tokens` tokens: steps that began behind it never happened."""
        self.finished = reason
        if num_tokens is None or num_tokens >= len(self.log_probs):
            return
        del self.log_probs[num_tokens:]
        starts = [0, *itertools.accumulate(self.step_sizes)]
        kept = sum(start < num_tokens for start in starts[:-1])
        del self.step_sizes[kept:], self.speculation[kept:]


@dataclass(slots=True)
class Ticket:
    """A command on its way: its choices and the times that its statistics need (monotonic seconds)."""

    command: GenerateCommand
    received: float
    started: float | None = None
    choices: list[Choice] = field(default_factory=list)

    @classmethod
    def open(cls, command: GenerateCommand, now: float) -> "Ticket":
        choices = [
            Choice(f"{command.id}/{index}", command.choice_offset + index) for index in range(command.n)
        ]
        return cls(command, received=now, choices=choices)

    def sequences(self) -> list[Sequence]:
        command = self.command
        return [
            Sequence(
                id=choice.sequence_id,
                prompt_ids=list(command.prompt_ids),
                params=command.params,
                config=command.config,
                choice=choice.index,
                cache_salt=command.cache_salt,
            )
            for choice in self.choices
        ]

    def choice(self, index: int) -> Choice | None:
        position = index - self.command.choice_offset
        return self.choices[position] if 0 <= position < len(self.choices) else None

    def step_event(self, choice: Choice, output: SequenceOutput) -> StepEvent:
        tops, scores = output.top_log_probs, output.prompt_log_probs
        return StepEvent(
            id=self.command.id,
            choice=choice.index,
            token_ids=list(output.token_ids),
            log_probs=list(output.log_probs),
            draft_positions=list(range(self._num_from_draft(output))),
            finish_reason=output.finish_reason,
            stop_token_id=output.stop_token_id,
            top_log_probs=None if tops is None else [list(top) for top in tops],
            prompt_log_probs=None
            if scores is None
            else [TokenScore(s.log_prob, list(s.top)) for s in scores],
        )

    def _num_from_draft(self, output: SequenceOutput) -> int:
        """A step's tokens begin with those that the draft proposed and the target accepted."""
        config, num_tokens = self.command.config, len(output.token_ids)
        if not config.uses_draft:
            return 0
        return min(output.num_accepted_tokens, num_tokens) if config.uses_target else num_tokens

    @property
    def is_finished(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.finished is not None for choice in self.choices)

    def finished_event(self, now: float, energy: EnergyUsage | None) -> FinishedEvent:
        """The command's end, once it `is_finished`."""
        reasons = [choice.finished for choice in self.choices if choice.finished is not None]
        assert len(reasons) == len(self.choices)
        return FinishedEvent(id=self.command.id, finish_reasons=reasons, stats=self._stats(now, energy))

    def _stats(self, now: float, energy: EnergyUsage | None) -> GenerationStats:
        started = now if self.started is None else self.started
        return GenerationStats(
            prompt_tokens=len(self.command.prompt_ids),
            completion_tokens=sum(len(choice.log_probs) for choice in self.choices),
            num_steps=sum(len(choice.step_sizes) for choice in self.choices),
            log_prob_sum=sum(sum(choice.log_probs) for choice in self.choices),
            queue_seconds=started - self.received,
            speculation=self._speculation(),
            presets=Counter(step.preset for choice in self.choices for step in choice.speculation),
            energy=energy,
            cached_tokens=min((c.num_reused for c in self.choices if c.num_reused is not None), default=0),
        )

    def _speculation(self) -> list[SpeculationStep]:
        """The steps that verified a draft; `mtjd` searches with the target itself."""
        if not self.command.config.uses_draft:
            return []
        steps = (step for choice in self.choices for step in choice.speculation)
        return [step for step in steps if step.num_draft_tokens > 0]
