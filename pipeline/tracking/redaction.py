"""Takes secrets out of what is written or printed: the one place that says what a secret is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar, cast
from urllib.parse import quote, quote_plus

T = TypeVar("T")

HIDDEN = "***"
"""Stands for what is left out."""

# Up to the last @ of a word: a password may hold @ and /, whether or not an address may. Of a user without a password,
# only what stands before the first slash: a path may hold @ too.
_CREDENTIALS = re.compile(r"(?P<scheme>[A-Za-z][\w+.-]*)://(?:[^\s/:@]*:\S*|[^\s/:@]+)@")
_QUERY = re.compile(r"(?P<name>[?&;][^\s?&;=]+)=[^\s&;]+")
#: Here the part before @ is a container or a path; no password is ever written there.
_WITHOUT_CREDENTIALS = {"abfs", "abfss", "wasb", "wasbs", "hdfs", "webhdfs", "viewfs", "file"}
#: Words of a name that say secret wherever they stand, and those that do as the last word only.
_SECRET = {"password", "passwd", "passphrase", "pwd", "secret", "credential", "credentials", "apikey"}
_SECRET_LAST = {"token", "key", "signature", "sig", "auth", "authorization"}
#: The password of an address that is nothing else; within a text, one with white space has no end.
_PASSWORD = re.compile(r"[A-Za-z][\w+.-]*://[^\s/:@]*:(?P<password>.*)@", re.S)
_known: set[str] = set()
"""Passwords with white space that this process was given."""


def remember(address: str) -> None:
    """Take the password of an address out of every text from now on, where white space hides its end."""
    found = _PASSWORD.match(address)
    if found and re.search(r"\s", found["password"]):
        _known.update(write(found["password"]) for write in (str, quote, quote_plus, partial(quote, safe="")))


def redact(value: T) -> T:
    """``value`` without secrets: text without the credentials of addresses, mappings without the values of secrets.

    Mappings, lists and tuples are gone through; all else stays as it is.
    """
    found: Any = value
    if isinstance(value, str):
        for password in _known:
            found = found.replace(password, HIDDEN)
        found = _QUERY.sub(_without_value, _CREDENTIALS.sub(_without_credentials, found))
    elif isinstance(value, Mapping):
        found = {key: _hide(item) if is_secret(str(key)) else redact(item) for key, item in value.items()}
    elif isinstance(value, list | tuple):
        found = [redact(item) for item in value]
        found = tuple(found) if isinstance(value, tuple) else found
    return cast(T, found)


def is_secret(name: str) -> bool:
    """Whether the name of a field says that its value is a secret."""
    words = [word.lower() for word in re.findall(r"[A-Z]*[a-z]+|[A-Z]+", name)]
    return bool(_SECRET & set(words)) or (bool(words) and words[-1] in _SECRET_LAST)


def _hide(value: Any) -> Any:
    """The values of a secret; what is not given is none, and a measured number is none either."""
    if isinstance(value, str):
        return HIDDEN if value and value != "None" else value
    if isinstance(value, int) and not isinstance(value, bool):
        return HIDDEN
    if isinstance(value, list | tuple):
        return [_hide(item) for item in value]
    return redact(value)


def _without_credentials(found: re.Match[str]) -> str:
    scheme = found["scheme"]
    return found[0] if scheme.lower() in _WITHOUT_CREDENTIALS else f"{scheme}://{HIDDEN}@"


def _without_value(found: re.Match[str]) -> str:
    return f"{found['name']}={HIDDEN}" if is_secret(found["name"]) else found[0]
