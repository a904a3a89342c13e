"""`jaxinfer validate`: quantised weights against those that they were made of."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich import box
from rich.table import Table

from jaxinfer.cli import progress
from jaxinfer.cli.console import console
from jaxinfer.cli.options import COMMON, Common, Json
from jaxinfer.errors import ConfigError

if TYPE_CHECKING:
    from jaxinfer.config import Config
    from jaxinfer.quality.report import Figures, Interval, Report
    from jaxinfer.weights import Checkpoint

MISSED = 1  # exit code
NAME_WIDTH = 15  # of a kind of text; a path goes on in the next line


def validate(
    *,
    reference: str | None = None,
    text: tuple[Path, ...] = (),
    tokens: int = 50_000,
    window: int = 512,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    as_json: Json = False,
    common: Common = COMMON,
) -> int:
    """Compares a quantised model with its reference, and exits with 1 beyond a bound.

    The report of a folder that `jaxinfer quantize` wrote is stored in it; a load looks there. With
    --quant an ordinary model is compared with itself, quantised; that stores nothing. With
    --engine.cache.dtype int8 the candidate keeps keys and values in int8, the reference does not.
    The gate of quality, which looks at that report, lets both in: it could never be made anew else.

    Parameters
    ----------
    reference
        The model that the candidate was made of. With --quant: the model itself.
    text
        A file of your own: text, or JSONL with a `text` on each line; repeatable.
    tokens
        How many tokens of the bundled text, and of each file, are compared.
    window
        Tokens that are looked at together.
    out
        Writes the report here as well.
    as_json
        Prints the report as one JSON object.
    """
    settings = common.load()
    check_numbers(tokens, window)
    from jaxinfer import weights
    from jaxinfer.quality import gate, report
    from jaxinfer.quality.validate import validate as compare
    from jaxinfer.weights.checkpoint import digest

    with progress.shown() as show:
        source = weights.describe(settings.model, progress=show)
        is_stored = source.config.quant != "none"
        keeps_int8 = settings.engine.cache.dtype == "int8"
        if not is_stored and settings.quant.scheme == "none" and not keeps_int8:
            raise ConfigError(
                f"{source.name} is not quantised; give --quant w8a8 to try that, "
                "or --engine.cache.dtype int8"
            )
        if is_stored and reference is None:
            raise ConfigError("--reference is missing: the model that the candidate was made of")
        first, second = load_both(settings, reference, is_stored=is_stored, show=show)
        found = compare(
            first,
            second,
            engine=settings.engine,
            files=text,
            max_tokens=tokens,
            window=window,
            weights=digest(source.path) if is_stored else "",
            progress=show,
        )
    # The report of a folder is one of its weights alone.
    is_kept = is_stored and not keeps_int8
    paths = ([gate.place(source)] if is_kept else []) + ([out] if out else [])
    for path in paths:
        report.write(found, path)
    return say(found, settings, paths, as_json=as_json)


def load_both(
    settings: "Config", reference: str | None, *, is_stored: bool, show: progress.Show
) -> tuple["Checkpoint", "Checkpoint"]:
    """The reference, and the candidate."""
    from jaxinfer import weights

    scheme, dtype = settings.quant.scheme, settings.engine.compute_dtype
    first = weights.load(reference or settings.model, dtype=dtype, progress=show)
    if not is_stored and reference is None:
        if scheme == "none":
            return first, first
        return first, weights.quantised(first, scheme, progress=show)
    return first, weights.load(settings.model, dtype=dtype, quant=scheme, progress=show)


def check_numbers(tokens: int, window: int) -> None:
    """Raises ConfigError for what can't be compared."""
    if tokens < 1:
        raise ConfigError(f"--tokens is {tokens}; it must be at least 1")
    if window < 8:
        raise ConfigError(f"--window is {window}; it must be at least 8")


def say(found: "Report", settings: "Config", paths: list[Path], *, as_json: bool) -> int:
    """Prints a report and what is beyond the bounds; returns the exit code."""
    from jaxinfer.quality.report import missed

    beyond = missed(found, settings.quant)
    if as_json:
        print(json.dumps({**asdict(found), "missed": list(beyond)}))
        return MISSED if beyond else 0
    screen = console()
    screen.print(table(found))
    for path in paths:
        screen.print(f"report: {path}", highlight=False, soft_wrap=True)
    for sentence in beyond:
        screen.print(f"beyond the bound: {sentence}", highlight=False, soft_wrap=True)
    return MISSED if beyond else 0


def table(found: "Report") -> Table:
    """One row a text, and one a kind of the bundled text."""
    title = f"{found.candidate} as {found.scheme}, against {found.reference}"
    columns = ("text", "tokens", "mean KL", "p99", "top-1", "perplexity", "ratio", "lost", "gained")
    made = Table(
        *columns,
        title=title,
        title_justify="left",
        caption="±: half of a 95 % interval; lost, gained: tokens only one has right",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
    )
    made.columns[0].overflow, made.columns[0].min_width = "fold", NAME_WIDTH
    for column in made.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for number, one in enumerate(found.texts, start=1):
        made.add_row(*_row(one), end_section=number == len(found.texts))
    for one in found.kinds:
        made.add_row(*_row(replace(one, name=f"  {one.name}")))
    return made


def _row(one: "Figures") -> tuple[str, ...]:
    return (
        one.name,
        str(one.num_tokens),
        _spread(one.kl, "{:.4f}"),
        f"{one.kl_p99:.3f}",
        _spread(one.top1, "{:.2%}"),
        f"{one.reference_perplexity:.2f}",
        _spread(one.perplexity_ratio, "{:.4f}"),
        str(one.num_lost),
        str(one.num_gained),
    )


def _spread(one: "Interval", form: str) -> str:
    """A figure, and under it half the width of its interval: a terminal is no wider."""
    return f"{form.format(one.value)}\n±{form.format((one.high - one.low) / 2)}"
