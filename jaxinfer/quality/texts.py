"""What two models are compared on: the bundled text, and files of the user's own."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from jaxinfer.errors import InvalidRequest

BUNDLED = Path(__file__).with_name("text.jsonl")
CALIBRATION = Path(__file__).with_name("calibration.jsonl")


@dataclass(frozen=True)
class Document:
    """One text, never compared across its end."""

    text: str
    kind: str = ""
    """Fiction, code...: bundled documents are also summed up by kind."""


class Window(NamedTuple):
    """Tokens that are looked at together: a piece of one document."""

    tokens: np.ndarray  # i32, at least two
    kind: str


@runtime_checkable
class Encodes(Protocol):
    """What is asked of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        ...


def bundled() -> list[Document]:
    """Stories, plays, code, documentation, records and sums: about 70,000 tokens.

    The stories are in the public domain; text.jsonl says of each document what it is from.
    """
    return _shipped(BUNDLED)


def for_calibration() -> list[Document]:
    """200 prompts of many kinds, about 30,000 tokens, none of which is in the bundled text.

    They are of Spec-Bench (Xia et al. 2024), under Apache-2.0.
    """
    return _shipped(CALIBRATION)


def read(path: Path, *, flag: str = "text") -> list[Document]:
    """A file of the user's, given with --`flag`: text, or JSONL whose objects have a `text`."""
    try:
        whole = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"--{flag} {path} can't be read: {error}", field=flag) from error
    if path.suffix != ".jsonl":
        return [Document(whole)]
    found = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            found.append(Document(json.loads(line)["text"]))
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidRequest(
                f'--{flag} {path}, line {number}: it must be an object like {{"text": "..."}}',
                field=flag,
            ) from error
    return found


def windows(
    documents: Iterable[Document], tokenizer: Encodes, *, size: int, max_tokens: int
) -> list[Window]:
    """The documents in pieces of at most `size` tokens, as many of them as `max_tokens` allows.

    What is left out is left out of every kind alike, so that a short run has the same mix.
    """
    pieces = [
        Window(np.asarray(tokens[first : first + size], np.int32), one.kind)
        for one in documents
        for tokens in [tokenizer.encode(one.text)]
        for first in range(0, len(tokens) - 1, size)
    ]
    total = sum(len(piece.tokens) - 1 for piece in pieces)
    kept: list[Window] = []
    taken = seen = 0
    for piece in pieces:
        seen += len(piece.tokens) - 1
        # The share that is kept never runs ahead of max_tokens / total.
        if (taken + len(piece.tokens) - 1) * total <= seen * max(max_tokens, size):
            kept.append(piece)
            taken += len(piece.tokens) - 1
    return kept


def _shipped(path: Path) -> list[Document]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Document(one["text"], one["kind"]) for one in map(json.loads, lines)]


def digest(pieces: Sequence[Window]) -> str:
    """A short name for exactly these tokens."""
    whole = hashlib.sha256()
    for piece in pieces:
        whole.update(len(piece.tokens).to_bytes(4, "little") + piece.tokens.tobytes())
    return whole.hexdigest()[:16]
