"""`jaxinfer bench serve`: load on a running server, and what its clients see."""

import asyncio
import json
import math
import shlex
import sys
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from cyclopts import Parameter

from jaxinfer import config
from jaxinfer.bench.load import files, saved, tables
from jaxinfer.bench.load.arrivals import pattern_of
from jaxinfer.bench.load.calls import Recipe
from jaxinfer.bench.load.lengths import Lengths, lengths_of
from jaxinfer.bench.load.measure import Rates, measure
from jaxinfer.bench.load.saved import Measured
from jaxinfer.bench.load.target import Ask, Target
from jaxinfer.cli import progress
from jaxinfer.cli.console import console
from jaxinfer.cli.options import Json
from jaxinfer.cli.simulate import LOAD, Load, spec_of
from jaxinfer.errors import ConfigError
from jaxinfer.host.workload import NAMED, SLO, WorkloadSpec

SWEEP_S = 30.0
TLS_FILES = ("tls_ca", "tls_cert", "tls_key")


@Parameter(name="*")
@dataclass(frozen=True)
class Shape:
    """How the requests are spread, and what goes with each of them."""

    arrivals: str = "poisson"
    """With a rate: poisson, even, gamma:SHAPE (less than 1 is more uneven) or bursts:SIZE."""
    seconds: float | None = None
    """With a rate, instead of --requests: how long they keep coming; of a trace, its beginning."""
    groups: int = 1
    """With --shared: groups of prompts, each with a beginning of its own."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    stop_at_eos: bool = False
    """Lets answers end where the model ends them; else all are as long as asked."""
    chat: bool = False
    """Sends prompts as a user's message, through the model's chat template."""
    no_prefix_cache: bool = False
    """Past the prefix cache, so that a second run of the same prompts is no faster."""
    timeout: float = 600.0
    """Seconds that a request may take; then it counts as failed."""


@Parameter(name="*")
@dataclass(frozen=True)
class Where:
    """The server."""

    target: str = "127.0.0.1:50051"
    """Address of a jaxinfer server."""
    openai: str | None = None
    """Instead: the URL of any server with OpenAI's API, http://127.0.0.1:8000; needs httpx."""
    model_name: str = ""
    """With --openai: the model to ask; else the first that the server lists."""
    token_file: Path | None = None
    """A file with the token that the server asks for, or the API key; else JAXINFER_TOKEN.

    JAXINFER_TLS_CA, JAXINFER_TLS_CERT and JAXINFER_TLS_KEY stand for the options of that name."""
    tls: bool = False
    """Speaks TLS with a jaxinfer server, and trusts what this machine trusts."""
    tls_ca: Path | None = None
    """Speaks TLS, and trusts this PEM file instead."""
    tls_cert: Path | None = None
    """With --tls-key: shows the server this certificate."""
    tls_key: Path | None = None
    """The certificate's key."""


@Parameter(name="*")
@dataclass(frozen=True)
class Out:
    """What becomes of the figures."""

    save: Path | None = None
    """Writes all of it as JSON, each request included."""
    html: Path | None = None
    """Writes a page with pictures: one file that loads nothing from elsewhere."""
    compare: Path | None = None
    """Prints ratios to another run, a file of --save."""


SHAPE, WHERE, OUT = Shape(), Where(), Out()


class Plan(NamedTuple):
    """What the options ask for."""

    recipe: Recipe
    load: str
    slo: SLO
    num_warmup: int
    rates: Rates | None


def serve(
    *,
    load: Load = LOAD,
    shape: Shape = SHAPE,
    where: Where = WHERE,
    slo: str = "",
    warmup: int = 4,
    sweep: str | None = None,
    slo_share: float = 99.0,
    saved_run: Annotated[Path | None, Parameter(name="--saved")] = None,
    out: Out = OUT,
    as_json: Json = False,
    debug: bool = False,
) -> None:
    """Sends load to a running server, and says what its clients see: TTFT, TPOT, goodput.

    A rate is an open loop: requests go when they are due, whatever the server does, and all times
    count from then. A concurrency is a closed one. The same options send the same requests.

    Parameters
    ----------
    slo
        Bounds in seconds: ttft=0.5,tpot=0.1,e2e=10. A request that failed is beyond all of them.
    warmup
        Requests that go first and don't count; other prompts than those that do.
    sweep
        LOW-HIGH requests a second: finds the highest rate that keeps --slo, each held for
        --seconds (30) or --requests.
    slo_share
        Percent of the requests that must keep --slo.
    saved_run
        Measures nothing, and shows a file of --save.
    as_json
        Prints one JSON object.
    debug
        Shows the traceback of an error.
    """
    _check_out(out)
    other = None if out.compare is None else saved.read(out.compare)
    if saved_run is not None:
        measured = saved.read(saved_run)
    else:
        plan = plan_of(load, shape, slo=slo, warmup=warmup, sweep=sweep, slo_share=slo_share)
        measured = asyncio.run(_measured(plan, shape, where))
    if out.save is not None:
        out.save.write_text(json.dumps(saved.to_dict(measured)) + "\n", encoding="utf-8")
    if out.html is not None:
        from jaxinfer.bench.load.report import html

        out.html.write_text(html(measured), encoding="utf-8")
    if as_json:
        print(json.dumps(saved.to_dict(measured)))
        return
    terminal = console()
    terminal.print(tables.shown(measured))
    if other is not None and out.compare is not None:
        terminal.print(tables.comparison(measured, other, out.compare.name))


def plan_of(
    load: Load, shape: Shape, *, slo: str, warmup: int, sweep: str | None, slo_share: float
) -> Plan:
    """The options, checked; ConfigError where they don't go together."""
    if warmup < 0:
        raise ConfigError(f"--warmup is {warmup}; it must be at least 0")
    if not 0 < shape.timeout < math.inf:
        raise ConfigError(f"--timeout is {shape.timeout}; it must be above 0 and finite")
    recipe, bounds = recipe_of(load, shape), slo_of(slo)
    if sweep is None:
        is_closed = recipe.concurrency is not None
        for option, is_given in (
            ("--seconds", shape.seconds is not None),
            ("--arrivals", shape.arrivals != SHAPE.arrivals),
        ):
            if is_closed and is_given:
                raise ConfigError(f"{option} goes with --rate or --sweep, not with a closed loop")
        return Plan(recipe, described(load, recipe), bounds, warmup, None)
    if load.rate is not None or load.concurrency is not None:
        raise ConfigError("--sweep tries rates of its own; leave out --rate and --concurrency")
    if bounds == SLO():
        raise ConfigError("--sweep looks for the highest rate that keeps --slo; give one")
    if not 0 < slo_share <= 100:
        raise ConfigError(f"--slo-share is {slo_share}; it must be above 0 and at most 100")
    low, _, high = sweep.partition("-")
    try:
        rates = float(low), float(high)
    except ValueError:
        rates = 0.0, 0.0
    if not 0 < rates[0] <= rates[1] < math.inf:
        raise ConfigError(f"--sweep is {sweep!r}; it must be a range of requests a second: 1-32")
    seconds = shape.seconds or (SWEEP_S if load.requests is None else None)
    words = f"{Path(load.workload).name}, sweep over {sweep} requests/s"
    return Plan(recipe, words, bounds, warmup, Rates(*rates, slo_share / 100, seconds))


def recipe_of(load: Load, shape: Shape) -> Recipe:
    """The workload, in the words of `jaxinfer simulate` and some more."""
    named, path = NAMED.get(load.workload), Path(load.workload)
    if named is None and not path.is_file():
        raise ConfigError(
            f"--workload is {load.workload!r}; it must be {', '.join(NAMED)} or a JSONL file"
        )
    plain = {name: (getattr(load, name) or "").partition("~")[0] for name in ("prompt", "output")}
    texts = {name: text or None for name, text in plain.items()}
    spec = spec_of(replace(load, **texts), named or WorkloadSpec(concurrency=8))
    rows, has_times = ((), False) if named else files.read(path)
    has_times = has_times and load.rate is None and load.concurrency is None
    if rows and (load.prompt or load.shared or shape.groups != 1):
        raise ConfigError("--prompt, --shared and --groups make prompts up; the file has its own")
    if shape.chat and any(isinstance(row.prompt, tuple) for row in rows):
        raise ConfigError("--chat sends texts, and this file has prompts in token_ids")
    if shape.groups < 1:
        raise ConfigError(f"--groups is {shape.groups}; it must be at least 1")
    if shape.groups > 1 and not spec.num_shared_tokens:
        raise ConfigError("--groups are of prompts that begin alike; give --shared TOKENS too")
    recipe = Recipe(
        prompt=_lengths("--prompt", load.prompt, spec.num_prompt_tokens),
        output=_lengths("--output", load.output, spec.num_output_tokens),
        num_requests=load.requests or len(rows) or spec.num_requests,
        rate_per_s=None if has_times else spec.rate_per_s,
        concurrency=None if has_times else spec.concurrency,
        pattern=pattern_of(shape.arrivals),
        num_shared_tokens=spec.num_shared_tokens,
        num_groups=shape.groups,
        seed=load.seed,
        rows=rows,
        has_times=has_times,
    )
    return _limited(recipe, load, shape)


def slo_of(text: str) -> SLO:
    """`ttft=0.5,tpot=0.1,e2e=10`, in seconds."""
    bounds: dict[str, float] = {}
    for part in text.split(",") if text else ():
        name, _, number = part.strip().partition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if name not in ("ttft", "tpot", "e2e") or not 0 < value < math.inf:
            raise ConfigError(
                f"--slo is {text!r}; it must be bounds in seconds: ttft=0.5,tpot=0.1,e2e=10"
            )
        bounds[f"{name}_s"] = value
    return SLO(**bounds)


def described(load: Load, recipe: Recipe) -> str:
    """The load in a few words."""
    words = f"{Path(load.workload).name}, {recipe.num_requests} requests"
    if recipe.has_times:
        return f"{words} at their recorded times"
    if recipe.rate_per_s is not None:
        return f"{words}, {recipe.rate_per_s:g} a second"
    return f"{words}, {recipe.concurrency} at once"


def _limited(recipe: Recipe, load: Load, shape: Shape) -> Recipe:
    """As many requests as --seconds lasts."""
    if shape.seconds is None:
        return recipe
    if load.requests is not None or not 0 < shape.seconds < math.inf:
        raise ConfigError("--seconds must be above 0, and goes without --requests")
    if recipe.has_times:
        count = sum(row.arrival.at_s < shape.seconds for row in recipe.rows)
        return replace(recipe, num_requests=count)
    if recipe.rate_per_s is None:
        return recipe  # of a sweep; each of its rates takes its own count
    return replace(recipe, num_requests=max(1, math.ceil(recipe.rate_per_s * shape.seconds)))


async def _measured(plan: Plan, shape: Shape, where: Where) -> Measured:
    """Opens the target and measures."""
    ask = Ask(
        temperature=shape.temperature,
        ignore_eos=not shape.stop_at_eos,
        is_chat=shape.chat,
        use_prefix_cache=not shape.no_prefix_cache,
        timeout_s=shape.timeout,
    )
    async with AsyncExitStack() as stack:
        target, facts, vocab_size = await _opened(where, ask, stack)
        with progress.shown() as show:
            run, swept = await measure(
                target,
                plan.recipe,
                vocab_size=None if shape.chat else vocab_size,
                slo=plan.slo,
                num_warmup=plan.num_warmup,
                rates=plan.rates,
                progress=show,
            )
    command = shlex.join(["jaxinfer", *sys.argv[1:]])
    return Measured(command, facts, _workload(plan, shape), plan.slo, run, swept)


async def _opened(
    where: Where, ask: Ask, stack: AsyncExitStack
) -> tuple[Target, dict[str, str], int | None]:
    """The target, what it is, and how many tokens it knows, where it says so."""
    usual = config.access()
    token = usual.get("token", "") if where.token_file is None else _read_token(where.token_file)
    if where.openai is None:
        if where.model_name:
            raise ConfigError("--model-name goes with --openai; a jaxinfer server has one model")
        from jaxinfer.bench.load.grpc import GrpcTarget

        named = {name: getattr(where, name) or usual.get(name) for name in TLS_FILES}
        grpc_target = GrpcTarget(where.target, ask, token=token or None, tls=where.tls, **named)
        await stack.enter_async_context(grpc_target)
        model = await grpc_target.model()
        facts = {"kind": "gRPC", "address": where.target, "model": model.name}
        return grpc_target, facts, model.vocab_size
    from jaxinfer.bench.load.openai import OpenAiTarget

    if where.tls or where.tls_ca or where.tls_cert or where.tls_key:
        raise ConfigError("--tls goes with --target; for TLS give --openai an https URL")
    if not ask.use_prefix_cache:
        raise ConfigError("--no-prefix-cache: OpenAI's API can't say so; leave it out")
    target = OpenAiTarget(where.openai, ask, model=where.model_name, key=token)
    await stack.enter_async_context(target)
    return target, {"kind": "OpenAI", "address": where.openai, "model": target.model}, None


def _workload(plan: Plan, shape: Shape) -> dict[str, Any]:
    recipe = plan.recipe
    return {
        "load": plan.load,
        "prompt tokens": "as in the file" if recipe.rows else _words(recipe.prompt),
        "output tokens": _words(recipe.output),
        "arrivals": shape.arrivals if recipe.concurrency is None else "closed loop",
        "shared tokens": "as in the file" if recipe.rows else recipe.num_shared_tokens,
        "groups": recipe.num_groups,
        "seed": recipe.seed,
        "warm-up requests": plan.num_warmup,
        "SLO": tables.slo_text(plan.slo),
        "temperature": shape.temperature,
        "stops at EOS": shape.stop_at_eos,
        "chat template": shape.chat,
        "prefix cache": not shape.no_prefix_cache,
    }


def _words(lengths: Lengths) -> str:
    median = "" if lengths.median is None else f"~{lengths.median}"
    return f"{lengths.low}-{lengths.high}{median}"


def _lengths(option: str, text: str | None, otherwise: tuple[int, int]) -> Lengths:
    return Lengths(*otherwise) if text is None else lengths_of(option, text)


def _read_token(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token-file {path} can't be read: {error}") from error


def _check_out(out: Out) -> None:
    """Before a long run, not after it."""
    for option, path in (("--save", out.save), ("--html", out.html)):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ConfigError(f"{option} {path} can't be written: it must be a file in a folder")
