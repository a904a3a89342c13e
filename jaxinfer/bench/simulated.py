"""The simulator against the real server: a cost model is fitted, then it predicts workloads."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.table import Table

from jaxinfer.bench import clients
from jaxinfer.client import AsyncClient
from jaxinfer.errors import ConfigError
from jaxinfer.host.cost_model import CostModel, StepRecord, fit, simulate
from jaxinfer.host.workload import (
    NAMED,
    SLO,
    Prediction,
    Timeline,
    Workload,
    WorkloadSpec,
    draw,
    summarise,
)
from jaxinfer.llm import LoadedEngine

BAR = 0.15
LOAD = 0.6  # of what the engine can do: the rate of open loops
FIGURES = ("ttft_ms", "tpot_ms", "tokens_per_s")
_CALIBRATION_SEED = 10_000
Show = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """Shows no progress."""


@dataclass(frozen=True)
class Compared:
    """One figure of one workload."""

    workload: str
    figure: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Of the prediction, relative to what was measured."""
        return self.predicted / self.measured - 1 if self.measured else 0.0


@dataclass(frozen=True)
class Report:
    """Everything of one run."""

    model: str
    cost: CostModel
    num_steps: int
    """That the cost model was fitted to."""
    rates_per_s: Mapping[str, float]
    """Of the open loops."""
    compared: tuple[Compared, ...]

    @property
    def worst(self) -> float:
        """The largest error, either way."""
        return max(abs(one.error) for one in self.compared)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [{**asdict(one), "error": one.error} for one in self.compared]
        return {**asdict(self), "compared": rows, "worst": self.worst, "bar": BAR}


def measure(
    loaded: LoadedEngine,
    *,
    specs: Mapping[str, WorkloadSpec] = NAMED,
    rounds: int = 2,
    progress: Show = silent,
) -> Report:
    """Each round calibrates and plays every workload; predictions use the calibrations alone."""
    check_room(loaded, specs)
    records: list[StepRecord] = []
    played: dict[str, list[Prediction]] = {name: [] for name in specs}
    workloads: dict[str, Workload] = {}

    async def all_rounds(client: AsyncClient) -> CostModel:
        cost = CostModel(1.0)
        for number in range(rounds):
            cost = await _calibrate(client, loaded, records, seed=number)
            for place, (name, spec) in enumerate(specs.items()):
                workload = workloads.setdefault(name, _at_load(spec, loaded, cost))
                lines = await _play(client, loaded, workload, seed=100 * number + place)
                played[name].append(summarise(lines, slo=SLO()))
                progress("measure", number * len(specs) + place + 1, rounds * len(specs))
        return cost

    cost = asyncio.run(clients.serve(loaded, all_rounds))
    compared = []
    for name, workload in workloads.items():
        predicted = figures(simulate(workload, loaded.engine.config, cost))
        seen = [figures(one) for one in played[name]]
        compared += [
            Compared(name, figure, predicted[figure], sum(one[figure] for one in seen) / rounds)
            for figure in FIGURES
        ]
    rates = {
        name: len(one.arrivals) / one.arrivals[-1].at_s
        for name, one in workloads.items()
        if one.concurrency is None
    }
    return Report(loaded.name, cost, len(records), rates, tuple(compared))


def calibrate(loaded: LoadedEngine, *, progress: Show = silent) -> CostModel:
    """The cost model of an engine behind a server, measured now."""
    cost = asyncio.run(clients.serve(loaded, lambda client: _calibrate(client, loaded, [], seed=0)))
    progress("measure", 1, 1)
    return cost


def figures(seen: Prediction) -> dict[str, float]:
    """What is compared."""
    return {
        "ttft_ms": 1e3 * seen.ttft_s.mean,
        "tpot_ms": 1e3 * seen.tpot_s.mean,
        "tokens_per_s": seen.output_tokens_per_s,
    }


def table(report: Report) -> Table:
    """One row for each figure of each workload."""
    error = report.cost.relative_error
    title = (
        f"{report.model}: the simulator against the server; fitted to {report.num_steps} steps, "
        f"half of them within {error:.0%}"
    )
    found = Table("workload", "figure", "predicted", "measured", "error", "within 15 %")
    found.title, found.title_justify = title, "left"
    for column in found.columns[2:5]:
        column.justify = "right"
    for place, one in enumerate(report.compared):
        if place and place % len(FIGURES) == 0:
            found.add_section()
        found.add_row(
            one.workload if place % len(FIGURES) == 0 else "",
            {"ttft_ms": "TTFT ms", "tpot_ms": "TPOT ms"}.get(one.figure, "output tokens/s"),
            f"{one.predicted:.1f}",
            f"{one.measured:.1f}",
            f"{one.error:+.1%}",
            "yes" if abs(one.error) <= BAR else "no",
        )
    return found


def check_room(loaded: LoadedEngine, specs: Mapping[str, WorkloadSpec]) -> None:
    """Raises ConfigError where a workload's sequences are too long for the engine."""
    longest = loaded.engine.config.max_seq_len
    for name, spec in specs.items():
        needed = spec.num_prompt_tokens[1] + spec.num_output_tokens[1]
        if needed > longest:
            raise ConfigError(
                f"workload {name} has sequences of {needed} tokens; set engine.max_seq_len to at "
                f"least that (it is {longest})"
            )


async def _calibrate(
    client: AsyncClient, loaded: LoadedEngine, records: list[StepRecord], *, seed: int
) -> CostModel:
    """Plays other requests than those to be predicted, and fits all records so far."""
    engine = loaded.engine
    before = engine.stats()
    edge_s = await clients.lone_edge_s(client, vocab_size=loaded.model.vocab_size)
    await clients.until_idle(engine)
    with clients.timed(engine) as times:
        for place, spec in enumerate(calibration_specs(engine.config.max_seq_len)):
            number = _CALIBRATION_SEED + 100 * seed + place
            await _play(client, loaded, draw(replace(spec, seed=number)), seed=number)
    records += times.records
    after = engine.stats()
    host_s = (after.host_s - before.host_s) / (after.num_steps - before.num_steps)
    return fit(records, host_s=host_s, edge_s=edge_s)


def calibration_specs(max_seq_len: int) -> tuple[WorkloadSpec, ...]:
    """All that steps are made of: chunks of every size, short and long contexts, few and many."""
    half, tenth = max_seq_len // 2, max(2, max_seq_len // 10)
    return (
        WorkloadSpec(6, 1, None, (1, half), (2, min(12, tenth))),
        WorkloadSpec(16, 8, None, (1, tenth), (2, min(48, tenth))),
        WorkloadSpec(12, 4, None, (1, half), (2, min(24, tenth))),
        WorkloadSpec(8, 3, None, (half + 1, half + tenth), (2, min(10, tenth)), half),
    )


async def _play(
    client: AsyncClient, loaded: LoadedEngine, workload: Workload, *, seed: int
) -> list[Timeline]:
    """From a cold prefix cache and an idle engine to an idle engine."""
    await clients.until_idle(loaded.engine)
    loaded.engine.flush_prefix_cache()
    lines = await clients.play(client, workload, vocab_size=loaded.model.vocab_size, seed=seed)
    await clients.until_idle(loaded.engine)
    return lines


def _at_load(spec: WorkloadSpec, loaded: LoadedEngine, cost: CostModel) -> Workload:
    """The workload; an open loop at a rate that this machine can serve."""
    if spec.concurrency is not None:
        return draw(spec)
    config = loaded.engine.config
    closed = replace(spec, rate_per_s=None, concurrency=config.num_slots)
    most = simulate(draw(closed), config, cost).requests_per_s
    return draw(replace(spec, rate_per_s=LOAD * most))
