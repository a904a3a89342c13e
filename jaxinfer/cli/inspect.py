"""`jaxinfer inspect`: what a model consists of, and what memory a config takes for it."""

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Annotated, NamedTuple

from cyclopts import Parameter
from rich.table import Table

from jaxinfer.cli import progress
from jaxinfer.cli.console import console
from jaxinfer.cli.options import COMMON, Common, Json
from jaxinfer.cli.plan import as_dict, memory_table, sequence_table, size, stored, usual_lengths

if TYPE_CHECKING:
    from jaxinfer.plan import MemoryPlan
    from jaxinfer.store import ProgramCost


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
    from jaxinfer import compile as programs_of
    from jaxinfer import models, spec, weights
    from jaxinfer.plan import abstract_params, plan_memory
    from jaxinfer.sharding import fit, replicas

    settings = replace(settings, mesh=replicas(settings.mesh)[0])
    dtype = settings.engine.compute_dtype
    with progress.shown() as show:
        source = weights.describe(settings.model, quant=settings.quant.scheme, progress=show)
        model = fit(source.config, settings.mesh)
        specs = models.spec_of(model)
        params = abstract_params(model, settings.engine, settings.mesh)
        programs: tuple[ProgramCost, ...] = stored(settings, model)
        if compile and not programs:
            built = programs_of.build(params, model, settings.engine, progress=show)
            programs = tuple(built.values())
    leaves = spec.paths(specs).items()
    groups = grouped((name, leaf.shape, str(leaf.dtype or dtype)) for name, leaf in leaves)
    memory = plan_memory(model, settings.engine, params=params, programs=programs)
    write(source.name, source.config.architecture, groups, memory, programs, as_json=as_json)


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
    memory: "MemoryPlan",
    programs: tuple["ProgramCost", ...],
    *,
    as_json: bool,
) -> None:
    """Prints the tree and the plan, as tables or as one JSON object."""
    num_parameters = sum(group.num_arrays * prod(group.shape) for group in groups)
    if as_json:
        tree = [group._asdict() for group in groups]
        facts = {"model": name, "architecture": architecture, "num_parameters": num_parameters}
        plan = as_dict(memory, programs, usual_lengths(memory))
        print(json.dumps({**facts, "parameters": tree, "memory": plan}))
        return
    screen = console()
    title = f"{name}: {architecture}, {num_parameters / 1e6:.1f} M parameters"
    screen.print(_tree_table(title, groups))
    screen.print(memory_table(memory, programs))
    screen.print(sequence_table(memory, usual_lengths(memory)))


def _tree_table(title: str, groups: list[Parameters]) -> Table:
    table = Table("parameter", "shape", "dtype", "", "bytes", title=title, title_justify="left")
    table.columns[4].justify = "right"
    for group in groups:
        count = f"x {group.num_arrays}" if group.num_arrays > 1 else ""
        shape = " x ".join(map(str, group.shape))
        table.add_row(group.name, shape, group.dtype, count, size(group.num_bytes))
    return table


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
