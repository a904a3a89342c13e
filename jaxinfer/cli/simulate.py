"""`jaxinfer simulate`: what clients of a workload would see, in virtual time."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from cyclopts import Parameter
from rich.table import Table

from jaxinfer import config as settings
from jaxinfer.cli import progress
from jaxinfer.cli.console import console
from jaxinfer.cli.options import COMMON, Common, Json
from jaxinfer.config import Config
from jaxinfer.errors import ConfigError
from jaxinfer.host import cost_model
from jaxinfer.host.cost_model import CostModel
from jaxinfer.host.workload import NAMED, SLO, Prediction, Workload, WorkloadSpec, draw, replay

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_VALUES = re.compile(r"(?:\[[^\]]*\]|[^,\[\]])+")  # commas within brackets separate nothing


@Parameter(name="*")
@dataclass(frozen=True)
class Load:
    """What the clients send; what is not given is as in the named workload."""

    workload: Annotated[str, Parameter(name=["--workload", "-w"])] = "short"
    """short, mixed or shared; or a JSONL file with one request a line: num_prompt_tokens and
    num_output_tokens, or a text in prompt or turns, whose tokens are counted."""
    requests: int | None = None
    """How many; of a file, the first ones."""
    rate: float | None = None
    """Arrivals a second, at random; instead of a concurrency."""
    concurrency: int | None = None
    """Streams that each send their next request when the last has ended."""
    prompt: str | None = None
    """Tokens of a prompt: 100, or evenly from 20-60."""
    output: str | None = None
    """Tokens of an answer: 100, or evenly from 16-48."""
    shared: int | None = None
    """First tokens that all prompts have in common."""
    seed: int = 0
    """Another one draws other lengths and arrivals."""


LOAD = Load()


class Case(NamedTuple):
    """One column of the answer."""

    name: str
    config: Config


def simulate(
    *,
    load: Load = LOAD,
    cost: Path | None = None,
    measure: bool = False,
    sweep: str | None = None,
    slo_ttft_ms: float | None = None,
    slo_tpot_ms: float | None = None,
    as_json: Json = False,
    common: Common = COMMON,
) -> None:
    """Predicts what clients of a workload would see: the real scheduler in virtual time.

    How long steps take comes from --cost, which `jaxinfer bench simulated --save` writes, or is
    measured now. It holds for the model, the machine and the kind of programs it was measured with.

    Parameters
    ----------
    cost
        The cost model: a JSON file.
    measure
        Loads the model and measures the cost model first.
    sweep
        Compares values of one setting side by side: engine.num-slots=8,16,32.
    slo_ttft_ms
        A request is good if its first token comes within this.
    slo_tpot_ms
        A request is good if its further tokens come within this, on average.
    as_json
        Prints one JSON object.
    """
    given = common.load()
    if (cost is None) == (not measure):
        raise ConfigError("give --cost FILE (from `jaxinfer bench simulated --save`) or --measure")
    cases = cases_of(given, common, sweep)
    workload = workload_of(load, given)
    costs = _measured(given) if cost is None else _read(cost)
    slo = SLO(_seconds(slo_ttft_ms, "--slo-ttft-ms"), _seconds(slo_tpot_ms, "--slo-tpot-ms"))
    found = [cost_model.simulate(workload, case.config.engine, costs, slo=slo) for case in cases]
    if as_json:
        answers = [
            {"case": case.name, **asdict(one)} for case, one in zip(cases, found, strict=True)
        ]
        print(json.dumps({"cost": asdict(costs), "predictions": answers}))
        return
    screen = console()
    title = f"{load.workload}: {len(workload.arrivals)} requests, predicted"
    screen.print(table(title, cases, found, has_slo=slo != SLO()))


def cases_of(given: Config, common: Common, sweep: str | None) -> list[Case]:
    """The settings to compare: as given, or once with each value of the sweep."""
    if sweep is None:
        return [Case("predicted", given)]
    key, _, text = sweep.partition("=")
    values = [value.strip() for value in _VALUES.findall(text)]
    if not key.startswith("engine.") or not values or not all(values):
        raise ConfigError(
            f"--sweep is {sweep!r}; give a setting of the engine and its values with commas: "
            "engine.num-slots=8,16,32"
        )
    short = key.rpartition(".")[2]
    return [
        Case(f"{short} {value}", settings.load(*common.sources(), f"--{key}={value}"))
        for value in values
    ]


def workload_of(load: Load, given: Config) -> Workload:
    """The requests that the options mean."""
    named = NAMED.get(load.workload)
    path = Path(load.workload)
    if named is None and not path.is_file():
        raise ConfigError(
            f"--workload is {load.workload!r}; it must be {', '.join(NAMED)} or a JSONL file"
        )
    spec = spec_of(load, named or WorkloadSpec(concurrency=8))
    if named is not None:
        return draw(spec)
    lengths = lengths_of(path, spec, given)
    return replay(lengths if load.requests is None else lengths[: load.requests], spec)


def spec_of(load: Load, named: WorkloadSpec) -> WorkloadSpec:
    """A named workload with what the options say instead."""
    if load.rate is not None and load.concurrency is not None:
        raise ConfigError("give --rate or --concurrency, not both")
    changes: dict[str, Any] = {"seed": load.seed}
    if load.rate is not None:
        changes |= {"rate_per_s": load.rate, "concurrency": None}
    if load.concurrency is not None:
        changes |= {"rate_per_s": None, "concurrency": load.concurrency}
    for name, value in (("num_requests", load.requests), ("num_shared_tokens", load.shared)):
        changes |= {} if value is None else {name: value}
    for name, option, text in (
        ("num_prompt_tokens", "--prompt", load.prompt),
        ("num_output_tokens", "--output", load.output),
    ):
        changes |= {} if text is None else {name: _range(option, text)}
    return replace(named, **changes)


def lengths_of(path: Path, spec: WorkloadSpec, given: Config) -> list[tuple[int, int]]:
    """Prompt and output lengths of each line of a JSONL file."""
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"--workload {path} is no JSONL file: {error}") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"--workload {path} must hold one JSON object a line")
    prompts = _prompt_lengths(path, rows, given)
    outputs = [
        one.num_output_tokens for one in draw(replace(spec, num_requests=len(rows))).arrivals
    ]
    return [
        (prompt, int(row.get("num_output_tokens", output)))
        for prompt, row, output in zip(prompts, rows, outputs, strict=True)
    ]


def table(
    title: str, cases: Sequence[Case], found: Sequence[Prediction], *, has_slo: bool
) -> Table:
    """One column for each case."""
    columns = Table(
        "", *(case.name.replace(" ", "\n") for case in cases), title=title, title_justify="left"
    )
    for column in columns.columns[1:]:
        column.justify = "right"
    for label, name in (("TTFT", "ttft_s"), ("TPOT", "tpot_s"), ("e2e", "e2e_s")):
        for part in ("mean", "p50", "p99"):
            values = [1e3 * getattr(getattr(one, name), part) for one in found]
            columns.add_row(f"{label} ms, {part}", *(f"{value:.1f}" for value in values))
        columns.add_section()
    rows: list[tuple[str, list[str]]] = [
        ("output tokens/s", [f"{one.output_tokens_per_s:.1f}" for one in found]),
        ("requests/s", [f"{one.requests_per_s:.2f}" for one in found]),
        ("good requests/s", [f"{one.goodput_per_s:.2f}" if has_slo else "-" for one in found]),
        ("refused", [str(one.num_refused) for one in found]),
        ("preemptions", [str(one.num_preemptions) for one in found]),
        ("prefix hit rate", [f"{one.hit_rate:.0%}" for one in found]),
        (
            "peak pages",
            [
                f"{one.peak_pages} of {case.config.engine.num_pages}"
                for case, one in zip(cases, found, strict=True)
            ],
        ),
    ]
    for label, cells in rows:
        columns.add_row(label, *cells)
    return columns


def _prompt_lengths(path: Path, rows: list[dict[str, Any]], given: Config) -> list[int]:
    """As the rows say, or by the model's tokenizer."""
    if all(isinstance(row.get("num_prompt_tokens"), int) for row in rows):
        return [max(1, row["num_prompt_tokens"]) for row in rows]
    found = [row.get("prompt") or (row.get("turns") or [None])[0] for row in rows]
    texts = [text for text in found if isinstance(text, str) and text]
    if len(texts) < len(rows):
        raise ConfigError(
            f"--workload {path}: each line needs num_prompt_tokens, or a text in prompt or turns"
        )
    from jaxinfer import weights
    from jaxinfer.text.tokenizer import Tokenizer

    tokenizer = Tokenizer(weights.describe(given.model).text)
    return [len(tokenizer.encode(text)) for text in texts]


def _measured(given: Config) -> CostModel:
    from jaxinfer.bench import simulated
    from jaxinfer.llm import load_engine

    with progress.shown() as show:
        return simulated.calibrate(load_engine(given, progress=show), progress=show)


def _read(path: Path) -> CostModel:
    try:
        return cost_model.from_json(path.read_text())
    except (OSError, ConfigError) as error:
        raise ConfigError(f"--cost {path}: {error}") from error


def _range(option: str, text: str) -> tuple[int, int]:
    found = _RANGE.fullmatch(text)
    if not found:
        raise ConfigError(f"{option} is {text!r}; it must be a number or a range: 20-60")
    return int(found[1]), int(found[2] or found[1])


def _seconds(milliseconds: float | None, option: str) -> float | None:
    if milliseconds is None:
        return None
    if not 0 < milliseconds < float("inf"):
        raise ConfigError(f"{option} is {milliseconds}; it must be above 0 and finite")
    return milliseconds / 1e3
