"""What a message may hold, before anything is made of it: sizes, depths and known fields."""

import json
from collections.abc import Callable
from typing import Any

from google.protobuf.message import Message

from jaxinfer.errors import InvalidRequest

MAX_JSON_CHARS = 1 << 20
MAX_JSON_DEPTH = 64
MAX_CHAT_MESSAGES = 4096
MAX_TEXT_CHARS = 1 << 20
CHARS_PER_TOKEN = 128  # no vocabulary has a token that is much longer
LARGE_BYTES = 64 * 1024  # what is larger is read off the event loop
MAX_PARTS = 65_536
"""Fields and list entries of a message: reading millions of empty ones takes seconds."""


def check_text(text: str, *, max_tokens: int | None, field: str) -> None:
    """Raises InvalidRequest where a text is longer than what it is for, before it is tokenised."""
    most = MAX_TEXT_CHARS
    if max_tokens is not None:
        most = min(MAX_TEXT_CHARS * 4, max_tokens * CHARS_PER_TOKEN)
    if len(text) > most:
        raise InvalidRequest(
            f"{field} has {len(text)} characters; at most {most} are taken here", field=field
        )


def json_value(text: str, kind: type, *, field: str) -> Any:
    """The object or array that a field's JSON holds; InvalidRequest where it is not one."""
    if not text:
        return kind()
    if len(text) > MAX_JSON_CHARS:
        raise InvalidRequest(
            f"{field} has {len(text)} characters; at most {MAX_JSON_CHARS} are taken", field=field
        )
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, json.JSONDecodeError) else "too deep or too large"
        raise InvalidRequest(f"{field} is not JSON: {reason}", field=field) from None
    if not isinstance(value, kind):
        words = {list: "an array", dict: "an object", str: "a text", type(None): "null"}
        found = words.get(type(value), "a number, true or false")
        raise InvalidRequest(f"{field} holds {found}; it must be {words[kind]}", field=field)
    _check_tree(value, field=field)
    return value


def check_parts(kind: Any, data: bytes) -> None:
    """Raises InvalidRequest where bytes hold more parts than any request needs.

    `kind` is a message's descriptor. It walks over the bytes before anything is made of them, in
    Python and so without holding up other threads, and stops at the bound. What is damaged is
    left to the parser.
    """
    num_parts = 0
    todo: list[tuple[Any, int, int]] = [(kind, 0, len(data))]
    while todo:
        inside, place, end = todo.pop()
        while place < end:
            tag, place = _varint(data, place)
            wire, value = tag & 7, 0
            if wire == 0 or wire == 2:
                value, place = _varint(data, place)
            num_parts += 1
            if num_parts > MAX_PARTS:
                raise InvalidRequest(
                    f"the request has more than {MAX_PARTS} fields and list entries in its "
                    f"{len(data)} bytes; send fewer",
                    field="the request",
                )
            if wire == 2:
                field = inside.fields_by_number.get(tag >> 3)
                if field is not None and field.message_type is not None:
                    todo.append((field.message_type, place, min(place + value, end)))
                place += value
            else:
                place += {1: 8, 5: 4}.get(wire, 0)


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A number and the place behind it; where the bytes end, whatever there was."""
    value = shift = 0
    for byte in data[place : place + 10]:
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
    return value, place


def refuse_unknown(message: Message) -> None:
    """Raises InvalidRequest where a message has fields that its type does not know."""
    known = type(message)()
    known.CopyFrom(message)
    known.DiscardUnknownFields()  # pyright: ignore[reportAttributeAccessIssue]
    if known.ByteSize() != message.ByteSize():
        _find_unknown(message, path="")


def _find_unknown(message: Message, *, path: str) -> None:
    bare = type(message)()
    bare.CopyFrom(message)
    for field, _ in message.ListFields():
        bare.ClearField(field.name)
    rest = bare.SerializeToString()
    if rest:
        raise InvalidRequest(
            f"{path or 'the request'} has a field numbered {_first_number(rest)}, which this "
            f"server does not know in {message.DESCRIPTOR.full_name}; leave it out, or ask a newer "
            "server",
            field=path or "the request",
        )
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        inner = f"{path}.{field.name}" if path else field.name
        for part in [value] if isinstance(value, Message) else value:
            _find_unknown(part, path=inner)


def _first_number(data: bytes) -> int:
    tag = 0
    for place, byte in enumerate(data[:10]):
        tag |= (byte & 127) << (7 * place)
        if byte < 128:
            break
    return tag >> 3


def _check_tree(value: Any, *, field: str) -> None:
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        if not level:
            return
        level = _children(level, lambda text: _check_unicode(text, field=field))
    if level:
        raise InvalidRequest(
            f"{field} is nested deeper than {MAX_JSON_DEPTH} levels, the most that is taken",
            field=field,
        )


def _children(level: list[Any], check: Callable[[str], None]) -> list[Any]:
    found: list[Any] = []
    for value in level:
        match value:
            case dict():
                for name in value:
                    check(name)
                found += value.values()
            case list():
                found += value
            case str():
                check(value)
    return found


def _check_unicode(text: str, *, field: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(
            f"{field} has half a surrogate pair in a text; it must be valid Unicode", field=field
        ) from None


def _no_constant(name: str) -> Any:
    raise ValueError(name)
