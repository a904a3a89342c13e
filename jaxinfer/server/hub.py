"""Carries outputs from the engine's thread to the event loop, one mailbox for each live request."""

import asyncio
from dataclasses import replace
from typing import NamedTuple

from jaxinfer.errors import DuplicateRequest
from jaxinfer.host.request import Output, Request
from jaxinfer.server.resume import check_same


class Mailbox:
    """What a request got and its reader has not taken yet: always at most one output.

    Outputs that arrive between two takes become one, so a slow reader gets larger pieces and never
    a longer queue.
    """

    def __init__(self) -> None:
        self.is_abandoned = False
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._text: list[str] = []
        self._last: Output | None = None
        self._arrived = asyncio.Event()
        self._finished = asyncio.Event()

    def put(self, output: Output) -> None:
        """Adds an output; on the loop's thread only."""
        self._last = output
        self._token_ids += output.token_ids
        self._logprobs += output.logprobs
        self._text.append(output.text)
        self._arrived.set()
        if output.finish_reason is not None:
            self._finished.set()

    async def take(self) -> Output:
        """Waits for news and returns all of it as one output."""
        await self._arrived.wait()
        self._arrived.clear()
        assert self._last is not None
        merged = replace(
            self._last,
            token_ids=tuple(self._token_ids),
            logprobs=tuple(self._logprobs),
            text="".join(self._text),
        )
        self._token_ids, self._logprobs, self._text = [], [], []
        return merged

    async def take_all(self) -> Output:
        """Waits for the end and returns everything as one output."""
        await self._finished.wait()
        return await self.take()


class Unclaimed(NamedTuple):
    """A request that came back from a snapshot, and everything that it got since."""

    request: Request
    mailbox: Mailbox


class Hub:
    """The mailboxes of all live requests, and of restored ones that still wait for a reader."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._mailboxes: dict[str, Mailbox] = {}
        self._unclaimed: dict[str, Unclaimed] = {}

    @property
    def live(self) -> list[str]:
        """Ids of requests that the engine has not ended yet, oldest first."""
        return list(self._mailboxes)

    def open(self, request_id: str) -> Mailbox:
        """A mailbox for a request that is about to be submitted."""
        if request_id in self._unclaimed:
            raise DuplicateRequest(
                f"a request with id {request_id!r} waits for its client to resume; ask with "
                "resume to go on with it, or use another id",
                field="request_id",
            )
        if request_id in self._mailboxes:
            raise DuplicateRequest(
                f"a request with id {request_id!r} is still live; use another id, or leave "
                "request_id out and one is drawn",
                field="request_id",
            )
        mailbox = self._mailboxes[request_id] = Mailbox()
        return mailbox

    def expect(self, request: Request) -> None:
        """Collects what a restored request gets, until it is claimed; before the engine runs."""
        mailbox = self.open(request.request_id)
        self._unclaimed[request.request_id] = Unclaimed(request, mailbox)

    def claim(self, request: Request) -> Mailbox | None:
        """The mailbox of a restored request, with all that it ever got; None where there is none.

        The first one to ask has it. Raises InvalidRequest where `request` is not that request.
        """
        unclaimed = self._unclaimed.get(request.request_id)
        if unclaimed is None:
            return None
        check_same(request, unclaimed.request)
        del self._unclaimed[request.request_id]
        return unclaimed.mailbox

    def expire(self) -> list[str]:
        """Gives up waiting for claims; returns the requests that the engine should now end."""
        unclaimed, self._unclaimed = self._unclaimed, {}
        return [name for name, one in unclaimed.items() if self.abandon(name, one.mailbox)]

    def forget(self, request_id: str) -> None:
        """Drops the mailbox of a request that the engine did not take."""
        self._mailboxes.pop(request_id, None)

    def abandon(self, request_id: str, mailbox: Mailbox) -> bool:
        """Says that no one reads a request any more; True where the engine should end it.

        Its id stays taken until the engine has ended it, so that a new request of the same name
        can't get the old one's last output.
        """
        if self._mailboxes.get(request_id) is not mailbox:
            return False
        mailbox.is_abandoned = True
        return True

    def deliver(self, outputs: list[Output]) -> None:
        """Takes the outputs of one engine step; on the engine's thread."""
        if outputs and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._spread, outputs)

    def _spread(self, outputs: list[Output]) -> None:
        for output in outputs:
            mailbox = self._mailboxes.get(output.request_id)
            if mailbox is None:
                continue
            if not mailbox.is_abandoned:
                mailbox.put(output)
            if output.finish_reason is not None:
                del self._mailboxes[output.request_id]
