"""`jaxinfer tune`: which tile sizes make the attention kernel fastest on this device."""

import json
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.table import Table

from jaxinfer.cli import progress
from jaxinfer.cli.console import console
from jaxinfer.cli.options import COMMON, Common, Json
from jaxinfer.errors import ConfigError

if TYPE_CHECKING:
    from jaxinfer.bench.hardware.tuning import Tuned
    from jaxinfer.config import EngineConfig, ModelConfig


def tune(
    *,
    out: Annotated[Path, Parameter(name=["--out", "-o"])] = Path("tiles.toml"),
    batches: tuple[int, ...] = (1, 16),
    context: int = 2048,
    chunk: int = 512,
    rounds: int = 7,
    tiny: bool = False,
    as_json: Json = False,
    common: Common = COMMON,
) -> None:
    """Times every tile size of the attention kernel on this device, and writes the fastest.

    Decodes of --batches rows and one chunk of a prompt, with the heads of the model and the pages
    of the settings, each in turns with the sizes that the rule gives. `--engine.tiles FILE` makes
    an engine take what is written. A file keeps its entries for other devices and heads.

    Parameters
    ----------
    out
        The file.
    batches
        Rows of the decodes.
    context
        Tokens that a row attends to.
    chunk
        Tokens of the prompt's chunk; 0 leaves it out.
    rounds
        How often each is timed; the median counts.
    tiny
        Runs the TPU kernel in its interpreter on any machine, with a few sizes: times mean
        nothing, and the entry is for a device of the name "interpreter".
    as_json
        Prints one JSON object, in one line.
    """
    if rounds < 1 or not batches or min(batches) < 1 or not 0 <= chunk <= context:
        raise ConfigError("--rounds and --batches must be at least 1, --chunk 0 to --context")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}")
    settings = common.load()
    from jaxinfer import weights
    from jaxinfer.kernels.paged_attention import tuned

    if out.exists():
        tuned.read(out)  # before the work, not after it
    name, model = weights.shape_of(settings.model, quant=settings.quant.scheme)
    with progress.shown() as show:
        found = measure(
            model,
            settings.engine,
            batches=batches,
            context=context,
            chunk=chunk,
            rounds=rounds,
            tiny=tiny,
            show=show,
        )
    tuned.write(out, [found.entry])
    if as_json:
        tried = [{**asdict(one), "ratio": one.ratio if one.ratios else None} for one in found.tried]
        print(json.dumps({"model": name, "entry": asdict(found.entry), "tried": tried}))
        return
    console().print(table(found))
    console().print(
        f"{list(found.entry.sizes)} for {found.entry.place}; written to {out}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def measure(
    model: "ModelConfig",
    engine: "EngineConfig",
    *,
    batches: tuple[int, ...],
    context: int,
    chunk: int,
    rounds: int,
    tiny: bool,
    show: progress.Show = lambda stage, done, total: None,
) -> "Tuned":
    """What was tried with the heads of a model; ConfigError where no kernel here has tiles."""
    from jaxinfer.bench.hardware import part, tuning
    from jaxinfer.bench.hardware.sizes import Load, Turns

    needs = part.needs_of(engine, head_dim=model.head_dim)
    place, device = nullcontext, part.device_name()
    if tiny:
        pretended = part.INTERPRETED["pallas_tpu"]
        needs = needs._replace(platform=pretended.platform, capability=pretended.capability)
        place, device = pretended.interpreter, "interpreter"
    engine = replace(
        engine,
        attention=tuning.backend_here(engine, needs),
        attention_tiles=(),
        tiles="",
    )
    size = engine.cache.page_size
    loads = [Load(batch, context, page_size=size) for batch in batches]
    loads += [Load(1, context, queries=chunk, page_size=size)] if chunk else []
    return tuning.tune(
        model,
        engine,
        needs,
        loads=loads,
        device=device,
        rounds=rounds,
        turns=Turns(1, 1) if tiny else Turns(16, 8),
        most=2 if tiny else None,
        place=place,
        progress=show,
    )


def table(found: "Tuned") -> Table:
    """The sizes by time, and what could not be taken."""
    from jaxinfer.kernels.paged_attention.tiles import FIELDS

    entry = found.entry
    names = FIELDS[entry.backend]
    shown = Table(*names, "of the rule's time", "", title=str(entry.place))
    fit = sorted((one for one in found.tried if not one.why_not), key=lambda one: one.ratio)
    for one in fit:
        cells = map(str, one.sizes) if one.sizes else ["rule", *"-" * (len(names) - 1)]
        shown.add_row(*cells, f"{one.ratio:.3f}", "")
    for one in found.tried:
        if one.why_not:
            shown.add_row(*map(str, one.sizes), "-", one.why_not)
    return shown
