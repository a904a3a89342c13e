"""The file of tokens: salted hashes with tenants, scopes and quotas; never a token itself."""

import hashlib
import hmac
import os
import re
import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from jaxinfer import settings
from jaxinfer.errors import ConfigError, Unauthenticated
from jaxinfer.server.tenants import Caller, Quota
from jaxinfer.server.watched import Watched, check_private

SCOPES = ("generate", "read", "admin", "health")
PREFIX = "jxi_"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
SETTING = "security.tokens"
PERSON = b"jaxinfer token"


@dataclass(frozen=True)
class Token:
    """One entry of the file of tokens: a hash, never the token."""

    tenant: str
    scopes: tuple[str, ...]
    salt: str
    hash: str
    expires: str = ""
    """The moment from which it is refused, as 2027-01-31T12:00:00+00:00; empty: never."""

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.tenant):
            raise ConfigError(
                f"tenant is {self.tenant!r}; it must be letters, digits, '_', '.' and '-', at most "
                "64 of them"
            )
        for scope in self.scopes:
            if scope not in SCOPES:
                raise ConfigError(f"scopes has {scope!r}; the scopes are {', '.join(SCOPES)}")
        for key, num_bytes in (("salt", 16), ("hash", 32)):
            if not re.fullmatch(f"[0-9a-f]{{{2 * num_bytes}}}", getattr(self, key)):
                raise ConfigError(f"{key} must be {2 * num_bytes} hexadecimal digits")
        self.ends_at()

    def ends_at(self) -> datetime | None:
        """When it expires."""
        if not self.expires:
            return None
        try:
            found = datetime.fromisoformat(self.expires)
        except ValueError:
            found = None
        if found is None or found.tzinfo is None:
            raise ConfigError(
                f"expires is {self.expires!r}; it must be a moment with its time zone, as "
                "2027-01-31T12:00:00+00:00"
            )
        return found


class TokenFile(NamedTuple):
    """The tokens by their id, and the quotas by tenant."""

    tokens: dict[str, Token]
    quotas: dict[str, Quota]

    def find(self, token: str, *, now: datetime | None = None) -> Caller | None:
        """Who a token stands for; None where nobody has it, Unauthenticated where it has expired.

        Tokens are 256 random bits, so a fast hash is enough: there is no dictionary to try, and a
        slow one would let strangers keep the server busy. Every entry is hashed and compared in
        constant time, and none ends the search, so how long it takes says nothing of any token.
        """
        found: Token | None = None
        for entry in self.tokens.values():
            is_same = hmac.compare_digest(entry.hash, digest(token, entry.salt))
            found = entry if is_same else found
        if found is None:
            return None
        ends_at = found.ends_at()
        if ends_at is not None and (now or datetime.now(UTC)) >= ends_at:
            raise Unauthenticated(f"the token expired on {found.expires}; ask for a new one")
        quota = self.quotas.get(found.tenant, Quota())
        return Caller(found.tenant, frozenset(found.scopes), quota)


def watch(path: Path, *, every_s: float = 1.0) -> Watched[TokenFile]:
    """The file's tokens, read again when it changes; ConfigError where it can't be used now."""
    return Watched([path], lambda: read(path), every_s=every_s)


def read(path: Path) -> TokenFile:
    """The tokens of a file that others can't touch."""
    check_private(path, SETTING)
    found = settings.from_file(path, name=str(path))
    sections: dict[tuple[str, str], settings.Settings] = {}
    for (*section, key), setting in found.items():
        if len(section) != 2 or section[0] not in ("tokens", "tenants"):
            raise ConfigError(
                f"{path}: unknown key {'.'.join((*section, key))}; its sections are [tokens.ID] "
                "and [tenants.NAME]"
            )
        kind, name = section
        blamed = setting._replace(origin=f"{path}: [{kind}.{name}]")
        sections.setdefault((kind, name), {})[(key,)] = blamed
    tokens: dict[str, Token] = {}
    quotas: dict[str, Quota] = {}
    for (kind, name), values in sections.items():
        try:
            if kind == "tokens":
                tokens[name] = _token(values)
            else:
                quotas[name] = settings.apply(Quota(), values)
        except ConfigError as error:
            raise ConfigError(f"{path}: [{kind}.{name}]: {error}") from None
    return TokenFile(tokens, quotas)


def _token(values: settings.Settings) -> Token:
    wanted = {entry.name for entry in fields(Token) if entry.default is MISSING}
    missing = sorted(wanted - {key for (key,) in values})
    if missing:
        raise ConfigError(f"{', '.join(missing)} is missing")
    return settings.apply(Token("nobody", (), "0" * 32, "0" * 64), values)


def digest(token: str, salt: str) -> str:
    """What the file keeps of a token, in hexadecimal digits."""
    return hashlib.blake2b(
        token.encode(errors="replace"), digest_size=32, salt=bytes.fromhex(salt), person=PERSON
    ).hexdigest()


def new_token() -> str:
    """256 random bits, and a beginning that scanners for secrets can find."""
    return PREFIX + secrets.token_urlsafe(32)


def entry_of(token: str, *, tenant: str, scopes: Sequence[str], expires: str = "") -> Token:
    """The file's entry of a token, with a salt of its own."""
    salt = secrets.token_hex(16)
    return Token(tenant, tuple(scopes), salt, digest(token, salt), expires)


def expiry(lifetime: str, *, now: datetime | None = None) -> str:
    """The moment that is `90d`, `12h` or `30m` from now."""
    found = re.fullmatch(r"(\d{1,5})([dhm])", lifetime)
    if found is None or not int(found[1]):
        raise ConfigError(
            f"--expires is {lifetime!r}; it must be a number of days, hours or minutes: 90d, 12h, "
            "30m"
        )
    unit = {"d": "days", "h": "hours", "m": "minutes"}[found[2]]
    moment = (now or datetime.now(UTC)) + timedelta(**{unit: int(found[1])})
    return moment.isoformat(timespec="seconds")


def append(path: Path, token_id: str, token: Token) -> None:
    """Adds an entry; a file that is not there is made, for its owner only."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError as error:
        raise ConfigError(f"{path} can't be written: {error.strerror}") from None
    with os.fdopen(handle, "ab") as file:
        if token_id in read(path).tokens:
            raise ConfigError(f"{path} has a token with the id {token_id} already; try again")
        file.write(_section(token_id, token).encode())


def remove(path: Path, token_id: str) -> None:
    """Takes an entry out and leaves every other line as it is."""
    before = read(path)
    if token_id not in before.tokens:
        known = ", ".join(before.tokens) or "none"
        raise ConfigError(f"{path} has no token with the id {token_id!r}; its ids are {known}")
    lines = path.read_text("utf-8").splitlines(keepends=True)
    header = re.compile(r"\s*\[")
    kept: list[str] = []
    is_inside = False
    for line in lines:
        if header.match(line):
            is_inside = line.strip() == f"[tokens.{token_id}]"
        kept += [] if is_inside else [line]
    _replace(path, "".join(kept))
    wanted = {name: one for name, one in before.tokens.items() if name != token_id}
    if read(path) != before._replace(tokens=wanted):
        _replace(path, "".join(lines))
        raise ConfigError(
            f"{path} writes [tokens.{token_id}] in a way that can't be taken out by its lines; "
            "remove it by hand"
        )


def _section(token_id: str, token: Token) -> str:
    body = "".join(
        f"{entry.name} = {settings.format_value(getattr(token, entry.name))}\n"
        for entry in fields(token)
        if getattr(token, entry.name) != entry.default
    )
    return f"\n[tokens.{token_id}]\n{body}"


def _replace(path: Path, text: str) -> None:
    """All of the file at once, so that no server reads half of it."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)  # for its owner only
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(name, path)
