"""`jaxinfer compile`: builds every program of the settings into the store, without weights."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.table import Table

from jaxinfer import config
from jaxinfer.cli import progress
from jaxinfer.cli.console import console
from jaxinfer.cli.options import COMMON, Common, Json
from jaxinfer.cli.plan import size
from jaxinfer.errors import ConfigError, ProgramRefused

if TYPE_CHECKING:
    from jaxinfer.compile import Program
    from jaxinfer.config import Config, ModelConfig
    from jaxinfer.manifest import Manifest

DIFFERENT = 1  # exit code of --check


def compile(
    *,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    check: Path | None = None,
    as_json: Json = False,
    common: Common = COMMON,
) -> int:
    """Builds every program of the settings, so that the next start loads them.

    No weights are read: a program depends on their shapes. A second run finds all of them stored.
    Nor is a model's quality report: it is the start that refuses a model, and its programs are
    those of any other of this shape.

    Parameters
    ----------
    out
        Writes the manifest here: every program with its key and its numbers.
    check
        Compares with an older manifest, prints what has changed, and exits with 1 if anything has.
    as_json
        Prints one JSON object.
    """
    settings = common.load()
    if out is not None and not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}")
    from jaxinfer import manifest, weights
    from jaxinfer.sharding import fit, make_mesh, replicas

    older = None if check is None else _read(check)
    name, model = weights.shape_of(settings.model, quant=settings.quant.scheme)
    first, *others = (replace(settings, mesh=mesh) for mesh in replicas(settings.mesh))
    model = fit(model, first.mesh)
    with progress.shown() as show:
        programs = build(first, model, progress=show)
        for other in others:  # the same programs for other devices
            build(other, model, progress=show)
    devices = make_mesh(first.mesh).devices.ravel().tolist()
    made = manifest.describe(programs, model, settings.engine, devices=devices)
    if out is not None:
        _write(made, out)
    changes = None if older is None else manifest.compare(older, made)
    if as_json:
        print(json.dumps(as_dict(name, programs, made, changes)))
    else:
        screen = console()
        screen.print(table(name, programs))
        screen.print(f"manifest {made.digest[:16]}", highlight=False)
        if changes is not None:
            for line in changes or ("nothing has changed",):
                screen.print(line, markup=False, highlight=False, soft_wrap=True)
    return DIFFERENT if changes else 0


def build(
    settings: "Config",
    model: "ModelConfig",
    *,
    progress: progress.Show = lambda stage, done, total: None,
) -> tuple["Program", ...]:
    """Every program that an engine with these settings runs, stored under the keys it looks up."""
    from jaxinfer import compile as programs_of
    from jaxinfer.fingerprint import settle_here
    from jaxinfer.plan import abstract_params
    from jaxinfer.sharding import make_mesh
    from jaxinfer.store import open_store

    store = open_store(config.cache_dir() / "programs")
    params = abstract_params(model, settings.engine, settings.mesh)
    devices = make_mesh(settings.mesh).devices.ravel().tolist()
    engine = settle_here(model, settings.engine, devices).engine
    steps = programs_of.build(params, model, engine, store=store, progress=progress)
    others = [programs_of.build_allocate(params, model, engine, store=store)]
    if engine.bits == "exact":
        others.append(programs_of.build_read_pages(params, model, engine, store=store))
    if engine.score_chunk:
        one, shape = engine.scoring, programs_of.score_shape(engine)
        found = programs_of.build(params, model, one, wanted=[shape], store=store)
        others += [found[shape], programs_of.build_allocate(params, model, one, store=store)]
    return (*steps.values(), *others)


def table(name: str, programs: tuple["Program", ...]) -> Table:
    """One row a program."""
    num_stored = sum(is_stored(program) for program in programs)
    title = f"{name}: {len(programs)} programs, {num_stored} were stored"
    columns = ("program", "arguments", "output", "aliased", "temporary", "code", "seconds", "")
    found = Table(*columns, title=title, title_justify="left")
    for column in found.columns[1:7]:
        column.justify = "right"
    for program in programs:
        found.add_row(
            program.shape.name,
            size(program.argument_bytes),
            size(program.output_bytes),
            size(program.alias_bytes),
            size(program.temp_bytes),
            size(program.code_bytes) if program.code_bytes else "-",
            f"{program.seconds:.2f}",
            "stored" if is_stored(program) else "built",
        )
    return found


def as_dict(
    name: str,
    programs: tuple["Program", ...],
    made: "Manifest",
    changes: tuple[str, ...] | None,
) -> dict[str, object]:
    """The same for JSON."""
    rows = [
        {
            "name": program.shape.name,
            **asdict(cost),
            "seconds": program.seconds,
            "is_stored": is_stored(program),
        }
        for program, cost in zip(programs, made.programs, strict=True)
    ]
    return {
        "model": name,
        "digest": made.digest,
        "num_stored": sum(map(is_stored, programs)),
        "programs": rows,
        "changes": None if changes is None else list(changes),
    }


def is_stored(program: "Program") -> bool:
    """Whether it was there already."""
    return program.load_s > 0


def _read(path: Path) -> "Manifest":
    from jaxinfer import manifest

    try:
        return manifest.read(path)
    except ProgramRefused as error:
        raise ConfigError(f"--check {path}: {error}") from error


def _write(made: "Manifest", path: Path) -> None:
    from jaxinfer import manifest

    try:
        manifest.write(made, path)
    except OSError as error:
        raise ConfigError(f"--out {path} can't be written: {error.strerror}") from error
