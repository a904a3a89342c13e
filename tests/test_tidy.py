"""House rules as tests: floors, who may do what, sizes, and the map of WORKSPACE.md."""

import ast
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("configs", "jaxinfer", "proto", "scripts", "tests")
TEXT_SUFFIXES = {"", ".md", ".py", ".pyi", ".proto", ".toml", ".txt", ".yaml", ".yml"}

# The longest prefix counts. A module imports its own floor and lower ones; the host column knows
# nothing of the device column, and the device column nothing of the host's.
FLOORS: dict[str, tuple[int, str]] = {
    "jaxinfer": (7, "both"),
    "jaxinfer.__main__": (7, "both"),
    "jaxinfer.bench": (7, "both"),
    "jaxinfer.cache": (2, "device"),
    "jaxinfer.cli": (7, "both"),
    "jaxinfer.client": (6, "host"),
    "jaxinfer.cluster": (7, "both"),
    "jaxinfer.compile": (4, "device"),
    "jaxinfer.config": (0, "both"),
    "jaxinfer.demo": (7, "both"),
    "jaxinfer.device": (5, "both"),
    "jaxinfer.dims": (0, "device"),
    "jaxinfer.edge_config": (0, "both"),
    "jaxinfer.engine": (5, "both"),
    "jaxinfer.engine_config": (0, "both"),
    "jaxinfer.errors": (0, "both"),
    "jaxinfer.exact": (0, "device"),
    "jaxinfer.fingerprint": (3, "device"),
    "jaxinfer.host": (4, "host"),
    "jaxinfer.host.pages": (2, "host"),
    "jaxinfer.host.prefix": (3, "host"),
    "jaxinfer.host.request": (2, "both"),
    "jaxinfer.host.sequence": (2, "host"),
    "jaxinfer.inputs": (0, "both"),
    "jaxinfer.kernels": (1, "device"),
    "jaxinfer.llm": (6, "both"),
    "jaxinfer.manifest": (4, "device"),
    "jaxinfer.models": (3, "device"),
    "jaxinfer.nn": (2, "device"),
    "jaxinfer.parallel": (1, "device"),
    "jaxinfer.plan": (4, "device"),
    "jaxinfer.quality": (5, "both"),
    "jaxinfer.quant": (2, "device"),
    "jaxinfer.recording": (6, "both"),
    "jaxinfer.replay": (6, "both"),
    "jaxinfer.replicas": (6, "both"),
    "jaxinfer.runner": (5, "both"),
    "jaxinfer.sampling": (3, "device"),
    "jaxinfer.scoring": (4, "device"),
    "jaxinfer.selftest": (4, "device"),
    "jaxinfer.server": (6, "both"),
    "jaxinfer.settings": (0, "both"),
    "jaxinfer.sharding": (2, "device"),
    "jaxinfer.spec": (0, "device"),
    "jaxinfer.step": (4, "device"),
    "jaxinfer.store": (2, "device"),
    "jaxinfer.verdict": (4, "device"),
    "jaxinfer.text": (1, "both"),
    "jaxinfer.v1": (0, "both"),
    "jaxinfer.weights": (3, "device"),
}
WITHOUT_JAX = ("jaxinfer.host", "jaxinfer.text", "jaxinfer.client")
READS_SETTINGS = ("jaxinfer/config.py", "jaxinfer/settings.py")
BARRIERS = (
    "jaxinfer/bench/hardware/part.py",
    "jaxinfer/cli/app.py",
    "jaxinfer/runner.py",
    "jaxinfer/server/",
)
MAX_BARRIERS = 4
MAX_LINE, MAX_FUNCTION, MAX_FILE = 100, 60, 400
MAX_KERNEL_FUNCTION, MAX_KERNEL_FILE = 120, 600


class Source(NamedTuple):
    """One file, by its path from the root."""

    path: str
    text: str

    @property
    def is_product(self) -> bool:
        return self.path.startswith("jaxinfer/") and self.path.endswith(".py")

    @property
    def is_kernel(self) -> bool:
        return self.path.startswith("jaxinfer/kernels/")

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


class Found(NamedTuple):
    """One offence against a rule."""

    path: str
    line: int
    what: str


Rule = Callable[[Source], Iterator[Found]]


def floors(source: Source) -> Iterator[Found]:
    """Imports point down, and not across."""
    if not source.is_product:
        return
    own = floor_of(source.module)
    for line, name in imports(source):
        if not name.startswith("jaxinfer.") or floor_of(name) == own:
            continue
        (floor, column), (own_floor, own_column) = floor_of(name), own
        if floor > own_floor:
            yield Found(source.path, line, f"floor {own_floor} imports {name}, floor {floor}")
        if {column, own_column} == {"host", "device"}:
            yield Found(source.path, line, f"{own_column} column imports {name} of the {column}'s")


def every_room_has_a_floor(source: Source) -> Iterator[Found]:
    """A new module or package at the top says its floor."""
    room = ".".join(source.module.split(".")[:2])
    if source.is_product and room not in FLOORS:
        yield Found(source.path, 1, f"{room} has no entry in FLOORS of tests/test_tidy.py")


def who_may(source: Source) -> Iterator[Found]:
    """Only compile.py jits, only config.py and settings.py read settings, and some know no jax."""
    if not source.is_product:
        return
    for line, name in (*imports(source), *attributes(source)):
        if name.split(".")[-1] in ("jit", "pjit", "pmap") and source.module != "jaxinfer.compile":
            yield Found(source.path, line, f"{name}: only compile.py jits")
        if re.match(r"os\.(environ|getenv|putenv)|tomllib", name) and not source.path.startswith(
            READS_SETTINGS
        ):
            yield Found(source.path, line, f"{name}: only config.py reads settings")
        if re.match(r"(jax|jaxlib|flax)(\.|$)", name) and source.module.startswith(WITHOUT_JAX):
            yield Found(source.path, line, f"{name}: this room imports no jax")


def habits(source: Source) -> Iterator[Found]:
    """No global, hasattr, guessing getattr, broad except or postponed annotations."""
    lines = source.text.splitlines()
    for node in nodes(source):
        match node:
            case ast.Global() | ast.Nonlocal():
                what = "global state"
            case ast.Call(func=ast.Name(id="hasattr")):
                what = "hasattr"
            case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(), _]):
                what = "getattr with a literal name and a default"
            case ast.ImportFrom(module="__future__", names=[ast.alias(name="annotations")]):
                what = "postponed annotations"
            case ast.ExceptHandler() if is_broad(node) and not is_barrier(source, lines, node):
                what = "broad except"
            case _:
                continue
        if source.is_product or not isinstance(node, ast.ExceptHandler):
            yield Found(source.path, node.lineno, what)


def docstrings(source: Source) -> Iterator[Found]:
    """A module says first, in one sentence, what it is."""
    if source.path.endswith(".py"):
        first = (ast.get_docstring(tree(source)) or "").split("\n\n")[0]
        if not first.endswith("."):
            yield Found(source.path, 1, "no one-sentence module docstring at the top")


def sizes(source: Source) -> Iterator[Found]:
    """A line, a function and a file can be held in mind."""
    lines = source.text.splitlines()
    if not source.path.endswith((".md", "constraints.txt", "LICENSE")):
        for number, line in enumerate(lines, 1):
            if len(line) > MAX_LINE:
                yield Found(source.path, number, f"line of {len(line)} characters")
    if not source.path.endswith(".py"):
        return
    if len(lines) > (most := MAX_KERNEL_FILE if source.is_kernel else MAX_FILE):
        yield Found(source.path, 1, f"file of {len(lines)} lines, at most {most}")
    most = MAX_KERNEL_FUNCTION if source.is_kernel else MAX_FUNCTION
    for node in nodes(source):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and length(node) > most:
            yield Found(source.path, node.lineno, f"{node.name} has {length(node)} lines")


def words(source: Source) -> Iterator[Found]:
    """No TODO without an issue, no address of one machine, no path of one person."""
    banned = {
        r"\b(TODO|FIXME|XXX)\b(?!\(#\d+\))": "no issue number: write TODO(#12)",
        r"(?<![\w.~/-])/(home|root|work|Users|tmp|mnt)/\w": "a path of one machine",
        r"\b(10|192\.168|172\.(1[6-9]|2\d|3[01]))(\.\d{1,3}){2,3}\b": "an address of one network",
        r"(?<!no-emit-)index-url|find-links|://[^\s/]*pypi": "an address of a package registry",
    }
    exempt = ("tests/test_tidy.py", "constraints.txt")  # these patterns; four-part versions
    for number, line in enumerate(source.text.splitlines(), 1):
        for pattern, what in banned.items():
            if re.search(pattern, line) and source.path not in exempt:
                yield Found(source.path, number, what)


RULES: tuple[Rule, ...] = (
    floors,
    every_room_has_a_floor,
    who_may,
    habits,
    docstrings,
    sizes,
    words,
)
PLANTED: tuple[tuple[Rule, str, str], ...] = (
    (floors, "jaxinfer/cache.py", "from jaxinfer import step"),
    (floors, "jaxinfer/cache.py", "from jaxinfer.step import prefill"),
    (floors, "jaxinfer/host/batch.py", "def late():\n    import jaxinfer.engine"),
    (floors, "jaxinfer/host/batch.py", "from jaxinfer import nn"),
    (floors, "jaxinfer/weights/hf.py", "from jaxinfer.host import pages"),
    (every_room_has_a_floor, "jaxinfer/attic/old.py", '"""Old."""'),
    (who_may, "jaxinfer/step.py", "import jax\n@jax.jit\ndef f(x): ..."),
    (who_may, "jaxinfer/step.py", "from jax import jit as fast"),
    (who_may, "jaxinfer/step.py", "from jax.experimental.pjit import pjit"),
    (who_may, "jaxinfer/llm.py", "import os\nos.environ['A']"),
    (who_may, "jaxinfer/llm.py", "import tomllib"),
    (who_may, "jaxinfer/llm.py", "from os import getenv"),
    (who_may, "jaxinfer/text/chat.py", "import jax.numpy as jnp"),
    (who_may, "jaxinfer/client/aio.py", "from jax import Array"),
    (habits, "jaxinfer/llm.py", "def f():\n    global x"),
    (habits, "jaxinfer/llm.py", "hasattr(x, 'a')"),
    (habits, "jaxinfer/llm.py", "getattr(x, 'a', None)"),
    (habits, "jaxinfer/llm.py", "try: ...\nexcept Exception: ..."),
    (habits, "jaxinfer/llm.py", "try: ...\nexcept (OSError, BaseException): ..."),
    (habits, "jaxinfer/llm.py", "try: ...\nexcept: ..."),
    (habits, "jaxinfer/llm.py", "try: ...\nexcept Exception:  # barrier: not here\n    ..."),
    (habits, "jaxinfer/runner.py", "try: ...\nexcept Exception:  # barrier:\n    ..."),
    (habits, "jaxinfer/llm.py", "from __future__ import annotations"),
    (docstrings, "jaxinfer/llm.py", "import ast"),
    (docstrings, "jaxinfer/llm.py", '"""No full stop"""'),
    (sizes, "scripts/test", "x" * (MAX_LINE + 1)),
    (sizes, "tests/test_llm.py", "#\n" * (MAX_FILE + 1)),
    (sizes, "jaxinfer/llm.py", "def f():\n" + "    f()\n" * MAX_FUNCTION),
    (words, "jaxinfer/llm.py", "# TO" + "DO: later"),
    (words, "README.md", "cd /ho" + "me/me/jaxinfer"),
    (words, "scripts/test", "curl 192." + "168.1.1"),
    (words, "scripts/setup", "pip install --index" + "-url x"),
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_the_rule(rule: Rule) -> None:
    found = [f"{one.path}:{one.line}: {one.what}" for source in house() for one in rule(source)]
    assert not found, "\n".join((rule.__doc__ or "", *found))


@pytest.mark.parametrize(("rule", "path", "text"), PLANTED)
def test_a_planted_offence_is_found(rule: Rule, path: str, text: str) -> None:
    assert list(rule(Source(path, text)))


def test_lower_floors_barriers_and_kernels_are_let_through() -> None:
    assert not list(floors(Source("jaxinfer/step.py", "from jaxinfer import cache, models")))
    barrier = "try: ...\nexcept Exception:  # barrier: a step's fault ends its requests only\n ..."
    assert not list(habits(Source("jaxinfer/runner.py", barrier)))
    long = '"""A kernel."""\n\ndef f():\n' + "    f()\n" * MAX_FUNCTION
    assert not list(sizes(Source("jaxinfer/kernels/a.py", long)))
    assert not list(words(Source("jaxinfer/llm.py", "# TODO" + "(#12): later")))


def test_barriers_are_few() -> None:
    found = [source.path for source in house() for _ in re.findall(r"# barrier: ", source.text)]
    found = [path for path in found if path.startswith("jaxinfer/")]
    assert len(found) <= MAX_BARRIERS, found


def test_rooms_without_jax_import_nothing_that_imports_it() -> None:
    uses = {one.module: {name for _, name in imports(one)} for one in house() if one.is_product}
    assert jax_users(uses) == {}
    planted = uses | {"jaxinfer.errors": {"jaxinfer.spec.check"}}
    assert "jaxinfer.host.pages" in jax_users(planted)


def test_the_map_is_true() -> None:
    mapped_folders = ("jaxinfer/", "scripts/", "configs/")
    there = {source.path for source in house() if source.path.startswith(mapped_folders)}
    named = mapped((ROOT / "WORKSPACE.md").read_text())
    assert sorted(there - named) == [], "missing from the map of WORKSPACE.md"
    assert sorted(named - there) == [], "in the map of WORKSPACE.md, but gone"


def test_a_map_is_read_by_its_paths() -> None:
    page = "`a.py`\n```\nMAP\njaxinfer/\n  jaxinfer/a.py   as b/c.py is\nscripts/test x\n```\n"
    assert mapped(page) == {"jaxinfer/a.py", "scripts/test"}


def mapped(page: str) -> set[str]:
    """The files that the map names: the first word of a line in a fenced block of WORKSPACE.md."""
    fenced = re.findall(r"^```.*?\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    first = {line.split()[0] for block in fenced for line in block.splitlines() if line.split()}
    return {word for word in first if re.fullmatch(r"(jaxinfer|scripts|configs)/.*[^/]", word)}


def jax_users(uses: dict[str, set[str]]) -> dict[str, list[str]]:
    """The modules of WITHOUT_JAX from which some chain of imports reaches jax, with the chain."""

    def chain(name: str, seen: tuple[str, ...]) -> list[str]:
        if re.match(r"jax(\.|$)", name):
            return [*seen, name]
        module = name if name in uses else name.rpartition(".")[0]
        if module in (*seen, "jaxinfer"):
            return []
        nexts = (chain(used, (*seen, module)) for used in sorted(uses.get(module, ())))
        return next((found for found in nexts if found), [])

    rooms = (module for module in sorted(uses) if module.startswith(WITHOUT_JAX))
    return {room: found for room in rooms if (found := chain(room, ()))}


def floor_of(module: str) -> tuple[int, str]:
    """The entry of the longest prefix."""
    while module not in FLOORS:
        module = module.rpartition(".")[0]
    return FLOORS[module]


def imports(source: Source) -> Iterator[tuple[int, str]]:
    """Every module, or name of a module, that is imported anywhere in the file, with its line."""
    for node in nodes(source):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{source.path}:{node.lineno}: a relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def attributes(source: Source) -> Iterator[tuple[int, str]]:
    """Every dotted pair of names: `jax.jit`, `os.environ`."""
    for node in nodes(source):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield node.lineno, f"{node.value.id}.{node.attr}"


def is_broad(handler: ast.ExceptHandler) -> bool:
    """Whether a handler takes everything."""
    names = {node.id for node in ast.walk(handler.type or handler) if isinstance(node, ast.Name)}
    return handler.type is None or bool(names & {"Exception", "BaseException"})


def is_barrier(source: Source, lines: list[str], handler: ast.ExceptHandler) -> bool:
    """Whether a broad handler stands where a fault must stop, and says why."""
    says_why = re.search(r"# barrier: \w", lines[handler.lineno - 1])
    return bool(says_why) and source.path.startswith(BARRIERS)


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    lines = (function.end_lineno or 0) - function.lineno + 1
    if ast.get_docstring(function) is not None:
        lines -= (function.body[0].end_lineno or 0) - function.body[0].lineno + 1
    return lines


def nodes(source: Source) -> Iterator[ast.AST]:
    """Every node of a Python file; none of another file."""
    return ast.walk(tree(source)) if source.path.endswith(".py") else iter(())


@functools.cache
def tree(source: Source) -> ast.Module:
    return ast.parse(source.text)


@functools.cache
def house() -> tuple[Source, ...]:
    """The text files of the project that people write; jaxinfer/v1 is generated."""
    tops = [path for path in ROOT.iterdir() if path.is_file()]
    inner = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    paths = (path for path in (*tops, *inner) if path.is_file() and path.suffix in TEXT_SUFFIXES)
    skipped = ("jaxinfer/v1/", "tests/golden/", ".")
    named = ((path.relative_to(ROOT).as_posix(), path) for path in sorted(paths))
    return tuple(
        Source(name, path.read_text())
        for name, path in named
        if not name.startswith(skipped) and "__pycache__" not in name
    )
