"""Who may do what: tokens with a scope, from a file or the environment."""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import OptionError
from .errors import ServiceError

SCOPES = ("read", "inspect", "curate")  # each allows what those before it allow
VARIABLE = "SPADE_FAISS_TOKEN"  # of the environment: a token that may do everything
COOKIE = "spade_faiss_session"
LEAST = 16  # characters of a token
HEX = re.compile("[0-9a-f]{64}")
COMMENT = re.compile(r"(?:^|(?<=\s))#.*")  # a token may have one inside


@dataclass(frozen=True)
class Caller:
    """Who asks, and the widest scope that is allowed."""

    name: str
    scope: str

    def require(self, scope: str) -> None:
        """Check that the caller may do what a scope allows.

        Raises:
            ServiceError: not with this token.
        """
        if SCOPES.index(self.scope) < SCOPES.index(scope):
            raise ServiceError(
                403, "scope_too_small", f"This needs a token of scope {scope}, found one of scope {self.scope}."
            )


LOCAL = Caller("local", "curate")  # without tokens, whoever is on this machine


class Tokens:
    """The tokens that are known, by their hashes; compared in constant time."""

    def __init__(self, file: Path | None = None, everything: str | None = None) -> None:
        """Read a file of lines NAME SCOPE TOKEN, and one more token that may do everything.

        Raises:
            OptionError: the file cannot be read, or a line is something else.
        """
        self._known: list[tuple[bytes, Caller]] = []
        if everything is not None:
            self._add(everything, Caller("environment", "curate"), f"environment variable {VARIABLE}")
        if file is not None:
            try:
                lines = file.read_text("utf-8-sig").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise OptionError(f"tokens: {file}: cannot be read: {error}") from error
            for number, line in enumerate(lines, start=1):
                words = COMMENT.sub("", line).split()
                if not words:
                    continue
                if len(words) != 3 or words[1] not in SCOPES:
                    raise OptionError(
                        f"tokens: {file}, line {number}: expected NAME SCOPE TOKEN with scope {' or '.join(SCOPES)}"
                    )
                self._add(words[2], Caller(words[0], words[1]), f"{file}, line {number}")
            if not self._known:
                raise OptionError(f"tokens: {file}: expected at least one line NAME SCOPE TOKEN, found none")

    def _add(self, token: str, caller: Caller, where: str) -> None:
        if len(token) < LEAST:
            raise OptionError(f"tokens: {where}: expected a token of at least {LEAST} characters, found {len(token)}")
        self._known.append((_hash(token), caller))

    def __bool__(self) -> bool:
        return bool(self._known)

    def caller(self, token: str | None, cookie: str | None) -> Caller:
        """Return who has a token, or the cookie that was made of it.

        Raises:
            ServiceError: tokens are needed, and this is none of them.
        """
        if not self._known:
            return LOCAL
        given, form = b"", _hash_itself
        if token is not None:
            given = _hash(token)
        elif cookie is not None and HEX.fullmatch(cookie):
            given, form = bytes.fromhex(cookie), _cookie
        found = None
        for known, caller in self._known:  # all of them, so that time tells nothing
            if hmac.compare_digest(given, form(known)):
                found = found or caller
        if found is None:
            missing = token is None and cookie is None
            code, why = (
                ("token_missing", "This needs a token") if missing else ("token_wrong", "This token is not known")
            )
            raise ServiceError(
                401, code, f"{why}; send the header Authorization: Bearer TOKEN.", {"WWW-Authenticate": "Bearer"}
            )
        return found

    def cookie_of(self, token: str) -> str | None:
        """Return what a browser keeps instead of a token, which it does not reveal; None: the token is not known."""
        one = _hash(token)
        found = [hmac.compare_digest(one, known) for known, _ in self._known]  # all, so that time tells nothing
        if not any(found):
            return None
        return _cookie(one).hex()


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _cookie(hashed: bytes) -> bytes:
    return hmac.digest(hashed, b"spade-faiss session", "sha256")


def _hash_itself(hashed: bytes) -> bytes:
    return hashed
