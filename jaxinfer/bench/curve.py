"""What many streams at once get: throughput against the time of each; and static batches."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from markupsafe import Markup

from jaxinfer.bench import offline
from jaxinfer.bench.load.charts import HALF
from jaxinfer.bench.load.drawing import Plot
from jaxinfer.bench.page import Page, Picture, Sheet, quartiles, spread
from jaxinfer.bench.workloads import Call, Workload, streams
from jaxinfer.engine import Engine

COUNTS = (1, 2, 4, 8, 16, 32, 64)
STATIC_BAR = 1.6
Show = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Point:
    """So many equal requests at once; medians over the rounds."""

    streams: int
    output_tokens_per_s: float
    ttft_ms: float
    tpot_ms: float
    e2e_ms: float


@dataclass(frozen=True)
class Curve:
    """Throughput and times from few streams to many."""

    model: str
    variant: str
    prompt: int
    output: int
    rounds: int
    points: tuple[Point, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Static:
    """Continuous batching against static batches: the same requests, round by round.

    A static batch keeps its shape until its longest answer has ended, as in transformers'
    `generate` or FasterTransformer (Orca, OSDI 2022, section 3). `dropping` is ours, kinder:
    rows that have ended are left out of later steps.
    """

    model: str
    variant: str
    workload: str
    num_slots: int
    continuous_tokens_per_s: float
    static_tokens_per_s: float
    dropping_tokens_per_s: float
    continuous_steps: int
    static_steps: int
    dropping_steps: int
    """Steps of one round: they depend on the lengths alone."""
    ratios: tuple[float, ...]
    """Output tokens a second that were asked for, continuous over static."""
    dropping_ratios: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        low, middle, high = quartiles(self.ratios)
        found = {"ratio": middle, "low": low, "high": high, "bar": STATIC_BAR}
        return {**asdict(self), **found}


def measure(
    engine: Engine,
    *,
    model: str,
    counts: tuple[int, ...] = COUNTS,
    prompt: int = 128,
    output: int = 64,
    rounds: int = 3,
    progress: Show = lambda stage, done, total: None,
) -> Curve:
    """Every count once a round, after one that does not count."""
    vocab_size = engine.model.vocab_size
    loads = [
        streams(count, prompt=prompt, output=output, vocab_size=vocab_size) for count in counts
    ]
    found: list[list[offline.Round]] = [[] for _ in loads]
    for number in range(-1, rounds):
        for place, load in enumerate(loads):
            calls = load.calls(number if number >= 0 else offline.WARM)
            one = offline.serve(engine, calls)[0]
            if number >= 0:
                found[place].append(one)
            progress("measure", (number + 1) * len(loads) + place + 1, (rounds + 1) * len(loads))
    return Curve(
        model=model,
        variant=offline.variant_of(engine),
        prompt=prompt,
        output=output,
        rounds=rounds,
        points=tuple(_point(count, some) for count, some in zip(counts, found, strict=True)),
    )


def in_shape(workload: Workload, num_slots: int) -> Workload:
    """Batches of `num_slots` in the order of requests, all as long as the longest of each."""

    def calls(repeat: int) -> tuple[Call, ...]:
        found = workload.calls(repeat)
        longest = [
            max(call.num_output_tokens for call in found[first : first + num_slots])
            for first in range(0, len(found), num_slots)
        ]
        return tuple(
            call._replace(num_output_tokens=longest[place // num_slots])
            for place, call in enumerate(found)
        )

    return replace(workload, calls=calls)


def against_static(
    continuous: Engine,
    static: Engine,
    workload: Workload,
    *,
    model: str,
    rounds: int = 3,
    progress: Show = lambda stage, done, total: None,
) -> Static:
    """All get the same requests; who goes first takes turns."""
    num_slots = continuous.config.num_slots
    sides = {
        "continuous": (continuous, workload),
        "static": (static, in_shape(workload, num_slots)),
        "dropping": (static, workload),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    steps: dict[str, int] = {}
    for number in range(-1, rounds):
        repeat = number if number >= 0 else offline.WARM
        wanted = sum(call.num_output_tokens for call in workload.calls(repeat))
        order = list(sides)[number % len(sides) :] + list(sides)[: number % len(sides)]
        for name in order:
            engine, load = sides[name]
            one = offline.serve(engine, load.calls(repeat))[0]
            steps[name] = one.num_steps
            if number >= 0:
                rates[name].append(wanted / max(record.ended_s for record in one.records))
        progress("measure", number + 2, rounds + 1)

    def over(name: str) -> tuple[float, ...]:
        pairs = zip(rates["continuous"], rates[name], strict=True)
        return tuple(ours / theirs for ours, theirs in pairs)

    return Static(
        model=model,
        variant=offline.variant_of(continuous),
        workload=workload.name,
        num_slots=num_slots,
        continuous_tokens_per_s=median(rates["continuous"]),
        static_tokens_per_s=median(rates["static"]),
        dropping_tokens_per_s=median(rates["dropping"]),
        continuous_steps=steps["continuous"],
        static_steps=steps["static"],
        dropping_steps=steps["dropping"],
        ratios=over("static"),
        dropping_ratios=over("dropping"),
    )


def sheet(curve: Curve) -> Sheet:
    """A line for each count."""
    alone = curve.points[0].output_tokens_per_s
    return Sheet(
        title=f"{curve.model}, {curve.variant}: {curve.prompt} tokens in, {curve.output} out each",
        columns=("streams", "tokens/s", "times one", "TTFT ms", "TPOT ms", "request ms"),
        rows=tuple(
            (
                str(one.streams),
                f"{one.output_tokens_per_s:.1f}",
                f"{one.output_tokens_per_s / alone:.2f}",
                f"{one.ttft_ms:.0f}",
                f"{one.tpot_ms:.1f}",
                f"{one.e2e_ms:.0f}",
            )
            for one in curve.points
        ),
        notes=(f"medians of {curve.rounds} rounds, the requests of one p50",),
    )


def static_sheet(found: Static) -> Sheet:
    """All three, and what continuous batching is worth against each kind of static ones."""
    ratio = quartiles(found.ratios)[1]
    return Sheet(
        title=f"{found.model}, {found.variant}: {found.workload} in {found.num_slots} slots",
        columns=("batching", "steps", "tokens/s", "continuous over it", "middle half"),
        rows=(
            (
                "continuous",
                str(found.continuous_steps),
                f"{found.continuous_tokens_per_s:.1f}",
                "",
                "",
            ),
            (
                "static",
                str(found.static_steps),
                f"{found.static_tokens_per_s:.1f}",
                f"{ratio:.2f}",
                spread(found.ratios),
            ),
            (
                "static, ended rows left out",
                str(found.dropping_steps),
                f"{found.dropping_tokens_per_s:.1f}",
                f"{quartiles(found.dropping_ratios)[1]:.2f}",
                spread(found.dropping_ratios),
            ),
        ),
        notes=(
            "a static batch begins when all slots are free, all its prompts in one step, and keeps "
            "its shape until its longest answer has ended",
            "only tokens that were asked for count",
            f"continuous over static at least {STATIC_BAR}: "
            f"{'yes' if ratio >= STATIC_BAR else 'no'}",
        ),
        breaks=frozenset({1}),
    )


def page(curve: Curve) -> Page:
    """The table and its picture."""
    best = max(curve.points, key=lambda one: one.output_tokens_per_s)
    return Page(
        title=f"{curve.model}, {curve.variant}: throughput against the time of a request",
        lines=(),
        tiles=(
            ("one stream", f"{curve.points[0].output_tokens_per_s:.0f}", "tokens/s"),
            (f"{best.streams} streams", f"{best.output_tokens_per_s:.0f}", "tokens/s"),
        ),
        sheets=(sheet(curve),),
        pictures=(Picture("Throughput against the time of a request", _picture(curve)),),
    )


def _picture(curve: Curve) -> Markup:
    spots = [(one.e2e_ms / 1e3, one.output_tokens_per_s) for one in curve.points]
    wide, high = (1.15 * max(values) for values in zip(*spots, strict=True))
    plot = Plot(2 * HALF, 320.0, wide, high, "seconds of a request", "output tokens/s")
    marks = [plot.path(spots, "line")]
    for one, spot in zip(curve.points, spots, strict=True):
        marks.append(plot.dot(*spot, "point", f"{one.streams} streams"))
        marks.append(plot.text(*spot, str(one.streams)))
    return plot.svg(*marks)


def _point(count: int, found: list[offline.Round]) -> Point:
    some = [one.figures for one in found]
    return Point(
        streams=count,
        output_tokens_per_s=median(one.output_tokens_per_s for one in some),
        ttft_ms=1e3 * median(one.ttft_s.p50 for one in some),
        tpot_ms=1e3 * median(one.tpot_s.p50 for one in some),
        e2e_ms=1e3 * median(one.e2e_s.p50 for one in some),
    )
