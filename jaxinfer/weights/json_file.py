"""Reads JSON files key by key, with errors that name file, key and value."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxinfer.errors import CheckpointError, UnsupportedModel

MAX_SHOWN = 80


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError where there is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} holds a {type(document).__name__}; it must be an object")
    return document


class Keys(Mapping[str, Any]):
    """The keys of one JSON object; absent and null mean the same, as in Hugging Face configs."""

    def __init__(self, document: Mapping[str, Any], path: Path, prefix: str = "") -> None:
        self._document = document
        self._path = path
        self._prefix = prefix

    def __getitem__(self, key: str) -> Any:
        return self._document[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._document)

    def __len__(self) -> int:
        return len(self._document)

    def section(self, key: str) -> "Keys | None":
        """An object inside this one; None where it is absent."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.unsupported(key, "it must be an object")
        return Keys(value, self._path, f"{self._prefix}{key}.")

    def count(self, key: str, default: int | None = None, *, low: int = 1) -> int:
        """A whole number, at least `low`."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise self.unsupported(key, f"it must be a whole number, at least {low}")
        return value

    def number(self, key: str, default: float | None = None, *, low: float = 0.0) -> float:
        """A finite number, at least `low`."""
        value = self._value(key, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value < low:
            raise self.unsupported(key, f"it must be a number, at least {low:g}")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false; absent is false."""
        value = self._value(key, False)
        if not isinstance(value, bool):
            raise self.unsupported(key, "it must be true or false")
        return value

    def text(self, key: str) -> str | None:
        """A string, or None where it is absent."""
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            raise self.unsupported(key, "it must be a string")
        return value

    def token_id(self, key: str) -> int | None:
        """One token id, or None where it is absent."""
        return None if self.get(key) is None else self.count(key, low=0)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One token id or a list of them, each once; () where it is absent."""
        value = self.get(key)
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise self.unsupported(key, "it must be a token id or a list of them")
        return tuple(dict.fromkeys(ids))

    def unsupported(self, key: str, need: str) -> UnsupportedModel:
        """The error for the value of one key, to be raised by the caller."""
        shown = repr(self.get(key))
        shown = shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}..."
        state = f"is {shown}" if key in self else "is absent"
        return UnsupportedModel(f"{self._path}: {self._prefix}{key} {state}; {need}")

    def _value(self, key: str, default: Any) -> Any:
        value = self.get(key)
        return default if value is None else value
