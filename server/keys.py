"""API keys as digests: what is compared and kept is never the key itself."""

import hashlib
import hmac
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

DIGEST_LINE = re.compile(r"sha256:([0-9a-fA-F]{64})")


def key_digests(keys: Iterable[str], file: Path | None) -> tuple[bytes, ...]:
    """Digests of the keys given and of those in `file`; raises ValueError naming the flag."""
    given = list(keys)
    if any(not key or key != key.strip() for key in given):
        raise ValueError("--api-key must not be empty, nor begin or end with a space")
    return (*map(_digest_of_line, given), *(_read(file) if file is not None else ()))


def known_digest(key: bytes, digests: Sequence[bytes]) -> bytes | None:
    """The digest of a key that is among `digests`, else None.

    In a time that does not depend on which key matches, nor on how far one does.
    """
    digest = hashlib.sha256(key).digest()
    matches = [hmac.compare_digest(digest, each) for each in digests]
    return digest if any(matches) else None


def _read(file: Path) -> list[bytes]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--api-key-file {file} cannot be read: give a text file with a key per line"
        ) from error
    digests = [_digest_of_line(line) for line in lines if line and not line.startswith("#")]
    if not digests:
        raise ValueError(f"--api-key-file {file} holds no key: write one per line")
    return digests


def _digest_of_line(line: str) -> bytes:
    if digest := DIGEST_LINE.fullmatch(line):
        return bytes.fromhex(digest[1])
    return hashlib.sha256(line.encode()).digest()
