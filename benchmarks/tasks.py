"""What a pair is asked: prompts as token ids, and how answers are graded where they can be."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.generation import Generation
from benchmarks.pairs import BenchPair
from benchmarks.tiny.card import grade, held_out, prompt_ids
from benchmarks.workloads import chat_ids, load_prompts

SQL = "sql"
SQL_SEED = 2_000_003  # not the seed of the cards


@dataclass(frozen=True, slots=True)
class Task:
    """Prompts as token ids; `grade` says which answers are right, None for free text."""

    name: str
    prompts: list[list[int]]
    grade: Callable[[list[Generation]], list[bool]] | None = None

    @property
    def prompt_length(self) -> float:
        """Mean length in tokens."""
        return sum(map(len, self.prompts)) / len(self.prompts)


def make_task(pair: BenchPair, workload: str | None, count: int, seed: int) -> Task:
    """`count` prompts of `workload`; by default SQL for pair T, chat for E, and for I what its base has.

    Raises:
        ValueError: the pair cannot do the workload, or there are too few prompts.
    """
    name = workload or (SQL if pair.base == "T" else "chat")
    if (name == SQL) != (pair.base == "T"):
        raise ValueError(f"pair {pair.label} is not measured with workload {name!r}")
    if name != SQL:
        prompts = [chat_ids(pair.tokenizer, each.prompt) for each in load_prompts(name, count, seed)]
        return Task(name, prompts)
    examples = held_out(count, SQL_SEED + seed)
    return Task(name, [prompt_ids(each) for each in examples], lambda results: grade(examples, results))
