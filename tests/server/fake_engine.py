"""An engine without a model: each token is a keyed hash of the prompt, the seed and the place."""

import codecs
import hashlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from jaxinfer.config import ModelConfig
from jaxinfer.errors import Draining, InvalidRequest, QueueFull
from jaxinfer.host.request import (
    EngineStats,
    FinishReason,
    Limits,
    Output,
    Request,
    SamplingParams,
    Timings,
    check_request,
)
from jaxinfer.runner import Pulse
from jaxinfer.server.served import Deliver, ServedModel
from jaxinfer.text.stops import StopMatcher

MODEL = "fake"
LIMITS = Limits(vocab_size=256, max_seq_len=512, eos_token_ids=(0,))
CHARACTERS = ("a", "é", "漢", "🙂", "z", "ß", "字", "🚀")
CONFIG = ModelConfig("llama", 256, 2, 64, 128, 4, 2, 16, 2048)


class FakeTokenizer:
    """One token for each byte; token 1 is special and goes first."""

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        return [1] * add_special + list(text.encode())

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        shown = bytes(token for token in ids if token > 1).decode(errors="replace")
        return shown if skip_special else "<s>" * list(ids).count(1) + shown

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> list[int]:
        if any(message["role"] == "narrator" for message in messages):
            raise InvalidRequest("no role 'narrator' in this chat template", field="messages")
        lines = [f"{message['role']}:{message.get('content')}" for message in messages]
        if tools:
            lines.append(f"tools={tools}")
        lines += [f"{name}={value}" for name, value in kwargs.items()]
        return self.encode("\n".join(lines) + "\nassistant:" * add_generation_prompt)


def served(*, defaults: SamplingParams | None = None) -> ServedModel:
    return ServedModel(
        MODEL, CONFIG, FakeTokenizer(), LIMITS, defaults or SamplingParams(max_tokens=8)
    )


def expected_tokens(prompt: Sequence[int], count: int, *, seed: int = 0) -> list[int]:
    key = hashlib.sha256(f"{list(prompt)} {seed}".encode()).digest()
    return [97 + key[place % 32] % 26 for place in range(count)]


def multibyte_tokens(prompt: Sequence[int], count: int, *, seed: int = 0) -> list[int]:
    """The bytes of characters of one to four bytes, so that text trails its tokens."""
    picks = expected_tokens(prompt, count, seed=seed)
    return list("".join(CHARACTERS[pick % 8] for pick in picks).encode())[:count]


def expected_logprobs(count: int) -> list[float]:
    return [-(place + 1) / 8 for place in range(count)]


def expected_text(text: str, count: int, *, seed: int = 0) -> str:
    return bytes(expected_tokens([1, *text.encode()], count, seed=seed)).decode()


@dataclass
class Sequence_:
    request: Request
    arrived_s: float
    tokens: list[int] = field(default_factory=list)
    first_s: float | None = None
    decoder: Any = field(default_factory=codecs.getincrementaldecoder("utf-8"))
    matcher: StopMatcher | None = None
    unsent: list[tuple[int, float, str]] = field(default_factory=list)
    stop: str | int | None = None
    reason: FinishReason | None = None
    is_cancelled: bool = False

    def __post_init__(self) -> None:
        if self.request.sampling.stop:
            self.matcher = StopMatcher(self.request.sampling.stop)


class FakeEngine:
    """One token for each live request and step; an EngineLike with dials for tests.

    `restored` are requests that it has from the start, each with so many tokens: its first output
    for them holds all of these.
    """

    def __init__(
        self,
        deliver: Deliver,
        *,
        step_s: float = 0.0,
        max_live: int = 1000,
        tokens: Callable[..., list[int]] = expected_tokens,
        restored: Sequence[tuple[Request, int]] = (),
        on_step: Callable[[list[Output]], None] = lambda outputs: None,
    ) -> None:
        self.scorer = None
        self.deliver, self.step_s, self.max_live, self.on_step = (
            deliver,
            step_s,
            max_live,
            on_step,
        )
        self.submitted: list[Request] = []
        self.cancelled: list[str] = []
        self.num_deliveries = 0
        self.steps_after_cancel: dict[str, int] = {}  # that began after a cancel, up to its end
        self._num_begun = 0
        self._cancelled_at: dict[str, int] = {}
        self.fail_with = ""
        self.submit_error: Exception | None = None
        self._live: dict[str, Sequence_] = {}
        self._tokens = tokens
        self._lock = threading.Condition()
        self._draining = self._stopped = False
        self._asked: list[tuple[Callable[[Any], Any], Future[Any]]] = []
        self._num_steps = self.num_flushed = 0
        self._crash: Exception | None = None
        self._ended: Callable[[Exception | None], None] = lambda error: None
        self.gate = threading.Event()  # a step ends only while it is open
        self.gate.set()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        for request, count in restored:
            sequence = self._live[request.request_id] = Sequence_(request, time.monotonic())
            for _ in range(count):
                self._push(sequence)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def pulse(self) -> Pulse:
        return Pulse(self._num_steps, bool(self._live or self._asked))

    def start(self, ended: Callable[[Exception | None], None] = lambda error: None) -> None:
        self._ended = ended
        self._thread.start()

    def ask(self, function: Callable[[Any], Any]) -> Future[Any]:
        answer: Future[Any] = Future()
        with self._lock:
            self._asked.append((function, answer))
            self._lock.notify_all()
        return answer

    def flush_prefix_cache(self) -> int:
        self.num_flushed += 1
        return 3

    def rotate_journal(self) -> None:
        return None

    def stats(self) -> EngineStats:
        return EngineStats(8, len(self._live), *[0] * 11, 0.0, 0.0, 0.0)

    def forget(self) -> None:
        """What was noted for tests, so that long runs keep no memory."""
        self.submitted.clear()
        self.cancelled.clear()
        self.steps_after_cancel.clear()

    def crash(self, error: Exception) -> None:
        """The thread ends as a failing engine's does."""
        with self._lock:
            self._crash = error
            self._lock.notify_all()

    def refuse(self) -> None:
        with self._lock:
            self._draining = True

    def accept(self) -> None:
        with self._lock:
            self._draining = False

    def submit(self, request: Request) -> None:
        with self._lock:
            if self.submit_error is not None:
                raise self.submit_error
            check_request(request, LIMITS)
            self.check_room()
            self.submitted.append(request)
            self._live[request.request_id] = Sequence_(request, time.monotonic())
            self._lock.notify_all()

    def check_room(self) -> None:
        if self._draining:
            raise Draining("the engine takes no new requests")
        if len(self._live) >= self.max_live:
            raise QueueFull(f"{self.max_live} requests are waiting")

    def cancel(self, request_id: str) -> None:
        with self._lock:
            self.cancelled.append(request_id)
            if request_id in self._live:
                self._live[request_id].is_cancelled = True
                self._cancelled_at[request_id] = self._num_begun
            self._lock.notify_all()

    def drain(self, timeout_s: float) -> bool:
        with self._lock:
            self._draining = True
            return self._lock.wait_for(lambda: not self._live, timeout_s)

    def stop(self, timeout_s: float | None = 5.0) -> bool:
        with self._lock:
            self._stopped = True
            self._lock.notify_all()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _loop(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(
                    lambda: self._live or self._stopped or self._asked or self._crash
                )
                if self._stopped or self._crash:
                    self._end()
                    return
                asked, self._asked = self._asked, []
            for function, answer in asked:
                answer.set_result(function(self))
            time.sleep(self.step_s)
            self.gate.wait()
            with self._lock:
                self._num_begun += 1
                advanced = [self._advance(sequence) for sequence in list(self._live.values())]
                outputs = [output for output in advanced if output is not None]
                for output in outputs:
                    if output.finish_reason is not None:
                        del self._live[output.request_id]
                        began = self._cancelled_at.pop(output.request_id, None)
                        if began is not None:
                            self.steps_after_cancel[output.request_id] = self._num_begun - began
                self._lock.notify_all()
            self._num_steps += 1
            self.num_deliveries += 1
            self.deliver(outputs)
            self.on_step(outputs)

    def _end(self) -> None:
        """Everyone who is live hears of it, as from runner.EngineThread."""
        self._ended(self._crash)
        reason = FinishReason.CANCELLED if self._crash is None else FinishReason.ERROR
        error = "" if self._crash is None else str(self._crash)
        outputs = [
            replace(self._output(one, reason, time.monotonic()), error=error)
            for one in self._live.values()
        ]
        self._live.clear()
        self._draining = True
        self._lock.notify_all()
        self.deliver(outputs)

    def _advance(self, sequence: Sequence_) -> Output | None:
        request, now = sequence.request, time.monotonic()
        if sequence.is_cancelled:
            return self._output(sequence, FinishReason.CANCELLED, now)
        if request.deadline_s is not None and now >= request.deadline_s:
            return self._output(sequence, FinishReason.DEADLINE, now)
        if self.fail_with:
            return self._output(sequence, FinishReason.ERROR, now)
        sequence.first_s = sequence.first_s or now
        self._push(sequence)
        return self._output(sequence, sequence.reason, now)

    def _push(self, sequence: Sequence_) -> None:
        """One token more, if it is not the end, and the text that it makes certain."""
        if sequence.reason is not None:
            return
        request, place = sequence.request, len(sequence.tokens)
        seed = request.sampling.seed or 0
        token = self._tokens(request.prompt, place + 1, seed=seed)[place]
        sequence.tokens.append(token)
        text = ""
        if token in request.sampling.stop_token_ids:
            sequence.reason, sequence.stop = FinishReason.STOP_TOKEN, token
        else:
            text = sequence.decoder.decode(bytes([token]))
            if sequence.matcher is not None:
                text, sequence.stop = sequence.matcher.push(text)
            if sequence.stop is not None:
                sequence.reason = FinishReason.STOP_STRING
            elif len(sequence.tokens) == request.sampling.max_tokens:
                sequence.reason = FinishReason.LENGTH
            elif len(request.prompt) + len(sequence.tokens) >= LIMITS.max_seq_len:
                sequence.reason = FinishReason.CONTEXT
        if sequence.reason not in (None, FinishReason.STOP_STRING):
            text += self._held_back(sequence)
        sequence.unsent.append((token, expected_logprobs(place + 1)[place], text))

    def _held_back(self, sequence: Sequence_) -> str:
        held, _ = sequence.decoder.getstate()
        text = held.decode(errors="replace")
        if sequence.matcher is None:
            return text
        return sequence.matcher.push(text).text + sequence.matcher.finish()

    def _output(self, sequence: Sequence_, reason: FinishReason | None, now: float) -> Output:
        unsent, sequence.unsent = sequence.unsent, []
        return Output(
            request_id=sequence.request.request_id,
            token_ids=tuple(token for token, _, _ in unsent),
            logprobs=tuple(logprob for _, logprob, _ in unsent),
            text="".join(text for _, _, text in unsent),
            finish_reason=reason,
            stop=sequence.stop,
            error=self.fail_with if reason is FinishReason.ERROR else "",
            num_prompt_tokens=len(sequence.request.prompt),
            num_output_tokens=len(sequence.tokens),
            num_cached_tokens=len(sequence.request.prompt) // 2,
            timings=Timings(
                sequence.arrived_s,
                sequence.arrived_s,
                sequence.first_s,
                None if reason is None else now,
            ),
        )
