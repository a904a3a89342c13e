"""`jaxinfer inspect`: what a model consists of, and what memory a config takes for it."""

import json
import re
import sys
from collections.abc import Iterable
from math import prod
from typing import Annotated, NamedTuple

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from jaxinfer.cli import progress
from jaxinfer.cli.options import COMMON, Common, Json
from jaxinfer.config import EngineConfig, ModelConfig


class Parameters(NamedTuple):
    """One array of the tree, or the same array of several layers."""

    name: str  # layers.0-29.mlp.gate
    shape: tuple[int, ...]
    dtype: str
    num_arrays: int
    num_bytes: int  # of all of them


class Plan(NamedTuple):
    """What a config takes of the device's memory."""

    weight_bytes: int
    page_bytes: int
    num_pages: int
    page_size: int
    bytes_per_token: int
    num_slots: int
    max_seq_len: int
    temp_bytes: int | None = None  # of the program that needs most
    programs: dict[str, int] | None = None  # temporary bytes by program

    @property
    def total_bytes(self) -> int:
        """All of it at the moment of the largest temporary."""
        return self.weight_bytes + self.page_bytes + (self.temp_bytes or 0)


def inspect(
    *,
    compile: Annotated[bool, Parameter(name="--compile")] = False,
    as_json: Json = False,
    common: Common = COMMON,
) -> None:
    """Shows the parameter tree of a model and the memory plan of the settings.

    Parameters
    ----------
    compile
        Also compiles every program, to know its temporary memory.
    as_json
        Prints one JSON object.
    """
    settings = common.load()
    import jax

    from jaxinfer import compile as programs_of
    from jaxinfer import models, spec, weights

    dtype = settings.engine.compute_dtype
    with progress.shown() as show:
        source = weights.describe(settings.model, progress=show)
        specs = models.module_of(source.config).spec(source.config)
        programs = None
        if compile:
            placed = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            params = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed),
                spec.abstract(specs, dtype),
            )
            programs = programs_of.build(params, source.config, settings.engine, progress=show)
    leaves = spec.paths(specs).items()
    groups = grouped((name, leaf.shape, str(leaf.dtype or dtype)) for name, leaf in leaves)
    plan = memory_plan(source.config, settings.engine, groups)
    if programs is not None:
        temps = {shape.name: program.temp_bytes for shape, program in programs.items()}
        plan = plan._replace(temp_bytes=max(temps.values()), programs=temps)
    write(source.name, source.config.architecture, groups, plan, as_json=as_json)


def memory_plan(model: ModelConfig, engine: EngineConfig, groups: list[Parameters]) -> Plan:
    """What weights and pages take; compiling tells the rest."""
    from jaxinfer import cache, spec

    return Plan(
        weight_bytes=sum(group.num_bytes for group in groups),
        page_bytes=spec.num_bytes(cache.spec(model, engine), engine.compute_dtype),
        num_pages=engine.num_pages,
        page_size=engine.cache.page_size,
        bytes_per_token=cache.bytes_per_token(model, engine),
        num_slots=engine.num_slots,
        max_seq_len=engine.max_seq_len,
    )


def grouped(leaves: Iterable[tuple[str, tuple[int, ...], str]]) -> list[Parameters]:
    """The arrays with those that differ in the layer alone taken together, in their order."""
    groups: dict[tuple[str, tuple[int, ...], str], list[int]] = {}
    for name, shape, dtype in leaves:
        head, layer, tail = _split(name)
        groups.setdefault((f"{head}{{}}{tail}", shape, dtype), []).append(layer)
    return [
        Parameters(
            name=name.format(_ranges(layers)),
            shape=shape,
            dtype=dtype,
            num_arrays=len(layers),
            num_bytes=len(layers) * prod(shape) * _itemsize(dtype),
        )
        for (name, shape, dtype), layers in groups.items()
    ]


def write(
    name: str,
    architecture: str,
    groups: list[Parameters],
    plan: Plan,
    *,
    as_json: bool,
) -> None:
    """Prints the tree and the plan, as tables or as one JSON object."""
    num_parameters = sum(group.num_arrays * prod(group.shape) for group in groups)
    if as_json:
        tree = [group._asdict() for group in groups]
        facts = {"model": name, "architecture": architecture, "num_parameters": num_parameters}
        memory = {**plan._asdict(), "total_bytes": plan.total_bytes}
        print(json.dumps({**facts, "parameters": tree, "memory": memory}))
        return
    console = Console() if sys.stdout.isatty() else Console(width=100)
    title = f"{name}: {architecture}, {num_parameters / 1e6:.1f} M parameters"
    console.print(_tree_table(title, groups))
    console.print(_plan_table(plan))


def _tree_table(title: str, groups: list[Parameters]) -> Table:
    table = Table("parameter", "shape", "dtype", "", "bytes", title=title, title_justify="left")
    table.columns[4].justify = "right"
    for group in groups:
        count = f"x {group.num_arrays}" if group.num_arrays > 1 else ""
        shape = " x ".join(map(str, group.shape))
        table.add_row(group.name, shape, group.dtype, count, size(group.num_bytes))
    return table


def _plan_table(plan: Plan) -> Table:
    table = Table("memory", "", "bytes", title="plan", title_justify="left")
    table.columns[2].justify = "right"
    pages = f"{plan.num_pages} and the trash page, {plan.page_size} tokens each"
    table.add_row("weights", "", size(plan.weight_bytes))
    table.add_row("pages", pages, size(plan.page_bytes))
    for name, temp_bytes in (plan.programs or {}).items():
        table.add_row("temporary", name, size(temp_bytes))
    if plan.programs is None:
        table.add_row("temporary", "--compile tells", "?")
    table.add_section()
    temporary = "without temporaries" if plan.temp_bytes is None else "with the largest temporary"
    table.add_row("total", temporary, size(plan.total_bytes))
    table.add_row("one token", "its keys and values in all layers", size(plan.bytes_per_token))
    return table


def size(num_bytes: int) -> str:
    """Bytes as people read them: 1.5 GiB."""
    value, units = float(num_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def _split(name: str) -> tuple[str, int, str]:
    """layers.3.mlp.gate -> ("layers.", 3, ".mlp.gate"); -1 where there is no layer."""
    found = re.match(r"(.*?\.)(\d+)(\..*)?$", name)
    return (found[1], int(found[2]), found[3] or "") if found else (name, -1, "")


def _ranges(layers: list[int]) -> str:
    """Layers in words: 0-3,5."""
    if layers == [-1]:
        return ""
    parts: list[list[int]] = []
    for layer in sorted(layers):
        if parts and layer == parts[-1][1] + 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ",".join(f"{low}-{high}" if low < high else str(low) for low, high in parts)


def _itemsize(dtype: str) -> int:
    from jax.numpy import dtype as dtype_of  # NumPy alone has no bfloat16

    return dtype_of(dtype).itemsize
