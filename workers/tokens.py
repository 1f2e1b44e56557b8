"""Bearer tokens of the endpoint's clients: a file of names, scopes and sha256 hashes, never the tokens themselves.

    # name   scope            sha256 of the token, in hex
    alice    images           2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b
    deploy   images,admin     ...

The file is read again when it changes, so that a token can be taken back without a restart.
"""

import hashlib
import hmac
import re
from dataclasses import dataclass
from pathlib import Path

SCOPES = ("images", "admin")


class TokenFileError(ValueError):
    """A token file that cannot be used; names the file, the line and what would be right."""


@dataclass(frozen=True, slots=True)
class Token:
    """One client's entry."""

    name: str
    scopes: frozenset[str]
    digest: bytes


class Tokens:
    """Who may do what, by the file at `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries = _read(path)
        self._changed = path.stat().st_mtime_ns

    def find(self, token: str) -> Token | None:
        """The entry of a token. Takes the same time whichever entry it is, or none."""
        self._refresh()
        digest = hashlib.sha256(token.encode()).digest()
        found = None
        for entry in self._entries:
            if hmac.compare_digest(entry.digest, digest):
                found = entry
        return found

    def _refresh(self) -> None:
        try:
            changed = self._path.stat().st_mtime_ns
            if changed != self._changed:
                self._entries, self._changed = _read(self._path), changed
        except (OSError, TokenFileError):
            # half written or gone for a moment: the entries that were read last stay
            return


def _read(path: Path) -> tuple[Token, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TokenFileError(f"the token file {path} cannot be read: {error}") from None
    entries = [
        _entry(f"{path} line {number}", line.split())
        for number, line in enumerate(lines, start=1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if not entries:
        raise TokenFileError(f"the token file {path} has no entry: add lines of NAME SCOPES SHA256")
    return tuple(entries)


def _entry(where: str, words: list[str]) -> Token:
    if len(words) != 3:
        raise TokenFileError(f"{where}: write NAME SCOPES SHA256, for example: alice images 2bb80d53...")
    name, scopes, digest = words
    unknown = set(scopes.split(",")) - set(SCOPES)
    if unknown:
        raise TokenFileError(f"{where}: unknown scope {', '.join(sorted(unknown))}; use {' or '.join(SCOPES)}")
    if not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
        raise TokenFileError(
            f"{where}: the third word is not a sha256 in hex (64 digits); never write the token itself"
        )
    return Token(name, frozenset(scopes.split(",")), bytes.fromhex(digest))
