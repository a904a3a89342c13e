"""`jaxinfer bench`: what this machine does with a model, against what it could do."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from cyclopts import App
from rich.table import Table

from jaxinfer.cli import COMMANDS, progress
from jaxinfer.cli.console import console
from jaxinfer.cli.options import COMMON, Common, Json
from jaxinfer.errors import ConfigError

app = App(name="bench", help=COMMANDS["bench"])
app.command(
    "jaxinfer.cli.bench_serve:serve",
    name="serve",
    help="Sends load to a running server, and says what its clients see: TTFT, TPOT, goodput.",
)
for name, said in {
    "offline": "Times a workload in this process: throughput, TTFT, TPOT, memory, waste.",
    "kernels": "Times attention and matmuls alone, against this machine's bandwidth.",
    "compare": "Times a workload here and in another program, in turns: ratios with quartiles.",
}.items():
    app.command(f"jaxinfer.cli.bench_offline:{name}", name=name, help=said)


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
    from jaxinfer.bench.step import measure, tables
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
    _print(*tables(report), facts=report.as_dict(), as_json=as_json)


@app.command
def prefix(
    *,
    shared: int = 768,
    own: int = 32,
    requests: int = 16,
    concurrency: int = 1,
    rounds: int = 3,
    as_json: Json = False,
    common: Common = COMMON,
) -> None:
    """Times first tokens of prompts that begin alike, with the prefix cache and past it.

    Each round sends the same requests both ways, from an empty cache.

    Parameters
    ----------
    shared
        First tokens that all prompts have in common.
    own
        Tokens of each prompt after them.
    requests
        How many requests a round has.
    concurrency
        How many are sent at once.
    rounds
        Rounds, both ways each.
    as_json
        Prints one JSON object.
    """
    settings = common.load()
    _at_least_one(rounds=rounds)
    from jaxinfer.bench.prefix import Load, measure, table
    from jaxinfer.llm import load_engine

    load = Load(shared, own, requests, concurrency)
    with progress.shown() as show:
        loaded = load_engine(settings, progress=show)
        report = measure(loaded.engine, name=loaded.name, load=load, rounds=rounds, progress=show)
    _print(table(report), facts=report.as_dict(), as_json=as_json)


@app.command
def interference(
    *,
    streams: int = 8,
    prompt: int = 4096,
    rounds: int = 3,
    as_json: Json = False,
    common: Common = COMMON,
) -> None:
    """Counts what is left of decoding while a long prompt is prefilled beside it.

    engine.num-slots and engine.max-seq-len are raised to what this needs.

    Parameters
    ----------
    streams
        How many sequences decode.
    prompt
        Tokens of the long prompt.
    rounds
        How many long prompts, one after another.
    as_json
        Prints one JSON object.
    """
    settings = common.load()
    _at_least_one(streams=streams, prompt=prompt, rounds=rounds)
    from jaxinfer.bench.interference import measure, roomy, table
    from jaxinfer.llm import load_engine

    engine = roomy(settings.engine, num_streams=streams, num_prompt_tokens=prompt)
    with progress.shown() as show:
        loaded = load_engine(replace(settings, engine=engine), progress=show)
        report = measure(
            loaded.engine,
            name=loaded.name,
            num_streams=streams,
            num_prompt_tokens=prompt,
            rounds=rounds,
            progress=show,
        )
    _print(table(report), facts=report.as_dict(), as_json=as_json)


@app.command
def simulated(
    *,
    rounds: int = 2,
    save: Path | None = None,
    as_json: Json = False,
    common: Common = COMMON,
) -> None:
    """Compares what the simulator predicts with what clients of a real server see.

    A cost model is fitted to the steps of other requests first; it alone makes the predictions.

    Parameters
    ----------
    rounds
        How often everything is measured, calibration included.
    save
        Writes the cost model here, for `jaxinfer simulate --cost`.
    as_json
        Prints one JSON object.
    """
    settings = common.load()
    _at_least_one(rounds=rounds)
    if save is not None and not save.parent.is_dir():
        raise ConfigError(f"--save {save}: there is no folder {save.parent}")
    from jaxinfer.bench.simulated import measure, table
    from jaxinfer.host.cost_model import to_json
    from jaxinfer.llm import load_engine

    with progress.shown() as show:
        report = measure(load_engine(settings, progress=show), rounds=rounds, progress=show)
    if save is not None:
        save.write_text(to_json(report.cost))
    _print(table(report), facts=report.as_dict(), as_json=as_json)


@app.command
def bits(
    *,
    context: int = 256,
    streams: tuple[int, ...] = (1, 8, 32),
    rounds: int = 30,
    as_json: Json = False,
    common: Common = COMMON,
) -> None:
    """What engine.bits=exact costs: its decode steps beside the fastest of engine.bits=fast.

    Each round times all of them once, so that a busy machine is as bad for one as for the other.

    Parameters
    ----------
    context
        Tokens that each stream attends to.
    streams
        How many sequences decode at once; those above engine.num_slots are left out.
    rounds
        Rounds; the table shows medians, and where the middle half of the prices lies.
    as_json
        Prints one JSON object.
    """
    settings = common.load()
    _at_least_one(rounds=rounds, context=context)
    from jaxinfer.bench.bits import measure, table
    from jaxinfer.llm import load_engine

    with progress.shown() as show:
        loaded = load_engine(settings, progress=show)
        report = measure(
            loaded.engine,
            name=loaded.name,
            context=context,
            actives=streams,
            rounds=rounds,
            progress=show,
        )
    _print(table(report), facts=report.as_dict(), as_json=as_json)


@app.command
def edge(
    *,
    streams: int = 64,
    step_ms: float = 1.0,
    tokens: int = 512,
    seconds: float = 5.0,
    rounds: int = 3,
    as_json: Json = False,
) -> None:
    """What streaming over gRPC costs, without a model: a real server, each stream a token a step.

    Server and client are two processes, so two cores are the least that this wants.

    Parameters
    ----------
    streams
        How many answers are streamed at once.
    step_ms
        Milliseconds between two tokens of a stream; a late step is not made up for.
    tokens
        Of one answer; a stream that is done is asked again.
    seconds
        How long a round counts, after a second to warm up.
    rounds
        Rounds, each with a new server; the JSON has the median of their tokens a second.
    as_json
        Prints one JSON object.
    """
    _at_least_one(streams=streams, tokens=tokens, rounds=rounds)
    if not (step_ms >= 0 and 0 < seconds < 3600):
        raise ConfigError("--step-ms must be at least 0, and --seconds above 0 and below 3600")
    from jaxinfer.bench.edge import Load, measure, table

    load = Load(streams, step_ms / 1e3, tokens, seconds)
    with progress.shown() as show:
        report = measure(load, rounds=rounds, progress=show)
    _print(table(report), facts=report.as_dict(), as_json=as_json)


def _at_least_one(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ConfigError(f"--{name} is {value}; it must be at least 1")


def _print(*tables: Table, facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts))
        return
    screen = console()
    for table in tables:
        screen.print(table)
