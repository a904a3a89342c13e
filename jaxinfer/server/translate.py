"""Messages of `jaxinfer.v1` to requests, and outputs to messages."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from jaxinfer.errors import InvalidRequest, UnknownModel
from jaxinfer.host.request import (
    JAXINFER_DEFAULTS,
    FinishReason,
    Output,
    SamplingParams,
)
from jaxinfer.server import bounds
from jaxinfer.server.bounds import json_value
from jaxinfer.server.capabilities import CAPABILITIES, MAX_ID_CHARS
from jaxinfer.server.served import Codec, ServedModel
from jaxinfer.v1 import inference_pb2 as pb
from jaxinfer.v1 import model_pb2

M = TypeVar("M", bound=Message)

# Names that a chat template's caller sets itself, so a request's variables can't.
TAKEN_NAMES = ("self", "messages", "tools", "add_generation_prompt", "now")
WIRE_PATHS = {
    "messages": "chat.messages",
    **{field.name: f"sampling.{field.name}" for field in pb.Sampling.DESCRIPTOR.fields},
    **{field.name: f"stopping.{field.name}" for field in pb.Stopping.DESCRIPTOR.fields},
}


@dataclass(frozen=True)
class Wanted:
    """What a caller wants to get back."""

    text: bool = True
    token_ids: bool = False
    logprobs: bool = False


def parse(kind: type[M], data: bytes) -> M:
    """Reads a message; InvalidRequest where it can't be read or has a field that we don't know."""
    if len(data) > bounds.LARGE_BYTES:
        bounds.check_parts(kind.DESCRIPTOR, data)
    message = kind()
    try:
        message.ParseFromString(data)
    except DecodeError:
        raise InvalidRequest(
            f"{len(data)} bytes that are no {kind.DESCRIPTOR.full_name}: damaged, or text in them "
            "that is not UTF-8",
            field="the request",
        ) from None
    bounds.refuse_unknown(message)
    return message


def check_model(asked: str, served: ServedModel) -> None:
    """Raises UnknownModel where a request names another model; an empty name is any."""
    if asked and asked != served.name:
        raise UnknownModel(
            f"no model {asked!r} here; this server has {served.name!r}", field="model"
        )


def request_id_from(message: pb.GenerateRequest | pb.GenerateStreamRequest) -> str:
    """The id that the caller chose, or a new one."""
    request_id = message.request_id
    if not message.HasField("request_id"):
        return secrets.token_hex(16)
    if not 1 <= len(request_id) <= MAX_ID_CHARS:
        raise InvalidRequest(
            f"request_id has {len(request_id)} characters; it must have 1 to {MAX_ID_CHARS}, or "
            "be left out",
            field="request_id",
        )
    return request_id


def encoder(
    message: pb.GenerateRequest | pb.GenerateStreamRequest | pb.ScoreRequest | pb.TokenizeRequest,
    tokenizer: Codec,
    *,
    add_special: bool = True,
    max_tokens: int | None = None,
    max_messages: int = bounds.MAX_CHAT_MESSAGES,
) -> Callable[[], list[int]]:
    """What turns a prompt into token ids; it may take long, so the caller chooses the thread.

    What can't be `max_tokens` or less is refused, or cut one beyond that, before work goes into it.
    """
    match message.WhichOneof("prompt"):
        case "text":
            text = message.text
            if not text:
                raise InvalidRequest("the prompt is empty; give at least a letter", field="text")
            bounds.check_text(text, max_tokens=max_tokens, field="text")
            return lambda: tokenizer.encode(text, add_special=add_special)
        case "token_ids" if not isinstance(message, pb.TokenizeRequest):
            ids = message.token_ids.ids[: None if max_tokens is None else max_tokens + 1]
            return lambda: ids
        case "chat":
            chat = message.chat
            return lambda: tokenizer.encode_chat(**_chat_arguments(chat, max_tokens, max_messages))
        case _:
            raise InvalidRequest(
                "the request has no prompt; give text, token_ids or chat", field="prompt"
            )


def sampling_from(
    message: pb.GenerateRequest | pb.GenerateStreamRequest, defaults: SamplingParams
) -> SamplingParams:
    """The parameters in force: the request's, else the model's, else ours; a drawn seed last."""
    present = [*message.sampling.ListFields(), *message.stopping.ListFields()]
    values: dict[str, Any] = {
        field.name: value if isinstance(value, int | float) else tuple(value)
        for field, value in present
    }
    return in_force(SamplingParams(**values), defaults)


def in_force(asked: SamplingParams, defaults: SamplingParams) -> SamplingParams:
    """What a request asked, filled up with the model's values, then ours, and a drawn seed."""
    sampling = asked.or_else(defaults).or_else(JAXINFER_DEFAULTS)
    if sampling.seed is None:
        return replace(sampling, seed=secrets.randbits(64))
    return sampling


def uses_prefix_cache(message: pb.GenerateRequest | pb.GenerateStreamRequest) -> bool:
    """Whether the request may read the prefix cache and leave pages in it."""
    return message.use_prefix_cache if message.HasField("use_prefix_cache") else True


def wire_path(field: str) -> str:
    """Where the wire has a field that an error names as Python has it."""
    return WIRE_PATHS.get(field, field)


def wanted_from(options: pb.OutputOptions) -> Wanted:
    """What the caller wants back."""
    return Wanted(**{field.name: value for field, value in options.ListFields()})


def to_started(
    *, request_id: str, model: str, num_prompt_tokens: int, parameters: pb.Parameters
) -> pb.Started:
    """The first word of a reply."""
    return pb.Started(
        request_id=request_id,
        model=model,
        num_prompt_tokens=num_prompt_tokens,
        parameters=parameters,
    )


def to_parameters(
    sampling: SamplingParams, wanted: Wanted, priority: int = 0, use_prefix_cache: bool = True
) -> pb.Parameters:
    """The values in force."""
    return pb.Parameters(
        sampling=_filled(pb.Sampling, sampling),
        stopping=_filled(pb.Stopping, sampling),
        output=_filled(pb.OutputOptions, wanted),
        priority=priority,
        use_prefix_cache=use_prefix_cache,
    )


def fill_delta(delta: pb.Delta, output: Output, wanted: Wanted) -> bool:
    """Puts into a message what the caller wants of an output; False where that is nothing.

    In place, as a message that is made for another one is copied into it.
    """
    has_ids = bool(output.token_ids) and (wanted.token_ids or wanted.logprobs)
    if not (has_ids or (output.text and wanted.text)):
        return False
    if wanted.text:
        delta.text = output.text
    if wanted.token_ids:
        delta.token_ids.extend(output.token_ids)
    if wanted.logprobs:
        delta.logprobs.extend(output.logprobs)
    return True


def to_finished(output: Output) -> pb.Finished:
    """Why the request ended."""
    assert output.finish_reason is not None
    finished = pb.Finished(reason=to_reason(output.finish_reason))
    if isinstance(output.stop, str):
        finished.stop_string = output.stop
    elif output.stop is not None:
        finished.stop_token_id = output.stop
    return finished


def to_reason(reason: FinishReason) -> str:
    """The wire's word for a finish reason."""
    return f"FINISH_REASON_{reason.name}"


def to_summary(output: Output) -> pb.Summary:
    """What the request took."""
    times = output.timings
    return pb.Summary(
        usage=pb.Usage(
            num_prompt_tokens=output.num_prompt_tokens,
            num_output_tokens=output.num_output_tokens,
            num_preemptions=output.num_preemptions,
            num_cached_tokens=output.num_cached_tokens,
        ),
        timings=pb.Timings(
            queue_s=_between(times.arrived_s, times.scheduled_s),
            prefill_s=_between(times.scheduled_s, times.first_token_s),
            decode_s=_between(times.first_token_s, times.finished_s),
            ttft_s=_between(times.arrived_s, times.first_token_s),
            total_s=_between(times.arrived_s, times.finished_s),
        ),
    )


def to_model(served: ServedModel) -> model_pb2.Model:
    """The model that is served."""
    defaults = served.defaults.or_else(JAXINFER_DEFAULTS)
    return model_pb2.Model(
        name=served.name,
        architecture=served.config.architecture,
        vocab_size=served.limits.vocab_size,
        max_seq_len=served.limits.max_seq_len,
        num_layers=served.config.num_layers,
        d_model=served.config.d_model,
        eos_token_ids=served.limits.eos_token_ids,
        defaults=to_parameters(defaults, Wanted()),
        capabilities=[model_pb2.Capability(**one._asdict()) for one in CAPABILITIES],
    )


def _chat_arguments(chat: pb.Chat, max_tokens: int | None, max_messages: int) -> dict[str, Any]:
    if not chat.messages:
        raise InvalidRequest("the conversation is empty; give a message", field="chat.messages")
    if len(chat.messages) > max_messages:
        raise InvalidRequest(
            f"the conversation has {len(chat.messages)} messages; at most {max_messages} are "
            "taken (server.max_chat_messages)",
            field="chat.messages",
        )
    messages = [
        _chat_message(message, place, max_tokens) for place, message in enumerate(chat.messages)
    ]
    kwargs = json_value(chat.template_kwargs_json, dict, field="chat.template_kwargs_json")
    taken = [name for name in TAKEN_NAMES if name in kwargs]
    if taken:
        raise InvalidRequest(
            f"chat.template_kwargs_json sets {taken[0]!r}, which the request's own fields say",
            field="chat.template_kwargs_json",
        )
    opens = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True
    return {
        **kwargs,
        "messages": messages,
        "tools": _tools(chat.tools_json),
        "add_generation_prompt": opens,
    }


def _tools(text: str) -> list[dict[str, Any]] | None:
    field = "chat.tools_json"
    tools = json_value(text, list, field=field)
    for place, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise InvalidRequest(
                f"{field}[{place}] is no object; each tool is described by one", field=field
            )
    return tools or None


def _chat_message(message: pb.ChatMessage, place: int, max_tokens: int | None) -> dict[str, Any]:
    field = f"chat.messages[{place}]"
    bounds.check_text(message.content, max_tokens=max_tokens, field=f"{field}.content")
    if not message.role:
        raise InvalidRequest(f"{field} has no role; say who speaks", field=f"{field}.role")
    more = json_value(message.fields_json, dict, field=f"{field}.fields_json")
    present = {entry.name: value for entry, value in message.ListFields()}
    present.pop("fields_json", None)
    return {**more, **present}


def _filled(kind: type[M], source: SamplingParams | Wanted) -> M:
    return kind(**{field.name: getattr(source, field.name) for field in kind.DESCRIPTOR.fields})


def _between(start_s: float | None, end_s: float | None) -> float | None:
    return None if start_s is None or end_s is None else end_s - start_s
