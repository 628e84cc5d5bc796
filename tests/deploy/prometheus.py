"""The real Prometheus on the files of deploy/prometheus, pointed at a server of the test."""

import contextlib
import math
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.e2e.conftest import free_port, until
from tests.programs import program

ROOT = Path(__file__).parent.parent.parent
CONFIG = ROOT / "deploy/prometheus"


@dataclass
class Prometheus:
    """A running Prometheus and its HTTP API."""

    url: str

    def get(self, path: str, **parameters: str) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=10)
        body = answer.json()
        assert body["status"] == "success", body
        return body["data"]

    def values(self, query: str) -> list[float]:
        """The values of an instant query that are numbers."""
        found = [float(sample["value"][1]) for sample in self.get("query", query=query)["result"]]
        return [value for value in found if not math.isnan(value)]

    def targets(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get("targets")["activeTargets"]
        return found

    def rules(self) -> list[dict[str, Any]]:
        return [rule for group in self.get("rules")["groups"] for rule in group["rules"]]

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/-/ready", timeout=5).status_code == 200
        except httpx.TransportError:
            return False


def write_config(folder: Path, target: str) -> Path:
    """The files of deploy/prometheus in `folder`, where only the address of the server is another."""
    shutil.copytree(CONFIG, folder, dirs_exist_ok=True)
    path = folder / "prometheus.yml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    (job,) = config["scrape_configs"]
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": [target]}]
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


@contextlib.contextmanager
def running_prometheus(folder: Path, target: str) -> Iterator[Prometheus]:
    """Prometheus with its data in `folder`, scraping `target` (host:port)."""
    address = f"127.0.0.1:{free_port()}"
    config = write_config(folder / "config", target)
    command = [program("prometheus"), f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    command += [f"--web.listen-address={address}", "--log.level=warn"]
    log = folder / "log"
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        prometheus = Prometheus(f"http://{address}")
        try:
            until(lambda: process.poll() is not None or prometheus.is_ready())
            assert process.poll() is None, log.read_text()
            yield prometheus
        finally:
            process.terminate()
