"""What the client of a live request is told: tokens, text and times."""

from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from jaxinfer.host.request import UNFINISHED, FinishReason, Output, Request, Timings
from jaxinfer.host.sequence import Sequence

PROMPT_TAIL = 8  # tokens of the prompt that may change how the first new one reads


@runtime_checkable
class Stream(Protocol):
    """Tokens in, text out: text.stream.TextStream."""

    def push(self, token_id: int, /) -> Any: ...
    def finish(self) -> str: ...


@runtime_checkable
class MakesStreams(Protocol):
    """What is needed of a tokenizer: text.tokenizer.Tokenizer."""

    def stream(self, prompt_tail: Items[int] = ..., *, stop: tuple[str, ...] = ...) -> Stream: ...


def open_stream(tokenizer: MakesStreams, request: Request) -> Stream:
    """The text of a request's answer, from its first token on."""
    return tokenizer.stream(request.prompt[-PROMPT_TAIL:], stop=request.sampling.stop)


@dataclass(slots=True)
class Live:
    """A request on its way, beside its sequence."""

    sequence: Sequence
    stream: Stream
    timings: Timings
    stop: str | int | None = None
    error: str = ""
    logprobs: list[float] = field(default_factory=list)  # of all tokens so far
    num_sent: int = 0  # of these, how many an output has told
    text: list[str] = field(default_factory=list)  # not told yet

    @property
    def request(self) -> Request:
        """What was asked."""
        return self.sequence.request

    @property
    def tokens(self) -> tuple[int, ...]:
        """What was sampled so far."""
        return tuple(self.sequence.tokens[len(self.request.prompt) :])

    def take(self, token: int, logprob: float) -> str | None:
        """One token into the text; returns the stop string that it completes."""
        self.logprobs.append(logprob)
        reason = self.sequence.finish_reason
        if reason in (FinishReason.EOS, FinishReason.STOP_TOKEN):
            self.stop = token if reason is FinishReason.STOP_TOKEN else None
            return None
        said = self.stream.push(token)
        self.text.append(said.text)
        if said.stop is not None:
            self.stop = said.stop
        return said.stop

    def go_on(self, logprobs: Items[float]) -> None:
        """Takes in the tokens that the sequence came with; the next output tells them all."""
        for token in self.tokens:
            self.text.append(self.stream.push(token).text)
        self.logprobs = list(logprobs)

    def end(self, now_s: float) -> None:
        """Its last text, which is certain only at the answer's own end; nothing follows."""
        if self.sequence.finish_reason not in (FinishReason.STOP_STRING, *UNFINISHED):
            self.text.append(self.stream.finish())
        self.timings = replace(self.timings, finished_s=now_s)

    def output(self) -> Output:
        """What was not told yet."""
        sent, self.num_sent = self.num_sent, len(self.logprobs)
        text, self.text = "".join(self.text), []
        sequence, num_prompt = self.sequence, len(self.request.prompt)
        return Output(
            request_id=self.request.request_id,
            token_ids=tuple(sequence.tokens[num_prompt + sent :]),
            logprobs=tuple(self.logprobs[sent:]),
            text=text,
            finish_reason=sequence.finish_reason,
            stop=self.stop,
            error=self.error,
            num_prompt_tokens=num_prompt,
            num_output_tokens=len(sequence.tokens) - num_prompt,
            num_preemptions=sequence.num_preemptions,
            num_cached_tokens=sequence.num_cached,
            timings=self.timings,
        )


class News:
    """What requests have got that nobody was told yet."""

    def __init__(self) -> None:
        self._fresh: dict[str, Live] = {}
        self._ended: list[Live] = []

    def __bool__(self) -> bool:
        return bool(self._fresh or self._ended)

    def add(self, live: Live) -> None:
        """It has got something."""
        self._fresh[live.request.request_id] = live

    def end(self, live: Live) -> None:
        """It has ended: what it has got is its last."""
        self._fresh.pop(live.request.request_id, None)
        self._ended.append(live)

    def tell(self) -> list[Output]:
        """All of it, once."""
        told = [*self._ended, *self._fresh.values()]
        self._ended, self._fresh = [], {}
        return [live.output() for live in told]
