"""Answers that are done, kept for a while: who asks again under the same id gets the same one."""

import hashlib
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from jaxinfer.host.request import UNFINISHED, Output, Request
from jaxinfer.server.resume import check_same

MAX_COUNT = 4096
MAX_BYTES = 16 * 1024 * 1024
OWN_BYTES = 2048  # of what is kept beside tokens and text


class Draft:
    """An answer while it grows."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._token_ids = array("i")
        self._logprobs = array("d")
        self._text: list[str] = []

    def add(self, output: Output) -> None:
        """What one step brought."""
        self._token_ids.extend(output.token_ids)
        self._logprobs.extend(output.logprobs)
        self._text.append(output.text)

    def whole(self, last: Output) -> Output:
        """All of it, as one output."""
        return replace(
            last,
            token_ids=tuple(self._token_ids),
            logprobs=tuple(self._logprobs),
            text="".join(self._text),
        )


class Kept(NamedTuple):
    """One answer; of its prompt only the digest."""

    request: Request
    digest: bytes
    draft: Draft
    last: Output
    num_bytes: int
    until_s: float


class Answered(NamedTuple):
    """The request that was served under an id, and everything that it got."""

    request: Request
    output: Output


class Answers:
    """Answers by request id, for `ttl_s` seconds; the oldest go first where there are too many."""

    def __init__(
        self,
        ttl_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        max_count: int = MAX_COUNT,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._ttl_s = ttl_s
        self._clock = clock
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._num_bytes = 0

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._kept

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def num_bytes(self) -> int:
        """About what they take."""
        return self._num_bytes

    def add(self, draft: Draft, last: Output) -> None:
        """Keeps an answer that came to its end; one that was cut short is not one."""
        if not self._ttl_s or last.finish_reason in UNFINISHED:
            return
        request = draft.request
        self._drop(request.request_id)
        text_bytes = sum(len(part.encode()) for part in draft._text)
        num_bytes = OWN_BYTES + 12 * last.num_output_tokens + text_bytes
        last = replace(last, token_ids=(), logprobs=(), text="")
        self._kept[request.request_id] = Kept(
            replace(request, prompt=()),
            _digest(request.prompt),
            draft,
            last,
            num_bytes,
            self._clock() + self._ttl_s,
        )
        draft.request = self._kept[request.request_id].request
        self._num_bytes += num_bytes
        self._shrink()

    def find(self, request: Request, *, is_seeded: bool) -> Answered | None:
        """The answer to a request that was served before; None where none is kept.

        Raises InvalidRequest where another request had its id. A request without a seed of its own
        is the same whichever seed was drawn.
        """
        self._shrink()
        kept = self._kept.get(request.request_id)
        if kept is None:
            return None
        is_same = _digest(request.prompt) == kept.digest
        before = replace(kept.request, prompt=request.prompt if is_same else ())
        drawn = (
            request.sampling if is_seeded else replace(request.sampling, seed=before.sampling.seed)
        )
        check_same(replace(request, sampling=drawn), before)
        return Answered(before, kept.draft.whole(kept.last))

    def _shrink(self) -> None:
        now_s = self._clock()
        while self._kept:
            name, oldest = next(iter(self._kept.items()))
            is_over = len(self._kept) > self._max_count or self._num_bytes > self._max_bytes
            if not is_over and oldest.until_s > now_s:
                return
            self._drop(name)

    def _drop(self, request_id: str) -> None:
        kept = self._kept.pop(request_id, None)
        if kept is not None:
            self._num_bytes -= kept.num_bytes


def _digest(prompt: tuple[int, ...]) -> bytes:
    return hashlib.sha256(array("q", prompt).tobytes()).digest()
