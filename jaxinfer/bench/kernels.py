"""Attention and matrix products alone, against the bytes that this machine copies in a second."""

from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, Literal

import jax

from jaxinfer import cache as paged
from jaxinfer.bench.kernel_cases import Case, Show, Timing, attention, in_rounds, matmul, timing
from jaxinfer.bench.page import Page, Sheet
from jaxinfer.bench.probes import Probes
from jaxinfer.config import EngineConfig, ModelConfig
from jaxinfer.errors import ConfigError
from jaxinfer.kernels import paged_attention

PRECISIONS = ("f32", "bf16", "int8")
PAGES: tuple[Literal["auto", "int8"], ...] = ("auto", "int8")


@dataclass(frozen=True)
class Report:
    """Everything of one run."""

    model: str
    device: str
    rounds: int
    copy_gb_per_s: float
    read_gb_per_s: float
    attention: tuple[Timing, ...]
    matmuls: tuple[Timing, ...]
    refused: tuple[str, ...]
    """Attention kernels that can't run here, and why."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def measure(
    model: ModelConfig,
    engine: EngineConfig,
    *,
    name: str,
    batches: tuple[int, ...] = (1, 8, 32),
    contexts: tuple[int, ...] = (256, 1024),
    rows: tuple[int, ...] = (1, 8, 32, 128, 512),
    rounds: int = 9,
    progress: Show = lambda stage, done, total: None,
) -> Report:
    """Every kernel once a round, with the probes of bandwidth at its start; random values."""
    attention, refused = _attention_cases(model, engine, batches, contexts)
    matmuls = [
        matmul(precision, count, model.d_ff, model.d_model)
        for precision in PRECISIONS
        for count in rows
    ]
    cases, probes = [*attention, *matmuls], Probes()
    for number, case in enumerate(cases):
        case.run()  # the first run of a program is slow
        progress("warm-up", number + 1, len(cases))
    found = in_rounds(cases, probes, rounds, progress=progress)
    timings = [
        timing(case, some, found.copies) for case, some in zip(cases, found.times, strict=True)
    ]
    return Report(
        model=name,
        device=jax.devices()[0].device_kind,
        rounds=rounds,
        copy_gb_per_s=median(found.copies) / 1e9,
        read_gb_per_s=median(found.reads) / 1e9,
        attention=tuple(timings[: len(attention)]),
        matmuls=tuple(timings[len(attention) :]),
        refused=refused,
    )


def page(report: Report) -> Page:
    """Both tables."""
    return Page(
        title=f"Kernels of {report.model} on {report.device}",
        lines=(f"medians of {report.rounds} rounds",),
        tiles=(
            ("copy", f"{report.copy_gb_per_s:.1f}", "GB/s, read and write"),
            ("read", f"{report.read_gb_per_s:.1f}", "GB/s"),
        ),
        sheets=(
            _sheet("one layer's attention, decode", report, report.attention, report.refused),
            _sheet("one weight of the feed-forward layer", report, report.matmuls, ()),
        ),
    )


def _sheet(
    title: str, report: Report, timings: tuple[Timing, ...], refused: tuple[str, ...]
) -> Sheet:
    breaks = {
        number
        for number, (one, after) in enumerate(zip(timings, timings[1:], strict=False))
        if one.kernel != after.kernel
    }
    speeds = f"copies {report.copy_gb_per_s:.1f} GB/s, reads {report.read_gb_per_s:.1f}"
    return Sheet(
        title=f"{report.model}: {title}; {speeds}",
        columns=("kernel", "size", "us", "MB", "of copy", "GFLOP/s"),
        rows=tuple(
            (
                one.kernel,
                one.size,
                f"{one.us:.0f}",
                f"{one.floor_bytes / 1e6:.2f}",
                f"{one.share:.0%}",
                f"{one.gflops:.1f}",
            )
            for one in timings
        ),
        notes=(*(f"not here: {reason}" for reason in refused),),
        breaks=frozenset(breaks),
    )


def _attention_cases(
    model: ModelConfig, engine: EngineConfig, batches: tuple[int, ...], contexts: tuple[int, ...]
) -> tuple[list[Case], tuple[str, ...]]:
    """Each kernel with each kind of pages, where it can run here."""
    cases, refused = [], []
    for name in paged_attention.BACKENDS:
        for pages in PAGES:
            cache = replace(engine.cache, dtype=pages)
            config = replace(engine, attention=name, cache=cache)
            needs = paged_attention.needs_here(
                dtype=paged.kept_dtype(config),
                head_dim=model.head_dim,
                page_size=cache.page_size,
                block=engine.attention_block,
                compute_dtype=engine.compute_dtype,
            )
            try:
                paged_attention.choose(name, needs)
            except ConfigError as error:
                refused.append(str(error))
                continue
            cases += [
                attention(model, config, batch, context)
                for batch in batches
                for context in contexts
            ]
    return cases, tuple(dict.fromkeys(refused))
