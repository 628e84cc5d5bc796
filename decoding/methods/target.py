"""Single-token decoding with one model: the `target`, the reference law p, or the `draft` alone."""

from dataclasses import dataclass

from decoding.batch import Batch
from decoding.methods.step import DecodeStep, single_step
from decoding.model_pair import ModelPair


@dataclass(frozen=True, slots=True)
class SingleModel:
    """One token per step from the model of `role`; its log-probabilities are that model's own."""

    role: str

    def step(self, pair: ModelPair, batch: Batch) -> DecodeStep:
        return single_step(pair.models[self.role], batch)
