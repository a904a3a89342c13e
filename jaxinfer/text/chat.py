"""Chat templates, rendered as the Hugging Face libraries do."""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser

from jaxinfer.errors import InvalidRequest
from jaxinfer.text.assets import TextAssets, check_unicode
from jaxinfer.text.sandbox import Sandbox, TooMuch, bounded, modest

TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
)
"""What a template can raise, through our fault or that of the messages."""

Message = Mapping[str, Any]


def render(
    assets: TextAssets,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    now: datetime | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The text that a model's template makes of messages.

    A message has a role and a content: text, or a list of `{"type": "text", "text": ...}` parts.
    A template that knows only text gets the parts joined by line ends. Other keys pass through.
    Raises InvalidRequest, naming the field.
    """
    if assets.chat_template is None:
        raise InvalidRequest(
            "this model has no chat template; send the prompt as text or token ids",
            field="messages",
        )
    _check_messages(messages)
    template = _compile(assets.chat_template)
    if any(map(_has_parts, messages)) and not _takes_parts(assets.chat_template):
        messages = [_join_parts(message) for message in messages]
    special = {"bos_token": assets.bos_token, "eos_token": assets.eos_token}
    values: dict[str, Any] = {
        "documents": None,
        **{name: token for name, token in special.items() if token is not None},
        **(variables or {}),
        "messages": [dict(message) for message in messages],
        "tools": None if tools is None else [dict(tool) for tool in tools],
        "add_generation_prompt": add_generation_prompt,
        "strftime_now": (now or datetime.now()).strftime,
    }
    try:
        text = bounded(template, values)
    except TooMuch as error:
        raise InvalidRequest(
            f"the chat template makes too much of these messages: {error}; send fewer or shorter "
            "ones",
            field="messages",
        ) from error
    except RaisedByTemplate as error:
        raise InvalidRequest(
            f"the chat template refuses these messages: {error}", field="messages"
        ) from error
    except TEMPLATE_ERRORS as error:
        raise InvalidRequest(
            f"the chat template fails on these messages{_why(error)}; see that each has the keys "
            "that the model's template reads",
            field="messages",
        ) from error
    check_unicode(text, field="messages")
    return text


def _check_messages(messages: Sequence[Message]) -> None:
    if not messages:
        raise InvalidRequest("messages is empty; give at least one", field="messages")
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        role: object = message.get("role")
        content: object = message.get("content")
        if not isinstance(role, str) or not role:
            raise InvalidRequest(
                f"{where} has the role {role!r}; it must be a name like 'user'", field="messages"
            )
        if _has_parts(message):
            for number, part in enumerate(message["content"]):
                _check_part(part, where=f"{where}.content[{number}]")
        elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise InvalidRequest(
                f"{where}.content is {_kind(content)}; it must be text or a list of text "
                "parts, and may be absent only beside tool_calls",
                field="messages",
            )


def _why(error: BaseException) -> str:
    """What a template lacked; other errors would show Python's names and addresses."""
    said = str(error)
    tells = re.search(r"[<>]|0x|/|__|jinja2|builtin", said)
    is_fit = isinstance(error, jinja2.UndefinedError) and tells is None
    return f": {said[:200]}" if is_fit else ""


def _kind(value: object) -> str:
    """The word of JSON for a value."""
    match value:
        case None:
            return "null or absent"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case Mapping():
            return "an object"
        case _:
            return "no text"


def _check_part(part: object, *, where: str) -> None:
    match part:
        case {"type": "text", "text": str()}:
            pass
        case {"type": str(kind)} if kind != "text":
            raise InvalidRequest(
                f"{where} is of type {kind!r}; this server takes text parts only", field="messages"
            )
        case _:
            raise InvalidRequest(
                f"{where} must be an object with type 'text' and a text", field="messages"
            )


def _has_parts(message: Message) -> bool:
    return isinstance(message.get("content"), list | tuple)


def _join_parts(message: Message) -> Message:
    if not _has_parts(message):
        return message
    return {**message, "content": "\n".join(part["text"] for part in message["content"])}


@lru_cache(maxsize=16)
def _takes_parts(source: str) -> bool:
    """Tries whether the template writes a list of parts as it writes their text."""
    values: dict[str, Any] = {
        "add_generation_prompt": False,
        "tools": None,
        "bos_token": "",
        "eos_token": "",
        "strftime_now": datetime(2000, 1, 1).strftime,
    }
    part = {"type": "text", "text": "probe"}
    texts: list[str] = []
    for content in ("probe", [part]):
        messages = [{"role": "user", "content": content}]
        try:
            texts.append(bounded(_compile(source), {**values, "messages": messages}))
        except TEMPLATE_ERRORS:
            return False
    return texts[0] == texts[1]


class RaisedByTemplate(jinja2.TemplateError):
    """A template's own `raise_exception`."""


class GenerationTag(jinja2.ext.Extension):
    """Accepts `{% generation %}`, which marks an assistant's words for training, and ignores it."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


@lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    environment: Any = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = modest(_to_json)
    environment.globals["raise_exception"] = _raise_exception
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise InvalidRequest(
            f"this model's chat template can't be used, line {error.lineno}: {error.message}; "
            "send the prompt as text or token ids",
            field="messages",
        ) from error


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of jinja2's own filter."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise RaisedByTemplate(message)
