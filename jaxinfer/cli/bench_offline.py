"""`jaxinfer bench offline`: a workload through the engine alone, without a server."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from cyclopts import Parameter

from jaxinfer import config as settings
from jaxinfer.cli import progress
from jaxinfer.cli.bench_serve import slo_of
from jaxinfer.cli.console import console
from jaxinfer.cli.options import COMMON, Common, Json
from jaxinfer.config import Config
from jaxinfer.errors import ConfigError

if TYPE_CHECKING:
    from jaxinfer.bench.page import Page
    from jaxinfer.bench.variants import Variants
    from jaxinfer.bench.workloads import Workload


class Wanted(NamedTuple):
    """Which workload, in the words of the command line."""

    name: str
    requests: int | None
    output_tokens: int
    chat: bool


def offline(
    workload: str = "W1",
    *,
    rounds: int = 3,
    requests: int | None = None,
    output_tokens: int = 64,
    chat: bool = False,
    slo: str = "",
    batch_curve: bool = False,
    static: bool = False,
    html: Path | None = None,
    as_json: Json = False,
    common: Common = COMMON,
) -> None:
    """Times a workload in this process: throughput, TTFT, TPOT, memory, waste.

    W1: one request, 128 tokens in, 128 out. W2: one of 1,024 in, 32 out. W3: 32 of mixed lengths.
    W4: 16 that share 768 tokens. W5: 64 whose answers are geometrically distributed, 96 tokens in
    the mean. Or a JSONL file of prompts. All requests are there at the start, greedy, and end
    after exactly so many tokens. engine.num-slots and engine.max-seq-len are what the workload
    needs, 32 slots at most, unless they are set.

    Parameters
    ----------
    workload
        W1 to W5, or a JSONL file with prompt, turns or token_ids in each line.
    rounds
        Repeats, after one that does not count; medians are shown.
    requests
        Only the first so many.
    output_tokens
        For lines of a file that don't say num_output_tokens.
    chat
        Puts the texts of a file through the model's chat template.
    slo
        Bounds in seconds that goodput counts: ttft=0.5,tpot=0.1,e2e=10.
    batch_curve
        Instead: 1 to 64 equal requests at once, throughput against the time of each.
    static
        Instead: continuous batching against static batches in 8 slots, W3 unless said otherwise.
    html
        Writes a page with pictures: one file that loads nothing from elsewhere.
    as_json
        Prints one JSON object, in one line.
    """
    if rounds < 1 or output_tokens < 1:
        raise ConfigError("--rounds and --output-tokens must be at least 1")
    config, keep = common.load(), asked_for(common)
    check_page(html)
    if batch_curve:
        _curve(config, keep, rounds=rounds, html=html, as_json=as_json)
        return
    wanted = Wanted(
        "W3" if static and workload == "W1" else workload, requests, output_tokens, chat
    )
    if static:
        _static(config, keep, wanted, rounds=rounds, html=html, as_json=as_json)
        return
    from jaxinfer.bench import offline_shown
    from jaxinfer.bench.offline import measure
    from jaxinfer.bench.variants import Variants

    bounds = slo_of(slo)
    with progress.shown() as show:
        variants = Variants(config.model, progress=show)
        config, load = fitted(variants, config, keep, wanted)
        report = measure(
            variants.engine(config),
            load,
            model=variants.checkpoint(config).name,
            rounds=rounds,
            slo=bounds,
            progress=show,
        )
    shown = offline_shown.page(report, bounds)
    put(report.as_dict(), page=shown, html=html, as_json=as_json)


def asked_for(common: Common) -> frozenset[str]:
    """The keys of `engine` that somebody has set: in a file, in the environment, by a flag."""
    given = settings.gather(*common.sources())
    return frozenset(key[1] for key in given if key[0] == "engine" and len(key) == 2)


def check_page(html: Path | None) -> None:
    """Raises ConfigError where a page can't be written, before anything is measured."""
    if html is not None and not html.parent.is_dir():
        raise ConfigError(f"--html {html}: there is no folder {html.parent}")


def put(facts: dict[str, Any], *, page: "Page", html: Path | None, as_json: bool) -> None:
    """Prints the figures, and writes their page."""
    from jaxinfer.bench import page as pages

    if html is not None:
        html.write_text(pages.html(page), encoding="utf-8")
    if as_json:
        print(json.dumps(facts))
        return
    screen = console()
    for sheet in page.sheets:
        screen.print(pages.shown(sheet))


def fitted(
    variants: "Variants", config: Config, keep: frozenset[str], wanted: Wanted
) -> tuple[Config, "Workload"]:
    """The workload, and the config with the slots and the room that it needs."""
    from jaxinfer.bench import workloads

    if Path(wanted.name).suffix == ".jsonl":
        load = workloads.from_file(
            Path(wanted.name),
            variants.tokenizer(config),
            num_output_tokens=wanted.output_tokens,
            chat=wanted.chat,
        )
    else:
        vocab_size = variants.checkpoint(config).config.vocab_size
        load = workloads.named(wanted.name, vocab_size=vocab_size)
    load = workloads.first(load, wanted.requests)
    return replace(config, engine=workloads.fitted(config.engine, load, keep=keep)), load


def _static(
    config: Config,
    keep: frozenset[str],
    wanted: Wanted,
    *,
    rounds: int,
    html: Path | None,
    as_json: bool,
) -> None:
    from jaxinfer.bench import curve, workloads
    from jaxinfer.bench.page import Page
    from jaxinfer.bench.variants import Variants, with_engine

    if "num_slots" not in keep:  # with a slot for each request both would do the same
        config, keep = with_engine(config, num_slots=8, decode_rows=()), keep | {"num_slots"}
    with progress.shown() as show:
        variants = Variants(config.model, progress=show)
        config, load = fitted(variants, config, keep, wanted)
        longest = curve.in_shape(load, config.engine.num_slots)
        room = workloads.fitted(config.engine, longest, keep=keep)
        config = replace(config, engine=room)
        found = curve.against_static(
            variants.engine(with_engine(config, batching="continuous")),
            variants.engine(with_engine(config, batching="static")),
            load,
            model=variants.checkpoint(config).name,
            rounds=rounds,
            progress=show,
        )
    sheet = curve.static_sheet(found)
    shown = Page(sheet.title, (load.said,), (), (sheet,))
    put(found.as_dict(), page=shown, html=html, as_json=as_json)


def _curve(
    config: Config, keep: frozenset[str], *, rounds: int, html: Path | None, as_json: bool
) -> None:
    from jaxinfer.bench import curve
    from jaxinfer.bench.variants import Variants, with_engine

    most = config.engine.num_slots if "num_slots" in keep else curve.COUNTS[-1]
    counts = tuple(count for count in curve.COUNTS if count <= most)
    config = with_engine(config, num_slots=most)
    if "decode_rows" not in keep:
        config = with_engine(config, decode_rows=())
    if "max_seq_len" not in keep:
        config = with_engine(config, max_seq_len=256)
    with progress.shown() as show:
        variants = Variants(config.model, progress=show)
        found = curve.measure(
            variants.engine(config),
            model=variants.checkpoint(config).name,
            counts=counts,
            rounds=rounds,
            progress=show,
        )
    shown = curve.page(found)
    put(found.as_dict(), page=shown, html=html, as_json=as_json)


def kernels(
    *,
    batches: tuple[int, ...] = (1, 8, 32),
    contexts: tuple[int, ...] = (256, 1024),
    rows: tuple[int, ...] = (1, 8, 32, 128, 512),
    rounds: int = 9,
    html: Path | None = None,
    as_json: Json = False,
    common: Common = COMMON,
) -> None:
    """Times attention and matmuls alone, in the model's sizes, against this machine's bandwidth.

    Every round begins with a probe of the bandwidth. Attention is timed with each kernel that can
    run here, matmuls in float32, bfloat16 and int8. No weights are loaded.

    Parameters
    ----------
    batches
        Rows that decode at once.
    contexts
        Tokens that each of them attends to.
    rows
        Rows of the matmuls.
    rounds
        Rounds; medians are shown.
    html
        Writes a page: one file that loads nothing from elsewhere.
    as_json
        Prints one JSON object, in one line.
    """
    if min((rounds, *batches, *contexts, *rows)) < 1:
        raise ConfigError("every count must be at least 1")
    config = common.load()
    check_page(html)
    from jaxinfer import weights
    from jaxinfer.bench import kernels as bench

    name, model = weights.shape_of(config.model)
    with progress.shown() as show:
        report = bench.measure(
            model,
            config.engine,
            name=name,
            batches=batches,
            contexts=contexts,
            rows=rows,
            rounds=rounds,
            progress=show,
        )
    put(report.as_dict(), page=bench.page(report), html=html, as_json=as_json)


def compare(
    workload: str,
    *command: Annotated[str, Parameter(allow_leading_hyphen=True)],
    rounds: int = 5,
    repeats: int = 3,
    html: Path | None = None,
    as_json: Json = False,
    common: Common = COMMON,
) -> None:
    """Times a workload here and in another program, in turns: ratios with quartiles.

    jaxinfer bench compare W3 -- python peer.py W3

    Both sides are new processes in every round, and who goes first alternates. The other program
    prints one JSON object in a line of its own, with any of seconds, ttft_ms, mean_ttft_ms,
    decode_tok_s, out_tok_s and peak_rss_mb; `jaxinfer bench offline --json` is one.

    Parameters
    ----------
    workload
        What `jaxinfer bench offline` takes; the command has to do the same work.
    command
        After --: the other program and its arguments.
    rounds
        Rounds, both sides once in each.
    repeats
        Repeats of our side in each round; its figures are their medians.
    html
        Writes a page: one file that loads nothing from elsewhere.
    as_json
        Prints one JSON object, in one line.
    """
    if not command:
        raise ConfigError("no command to compare with; give one after --, such as: -- python p.py")
    if rounds < 1 or repeats < 1:
        raise ConfigError("--rounds and --repeats must be at least 1")
    common.load()
    check_page(html)
    from jaxinfer.bench import compare as bench

    own = (sys.executable, "-m", "jaxinfer", "bench", "offline", workload, "--json")
    ours = (*own, f"--rounds={repeats}", *common.arguments())
    with progress.shown() as show:
        report = bench.measure(ours, command, workload=workload, rounds=rounds, progress=show)
    put(report.as_dict(), page=bench.page(report), html=html, as_json=as_json)
