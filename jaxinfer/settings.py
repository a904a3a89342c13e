"""Strict reading and writing of settings: TOML, environment and dotted flags onto dataclasses.

Knows nothing of what the settings mean: `config.py` names the dataclasses and the files. It is
written out, rather than left to the command-line library, so that a file, a variable, a flag and a
Python call give the same errors, and so that a script needs no command-line library at all.
"""

import ast
import difflib
import inspect
import json
import os
import textwrap
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from jaxinfer.errors import ConfigError

TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


class Setting(NamedTuple):
    """One value that somebody set, and where."""

    value: Any
    origin: str  # what an error blames: a file, a variable, a flag
    is_text: bool  # from a shell, so still to be read as the type that its key wants


Settings = dict[tuple[str, ...], Setting]
"""Values by the path of their key: ("engine", "cache", "page_size")."""


def from_file(path: Path, *, name: str) -> Settings:
    """The settings of one TOML file; `name` is what errors call it."""
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"{name}: can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: not UTF-8 text at byte {error.start}") from error
    return from_text(text, name=name)


def from_text(text: str, *, name: str) -> Settings:
    """The settings of a TOML text."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: not valid TOML: {error}") from error
    return {key: Setting(value, name, False) for key, value in _leaves(tree, ())}


def from_environment(environ: Mapping[str, str], *, prefix: str, reserved: set[str]) -> Settings:
    """The settings among the environment variables: `PREFIX_ENGINE__CACHE__PAGE_SIZE`."""
    return {
        tuple(name.removeprefix(prefix).lower().split("__")): Setting(text, name, True)
        for name, text in sorted(environ.items())
        if name.startswith(prefix) and name not in reserved
    }


def variables(*prefixes: str, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment variables whose names begin so: what others than jaxinfer say in them."""
    found = os.environ if environ is None else environ
    return {name: text for name, text in found.items() if name.startswith(prefixes)}


def from_override(text: str) -> Settings:
    """The setting of `engine.num_slots=32` or `--engine.num-slots=32`."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"{text!r} sets nothing; write key=value, like engine.num_slots=8")
    key = key.strip()
    path = tuple(key.removeprefix("--").replace("-", "_").split("."))
    return {path: Setting(value.strip(), key if key.startswith("--") else "override", True)}


def merge(*layers: Settings) -> Settings:
    """All layers as one; a later one wins."""
    merged: Settings = {}
    for layer in layers:
        for key, setting in layer.items():
            merged.pop(key, None)
            merged[key] = setting
    return merged


def apply(base: Any, settings: Settings) -> Any:
    """A new value of the dataclass `base`, with the settings in place.

    Raises ConfigError for a key that is not there, a value of another type, and whatever the
    dataclass itself refuses, naming the origin of the value each time.
    """
    tree: dict[str, Any] = {}
    for key, setting in settings.items():
        _place(tree, key, _checked(type(base), key, setting))
    try:
        return _replace(base, tree)
    except ConfigError as error:
        raise ConfigError(f"{error}{_blame(str(error), settings)}") from error


def flatten(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every leaf of nested dataclasses by its dotted key, in the order of the fields."""
    for entry in fields(value):
        leaf, key = getattr(value, entry.name), (*path, entry.name)
        if is_dataclass(leaf):
            yield from flatten(leaf, key)
        else:
            yield ".".join(key), leaf


def to_toml(value: Any) -> str:
    """Nested dataclasses as TOML that reads back to the same value."""
    sections: dict[str, list[str]] = {"": []}
    for key, leaf in flatten(value):
        section, _, name = key.rpartition(".")
        if leaf is not None:
            sections.setdefault(section, []).append(f"{name} = {format_value(leaf)}")
    parts = [
        "\n".join([f"[{section}]", *lines] if section else lines)
        for section, lines in sections.items()
        if lines
    ]
    return "\n\n".join(parts) + "\n"


def format_value(value: Any) -> str:
    """One value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple | list):
        return "[" + ", ".join(format_value(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {format_value(item)}" for key, item in value.items()) + "}"
    return str(value)


def schema(kind: type) -> dict[str, Any]:
    """The JSON schema of a dataclass, for editors that complete and check TOML."""
    docs, default, hints = field_docs(kind), kind(), get_type_hints(kind)
    properties: dict[str, Any] = {}
    for entry in fields(kind):
        value = getattr(default, entry.name)
        if is_dataclass(value):
            shape = schema(type(value))
        else:
            shape = {**_shape(hints[entry.name]), "default": value}
        if entry.name in docs:
            shape["description"] = docs[entry.name]
        properties[entry.name] = shape
    return {"type": "object", "additionalProperties": False, "properties": properties}


def field_docs(kind: type) -> dict[str, str]:
    """The string that follows each field of a dataclass in its source, by field name."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    body = next(node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    docs = {}
    for first, second in zip(body, body[1:], strict=False):
        match first, second:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                docs[name] = inspect.cleandoc(text)
    return docs


def _leaves(
    tree: Mapping[str, Any], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            # An empty table sets nothing but must still be a table that exists.
            yield from _leaves(value, (*path, name)) if value else [((*path, name), {})]
        else:
            yield (*path, name), value


def _checked(kind: type, path: tuple[str, ...], setting: Setting) -> Any:
    """The value for a key of `kind`, or ConfigError."""
    hint: Any = kind
    for depth, name in enumerate(path):
        if not is_dataclass(hint):
            parent = ".".join(path[:depth])
            raise ConfigError(
                f"{setting.origin}: {'.'.join(path)} is no key: {parent} is {_wanted(hint)}, "
                "not a section"
            )
        hints = get_type_hints(hint)
        if name not in hints:
            raise ConfigError(_unknown(kind, path, depth, setting))
        hint = hints[name]
    key = ".".join(path)
    if is_dataclass(hint):
        if setting.value == {}:
            return {}
        names = ", ".join(f"{key}.{entry.name}" for entry in fields(hint))
        raise ConfigError(f"{setting.origin}: {key} is a section; its keys are {names}")
    try:
        return _convert(_read(setting.value, hint) if setting.is_text else setting.value, hint)
    except ValueError as error:
        raise ConfigError(
            f"{setting.origin}: {key} is {_given(setting)}; it must be {_wanted(hint)}"
        ) from error


def _unknown(kind: type, path: tuple[str, ...], depth: int, setting: Setting) -> str:
    """What to say of a key whose part at `depth` is not there: its near miss, or its siblings."""
    section: Any = kind
    for name in path[:depth]:
        section = get_type_hints(section)[name]
    parent, siblings = ".".join(path[:depth]), [entry.name for entry in fields(section)]
    hint = f"{parent} has" if depth else "the keys are"
    hint = f"{hint} {', '.join(siblings)}"
    if near := _near_miss(kind, path, depth, siblings):
        hint = f"did you mean {near}?"
    return f"{setting.origin}: unknown key {'.'.join(path)}; {hint}"


def _near_miss(kind: type, path: tuple[str, ...], depth: int, siblings: list[str]) -> str:
    """The key that was meant: in the same section, else a wrong section's, else anywhere; or ""."""
    if depth == len(path) - 1:
        for name in difflib.get_close_matches(path[-1], siblings, n=1):
            return ".".join((*path[:depth], name))
    keys = [key for key, _ in flatten(kind())]
    if depth == 0:
        for key in difflib.get_close_matches(".".join(path), keys, n=1, cutoff=0.75):
            return key
    names = {key.rpartition(".")[2]: key for key in keys}
    return next((names[name] for name in difflib.get_close_matches(path[-1], names, n=1)), "")


def _read(text: str, hint: Any) -> Any:
    """A value from the shell, read as the type it must have; ValueError where it can't be."""
    if type(None) in get_args(hint) and text.lower() == "none":
        return None
    options = _options(hint)
    if str in options or any(isinstance(option, str) for option in options):
        return text
    if bool in options:
        words = {"true": True, "1": True, "false": False, "0": False}
        return words.get(text.lower(), text)  # another word is refused as what it is: a string
    if int in options:
        return int(text)
    if float in options:
        return float(text)
    inner = text if text.startswith("[") else f"[{text}]"
    try:
        return tomllib.loads(f"value = {inner}")["value"]
    except tomllib.TOMLDecodeError:
        return [item.strip() for item in text.split(",")]


def _convert(value: Any, hint: Any) -> Any:
    """The value as its type wants it (lists become tuples); ValueError where it is another."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is NoneType and value is None:
        return None
    if origin is Literal and any(value == arg and type(value) is type(arg) for arg in args):
        return value
    if origin in (Union, UnionType):
        for option in args:
            try:
                return _convert(value, option)
            except ValueError:
                continue
    if origin is tuple and isinstance(value, list | tuple):
        if args[-1] is Ellipsis:
            return tuple(_convert(item, args[0]) for item in value)
        if len(args) == len(value):
            return tuple(_convert(item, arg) for item, arg in zip(value, args, strict=True))
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint in (int, bool, str) and type(value) is hint:
        return value
    raise ValueError(f"{value!r} is not {_wanted(hint)}")


def _options(hint: Any) -> tuple[Any, ...]:
    """The plain types that a key takes."""
    if get_origin(hint) in (Union, UnionType, Literal):
        return tuple(arg for arg in get_args(hint) if arg is not NoneType)
    return (hint,)


def _wanted(hint: Any) -> str:
    """A type in words."""
    args = get_args(hint)
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(str(arg) for arg in args)
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_wanted(arg) for arg in args if arg is not NoneType)
    if get_origin(hint) is tuple:
        if args[-1] is Ellipsis:
            return f"a list, each item {_wanted(args[0])}"
        return f"a list of {len(args)}: " + ", ".join(_wanted(arg) for arg in args)
    return TYPE_NAMES.get(hint, str(hint))


def _given(setting: Setting) -> str:
    if setting.is_text:
        return repr(setting.value)
    kinds = {**TYPE_NAMES, list: "a list", dict: "a section"}
    kind = kinds.get(type(setting.value), f"a {type(setting.value).__name__}")
    return f"{format_value(setting.value)} ({kind})"


def _place(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    if value != {}:
        tree[path[-1]] = value


def _replace(base: Any, tree: dict[str, Any]) -> Any:
    changes = {
        name: _replace(getattr(base, name), value) if isinstance(value, dict) else value
        for name, value in tree.items()
    }
    return replace(base, **changes) if changes else base


def _blame(message: str, settings: Settings) -> str:
    """Which of the settings named in a message came from where."""
    named = [
        f"{'.'.join(key)} comes from {setting.origin}"
        for key, setting in settings.items()
        if ".".join(key) in message
    ]
    return f" ({'; '.join(named)})" if named else ""


def _shape(hint: Any) -> dict[str, Any]:
    """The JSON schema of one leaf."""
    args = get_args(hint)
    if get_origin(hint) is Literal:
        return {"enum": list(args)}
    if get_origin(hint) in (Union, UnionType):
        return {"anyOf": [_shape(arg) for arg in args if arg is not NoneType]}
    if get_origin(hint) is tuple:
        if args[-1] is Ellipsis:
            return {"type": "array", "items": _shape(args[0])}
        return {"type": "array", "prefixItems": [_shape(arg) for arg in args], "items": False}
    names = {int: "integer", float: "number", bool: "boolean", str: "string"}
    return {"type": names[hint]}
