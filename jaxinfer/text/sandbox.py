"""Where chat templates run: no way out, and no more loops, text or large numbers than a chat needs.

A template comes with a checkpoint and the data with a request; neither may hold up a server. What
Python does in one go, such as `'x' * 10**9`, is refused before it begins; what it does in many
small steps is counted.
"""

# pyright: standard
# (values of a template are of any kind)

import functools
import inspect
import re
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from types import BuiltinMethodType
from typing import Any

import jinja2
import jinja2.nodes
import jinja2.runtime
import jinja2.visitor
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_CHARS = 4_000_000
MAX_TURNS = 100_000
"""Turns of all loops and calls of all macros together."""
RENDER_S = 0.1
"""Processor time of a render, beside what each message may take."""
RENDER_MESSAGE_S = 0.0002
TICKS_A_LOOK = 16  # at the clock, which is a system call
LARGE = 1000
MAX_COUNT = 100_000  # widths, repetitions, precisions
MAX_BITS = 4096

_HERE = __name__
# A width of six digits, or one that is an argument, of `%` or of `format`.
_WIDE = re.compile(r"%[-+ #0]*(?:\d{6}|\*)|\.(?:\d{6}|\*)|:[^{}]*\d{6}|\{[^{}]*:[^{}]*\{")
_COUNTING = ("batch", "center", "expandtabs", "indent", "ljust", "rjust", "round", "slice") + (
    "_to_json",
    "truncate",
    "wordwrap",
    "zfill",
)


class TooMuch(jinja2.TemplateError):
    """A template that wants more time or text than a chat needs."""


class _Spent:
    """What one render has taken."""

    def __init__(self, num_messages: int, clock: Callable[[], float]) -> None:
        self.num_turns = self._num_ticks = 0
        self.num_chars = 0
        self.num_made = 0
        self._clock = clock
        self._allowed_s = RENDER_S + RENDER_MESSAGE_S * num_messages
        self._end_s = clock() + self._allowed_s

    def tick(self, value: object = None) -> None:
        """Before each piece of work; one on a large value counts as many."""
        is_large = isinstance(value, str | list | tuple | dict | range) and len(value) > LARGE
        self._num_ticks += TICKS_A_LOOK if is_large else 1
        if self._num_ticks < TICKS_A_LOOK:
            return
        self._num_ticks = 0
        if self._clock() > self._end_s:
            raise TooMuch(f"more than {self._allowed_s:g} s of processor time")

    def turn(self) -> None:
        self.num_turns += 1
        if self.num_turns > MAX_TURNS:
            raise TooMuch(f"more than {MAX_TURNS} turns of loops")
        self.tick()

    def write(self, num_chars: int) -> None:
        self.num_chars += num_chars
        if self.num_chars > MAX_CHARS:
            raise TooMuch(f"more than {MAX_CHARS} characters")

    def make(self, num_chars: int) -> None:
        """Text that a filter made, whether it is written or not."""
        self.num_made += num_chars
        _check_size(self.num_made // 8)


_PASSED = jinja2.Environment | jinja2.runtime.Context
_SPENT: ContextVar[_Spent] = ContextVar("spent")


def bounded(
    template: jinja2.Template,
    values: Mapping[str, Any],
    *,
    clock: Callable[[], float] = time.thread_time,
) -> str:
    """The text of a template of a `Sandbox`; raises TooMuch where it goes beyond all use.

    The clock counts this thread's own work, so that a machine that is busy refuses nothing.
    """
    spent = _Spent(len(values.get("messages", ())), clock)
    token = _SPENT.set(spent)
    try:
        parts: list[str] = []
        num_chars = 0
        for part in template.generate(**values):
            num_chars += len(part)
            if num_chars > MAX_CHARS:
                raise TooMuch(f"more than {MAX_CHARS} characters")
            parts.append(part)
            spent.tick()
        return "".join(parts)
    except MemoryError:
        raise TooMuch("more memory than there is") from None
    finally:
        _SPENT.reset(token)


def turn() -> str:
    """Counts one turn of a loop; every loop of a compiled template calls it."""
    _SPENT.get().turn()
    return ""


def concat(*parts: object) -> str:
    """The template's `~`."""
    texts = [str(part) for part in parts]
    _check_size(sum(map(len, texts)))
    return "".join(texts)


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja without a way to Python's own objects, and with bounds; render with `bounded`."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, finalize=_written)
        self.globals.pop("lipsum", None)
        for name, function in list(self.filters.items()):
            self.filters[name] = modest(function)

    def _generate(self, source: jinja2.nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Counted().visit(source), *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Refuses what would be too large."""
        _tick(left)
        match operator, left, right:
            case "**", _, int() if abs(right) > 1:
                bits = left.bit_length() if isinstance(left, int) else 64
                _check_number(bits * abs(right))
            case "*", int(), int():
                _check_number(left.bit_length() + right.bit_length())
            case "*", int(), str() | list() | tuple():
                _check_size(left * len(right))
            case "*", str() | list() | tuple(), int():
                _check_size(right * len(left))
            case "+", str() | list() | tuple(), str() | list() | tuple():
                _check_size(len(left) + len(right))
            case "%", str(), _:
                _check_widths(left)
        return super().call_binop(context, operator, left, right)

    def call(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, context: Any, function: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Refuses what would be too large; the rest is up to Jinja's sandbox."""
        inner = inspect.unwrap(function) if callable(function) else function
        own = inner.__self__ if isinstance(inner, BuiltinMethodType) else None
        if isinstance(own, str):
            if inner.__name__ == "join" and args:
                args = (list(args[0]), *args[1:])
            _check_arguments(inner.__name__, own, args, kwargs)
        _tick(own)
        return super().call(context, function, *args, **kwargs)


class _Counted(jinja2.visitor.NodeTransformer):
    """Puts a count at the begin of every loop and macro, and takes `~` over."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.For:
        self.generic_visit(node)
        node.body.insert(0, _call("turn", [], node.lineno, statement=True))
        if node.test is not None:  # its turns are those that pass: what it looks at counts, too
            counted = _call("turn", [], node.lineno)
            both = jinja2.nodes.Not(counted, lineno=node.lineno)
            node.test = jinja2.nodes.And(both, node.test, lineno=node.lineno)
        return node

    def visit_Macro(self, node: jinja2.nodes.Macro) -> jinja2.nodes.Macro:
        self.generic_visit(node)
        node.body.insert(0, _call("turn", [], node.lineno, statement=True))
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> Any:
        self.generic_visit(node)
        return _call("concat", node.nodes, node.lineno)


def _call(name: str, arguments: list[Any], line: int, *, statement: bool = False) -> Any:
    function = jinja2.nodes.ImportedName(f"{_HERE}.{name}", lineno=line)
    call = jinja2.nodes.Call(function, arguments, [], None, None, lineno=line)
    return jinja2.nodes.ExprStmt(call, lineno=line) if statement else call


def _tick(value: object) -> None:
    spent = _SPENT.get(None)
    if spent is not None:
        spent.tick(value)


def _written(value: Any) -> Any:
    spent = _SPENT.get(None)  # none where constants are folded
    if isinstance(value, str) and spent is not None:
        spent.write(len(value))
    return value


def modest(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that refuses what would be too large."""
    name = function.__name__.removeprefix("do_").removeprefix("sync_do_")

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        place = int(bool(args) and isinstance(args[0], jinja2.nodes.EvalContext | _PASSED))
        if name == "join" and len(args) > place:
            args = (*args[:place], list(args[place]), *args[place + 1 :])
        value, *more = args[place:] or (None,)
        _tick(value)
        _check_arguments(name, value, tuple(more), kwargs)
        result = function(*args, **kwargs)
        spent = _SPENT.get(None)
        if isinstance(result, str) and spent is not None:
            spent.make(len(result))
        return result

    return checked


def _check_arguments(name: str, own: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    given = (*args, *kwargs.values())
    texts = [value for value in given if isinstance(value, str)]
    widths = [value for value in given if isinstance(value, int)]
    if name in _COUNTING and any(abs(width) > MAX_COUNT for width in widths):
        raise TooMuch(f"a count above {MAX_COUNT}")
    if name == "join":
        parts = own if isinstance(own, list) else given[0] if given else []
        _check_size(sum(len(part) for part in parts if isinstance(part, str)))
        glue = own if isinstance(own, str) else "".join(texts[:1])
        _check_size(len(glue) * len(parts))
    elif not isinstance(own, str):
        return
    elif name == "replace" and len(texts) > 1:
        _check_size(len(own) + own.count(texts[0]) * len(texts[1]))
    elif name in ("indent", "expandtabs"):
        _check_size(len(own) + (own.count("\n") + own.count("\t")) * max([*widths, 8]))
    elif name == "wordwrap":
        _check_size(len(own) * max([1, *map(len, texts)]))
    elif name in ("format", "format_map"):
        _check_widths(own)


def _check_widths(text: str) -> None:
    if _WIDE.search(text):
        raise TooMuch(f"a width above {MAX_COUNT}, or one that is an argument")


def _check_number(num_bits: int) -> None:
    if num_bits > MAX_BITS:
        raise TooMuch(f"a number of more than {MAX_BITS} bits")


def _check_size(size: int) -> None:
    if size > MAX_CHARS:
        raise TooMuch(f"more than {MAX_CHARS} characters")
