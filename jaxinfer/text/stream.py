"""Text of a growing token sequence, each part as soon as it is certain."""

import codecs
from collections.abc import Sequence
from typing import NamedTuple

from jaxinfer.text.pieces import PieceTable, num_stripped
from jaxinfer.text.stops import StopMatcher

MAX_CHARACTER_BYTES = 4


class StreamStep(NamedTuple):
    """What one token made certain; `stop` is the stop string that it completed."""

    text: str
    stop: str | None = None


class TextStream:
    """Turns tokens into text one at a time; made by `Tokenizer.stream`.

    Without stop strings, all pushed text and `finish()` joined are what the tokens add to the
    prompt's text: `decode(prompt + tokens)` less `decode(prompt)`, and `decode(tokens)` where the
    prompt is empty. A character that the prompt left half done belongs to the stream. Bytes that
    may still become a character are held back; so is text that may become a stop string. With
    stop strings, the text ends before the first one to be complete (see StopMatcher).
    """

    __slots__ = ("_at_start", "_first", "_matcher", "_num_strip", "_pending", "_pieces", "_stop")

    def __init__(
        self, pieces: PieceTable, *, prompt_tail: Sequence[int] = (), stop: Sequence[str] = ()
    ) -> None:
        self._pieces = pieces
        self._pending = b""
        self._num_strip = pieces.rule.num_strip
        self._first = True
        self._at_start = True  # the first token, or characters to strip, may still come
        self._matcher = StopMatcher(stop) if stop else None
        self._stop: str | None = None
        self._follow(prompt_tail)

    def push(self, token_id: int) -> StreamStep:
        """The text that this token made certain; after a stop string, no more text."""
        if self._stop is not None:
            return StreamStep("", self._stop)
        text = self._pieces[token_id].text
        if text is None or self._pending or self._at_start:
            text = self._decode(token_id)
        return StreamStep(text) if self._matcher is None else self._match(text)

    def finish(self) -> str:
        """The text that was held back; half a character is one U+FFFD."""
        if self._stop is not None:
            return ""
        text, self._pending = self._pending.decode("utf-8", "replace"), b""
        if self._matcher is None:
            return text
        step = self._match(text)
        return step.text if step.stop else step.text + self._matcher.finish()

    def _follow(self, prompt_tail: Sequence[int]) -> None:
        """Starts behind the prompt: only its last few bytes can still matter."""
        data = b""
        for token_id in reversed(prompt_tail):
            piece = self._pieces[token_id]
            if not piece.skipped:
                self._first, self._at_start, self._num_strip = False, False, 0
                data = piece.data + data
            if len(data) >= MAX_CHARACTER_BYTES:
                break
        _, used = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[used:]

    def _decode(self, token_id: int) -> str:
        """The slow path: bytes that wait for others, and the start of a text."""
        piece = self._pieces[token_id]
        if self._first:
            if piece.skipped:
                return ""
            piece = self._pieces.first(token_id)
            self._first = False
        data = self._pending + piece.data
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        if self._num_strip and text:
            count = num_stripped(text, self._pieces.rule.strip, self._num_strip)
            self._num_strip = self._num_strip - count if count == len(text) else 0
            text = text[count:]
        self._at_start = self._num_strip > 0
        return text

    def _match(self, text: str) -> StreamStep:
        assert self._matcher is not None
        found = self._matcher.push(text)
        self._stop = found.stop
        return StreamStep(found.text, found.stop)
