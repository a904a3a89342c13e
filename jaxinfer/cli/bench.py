"""`jaxinfer bench`: what this machine does with a model, against what it could do."""

import json
import sys

from cyclopts import App
from rich.console import Console
from rich.table import Table

from jaxinfer.cli import COMMANDS, progress
from jaxinfer.cli.options import COMMON, Common, Json

app = App(name="bench", help=COMMANDS["bench"])


@app.command
def step(
    *,
    contexts: tuple[int, ...] = (256,),
    rows: tuple[int, ...] = (1, 8, 32),
    rounds: int = 15,
    as_json: Json = False,
    common: Common = COMMON,
) -> None:
    """Times decode steps against the read floor, and the host's part of the engine's steps.

    Every round times each load once, with a probe of the read bandwidth beside it.

    Parameters
    ----------
    contexts
        Tokens that each row attends to.
    rows
        How many sequences decode at once; those above engine.num_slots are left out.
    rounds
        Rounds; the table shows medians.
    as_json
        Prints one JSON object.
    """
    settings = common.load()
    from jaxinfer.bench.step import measure
    from jaxinfer.llm import load_engine

    with progress.shown() as show:
        loaded = load_engine(settings, progress=show)
        report = measure(
            loaded.engine,
            name=loaded.name,
            contexts=contexts,
            actives=rows,
            rounds=rounds,
            progress=show,
        )
    if as_json:
        print(json.dumps(report.as_dict()))
        return
    console = Console() if sys.stdout.isatty() else Console(width=100)
    title = f"{report.model}, {report.compute_dtype}; reads {report.read_gb_per_s:.1f} GB/s"
    table = Table(
        "rows", "context", "step ms", "min", "floor ms", "of floor", "tokens/s", title=title
    )
    for one in report.steps:
        table.add_row(
            str(one.active),
            str(one.context),
            f"{one.median_ms:.1f}",
            f"{one.min_ms:.1f}",
            f"{one.floor_ms:.1f}",
            f"{one.floor_ms / one.median_ms:.0%}",
            f"{one.tokens_per_s:.0f}",
        )
    console.print(table)
    table = Table(
        "rows",
        "steps",
        "step ms",
        "host ms",
        "dispatch ms",
        "tokens/s",
        title="the engine's own steps",
    )
    for one in report.host:
        table.add_row(
            str(one.active),
            str(one.steps),
            f"{one.step_ms:.1f}",
            f"{one.host_ms:.2f}",
            f"{one.dispatch_ms:.2f}",
            f"{one.output_tokens_per_s:.0f}",
        )
    console.print(table)
