"""The journal's files: a folder of segments, each a header and then one record a line.

    journal-000007.jsonl      5f3a9c01 {"journal": 1, "segment": 7, ...}
                              e8c00b2d {"step": 0, "now": 12.5, ...}

Before each line stands the CRC-32 of its JSON text. A line goes to the operating system in one
write, so that a process that is killed loses at most the line that it was writing.
"""

import json
import logging
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jaxinfer.errors import JournalRefused
from jaxinfer.host.journal import FORMAT
from jaxinfer.host.plain import Record

_PATTERN = "journal-*.jsonl"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Segment:
    """One file, read."""

    path: Path
    header: Record
    records: list[Record]
    is_torn: bool
    """Its last line was not written to the end."""


class Writer:
    """Appends to the newest segment; the oldest ones are deleted.

    A disk that fails costs the journal, not the service: it is logged once, and nothing more is
    written.
    """

    def __init__(
        self, folder: Path, header: Record, *, segment_bytes: int, num_segments: int
    ) -> None:
        self.is_broken = False
        self._folder = folder
        self._header = header
        self._segment_bytes = segment_bytes
        self._num_segments = num_segments
        self._num_bytes = 0
        self._file = -1
        self.path = folder  # of the segment, as soon as it is open
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._open({})

    @property
    def is_full(self) -> bool:
        """Whether the next segment should begin as soon as there is a state to begin it with."""
        return self._num_bytes >= self._segment_bytes and not self.is_broken

    def append(self, record: Record) -> None:
        """Writes one line."""
        self._guard(lambda: self._write(record))

    def rotate(self, state: Record) -> None:
        """Begins a new segment."""
        self._guard(lambda: self._open(state))

    def close(self) -> None:
        """Nothing more is written."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _guard(self, write: Callable[[], None]) -> None:
        if self.is_broken:
            return
        try:
            write()
        except OSError as error:
            self.is_broken = True
            log.error("the journal in %s stops here: %s", self._folder, error)

    def _open(self, state: Record) -> None:
        self.close()
        known = segments(self._folder)
        number = 1 + max((_number(path) for path in known), default=0)
        path = self._folder / f"journal-{number:06}.jsonl"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
        self._file = os.open(path, flags, 0o600)
        self._write({"journal": FORMAT, "segment": number} | self._header | {"state": state})
        self.path = path
        self._num_bytes = 0  # a large state must not fill a segment by itself
        for old in known[: max(0, len(known) + 1 - self._num_segments)]:
            old.unlink(missing_ok=True)

    def _write(self, record: Record) -> None:
        text = json.dumps(record, separators=(",", ":")).encode()
        line = b"%08x %s\n" % (zlib.crc32(text), text)
        if os.write(self._file, line) < len(line):
            raise OSError("a line was written only in part; is the disk full?")
        self._num_bytes += len(line)


def segments(folder: Path) -> list[Path]:
    """The files of a journal, oldest first."""
    return sorted(folder.glob(_PATTERN), key=_number)


def read(path: Path) -> Segment:
    """Reads one segment; raises JournalRefused where it is damaged before its last line."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise JournalRefused(f"{path} can't be read: {error.strerror}") from error
    tail = lines.pop()
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is None:
            raise JournalRefused(
                f"{path} is damaged: line {number} of {len(lines)} does not have its checksum"
            )
        records.append(record)
    if not records or "journal" not in records[0]:
        raise JournalRefused(f"{path} is no journal: it does not begin with a header")
    header = records.pop(0)
    if header["journal"] != FORMAT:
        raise JournalRefused(
            f"{path} has format {header['journal']}, this is jaxinfer with format {FORMAT}"
        )
    return Segment(path, header, records, is_torn=bool(tail))


def find(where: Path, *, number: int | None = None) -> Path:
    """The file that is meant by a segment or a folder: the newest one, or that number."""
    if where.is_file():
        return where
    known = segments(where)
    if not known:
        raise JournalRefused(f"there is no journal in {where}: no file is called {_PATTERN}")
    if number is None:
        return known[-1]
    for path in known:
        if _number(path) == number:
            return path
    have = f"{_number(known[0])} to {_number(known[-1])}"
    raise JournalRefused(f"there is no segment {number} in {where}; it has {have}")


def _parse(line: bytes) -> Record | None:
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        return None
    return json.loads(text)


def _number(path: Path) -> int:
    digits = path.stem.rpartition("-")[2]
    return int(digits) if digits.isdigit() else 0
