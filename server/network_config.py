"""What of the server's configuration concerns its clients: where it listens, who may ask, what it shows."""

import ipaddress
import json
import ssl
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, SecretStr, field_validator, model_validator
from pydantic_settings import NoDecode

from server.keys import key_digests


class NetworkConfig(BaseModel):
    """Part of `ServerConfig`."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    metrics_port: int | None = Field(
        default=None, ge=1, le=65535, description="Serve /metrics on this port of --host instead."
    )
    metrics_compat: Literal["vllm", "dcgm", "vllm,dcgm", "none"] = Field(
        default="vllm", description="Whose names /metrics shows beside its own."
    )
    root_path: str = Field(default="", pattern=r"^(/[^/?#]+)*$", description="Where a proxy mounts it.")
    ssl_certfile: Path | None = Field(default=None, description="PEM certificate chain: serves HTTPS.")
    ssl_keyfile: Path | None = Field(default=None, description="PEM private key of the certificate.")
    allowed_origins: list[str] = Field(default_factory=list, description="Origins of web pages (CORS).")
    api_key: Annotated[list[SecretStr], NoDecode] = Field(
        default_factory=list, description="Key that requests must carry; comma-separated or repeated."
    )
    api_key_file: Path | None = Field(
        default=None, description="File with a key per line, or its digest as sha256:<hex>."
    )
    allow_unauthenticated: bool = Field(default=False, description="Listen beyond loopback without keys.")
    requests_per_minute: int | None = Field(
        default=None, ge=1, le=1_000_000, description="Most requests of a key; without keys, of an address."
    )
    disable_fastapi_docs: bool = Field(default=False, description="Serve neither /docs nor /openapi.json.")

    @field_validator("api_key", mode="before")
    @classmethod
    def _keys_are_listed(cls, keys: Any) -> Any:
        """The environment gives one string, the command line a JSON list as text."""
        if not isinstance(keys, str):
            return keys
        return json.loads(keys) if keys.startswith("[") else keys.split(",")

    @model_validator(mode="after")
    def _reachable_safely(self) -> Self:
        if not (self.key_digests or self.allow_unauthenticated or is_loopback(self.host)):
            raise ValueError(
                "--host is reachable from other machines and nothing asks for a key: "
                "use 127.0.0.1, give --api-key-file, or add --allow-unauthenticated"
            )
        if self.ssl_certfile is None and self.ssl_keyfile is not None:
            raise ValueError("--ssl-keyfile needs --ssl-certfile")
        if self.ssl_certfile is not None:
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.ssl_certfile, self.ssl_keyfile)
            except OSError as error:
                raise ValueError(f"--ssl-certfile and --ssl-keyfile cannot be used: {error}") from error
        return self

    @property
    def key_digests(self) -> tuple[bytes, ...]:
        """SHA-256 of every key, none where no key is asked for; raises ValueError."""
        return key_digests([key.get_secret_value() for key in self.api_key], self.api_key_file)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
