"""The live requests and what they have got so far, as a small file: enough to go on elsewhere.

Keys and values are not part of it: they are computed again, and come out the same.
"""

import base64
import json
import os
import zlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxinfer.errors import SnapshotRefused
from jaxinfer.host.plain import Record, request_from_plain, request_to_plain
from jaxinfer.host.request import Request

FORMAT = 1


class Saved(NamedTuple):
    """One request."""

    request: Request
    tokens: tuple[int, ...]  # sampled so far
    logprobs: tuple[float, ...]


class Snapshot(NamedTuple):
    """All of them, in order of arrival."""

    requests: tuple[Saved, ...]
    model: str = ""
    """What the programs and the model are: the tokens go on as they began only there."""


def write(snapshot: Snapshot, path: Path) -> None:
    """Writes the file, all of it or nothing."""
    content = {
        "snapshot": FORMAT,
        "model": snapshot.model,
        "requests": [
            [
                request_to_plain(one.request) | {"prompt": _encode("i", one.request.prompt)},
                _encode("i", one.tokens),
                _encode("f", one.logprobs),
            ]
            for one in snapshot.requests
        ],
    }
    text = json.dumps(content, separators=(",", ":")).encode()
    partial = path.with_name(f"{path.name}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(b"%08x %s\n" % (zlib.crc32(text), text))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read(path: Path) -> Snapshot | None:
    """Reads the file; None where there is none, SnapshotRefused where it is damaged."""
    try:
        checksum, _, text = path.read_bytes().partition(b" ")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SnapshotRefused(f"the snapshot {path} can't be read: {error.strerror}") from error
    text = text.rstrip(b"\n")
    if checksum != b"%08x" % zlib.crc32(text):
        raise SnapshotRefused(f"the snapshot {path} is damaged: its checksum differs")
    content: Record = json.loads(text)
    if content.get("snapshot") != FORMAT:
        raise SnapshotRefused(
            f"the snapshot {path} has format {content.get('snapshot')}, this is {FORMAT}"
        )
    return Snapshot(
        tuple(
            Saved(
                request_from_plain(request | {"prompt": _decode("i", request["prompt"])}),
                _decode("i", tokens),
                _decode("f", logprobs),
            )
            for request, tokens, logprobs in content["requests"]
        ),
        content["model"],
    )


def _encode(kind: str, values: Sequence[Any]) -> str:
    """Numbers of 4 bytes: a long answer must not keep Python busy for long."""
    return base64.b64encode(array(kind, values).tobytes()).decode()


def _decode(kind: str, text: str) -> tuple[Any, ...]:
    return tuple(array(kind, base64.b64decode(text)))
