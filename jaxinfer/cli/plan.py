"""`jaxinfer plan`: what fits on a device, without loading or running anything."""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from rich.table import Table

from jaxinfer.cli.console import console
from jaxinfer.cli.options import COMMON, Common, Json
from jaxinfer.errors import ConfigError

if TYPE_CHECKING:
    from jaxinfer.config import Config, ModelConfig
    from jaxinfer.plan import MemoryPlan
    from jaxinfer.store import ProgramCost

_TOKENS = re.compile(r"\d+k?", re.IGNORECASE)


def plan(
    *,
    tokens: str | None = None,
    device_gib: float | None = None,
    as_json: Json = False,
    common: Common = COMMON,
) -> None:
    """Says what memory a model takes with these settings, and how many sequences fit.

    Nothing is loaded, compiled or run. Temporaries are those of stored programs where
    `jaxinfer compile` or a start has left all of them, else an estimate.

    Parameters
    ----------
    tokens
        Lengths of sequences, prompt and answer together, with commas: 32k,2048.
    device_gib
        Plans for a device of this many GiB instead of the one that is here.
    as_json
        Prints one JSON object.
    """
    settings = common.load()
    lengths = None if tokens is None else token_counts(tokens)
    if device_gib is not None and not 0 < device_gib < math.inf:
        raise ConfigError(f"--device-gib is {device_gib}; it must be above 0 and finite")
    from jaxinfer import weights
    from jaxinfer.plan import abstract_params, plan_memory
    from jaxinfer.sharding import fit, replicas

    name, model = weights.shape_of(settings.model, quant=settings.quant.scheme)
    meshes = replicas(settings.mesh)
    settings = replace(settings, mesh=meshes[0])
    model = fit(model, settings.mesh)
    programs = stored(settings, model)
    memory = plan_memory(
        model,
        settings.engine,
        params=abstract_params(model, settings.engine, settings.mesh),
        programs=programs,
        device_bytes=None if device_gib is None else int(device_gib * 2**30),
    )
    lengths = lengths or usual_lengths(memory)
    if as_json:
        about = {"model": name, "num_replicas": len(meshes)}
        print(json.dumps({**about, **as_dict(memory, programs, lengths)}))
        return
    screen = console()
    other = device_gib is not None
    title = name if len(meshes) == 1 else f"{name}, each of {len(meshes)} replicas"
    screen.print(memory_table(memory, programs, title=title, is_other_device=other))
    screen.print(sequence_table(memory, lengths))


def token_counts(text: str) -> tuple[int, ...]:
    """Lengths from the command line: `32k,2048` is 32768 and 2048."""
    found: list[int] = []
    for part in text.split(","):
        word = part.strip()
        if not _TOKENS.fullmatch(word) or not int(word.rstrip("kK")):
            raise ConfigError(
                f"--tokens is {text!r}; it must be numbers of at least 1 with commas: 32k,2048"
            )
        found.append(int(word[:-1]) * 1024 if word[-1] in "kK" else int(word))
    return tuple(found)


def stored(settings: "Config", model: "ModelConfig") -> tuple["ProgramCost", ...]:
    """What the stored programs of these settings take; nothing unless all of them are there."""
    from jaxinfer import compile as programs_of
    from jaxinfer import config
    from jaxinfer.plan import abstract_params
    from jaxinfer.sharding import is_here
    from jaxinfer.store import find_store

    if not is_here(settings.mesh):
        return ()
    folder = config.cache_dir() / "programs"
    store = find_store(folder) if folder.is_dir() else None
    if store is None:
        return ()
    params = abstract_params(model, settings.engine, settings.mesh)
    found = programs_of.stored_costs(model, settings.engine, store, params)
    wanted = (*programs_of.shapes(settings.engine), programs_of.ALLOCATE)
    return tuple(found[shape] for shape in wanted) if found.keys() >= set(wanted) else ()


def usual_lengths(memory: "MemoryPlan") -> tuple[int, ...]:
    """The longest sequence, and one of an eighth of that."""
    return (memory.max_seq_len, max(1, memory.max_seq_len // 8))


def as_dict(
    memory: "MemoryPlan", programs: Iterable["ProgramCost"], lengths: Iterable[int]
) -> dict[str, Any]:
    """The plan for JSON."""
    sums = {name: getattr(memory, name) for name in ("cache_bytes", "total_bytes", "free_bytes")}
    return {
        **asdict(memory),
        **sums,
        "temp_bytes_by_program": {one.shape.name: one.temp_bytes for one in programs},
        "sequences": [
            {
                "num_tokens": length,
                "num_configured": memory.num_sequences(length),
                "num_possible": memory.max_sequences(length),
            }
            for length in lengths
        ],
    }


def memory_table(
    memory: "MemoryPlan",
    programs: Iterable["ProgramCost"],
    *,
    title: str = "plan",
    is_other_device: bool = False,
) -> Table:
    """What takes how much, and what the device has left."""
    table = Table("memory", "", "bytes", title=title, title_justify="left")
    table.columns[2].justify = "right"
    one_token = memory.page_bytes // memory.page_size
    pages = f"{memory.num_pages} and the trash page, {memory.page_size} tokens each"
    table.add_row("weights", "", size(memory.weight_bytes))
    table.add_row("pages", f"{pages}; {size(one_token)} a token", size(memory.cache_bytes))
    largest = max(programs, key=lambda program: program.temp_bytes, default=None)
    where = "an estimate; `jaxinfer compile` tells"
    if largest is not None:
        where = f"the largest, of {largest.shape.name}, as compiled here"
    table.add_row("temporary", where, size(memory.temp_bytes))
    code = size(memory.code_bytes) if memory.code_bytes else "-"
    table.add_row("code", "" if memory.code_bytes else "the device does not say", code)
    table.add_section()
    table.add_row("total", "", size(memory.total_bytes))
    if memory.device_bytes is not None and memory.free_bytes is not None:
        which = "as --device-gib says" if is_other_device else "the first one here"
        table.add_row("device", which, size(memory.device_bytes))
        fits = "" if memory.free_bytes >= 0 else "it does not fit"
        table.add_row("left", fits, size(memory.free_bytes))
    return table


def sequence_table(memory: "MemoryPlan", lengths: Iterable[int]) -> Table:
    """How many sequences of each length are held at once, as configured and at most."""
    table = Table("tokens", "pages", "at once, as configured", "memory for", "bound by")
    for column in table.columns[:4]:
        column.justify = "right"
    for length in lengths:
        pages = math.ceil(length / memory.page_size)
        possible = memory.max_sequences(length)
        table.add_row(
            str(length),
            str(pages),
            str(memory.num_sequences(length)),
            "-" if possible is None else str(possible),
            _bound(memory, length, pages),
        )
    return table


def _bound(memory: "MemoryPlan", length: int, pages: int) -> str:
    """The setting that keeps it from being more."""
    if length > memory.max_seq_len:
        return f"engine.max_seq_len = {memory.max_seq_len}"
    if memory.num_slots <= memory.num_pages // pages:
        return f"engine.num_slots = {memory.num_slots}"
    return f"engine.cache.num_pages = {memory.num_pages}"


def size(num_bytes: int) -> str:
    """Bytes as people read them: 1.5 GiB."""
    value, units = float(num_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(value) >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"
