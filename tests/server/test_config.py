"""Flags, environment, file: names, precedence, and one clear line for every mistake."""

import hashlib
import tomllib
from pathlib import Path

import pytest

from decoding import ACCEPTANCE_REFERENCES, METHODS, DecodingConfig
from decoding.config import ACCEPTANCES
from server import __main__, __version__
from server.config import ServerConfig, load_config, worker_environment, worker_link_fd
from server.config_errors import ConfigError
from server.keys import key_digests, known_digest
from server.network_config import is_loopback
from server.report import fingerprint_source, system_fingerprint
from server.speculative_config import Acceptance, AcceptanceReference, MethodName
from server.supervisor import load_command


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("MMTAD_")]:
        monkeypatch.delenv(name)


def test_defaults_are_the_embedded_pair() -> None:
    config = load_config([])
    assert (config.host, config.port, config.max_num_seqs, config.max_num_queued_reqs) == (
        "127.0.0.1",
        8000,
        16,
        256,
    )
    assert config.target_id == "SmolLM2-135M-Instruct"
    assert config.draft_id == "SmolLM2-135M-Instruct-draft"
    assert config.decoding == DecodingConfig(method="mmtad", adaptive=True)
    assert config.shutdown_timeout == 30


def test_a_target_alone_serves_target() -> None:
    config = load_config(["--model", "some/target"])
    assert config.decoding.method == "target"
    assert (config.target_id, config.draft_id) == ("some/target", None)


@pytest.mark.parametrize(
    "arguments",
    [
        [
            "--speculative-config",
            '{"model": "d", "method": "mtad", "num_speculative_tokens": 2, "beam_width": 3}',
        ],
        [
            "--speculative-config.model=d",
            "--speculative-config.method=mtad",
            "--speculative-config.num_speculative_tokens=2",
            "--speculative-config.beam-width=3",
        ],
        [
            "--speculative_config.model",
            "d",
            "--speculative-config",
            '{"method": "mtad", "num_speculative_tokens": 2}',
            "--speculative-config.beam_width",
            "3",
        ],
    ],
)
def test_speculative_config(arguments: list[str]) -> None:
    config = load_config(["--model", "t", *arguments])
    assert config.draft_id == "d"
    assert config.decoding == DecodingConfig("mtad", num_speculative_tokens=2, beam_width=3, adaptive=True)


def test_names() -> None:
    for arguments in (
        ["--served-model-name", "a,b"],
        ["--served-model-name", "a", "--served-model-name", "b"],
    ):
        config = load_config(["--model", "t", *arguments])
        assert (config.target_id, config.target_aliases) == ("a", ("b",))


def test_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flag over environment over file over default, key by key."""
    file = tmp_path / "server.yaml"
    file.write_text(
        "port: 1\nmax_num_seqs: 2\nseed: 3\nmodel: t\nspeculative_config: {model: d, beam_width: 2}\n"
    )
    assert load_config(["--config", str(file)]).port == 1
    monkeypatch.setenv("MMTAD_PORT", "4")
    monkeypatch.setenv("MMTAD_MAX_NUM_SEQS", "5")
    monkeypatch.setenv("MMTAD_SPECULATIVE_CONFIG__METHOD", "mtad")
    config = load_config([f"--config={file}", "--port", "6"])
    assert (config.port, config.max_num_seqs, config.seed, config.draft_id) == (6, 5, 3, "d")
    assert (config.decoding.method, config.decoding.beam_width) == ("mtad", 2)
    monkeypatch.setenv("MMTAD_CONFIG", str(file))
    assert load_config([]).seed == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "x"], ["--port", "integer"]),
        (["--port", "70000"], ["--port", "65535"]),
        (["--port"], ["--port", "argument"]),
        (["--foo", "1"], ["--foo", "no such flag"]),
        (["stray"], ["stray"]),
        (["--max-num-seqs", "0"], ["--max-num-seqs", "1"]),
        (["--max-model-len", "0"], ["--max-model-len"]),
        (["--seed", str(2**63)], ["--seed"]),
        (["--dtype", "int8"], ["--dtype", "float16"]),
        (["--device", "tpu"], ["--device", "cuda"]),
        (["--speculative-config", "{"], ["--speculative-config", "JSON"]),
        (["--speculative-config", '{"beam": 1}'], ["--speculative-config.beam", "no such setting"]),
        (["--speculative-config", '{"beam_width": 17}'], ["--speculative-config", "beam_width", "16"]),
        (["--speculative-config", '{"method": "beam"}'], ["--speculative-config.method", "mmtad"]),
        (["--model", "t", "--speculative-config.method", "mtad"], ["--speculative-config.model", "draft"]),
        (["--speculative-config.model", "d"], ["--model"]),
        (["--served-model-name", ""], ["--served-model-name"]),
        (["--host", "0.0.0.0"], ["--host", "--allow-unauthenticated"]),
        (["--max-beam-width", "2"], ["--max-beam-width"]),
        (["--max-num-speculative-tokens", "2"], ["--max-num-speculative-tokens"]),
        (["--config", "/nowhere.yaml"], ["--config", "/nowhere.yaml"]),
        (["--shutdown-timeout", "-1"], ["--shutdown-timeout"]),
        (["--max-logprobs", "21"], ["--max-logprobs", "20"]),
        (["--api-key", ""], ["--api-key", "empty"]),
        (["--api-key-file", "/nowhere"], ["--api-key-file", "/nowhere"]),
        (["--api-key-file", "/dev/null"], ["--api-key-file", "no key"]),
        (["--ssl-keyfile", "/nowhere"], ["--ssl-keyfile", "--ssl-certfile"]),
        (["--ssl-certfile", "/nowhere"], ["--ssl-certfile", "No such file"]),
        (["--root-path", "x/"], ["--root-path"]),
        (["--speculative-config", '{"candidates_per_level": [9, 9]}'], ["candidates_per_level", "64"]),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    arguments: list[str],
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["server", *arguments])
    assert __main__.main() == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    for word in words:
        assert word in output.err


@pytest.mark.parametrize("text", ["port: [", "port: x\n", "prot: 1\n"])
def test_mistakes_in_the_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match="--"):
        load_config(["--config", str(file)])


def test_mistakes_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMTAD_PORT", "x")
    with pytest.raises(ConfigError, match="--port"):
        load_config([])


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("example.org", False),
    ],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) == expected
    if not expected:
        assert load_config(["--host", host, "--allow-unauthenticated"]).host == host


@pytest.mark.parametrize(
    "arguments", [["--api-key", "one,two"], ["--api-key", "one", "--api-key", "two"], ["--api-key=one,two"]]
)
def test_keys_from_the_command_line(arguments: list[str]) -> None:
    config = load_config([*arguments, "--host", "0.0.0.0"])
    assert config.key_digests == key_digests(["one", "two"], None)
    assert "two" not in repr(config)


def test_keys_from_the_environment_and_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    digest = hashlib.sha256(b"three").hexdigest()
    file.write_text(f"# ours\ntwo\n\n sha256:{digest} \n")
    monkeypatch.setenv("MMTAD_API_KEY", "one")
    config = load_config(["--api-key-file", str(file), "--host", "0.0.0.0"])
    assert config.key_digests == key_digests(["one", "two", "three"], None)
    assert known_digest(b"three", config.key_digests)
    assert not known_digest(digest.encode(), config.key_digests)
    monkeypatch.setenv("MMTAD_API_KEY", "one,two")
    assert len(load_config([]).key_digests) == 2


def test_other_origins_and_paths() -> None:
    config = load_config(["--allowed-origins", "https://a.example", "--root-path", "/llm/v2"])
    assert (config.allowed_origins, config.root_path) == (["https://a.example"], "/llm/v2")


def test_a_target_alone_can_search_with_itself() -> None:
    assert load_config(["--model", "t", "--speculative-config.method", "mtjd"]).decoding.method == "mtjd"


def test_fingerprint_follows_what_decides_the_text() -> None:
    base = load_config([])
    assert system_fingerprint(base) == system_fingerprint(load_config(["--port", "9"]))
    for arguments in (["--seed", "1"], ["--speculative-config.beam-width", "2"], ["--dtype", "float32"]):
        assert system_fingerprint(load_config(arguments)) != system_fingerprint(base)
    assert "port" not in fingerprint_source(base)


@pytest.mark.parametrize("flag", [True, False])
def test_prefix_caching_reaches_the_worker(flag: bool) -> None:
    """On unless it is turned off, by a flag as vLLM's."""
    assert load_command(load_config([]), 0).enable_prefix_caching
    arguments = [f"--{'' if flag else 'no-'}enable-prefix-caching"]
    assert load_command(load_config(arguments), 0).enable_prefix_caching == flag


@pytest.mark.parametrize("arguments", [[], ["--enforce-eager"], ["--no-enforce-eager"]])
def test_enforce_eager_reaches_the_worker(arguments: list[str]) -> None:
    assert load_command(load_config(arguments), 0).enforce_eager == (arguments == ["--enforce-eager"])


def test_literals_are_those_of_decoding() -> None:
    assert set(MethodName.__args__) == set(METHODS)  # type: ignore[attr-defined]
    assert set(Acceptance.__args__) == set(ACCEPTANCES)  # type: ignore[attr-defined]
    assert set(AcceptanceReference.__args__) == set(ACCEPTANCE_REFERENCES)  # type: ignore[attr-defined]


@pytest.mark.parametrize("arguments", [[], ["--link-fd"], ["--link-fd", "x"], ["--port", "1"]])
def test_a_worker_is_not_started_by_hand(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["worker", *arguments])
    with pytest.raises(SystemExit, match="python -m server"):
        worker_link_fd()


def test_compute_threads_of_a_worker_sleep_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("KEPT", "1")
    assert {"OMP_WAIT_POLICY": "PASSIVE", "KEPT": "1"}.items() <= worker_environment().items()
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert worker_environment()["OMP_WAIT_POLICY"] == "ACTIVE"


@pytest.mark.parametrize(
    ("visible", "worker", "num_gpus", "seen"),
    [
        (None, 2, 1, "2"),
        (None, 1, 2, "2,3"),
        ("4,5,6,7", 1, 1, "5"),
        ("4,5,6,7", 1, 2, "6,7"),
        ("4,5", 1, 2, ""),
        ("", 0, 1, ""),
        ("", 2, 2, ""),
    ],
)
def test_each_of_several_workers_sees_its_gpus(
    visible: str | None, worker: int, num_gpus: int, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none of another; where all are hidden they stay it."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert worker_environment(worker, 3, num_gpus)["CUDA_VISIBLE_DEVICES"] == seen


def test_version_is_that_of_the_distribution() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__


def test_configuration_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        ServerConfig().port = 1  # type: ignore[misc]
