"""The server's configuration: flags, environment (`MMTAD_`), a YAML file. Nothing else reads them.

Precedence: flag, environment, file, default. Flags carry vLLM's names.
"""

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    CliDualFlag,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)

from decoding import MAX_BEAM_WIDTH, MAX_SPECULATIVE_TOKENS, DecodingConfig
from server.config_errors import ConfigError, describe_settings, describe_value, one_line
from server.network_config import NetworkConfig
from server.speculative_config import SpeculativeConfig

ENVIRONMENT_PREFIX = "MMTAD_"
EMBEDDED_TARGET_ID = "SmolLM2-135M-Instruct"
EMBEDDED_DRAFT_ID = f"{EMBEDDED_TARGET_ID}-draft"
WORKER_LINK_FLAG = "--link-fd"


class ServerConfig(NetworkConfig, BaseSettings):
    """Every switch of the server; times in seconds."""

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX,
        env_nested_delimiter="__",
        cli_kebab_case=True,
        cli_implicit_flags="toggle",
        cli_exit_on_error=False,
        cli_prog_name="python -m server",
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
    )

    config: Path | None = Field(default=None, description="YAML file with any of these settings.")
    model: str | None = Field(
        default=None, description="Target: a folder or a Hub id. Default: embedded pair."
    )
    speculative_config: SpeculativeConfig = Field(default_factory=SpeculativeConfig)
    served_model_name: list[str] = Field(
        default_factory=list, description="Names of the target in the API, the first one is the id."
    )
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_model_len: int | None = Field(default=None, ge=1)
    max_num_seqs: int = Field(default=16, ge=1, le=1024)
    num_workers: int = Field(
        default=1, ge=1, le=64, description="Processes that decode. Unless given, one per visible GPU."
    )
    tensor_parallel_size: int = Field(
        default=1, ge=1, le=64, description="Processes, and GPUs, that hold one target together: a worker."
    )
    enable_prefix_caching: CliDualFlag[bool] = Field(
        default=True, description="Whether prompts that begin alike share what the caches hold of them."
    )
    enforce_eager: CliDualFlag[bool] = Field(
        default=False, description="On a GPU, run every pass as it is, without captured graphs."
    )
    worker_backend: Literal["local", "ray"] = Field(
        default="local", description="Where workers run: on this machine, or on the nodes of a Ray cluster."
    )
    ray_address: str = Field(default="auto", description="HOST:PORT of the cluster that this machine is in.")
    worker_timeout: float = Field(
        default=30.0, gt=0, description="Seconds without a step after which a busy worker is replaced."
    )
    worker_load_timeout: float = Field(
        default=1800.0, gt=0, description="Seconds of loading after which a worker is replaced."
    )
    max_num_queued_reqs: int = Field(
        default=256, ge=0, le=100_000, description="Most sequences that wait for a row."
    )
    max_num_queued_tokens: int = Field(
        default=262_144, ge=0, description="Most tokens, prompts and 'max_tokens', beyond what the rows hold."
    )
    max_num_speculative_tokens: int = Field(default=MAX_SPECULATIVE_TOKENS, ge=1, le=MAX_SPECULATIVE_TOKENS)
    max_beam_width: int = Field(default=MAX_BEAM_WIDTH, ge=1, le=MAX_BEAM_WIDTH)
    max_logprobs: int = Field(default=5, ge=0, le=20, description="Most 'logprobs' of a completion.")
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63, description="Seed of requests without one.")
    energy_source: str = Field(
        default="auto",
        pattern=r"^(auto|none|replay:.+)$",
        description="What measures joules: auto, none, or replay:FILE for a recording.",
    )
    shutdown_timeout: float = Field(default=30.0, ge=0, le=3600)

    @field_validator("served_model_name")
    @classmethod
    def _names_are_usable(cls, names: list[str]) -> list[str]:
        if any(not 1 <= len(name) <= 256 for name in names):
            raise ValueError("each name must have 1 to 256 characters")
        return names

    @model_validator(mode="after")
    def _backend_is_installed(self) -> Self:
        if self.worker_backend == "ray" and importlib.util.find_spec("ray") is None:
            raise ValueError("--worker-backend ray needs Ray: pip install 'mmtad-server[ray]'")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        speculative = self.speculative_config
        if self.model is None and speculative.model is not None:
            raise ValueError(
                "--speculative-config.model needs --model: the embedded target has its own draft"
            )
        if not self.has_draft and speculative.method not in (None, "target", "mtjd"):
            raise ValueError(
                f"--speculative-config.method {speculative.method} needs a draft: "
                "give --speculative-config.model, or use method target or mtjd"
            )
        if self.decoding.num_speculative_tokens > self.max_num_speculative_tokens:
            raise ValueError("--max-num-speculative-tokens is below the server's own num_speculative_tokens")
        if self.decoding.beam_width > self.max_beam_width:
            raise ValueError("--max-beam-width is below the server's own beam_width")
        return self

    @property
    def has_draft(self) -> bool:
        return self.model is None or self.speculative_config.model is not None

    @property
    def decoding(self) -> DecodingConfig:
        """How a request that says nothing is decoded, above temperature 0; raises ValueError."""
        values = self.speculative_config.model_dump(exclude={"model"}, exclude_none=True)
        values.setdefault("method", "mmtad" if self.has_draft else "target")
        try:
            return DecodingConfig(**values)
        except ValueError as error:
            raise ValueError(f"--speculative-config: {error}") from error

    @property
    def target_id(self) -> str:
        return self.served_model_name[0] if self.served_model_name else (self.model or EMBEDDED_TARGET_ID)

    @property
    def target_aliases(self) -> tuple[str, ...]:
        return tuple(self.served_model_name[1:])

    @property
    def draft_id(self) -> str | None:
        return EMBEDDED_DRAFT_ID if self.model is None else self.speculative_config.model

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        sources = [init_settings, env_settings]
        file = init_settings.init_kwargs.get("config")  # type: ignore[attr-defined]
        if file is not None:
            sources.append(YamlConfigSettingsSource(settings_cls, yaml_file=file))
        return tuple(sources)


def load_config(argv: Sequence[str] | None = None) -> ServerConfig:
    """Configuration of this process from `argv` (default: the process's own).

    Raises ConfigError with one line that names the flag; `--help` prints and exits 0.
    """
    arguments = [_kebab_case(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    file = _config_file(arguments)
    overrides: dict[str, Any] = {} if file is None else {"config": file}
    try:
        command_line: CliSettingsSource[Any] = CliSettingsSource(ServerConfig, cli_parse_args=arguments)
        return ServerConfig(_cli_settings_source=command_line, **overrides)
    except ValidationError as error:
        raise ConfigError(describe_value(error)) from error
    except SettingsError as error:
        raise ConfigError(describe_settings(one_line(str(error)))) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config: {file} is not valid YAML: {one_line(str(error))}") from error


def _kebab_case(argument: str) -> str:
    """vLLM takes flags with underscores too, and dotted keys are written with them."""
    flag, separator, value = argument.partition("=")
    return flag.replace("_", "-") + separator + value if flag.startswith("--") else argument


def _config_file(arguments: Sequence[str]) -> Path | None:
    """The file is needed before the flags are parsed, because it ranks below them."""
    name = os.environ.get(f"{ENVIRONMENT_PREFIX}CONFIG")
    for position, argument in enumerate(arguments):
        if argument.startswith("--config="):
            name = argument.partition("=")[2]
        elif argument == "--config" and position + 1 < len(arguments):
            name = arguments[position + 1]
    if name is None:
        return None
    if not Path(name).is_file():
        raise ConfigError(f"--config: there is no file {name}")
    return Path(name)


def worker_link_fd() -> int:
    """The inherited socket of a worker process: `python -m server.worker --link-fd N`."""
    arguments = sys.argv[1:]
    if len(arguments) != 2 or arguments[0] != WORKER_LINK_FLAG or not arguments[1].isdigit():
        raise SystemExit("server.worker is started by the server; start `python -m server` instead")
    return int(arguments[1])


def worker_environment(worker: int = 0, num_workers: int = 1, num_gpus: int = 1) -> dict[str, str]:
    """The environment of a worker: its compute threads sleep while they wait.

    Threads that spin starve the API process, and whatever else runs, of the cores they wait for; where
    those cores are busy a step then takes many times as long. Who set the policy keeps it. Several
    workers share the cores, and each sees `num_gpus` of the GPUs.
    """
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    if num_workers > 1:
        cores = len(os.sched_getaffinity(0))
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_workers)))
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        last = (worker + 1) * num_gpus
        # Where it is empty GPUs are hidden; a name beyond the last one would be a GPU of another worker.
        names = [str(place) for place in range(last)] if visible is None else visible.split(",")
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(names[worker * num_gpus : last])
    return environment
