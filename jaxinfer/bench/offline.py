"""A workload through the engine alone, without a server: how fast, how soon, how much memory."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import jax

from jaxinfer.bench import memory
from jaxinfer.bench.load.events import Figures, Record, figures
from jaxinfer.bench.tally import Tally
from jaxinfer.bench.workloads import Call, Workload
from jaxinfer.engine import Engine
from jaxinfer.host.request import JAXINFER_DEFAULTS, Request, SamplingParams
from jaxinfer.host.workload import SLO

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True, seed=0).or_else(JAXINFER_DEFAULTS)
WARM = 1000  # the first warm-up's number: its tokens are in no repeat
Show = Callable[[str, int, int], None]
Answers = tuple[tuple[tuple[int, ...], tuple[float, ...]], ...]
"""Tokens and log probabilities of each request, in order."""


@dataclass(frozen=True)
class Round:
    """One repeat; all its requests were there at its start."""

    records: tuple[Record, ...]
    figures: Figures
    num_steps: int
    page_waste: float
    """Share of the places in sequences' pages that are empty, over all steps."""
    prefill_padding: float
    """Share of the tokens of prefill programs that are padding."""
    decode_padding: float
    """Share of the rows of decode programs that are inert."""
    host_ms: float
    """Processor time of the engine's thread a step: plan, pack, commit, text."""


@dataclass(frozen=True)
class Report:
    """Everything of one run."""

    model: str
    variant: str
    workload: str
    said: str
    device: str
    threads: int
    num_slots: int
    rounds: tuple[Round, ...]
    peak_rss_mb: float
    """Of this process since its start: the weights' loading and the warm-up are in it."""
    serving_rss_mb: float
    """The peak of the repeats alone; as the other where the system does not tell."""

    @property
    def middle(self) -> Round:
        """The repeat of the median duration."""
        ordered = sorted(self.rounds, key=lambda one: one.figures.duration_s)
        return ordered[len(ordered) // 2]

    def of(self, value: Callable[[Round], float]) -> float:
        """The median of a figure over the repeats."""
        return median(value(one) for one in self.rounds)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; the first names are those that other programs print for their peers."""
        seconds = [one.figures.duration_s for one in self.rounds]
        return {
            "peer": "jaxinfer",
            "workload": self.workload,
            "model": self.model,
            "variant": self.variant,
            "threads": self.threads,
            **{name: round(value, 4) for name, value in line(self).items()},
            "spread": round(max(seconds) / min(seconds), 3),
            "peak_rss_mb": round(self.peak_rss_mb),
            "serving_rss_mb": round(self.serving_rss_mb),
            "tries": len(self.rounds),
            "said": self.said,
            "device": self.device,
            "num_slots": self.num_slots,
            "rounds": [_as_dict(one) for one in self.rounds],
        }


def line(report: Report) -> dict[str, float]:
    """The figures by the names that peers have for them; medians over the repeats."""
    found = {
        "seconds": report.of(lambda one: one.figures.duration_s),
        "mean_ttft_ms": report.of(lambda one: 1e3 * one.figures.ttft_s.mean),
        "out_tok_s": report.of(lambda one: one.figures.output_tokens_per_s),
        "ttft_p99_ms": report.of(lambda one: 1e3 * one.figures.ttft_s.p99),
        "tpot_ms": report.of(lambda one: 1e3 * one.figures.tpot_s.p50),
        "tpot_p99_ms": report.of(lambda one: 1e3 * one.figures.tpot_s.p99),
        "itl_p99_ms": report.of(lambda one: 1e3 * one.figures.itl_s.p99),
        "page_waste": report.of(lambda one: one.page_waste),
        "prefill_padding": report.of(lambda one: one.prefill_padding),
        "decode_padding": report.of(lambda one: one.decode_padding),
        "host_ms_per_step": report.of(lambda one: one.host_ms),
    }
    if report.rounds[0].figures.num_requests == 1:
        found["ttft_ms"] = found["mean_ttft_ms"]
        found["decode_tok_s"] = report.of(lambda one: _decode_rate(one.records[0]))
    return found


def measure(
    engine: Engine,
    workload: Workload,
    *,
    model: str,
    rounds: int = 3,
    warmups: int = 1,
    slo: SLO = SLO(),  # noqa: B008
    progress: Show = lambda stage, done, total: None,
) -> Report:
    """The workload's repeats, after some that don't count; each from an empty prefix cache."""
    for number in range(warmups):
        serve(engine, workload.calls(WARM + number), slo=slo)
        progress("warm-up", number + 1, warmups)
    before = memory.peak_rss_mb()
    is_reset = memory.reset_peak()
    found = []
    for number in range(rounds):
        found.append(serve(engine, workload.calls(number), slo=slo)[0])
        progress("measure", number + 1, rounds)
    after = memory.peak_rss_mb()
    return Report(
        model=model,
        variant=variant_of(engine),
        workload=workload.name,
        said=workload.said,
        device=jax.devices()[0].device_kind,
        threads=os.cpu_count() or 1,
        num_slots=engine.config.num_slots,
        rounds=tuple(found),
        peak_rss_mb=max(before, after),
        serving_rss_mb=after if is_reset else max(before, after),
    )


def serve(
    engine: Engine,
    calls: Sequence[Call],
    *,
    slo: SLO = SLO(),  # noqa: B008
) -> tuple[Round, Answers]:
    """Submits all requests at once and steps until the last one has ended."""
    engine.flush_prefix_cache()
    tally, before = Tally(engine.config), engine.stats()
    watched, engine.observer = engine.observer, tally
    records = {f"bench-{number}": Record(number, 0.0) for number in range(len(calls))}
    answers: dict[str, tuple[list[int], list[float]]] = {name: ([], []) for name in records}
    started = time.perf_counter()
    for name, call in zip(records, calls, strict=True):
        engine.submit(_request(name, call))
        records[name].sent_s = time.perf_counter() - started
    while engine.has_work:
        outputs = engine.step()
        now_s = time.perf_counter() - started
        for output in outputs:
            one = records[output.request_id]
            if output.token_ids:
                one.chunks_s.append(now_s)
            answers[output.request_id][0].extend(output.token_ids)
            answers[output.request_id][1].extend(output.logprobs)
            one.num_prompt_tokens = output.num_prompt_tokens
            one.num_output_tokens = output.num_output_tokens
            one.num_cached_tokens = output.num_cached_tokens
            one.num_preemptions = output.num_preemptions
            if output.finish_reason is not None:
                one.ended_s = now_s
                if output.error:
                    one.status, one.message = "FAILED", output.error
    engine.observer = watched
    host_s = engine.stats().host_s - before.host_s
    done = tuple(records.values())
    found = Round(
        records=done,
        figures=figures(done, slo),
        num_steps=tally.num_steps,
        page_waste=tally.page_waste,
        prefill_padding=tally.prefill_padding,
        decode_padding=tally.decode_padding,
        host_ms=1e3 * host_s / max(tally.num_steps, 1),
    )
    return found, tuple((tuple(tokens), tuple(values)) for tokens, values in answers.values())


def variant_of(engine: Engine) -> str:
    """The precision in a word: bf16, f32, or the scheme of quantised weights."""
    if engine.model.quant != "none":
        return engine.model.quant
    return {"bfloat16": "bf16", "float32": "f32"}[engine.config.compute_dtype]


def _request(name: str, call: Call) -> Request:
    return Request(name, call.prompt, replace(GREEDY, max_tokens=call.num_output_tokens))


def _decode_rate(record: Record) -> float:
    """Tokens a second after the first."""
    return 1 / record.tpot_s if record.tpot_s else 0.0


def _as_dict(one: Round) -> dict[str, Any]:
    """Without the requests: a page has them as a picture."""
    return {name: value for name, value in asdict(one).items() if name != "records"}
