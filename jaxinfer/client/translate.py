"""Keyword arguments to messages of `jaxinfer.v1`, and messages to results."""

import difflib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict, TypeVar

from google.protobuf.message import Message

from jaxinfer.client.results import (
    Completed,
    Completion,
    Delta,
    Model,
    Score,
    Stamps,
    Timings,
    Usage,
)
from jaxinfer.errors import ClientError, InvalidRequest
from jaxinfer.host.request import FinishReason, SamplingParams
from jaxinfer.v1 import inference_pb2 as pb
from jaxinfer.v1 import model_pb2

M = TypeVar("M", bound=Message)
ChatMessages = Sequence[Mapping[str, Any]]
Clock = Callable[[], float]


class Options(TypedDict, total=False):
    """What `generate` and `stream` take by keyword; what is left out, the server decides."""

    token_ids: Sequence[int]
    """A prompt in tokens, taken as it is."""
    messages: ChatMessages
    """A prompt as a conversation: mappings with role, content and what else the template reads."""
    tools: ChatMessages
    template_kwargs: Mapping[str, Any]
    add_generation_prompt: bool
    request_id: str
    model: str
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    max_tokens: int
    min_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: bool
    priority: int
    use_prefix_cache: bool
    """False computes the whole prompt, and leaves nothing of it behind for others."""
    timeout_s: float | None
    """The call's deadline, which also ends the request in the server."""
    resume_s: float
    """How long to ask again where the connection or the server is lost, from the last news on.

    The answer then goes on where it was: nothing is missing and nothing comes twice. 0, the
    default, raises the first such error.
    """


# Option name -> the message inside the request that holds it; "" is the request itself.
PLACES = {
    **{field.name: "sampling" for field in pb.Sampling.DESCRIPTOR.fields},
    **{field.name: "stopping" for field in pb.Stopping.DESCRIPTOR.fields},
    "logprobs": "output",
    "request_id": "",
    "model": "",
    "priority": "",
    "use_prefix_cache": "",
}
CHAT_ONLY = ("tools", "template_kwargs", "add_generation_prompt")
MESSAGE_FIELDS = ("role", "content")


def to_request(kind: type[M], prompt: str | None, options: Mapping[str, Any]) -> M:
    """A GenerateRequest or GenerateStreamRequest."""
    _check_names(options)
    groups: dict[str, dict[str, Any]] = {"": {}, "sampling": {}, "stopping": {}, "output": {}}
    groups["output"] = {"text": True, "token_ids": True}
    for name, place in PLACES.items():
        value = options.get(name)
        if value is not None:
            groups[place][name] = [value] if name == "stop" and isinstance(value, str) else value
    return build(
        kind,
        **to_prompt(prompt, options),
        **groups[""],
        sampling=build(pb.Sampling, **groups["sampling"]),
        stopping=build(pb.Stopping, **groups["stopping"]),
        output=build(pb.OutputOptions, **groups["output"]),
    )


def to_prompt(prompt: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """The one prompt among the three ways to give it."""
    ways = {
        "prompt": prompt,
        "token_ids": options.get("token_ids"),
        "messages": options.get("messages"),
    }
    given = [name for name, value in ways.items() if value is not None]
    if len(given) != 1:
        told = " and ".join(given) or "none"
        raise InvalidRequest(
            f"give one of prompt, token_ids and messages, not {told}", field="prompt"
        )
    stray = [name for name in CHAT_ONLY if options.get(name) is not None]
    if stray and given != ["messages"]:
        raise InvalidRequest(f"{stray[0]} goes with messages, not {given[0]}", field=stray[0])
    match given[0]:
        case "prompt":
            return {"text": prompt}
        case "token_ids":
            return {"token_ids": build(pb.TokenIds, ids=options["token_ids"])}
        case _:
            return {"chat": _to_chat(options)}


def build(kind: type[M], **values: Any) -> M:
    """A message; InvalidRequest, naming the field, where a value is of the wrong type or size."""
    message = kind()
    for name, value in values.items():
        try:
            message.MergeFrom(kind(**{name: value}))
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"{name} is {value!r:.100}: {error}", field=name) from None
    return message


class StreamReader:
    """Puts the messages of one stream together, with the client's own stamps."""

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self._clock = clock
        self._sent_s = clock()
        self._first_s: float | None = None
        self._last_s: float | None = None
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._started = pb.Started()
        self._finished = pb.Finished()

    @property
    def started(self) -> pb.Started | None:
        """The stream's first message, once it came."""
        return self._started if self._started.HasField("request_id") else None

    @property
    def resume(self) -> pb.Resume:
        """How much of the answer is here already."""
        num_text_bytes = sum(len(text.encode()) for text in self._text)
        return pb.Resume(num_tokens=len(self._token_ids), num_text_bytes=num_text_bytes)

    def feed(self, message: pb.GenerateStreamResponse) -> Delta | Completed | None:
        """The event that a message is; None for those that only help to build the last one."""
        match message.WhichOneof("event"):
            case "started":
                self._started = message.started
            case "delta":
                return self._delta(message.delta)
            case "finished":
                self._finished = message.finished
            case "summary":
                return Completed(self._completion(message.summary))
            case _:  # an event that a newer server may have
                pass
        return None

    def _delta(self, message: pb.Delta) -> Delta:
        delta = Delta(message.text, tuple(message.token_ids), tuple(message.logprobs))
        self._last_s = self._clock()
        if self._first_s is None:
            self._first_s = self._last_s
        self._text.append(delta.text)
        self._token_ids += delta.token_ids
        self._logprobs += delta.logprobs
        return delta

    def _completion(self, summary: pb.Summary) -> Completion:
        output = pb.Delta(
            text="".join(self._text), token_ids=self._token_ids, logprobs=self._logprobs
        )
        message = pb.GenerateResponse(
            started=self._started, output=output, finished=self._finished, summary=summary
        )
        return to_completion(message, stamps=self._stamps())

    def _stamps(self) -> Stamps:
        if self._first_s is None or self._last_s is None:
            return Stamps()
        more = len(self._token_ids) - 1
        tpot_s = (self._last_s - self._first_s) / more if more > 0 else None
        return Stamps(self._first_s - self._sent_s, tpot_s, self._last_s - self._sent_s)


def to_completion(message: pb.GenerateResponse, *, stamps: Stamps) -> Completion:
    """A finished request."""
    stop = message.finished.WhichOneof("stop")
    return Completion(
        text=message.output.text,
        token_ids=tuple(message.output.token_ids),
        finish_reason=_finish_reason(message.finished.reason),
        usage=Usage(**_present(message.summary.usage)),
        timings=Timings(**_present(message.summary.timings)),
        parameters=_sampling(message.started.parameters),
        request_id=message.started.request_id,
        model=message.started.model,
        stop=getattr(message.finished, stop) if stop else None,
        logprobs=tuple(message.output.logprobs),
        stamps=stamps,
    )


def to_score(message: pb.ScoreResponse) -> Score:
    """The scores of a text."""
    return Score(tuple(message.token_ids), tuple(message.logprobs), tuple(message.is_likeliest))


def to_model(message: model_pb2.Model) -> Model:
    """A model that a server has."""
    return Model(
        name=message.name,
        architecture=message.architecture,
        vocab_size=message.vocab_size,
        max_seq_len=message.max_seq_len,
        num_layers=message.num_layers,
        d_model=message.d_model,
        eos_token_ids=tuple(message.eos_token_ids),
        defaults=_sampling(message.defaults),
    )


def _check_names(options: Mapping[str, Any]) -> None:
    known = Options.__annotations__
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
            raise TypeError(f"unknown option {name!r}; {hint}")


def _to_chat(options: Mapping[str, Any]) -> pb.Chat:
    json_fields = {
        f"{name}_json": _to_json(options[name], field=name)
        for name in ("tools", "template_kwargs")
        if options.get(name) is not None
    }
    opens = options.get("add_generation_prompt")
    messages = [_to_chat_message(message) for message in options["messages"]]
    more = {} if opens is None else {"add_generation_prompt": opens}
    return build(pb.Chat, messages=messages, **json_fields, **more)


def _to_chat_message(message: Mapping[str, Any]) -> pb.ChatMessage:
    plain = {name: message[name] for name in MESSAGE_FIELDS if isinstance(message.get(name), str)}
    more = {name: value for name, value in message.items() if name not in plain}
    if more:
        plain["fields_json"] = _to_json(more, field="messages")
    return build(pb.ChatMessage, **plain)


def _to_json(value: Any, *, field: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{field} can't be written as JSON: {error}", field=field) from None


def _finish_reason(reason: int) -> FinishReason:
    if reason not in pb.FinishReason.values() or reason == pb.FINISH_REASON_UNSPECIFIED:
        raise ClientError(
            f"the server ended for a reason numbered {reason}, which this client does not know; "
            "use a newer client"
        )
    return FinishReason[pb.FinishReason.Name(reason).removeprefix("FINISH_REASON_")]


def _sampling(parameters: pb.Parameters) -> SamplingParams:
    return SamplingParams(**_present(parameters.sampling), **_present(parameters.stopping))


def _present(message: Message) -> dict[str, Any]:
    return {
        field.name: value if isinstance(value, int | float) else tuple(value)
        for field, value in message.ListFields()
    }
