"""Carries outputs from the engine's thread to the event loop, one mailbox for each live request."""

import asyncio
from collections.abc import Iterable, Sequence, Set
from dataclasses import replace
from itertools import chain
from typing import NamedTuple, Protocol, runtime_checkable

from jaxinfer.errors import DuplicateRequest, JaxinferError
from jaxinfer.host.request import Output, Request
from jaxinfer.server.answers import Answers, Draft
from jaxinfer.server.line import Line
from jaxinfer.server.resume import check_same

MAX_NEWS = 64  # outputs apart from each other, while nobody takes them


class Mailbox:
    """What a request got and its reader has not taken yet: one output, when it is taken.

    Outputs that arrive between two takes become one, so a slow reader gets larger pieces and never
    a longer queue.
    """

    def __init__(self) -> None:
        self.is_abandoned = False
        self.is_aborted = False  # by an operator
        self.has_begun = False
        self.draft: Draft | None = None  # of the whole answer, for those who ask again
        self._news: list[Output] = []
        self._last: Output | None = None
        self._is_over = False
        self._reader: asyncio.Future[None] | None = None
        self._is_end_awaited = False  # and news alone do not wake the reader

    @property
    def num_output_tokens(self) -> int:
        """Of the whole request, as far as its reader may know."""
        return 0 if self._last is None else self._last.num_output_tokens

    def put(self, output: Output) -> None:
        """Adds an output; on the loop's thread only."""
        self._last = output
        news = self._news
        news.append(output)
        if len(news) >= MAX_NEWS + len(news[0].token_ids) // 8:  # seldom, the more there is
            self._news = [_merged(news)]
        if output.finish_reason is not None:
            self._is_over = True
        if self._reader is not None and (self._is_over or not self._is_end_awaited):
            self._reader, reader = None, self._reader
            if not reader.done():
                reader.set_result(None)

    async def take(self) -> Output:
        """Waits for news and returns all of it as one output."""
        while not self._news:
            await self._wait(for_end=False)
        news, self._news = self._news, []
        return news[0] if len(news) == 1 else _merged(news)

    async def take_all(self) -> Output:
        """Waits for the end and returns everything as one output."""
        while not self._is_over:
            await self._wait(for_end=True)
        return await self.take()

    async def _wait(self, *, for_end: bool) -> None:
        self._is_end_awaited = for_end
        self._reader = asyncio.get_running_loop().create_future()
        await self._reader


def _merged(news: Sequence[Output]) -> Output:
    return replace(
        news[-1],
        token_ids=tuple(chain.from_iterable(one.token_ids for one in news)),
        logprobs=tuple(chain.from_iterable(one.logprobs for one in news)),
        text="".join(one.text for one in news),
    )


class Unclaimed(NamedTuple):
    """A request that came back from a snapshot, and everything that it got since."""

    request: Request
    mailbox: Mailbox


@runtime_checkable
class Observer(Protocol):
    """What sees every output, on the loop's thread: server.metrics, server.request_log."""

    def delivered(self, outputs: list[Output], cancelled: Set[str], /) -> None:
        """One step's outputs; nobody waits for those that are `cancelled`."""
        ...


class Hub:
    """The mailboxes of all live requests, and of restored ones that still wait for a reader."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        observers: Sequence[Observer] = (),
        *,
        answers: Answers | None = None,
        line: Line | None = None,
    ) -> None:
        self._loop = loop
        self.answers = Answers(0.0) if answers is None else answers
        self.line = Line() if line is None else line
        self._observers = observers
        self._mailboxes: dict[str, Mailbox] = {}
        self._unclaimed: dict[str, Unclaimed] = {}

    @property
    def live(self) -> list[str]:
        """Ids of requests that the engine has not ended yet, oldest first."""
        return list(self._mailboxes)

    def knows(self, request_id: str) -> bool:
        """Whether a request of that id is live, or its answer is kept."""
        return request_id in self._mailboxes or request_id in self.answers

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
        mailbox.draft = Draft(request)
        self._unclaimed[request.request_id] = Unclaimed(request, mailbox)

    def admit(self, request: Request, tenant: str = "") -> Mailbox:
        """A mailbox for a request that may wait; raises what it is told where it may not."""
        mailbox = self.open(request.request_id)
        try:
            self.line.check(request, tenant)
        except JaxinferError:
            self.forget(request.request_id)
            raise
        self.line.enter(request, tenant)
        mailbox.draft = Draft(request)
        return mailbox

    def answered(self, request: Request, *, is_seeded: bool) -> tuple[Request, Mailbox] | None:
        """A request that was served before under that id, and a mailbox with all it got."""
        found = self.answers.find(request, is_seeded=is_seeded)
        if found is None:
            return None
        mailbox = Mailbox()
        mailbox.put(found.output)
        return found.request, mailbox

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

    def abort(self, request_ids: Iterable[str]) -> list[str]:
        """Marks requests that an operator ends; returns those of them that are live."""
        live = [name for name in dict.fromkeys(request_ids) if name in self._mailboxes]
        for name in live:
            self._mailboxes[name].is_aborted = True
        return live

    def forget(self, request_id: str) -> None:
        """Drops the mailbox of a request that the engine did not take."""
        self._mailboxes.pop(request_id, None)
        self.line.leave(request_id)

    def abandon(self, request_id: str, mailbox: Mailbox) -> bool:
        """Says that no one reads a request any more; True where the engine should end it.

        Its id stays taken until the engine has ended it, so that a new request of the same name
        can't get the old one's last output.
        """
        if self._mailboxes.get(request_id) is not mailbox or mailbox.is_abandoned:
            return False
        mailbox.is_abandoned = True
        return True

    def deliver(self, outputs: list[Output]) -> None:
        """Takes the outputs of one engine step; on the engine's thread."""
        if outputs and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._spread, outputs)

    def _spread(self, outputs: list[Output]) -> None:
        cancelled: set[str] = set()
        for output in outputs:
            mailbox = self._mailboxes.get(output.request_id)
            if mailbox is None:
                continue
            if not mailbox.has_begun:
                mailbox.has_begun = True
                self.line.begin(output.request_id)
            if mailbox.draft is not None:
                mailbox.draft.add(output)
            if not mailbox.is_abandoned:
                mailbox.put(output)
            if output.finish_reason is not None:
                if mailbox.draft is not None:
                    self.answers.add(mailbox.draft, output)
                del self._mailboxes[output.request_id]
                if mailbox.is_abandoned or mailbox.is_aborted:
                    cancelled.add(output.request_id)
        for observer in self._observers:
            observer.delivered(outputs, cancelled)
