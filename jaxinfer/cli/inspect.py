"""`jaxinfer inspect`: what a model consists of, and what memory a config takes for it."""

import json
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict
from math import prod
from typing import TYPE_CHECKING, Annotated, NamedTuple

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from jaxinfer.cli import progress
from jaxinfer.cli.options import COMMON, Common, Json

if TYPE_CHECKING:
    from jaxinfer.plan import MemoryPlan


class Parameters(NamedTuple):
    """One array of the tree, or the same array of several layers."""

    name: str  # layers.0-29.mlp.gate
    shape: tuple[int, ...]
    dtype: str
    num_arrays: int
    num_bytes: int  # of all of them


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
    from jaxinfer.plan import plan_memory

    dtype = settings.engine.compute_dtype
    with progress.shown() as show:
        source = weights.describe(settings.model, progress=show)
        specs = models.module_of(source.config).spec(source.config)
        programs = {}
        if compile:
            placed = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            params = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed),
                spec.abstract(specs, dtype),
            )
            programs = programs_of.build(params, source.config, settings.engine, progress=show)
    leaves = spec.paths(specs).items()
    groups = grouped((name, leaf.shape, str(leaf.dtype or dtype)) for name, leaf in leaves)
    plan = plan_memory(source.config, settings.engine, programs=programs.values())
    temps = {shape.name: program.temp_bytes for shape, program in programs.items()}
    write(source.name, source.config.architecture, groups, plan, temps, as_json=as_json)


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
    plan: "MemoryPlan",
    temps: dict[str, int],
    *,
    as_json: bool,
) -> None:
    """Prints the tree and the plan, as tables or as one JSON object."""
    num_parameters = sum(group.num_arrays * prod(group.shape) for group in groups)
    if as_json:
        tree = [group._asdict() for group in groups]
        facts = {"model": name, "architecture": architecture, "num_parameters": num_parameters}
        sums = {"cache_bytes": plan.cache_bytes, "total_bytes": plan.total_bytes}
        memory = {**asdict(plan), **sums, "temp_bytes_by_program": temps}
        print(json.dumps({**facts, "parameters": tree, "memory": memory}))
        return
    console = Console() if sys.stdout.isatty() else Console(width=100)
    title = f"{name}: {architecture}, {num_parameters / 1e6:.1f} M parameters"
    console.print(_tree_table(title, groups))
    console.print(_plan_table(plan, temps))


def _tree_table(title: str, groups: list[Parameters]) -> Table:
    table = Table("parameter", "shape", "dtype", "", "bytes", title=title, title_justify="left")
    table.columns[4].justify = "right"
    for group in groups:
        count = f"x {group.num_arrays}" if group.num_arrays > 1 else ""
        shape = " x ".join(map(str, group.shape))
        table.add_row(group.name, shape, group.dtype, count, size(group.num_bytes))
    return table


def _plan_table(plan: "MemoryPlan", temps: dict[str, int]) -> Table:
    table = Table("memory", "", "bytes", title="plan", title_justify="left")
    table.columns[2].justify = "right"
    pages = f"{plan.num_pages} and the trash page, {plan.page_size} tokens each"
    table.add_row("weights", "", size(plan.weight_bytes))
    table.add_row("pages", pages, size(plan.cache_bytes))
    for name, temp_bytes in temps.items():
        table.add_row("temporary", name, size(temp_bytes))
    if plan.is_temp_estimate:
        table.add_row("temporary", "an estimate; --compile tells", size(plan.temp_bytes))
    table.add_section()
    table.add_row("total", "with the largest temporary", size(plan.total_bytes))
    if plan.device_bytes is not None:
        table.add_row("device", "what it has", size(plan.device_bytes))
    one_token = plan.page_bytes // plan.page_size
    table.add_row("one token", "its keys and values in all layers", size(one_token))
    lengths = (plan.max_seq_len, max(1, plan.max_seq_len // 8))
    for length in lengths:
        held = f"{plan.num_sequences(length)} at once; memory for {plan.max_sequences(length)}"
        table.add_row("sequences", f"of {length} tokens", held)
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
