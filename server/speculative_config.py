"""How the server speculates unless a request says otherwise, as it is configured."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from decoding import GREEDY_THRESHOLD, SAMPLING_THRESHOLD, DecodingConfig

MethodName = Literal["target", "draft", "speculative", "multi_candidate", "mtjd", "mtad", "mmtad"]
AcceptanceReference = Literal["draft", "target"]
Acceptance = Literal["token", "block"]


class SpeculativeConfig(BaseModel):
    """`--speculative-config`: the draft and how the server speculates unless a request says otherwise."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(default=None, description="Folder or Hub id of the draft model.")
    method: MethodName | None = Field(default=None, description="Default: mmtad with a draft, else target.")
    num_speculative_tokens: int = DecodingConfig().num_speculative_tokens
    beam_width: int = DecodingConfig().beam_width
    acceptance_threshold: float | None = Field(
        default=None,
        description=f"Default: {GREEDY_THRESHOLD} at temperature 0, {SAMPLING_THRESHOLD} above it.",
    )
    acceptance_reference: AcceptanceReference = DecodingConfig().acceptance_reference
    acceptance: Acceptance = DecodingConfig().acceptance
    adaptive: bool = Field(
        default=True,
        description="Choose depth and width anew in every step, up to the numbers here, by what pays.",
    )
    candidates_per_level: tuple[int, ...] = DecodingConfig().candidates_per_level
