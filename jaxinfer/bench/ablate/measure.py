"""Each variant of the settings through the same workload, all of them once in every round."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from jaxinfer.bench import offline
from jaxinfer.bench.ablate.levers import Lever, plain
from jaxinfer.bench.offline import Answers, Round
from jaxinfer.bench.page import quartiles
from jaxinfer.bench.workloads import Workload
from jaxinfer.config import Config
from jaxinfer.engine import Engine
from jaxinfer.host.workload import SLO
from jaxinfer.settings import flatten, format_value

Kind = Literal["given", "switched", "plain", "alone"]
Show = Callable[[str, int, int], None]
FIGURES: dict[str, Callable[[Round], float]] = {
    "ttft_ms": lambda one: 1e3 * one.figures.ttft_s.p50,
    "tpot_ms": lambda one: 1e3 * one.figures.tpot_s.p50,
    "itl_p99_ms": lambda one: 1e3 * one.figures.itl_s.p99,
    "tokens_per_s": lambda one: one.figures.output_tokens_per_s,
    "goodput_per_s": lambda one: one.figures.goodput_per_s,
}


@dataclass(frozen=True)
class Variant:
    """One state of the levers."""

    name: str
    kind: Kind
    config: Config


class Quality(NamedTuple):
    """How far a variant's model is from the full one; on text, not on the workload."""

    kl: float
    top1: float
    perplexity_ratio: float


class Ratio(NamedTuple):
    """A figure over that of the variant it is compared with, round by round."""

    low: float
    middle: float
    high: float


@dataclass(frozen=True)
class Row:
    """What one variant came to."""

    name: str
    kind: Kind
    changed: tuple[str, ...]
    """The settings that differ from those given, as key=value."""
    values: dict[str, float]
    """Medians of FIGURES over the rounds."""
    ratios: dict[str, Ratio]
    """To the given settings; of a lever alone, to all of them off. Empty for those two."""
    memory_mb: float
    """Weights, pages, temporaries and code, as the engine plans them."""
    memory_ratio: float
    same_bits: bool
    """All answers have the tokens and log probabilities of the given settings, to the last bit."""
    same_tokens: float
    """Share of output tokens that are those of the given settings."""
    quality: Quality | None
    """None where weights and pages are those of the full model."""


@dataclass(frozen=True)
class Report:
    """Everything of one run."""

    model: str
    workload: str
    said: str
    num_slots: int
    rounds: int
    slo: SLO
    levers: dict[str, str]
    """What each lever does."""
    left_out: dict[str, str]
    """Levers that make no difference here, and why."""
    rows: tuple[Row, ...]


class _Found(NamedTuple):
    """What came of one config, round by round."""

    memory_mb: float
    rounds: list[Round]
    answers: list[Answers]


@runtime_checkable
class Makes(Protocol):
    """What is asked of `bench.variants.Variants`."""

    def engine(self, config: Config) -> Engine:
        """An engine of its own for a config."""
        ...


def variants(config: Config, levers: Sequence[Lever], *, alone: bool) -> list[Variant]:
    """The given settings, each lever switched, all of them off, and each alone; none twice."""
    found = [Variant("as given", "given", config)]
    for lever in levers:
        word, changed = ("without", lever.off) if lever.is_on(config) else ("with", lever.on)
        found.append(Variant(f"{word} {lever.name}", "switched", changed(config)))
    if alone:
        base = plain(config, tuple(levers))
        found.append(Variant("all off", "plain", base))
        found += [Variant(f"only {lever.name}", "alone", lever.on(base)) for lever in levers]
    known: dict[tuple[Config, bool], Variant] = {}
    for one in found:
        known.setdefault((one.config, one.kind in ("plain", "alone")), one)
    return list(known.values())


def measure(
    makes: Makes,
    config: Config,
    levers: Sequence[Lever],
    workload: Workload,
    *,
    model: str,
    left_out: dict[str, str] | None = None,
    rounds: int = 3,
    alone: bool = True,
    slo: SLO = SLO(ttft_s=2.0, tpot_s=0.1),  # noqa: B008
    judge: Callable[[Config], Quality | None] = lambda config: None,
    progress: Show = lambda stage, done, total: None,
) -> Report:
    """Every variant once a round, in an order that turns round; one more before does not count.

    Engines share weights where they can, and only the one at work has its pages.
    """
    wanted = variants(config, levers, alone=alone)
    engines: dict[Config, Engine] = {}
    for number, one in enumerate(wanted):
        if one.config not in engines:
            engines[one.config] = makes.engine(one.config)
            engines[one.config].device.cache = None
        progress("engines", number + 1, len(wanted))
    found = _run(engines, workload, rounds, slo, progress)
    rows = []
    for number, one in enumerate(wanted):
        kind = "plain" if one.kind in ("plain", "alone") else "given"
        base = next(other for other in wanted if other.kind == kind)
        rows.append(_row(one, base, config, found, judge))
        progress("quality", number + 1, len(wanted))
    return Report(
        model=model,
        workload=workload.name,
        said=workload.said,
        num_slots=config.engine.num_slots,
        rounds=rounds,
        slo=slo,
        levers={lever.name: lever.said for lever in levers},
        left_out=left_out or {},
        rows=tuple(rows),
    )


def _run(
    engines: dict[Config, Engine], workload: Workload, rounds: int, slo: SLO, progress: Show
) -> dict[Config, _Found]:
    found = {key: _Found(_megabytes(engine), [], []) for key, engine in engines.items()}
    for number in range(-1, rounds):
        calls = workload.calls(number if number >= 0 else offline.WARM)
        for place, key in enumerate(list(engines)[:: -1 if number % 2 else 1]):
            one, answers = _serve(engines[key], calls, slo)
            if number >= 0:
                found[key].rounds.append(one)
                found[key].answers.append(answers)
            done = (number + 1) * len(engines) + place + 1
            progress("measure", done, (rounds + 1) * len(engines))
    return found


def _row(
    one: Variant,
    base: Variant,
    given: Config,
    found: dict[Config, _Found],
    judge: Callable[[Config], Quality | None],
) -> Row:
    own, other, first = found[one.config], found[base.config], found[given]
    return Row(
        name=one.name,
        kind=one.kind,
        changed=_changed(given, one.config),
        values={
            name: quartiles([of(some) for some in own.rounds])[1] for name, of in FIGURES.items()
        },
        ratios={} if one is base else _ratios(own.rounds, other.rounds),
        memory_mb=own.memory_mb,
        memory_ratio=own.memory_mb / other.memory_mb,
        same_bits=own.answers == first.answers,
        same_tokens=_same_tokens(own.answers, first.answers),
        quality=judge(one.config),
    )


def _serve(engine: Engine, calls: Sequence[Any], slo: SLO) -> tuple[Round, Answers]:
    """With pages of its own, which are gone afterwards."""
    engine.device.reset()
    found = offline.serve(engine, calls, slo=slo)
    engine.device.cache = None
    return found


def _ratios(some: Sequence[Round], base: Sequence[Round]) -> dict[str, Ratio]:
    found = {}
    for name, of in FIGURES.items():
        pairs = [(of(one), of(other)) for one, other in zip(some, base, strict=True)]
        if all(below > 0 for _, below in pairs):
            found[name] = Ratio(*quartiles([value / below for value, below in pairs]))
    return found


def _same_tokens(some: Sequence[Answers], base: Sequence[Answers]) -> float:
    """Position by position: after the first other token all that follow may differ."""
    same = total = 0
    for ours, theirs in zip(some, base, strict=True):
        for (tokens, _), (others, _) in zip(ours, theirs, strict=True):
            same += sum(one == other for one, other in zip(tokens, others, strict=False))
            total += max(len(tokens), len(others))
    return same / max(total, 1)


def _megabytes(engine: Engine) -> float:
    return engine.device.memory.total_bytes / 2**20


def _changed(given: Config, other: Config) -> tuple[str, ...]:
    before = dict(flatten(given))
    return tuple(
        f"{key}={format_value(value)}" for key, value in flatten(other) if value != before[key]
    )
