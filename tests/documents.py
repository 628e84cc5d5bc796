"""The commands of README.md and docs/, and a folder in which they can be run as a reader would."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
OWN_SCRIPTS = ("install",)  # tests change nothing in the environment they run in
ADDRESS = "127.0.0.1:8000"
# What only a machine with a container engine, several machines, or a clone with a remote, can do.
ELSEWHERE = re.compile(
    r"^(\w+=\S+ )*(docker|kubectl|git|\.venv/bin/ray) |^\./scripts/serve --worker-backend ray "
)


def blocks(document: str, language: str = "console") -> list[str]:
    """The fenced blocks of a document in that language."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[str]:
    """Its commands, continued lines joined, comments at their ends cut off."""
    lines = block.replace("\\\n", " ").splitlines()
    return [" ".join(re.sub(r"\s+# .*", "", line).split()) for line in lines if line.strip()]


def runnable(block: str) -> str:
    """The block without the lines that need a container engine."""
    return "\n".join(line for line in block.splitlines() if not ELSEWHERE.match(line))


class Clone:
    """A folder that looks like a clone of the repository after scripts/install."""

    def __init__(self, folder: Path, port: int, **settings: str) -> None:
        self.folder = folder
        self.port = port
        for path in ROOT.iterdir():
            if path.name not in ("scripts", "deploy", ".venv", ".env", ".git"):
                (folder / path.name).symlink_to(path)
        (folder / ".venv").symlink_to(sys.prefix)
        (folder / "deploy/keys").mkdir(parents=True)
        (folder / "scripts").mkdir()
        for path in (ROOT / "scripts").iterdir():
            if path.name not in OWN_SCRIPTS:
                (folder / "scripts" / path.name).symlink_to(path)
        for name in OWN_SCRIPTS:
            (folder / "scripts" / name).write_text("#!/bin/sh\n")
            (folder / "scripts" / name).chmod(0o755)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MMTAD_")}
        kept.pop("PYTHONPATH", None)
        path_variable = f"{Path(sys.executable).parent}:{kept['PATH']}"
        defaults = {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "MMTAD_PORT": str(port)}
        self.environment = kept | defaults | settings | {"PATH": path_variable}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def translate(self, text: str) -> str:
        """The text with the address of the documents replaced by that of the test's server."""
        return text.replace(ADDRESS, f"127.0.0.1:{self.port}")

    def run(self, block: str, seconds: float = 120) -> str:
        """Standard output of the block as a script that ends at its first error."""
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", self.translate(block)],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert result.returncode == 0, f"{block}\n{result.stdout}{result.stderr}"
        return result.stdout
