"""Frozen dataclasses from JSON, strictly: every key there, none unknown, every type right."""

import types
import typing
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar

from jaxinfer.errors import CheckpointError

Record = TypeVar("Record")


def from_json(kind: type[Record], document: Any, *, where: str) -> Record:
    """The record that `dataclasses.asdict` made `document` from; `where` begins every error."""
    if not isinstance(document, dict):
        raise CheckpointError(f"{where} is {document!r}; it must be an object")
    names = {entry.name for entry in fields(typing.cast(Any, kind))}
    for key in sorted(names ^ set(document)):
        state = "is missing" if key in names else "is not a key of this version"
        raise CheckpointError(f"{where}: {key} {state}")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _value(hints[name], document[name], f"{where}: {name}") for name in names})


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if is_dataclass(hint):
        return from_json(typing.cast(Any, hint), value, where=where)
    if origin is types.UnionType or origin is typing.Union:
        kept = [kind for kind in inner if kind is not type(None)]
        return None if value is None else _value(kept[0], value, where)
    if origin is Literal and value in inner:
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_value(inner[0], entry, f"{where}[{i}]") for i, entry in enumerate(value))
    if hint is float and type(value) in (int, float):
        return float(value)
    if type(value) is hint:
        return value
    wanted = " or ".join(map(repr, inner)) if origin is Literal else str(hint)
    raise CheckpointError(f"{where} is {value!r}; it must be {wanted}")
