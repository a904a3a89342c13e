"""Tile sizes that were measured: a file of them, and which of them an engine takes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxinfer import settings
from jaxinfer.config import EngineConfig
from jaxinfer.errors import ConfigError
from jaxinfer.kernels.paged_attention.needs import Needs
from jaxinfer.kernels.paged_attention.tiles import FIELDS, Sizes, misfit
from jaxinfer.settings import Setting

_HEAD = """\
# Tile sizes that were fastest, from `jaxinfer tune`; an engine takes them by engine.tiles.
# ratio: time with them over time with the sizes of the rule, over the loads that were tried.
"""


class Place(NamedTuple):
    """What sizes are measured for, and hold for."""

    backend: str
    device: str  # its kind, as jax calls it
    dtype: str
    head_dim: int
    group: int  # query heads that share a kv head
    page_size: int

    def __str__(self) -> str:
        return (
            f"{self.backend} on {self.device!r}: {self.dtype} heads of {self.head_dim} in groups "
            f"of {self.group}, pages of {self.page_size}"
        )


@dataclass(frozen=True)
class Entry:
    """The sizes for one place, as the file has them."""

    backend: str = ""
    device: str = ""
    dtype: str = ""
    head_dim: int = 0
    group: int = 0
    page_size: int = 0
    sizes: tuple[int, ...] = ()
    ratio: float = 0.0

    @property
    def place(self) -> Place:
        """What it is for."""
        return Place(*(getattr(self, name) for name in Place._fields))


def settle(
    engine: EngineConfig, needs: Needs, *, group: int, device: str | None = None
) -> EngineConfig:
    """The config with the sizes that its kernel takes; `engine.attention` is a backend's name.

    Sizes that were asked for and can't be had are refused, never replaced by the rule's.
    """
    name = engine.attention
    if engine.attention_tiles:
        if reason := misfit(name, engine.attention_tiles, needs):
            given = list(engine.attention_tiles)
            raise ConfigError(f"engine.attention_tiles is {given}; {reason}")
        return engine
    if not engine.tiles:
        return engine
    if name not in FIELDS:
        raise ConfigError(
            f"engine.tiles is {engine.tiles!r}, and attention by {name} has no tiles; leave it "
            f"out, or choose engine.attention from {', '.join(FIELDS)}"
        )
    kind = jax.devices()[0].device_kind if device is None else device
    place = Place(name, kind, needs.dtype, needs.head_dim, group, needs.page_size)
    sizes = find(read(engine.tiles), place, origin=engine.tiles)
    if reason := misfit(name, sizes, needs):
        raise ConfigError(f"engine.tiles is {engine.tiles!r}, with {list(sizes)} here; {reason}")
    return replace(engine, attention_tiles=sizes)


def find(entries: Iterable[Entry], place: Place, *, origin: str) -> Sizes:
    """The sizes for a place; ConfigError where none were measured there."""
    found = {entry.place: entry.sizes for entry in entries}
    if place not in found:
        there = "; ".join(map(str, found)) or "nothing"
        raise ConfigError(
            f"engine.tiles is {origin!r}, which has no sizes for {place}; it has {there}. "
            "`jaxinfer tune` measures them on this device"
        )
    return found[place]


def read(path: str | Path) -> tuple[Entry, ...]:
    """The entries of a file; ConfigError for what is no entry of a kernel that there is."""
    name = str(path)
    found = settings.from_file(Path(path), name=name)
    tables = found.pop(("tiles",), Setting([], name, False)).value
    if found:
        raise ConfigError(f"{name}: unknown key {'.'.join(next(iter(found)))}; it has [[tiles]]")
    if not isinstance(tables, list):
        raise ConfigError(f"{name}: tiles must be a list of tables: [[tiles]]")
    entries = tuple(_entry(table, f"{name}: tiles {at}") for at, table in enumerate(tables, 1))
    places = [entry.place for entry in entries]
    for place in places:
        if places.count(place) > 1:
            raise ConfigError(f"{name}: two entries for {place}; leave one")
    return entries


def write(path: Path, entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """Puts entries into a file, beside those that it has for other places; returns all."""
    kept = {entry.place: entry for entry in (read(path) if path.exists() else ())}
    kept |= {entry.place: entry for entry in entries}
    tables = [
        "\n".join(["[[tiles]]", *(f"{key} = {settings.format_value(value)}" for key, value in one)])
        for one in (vars(entry).items() for _, entry in sorted(kept.items()))
    ]
    try:
        path.write_text("\n\n".join([_HEAD.rstrip(), *tables]) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} can't be written: {error.strerror}") from error
    return tuple(kept.values())


def _entry(table: Any, origin: str) -> Entry:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{origin} is {table!r}; it must be a table")
    given = {(str(key),): Setting(value, origin, False) for key, value in table.items()}
    entry = settings.apply(Entry(), given)
    for one in fields(Entry):
        if one.name not in table and one.name != "ratio":
            raise ConfigError(f"{origin}: {one.name} is missing")
    if entry.backend not in FIELDS:
        raise ConfigError(
            f"{origin}: backend is {entry.backend!r}; kernels with tiles are {', '.join(FIELDS)}"
        )
    names = FIELDS[entry.backend]
    if len(entry.sizes) != len(names):
        raise ConfigError(
            f"{origin}: sizes is {list(entry.sizes)}; {entry.backend} takes {', '.join(names)}"
        )
    return entry
