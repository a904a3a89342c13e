"""How long steps take, fitted to recorded ones, and what a workload would then see.

    t = step + sum of chunk[size] + prefill_context * tokens * context + context * read + row * rows

A prefill program has a fixed size, the tokens of all its rows, and its time is no line over sizes:
a small one waits for the weights as a decode does, a large one computes.

The real scheduler runs in virtual time: a step ends when the one before it has ended and its own
time has passed, and its tokens are read one step late, as the engine does.
"""

import heapq
import json
import math
from collections import deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Items
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple

import numpy as np

from jaxinfer.config import EngineConfig
from jaxinfer.errors import ConfigError
from jaxinfer.host.loop import Loop, Sampled
from jaxinfer.host.plan import Plan
from jaxinfer.host.prefills import prefills
from jaxinfer.host.request import JAXINFER_DEFAULTS, Request, SamplingParams
from jaxinfer.host.scheduler import Scheduler
from jaxinfer.host.sequence import Sequence
from jaxinfer.host.workload import SLO, Arrival, Prediction, Timeline, Workload, summarise

_FIT_ROUNDS = 10
_HUBER = 2.0  # errors from so many medians on count by their size, not its square
_TINY = 1e-6
_OWN_TOKENS = 2**24  # token ids from here on are in no shared prefix


class Work(NamedTuple):
    """What the time of one step depends on."""

    sizes: tuple[int, ...]  # of the prefill programs: the tokens of all rows, padding included
    prefill_context: int  # tokens of each chunk times the context that they see
    context: int  # tokens that the decode reads: its rows times its longest context, in blocks
    rows: int  # of the decode program, padding included; 1 where one sequence is alone


class StepRecord(NamedTuple):
    """One step that was measured."""

    work: Work
    seconds: float


@dataclass(frozen=True)
class CostModel:
    """Seconds per unit of each thing that a step does."""

    step_s: float
    chunks: tuple[tuple[int, float], ...] = ()
    """The seconds of one prefill program by its size, ascending; others lie between or beyond, in
    proportion."""
    prefill_context_s: float = 0.0
    context_token_s: float = 0.0
    row_s: float = 0.0
    host_s: float = 0.0
    """Of the host between two steps, which overlap hides behind the device."""
    edge_s: float = 0.0
    """Between client and engine, both ways together: a request arrives so much after it is sent."""
    relative_error: float = 0.0
    """Of the steps that it was fitted to: the median."""

    def seconds(self, work: Work) -> float:
        """The time of one step."""
        return (
            self.step_s
            + sum(map(self.chunk_s, work.sizes))
            + self.prefill_context_s * work.prefill_context
            + self.context_token_s * work.context
            + self.row_s * work.rows
        )

    def chunk_s(self, size: int) -> float:
        """The time of one chunk, its context apart."""
        if not self.chunks:
            return 0.0
        sizes, times = zip(*self.chunks, strict=True)
        return float(np.interp(size, sizes, times)) * max(1.0, size / sizes[-1])


def to_json(cost: CostModel) -> str:
    """A cost model as a file holds it."""
    return json.dumps(asdict(cost), indent=1) + "\n"


def from_json(text: str) -> CostModel:
    """Reads `to_json` back; raises ConfigError where it is anything else."""
    known = [field.name for field in fields(CostModel) if field.name != "chunks"]
    try:
        found = json.loads(text)
        chunks = tuple((int(size), float(time)) for size, time in found.pop("chunks"))
        values = {name: float(value) for name, value in found.items()}
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise ConfigError(f"no cost model: {error}") from error
    wrong = sorted(values.keys() ^ set(known))
    if wrong:
        raise ConfigError(f"a cost model has {', '.join(known)}; {', '.join(wrong)} differ")
    cost = CostModel(**values, chunks=chunks)
    times = [time for _, time in chunks]
    is_finite = all(0 <= value < math.inf for value in (*values.values(), *times))
    if not is_finite or not cost.seconds(Work((1,), 1, 1, 1)):
        raise ConfigError("every cost must be finite and at least 0, and those of a step not all 0")
    return cost


class StepTimes:
    """Turns the comings and goings of steps into records; the engine tells it the time."""

    def __init__(self, config: EngineConfig, *, max_records: int = 4096) -> None:
        self.records: deque[StepRecord] = deque(maxlen=max_records)
        self._config = config
        self._under_way: deque[tuple[Work, float]] = deque()
        self._last_s = 0.0

    def dispatched(self, plan: Plan, now_s: float) -> None:
        """A plan, already begun, is on its way to the device."""
        self._under_way.append((work_of(plan, self._config), now_s))

    def returned(self, now_s: float) -> None:
        """The oldest step under way has been read."""
        work, dispatched_s = self._under_way.popleft()
        self.records.append(StepRecord(work, now_s - max(dispatched_s, self._last_s)))
        self._last_s = now_s

    def restart(self) -> None:
        """What was under way is lost."""
        self._under_way.clear()


def work_of(plan: Plan, config: EngineConfig) -> Work:
    """What a plan that has begun, and not returned, asks of the device."""
    block = config.attention_block
    rows = context = 0
    if plan.decodes:
        rows = next(rows for rows in config.row_counts if rows >= len(plan.decodes))
        longest = max(sequence.num_stored for sequence in plan.decodes)
        context = rows * -(-longest // block) * block
    ends = [-(-(chunk.start + chunk.length) // block) * block for chunk in plan.chunks]
    return Work(
        sizes=tuple(prefill.num_tokens for prefill in prefills(plan.chunks, config)),
        prefill_context=sum(chunk.size * end for chunk, end in zip(plan.chunks, ends, strict=True)),
        context=context,
        rows=rows,
    )


def fit(records: Iterable[StepRecord], *, host_s: float = 0.0, edge_s: float = 0.0) -> CostModel:
    """The model with the least error relative to what it predicts, and no negative term.

    Errors are not taken relative to what was measured: a step that seems short because the host
    was late for the one before would then count most; those far off count less (Huber 1964). Terms
    that the records can't tell apart, or that would be negative, are left out one by one.
    """
    kept = [record for record in records if record.seconds > 0]
    if not kept:
        raise ConfigError("no step was recorded; a cost model needs at least one")
    seconds = np.array([record.seconds for record in kept])
    sizes = sorted({size for record in kept for size in record.work.sizes})
    features = np.array(
        [(1, *map(record.work.sizes.count, sizes), *record.work[1:]) for record in kept],
        np.float64,
    )
    features[:, 1:] *= np.ptp(features[:, 1:], axis=0) > 0  # one value only: part of step_s
    predicted = np.full(len(kept), seconds.mean())
    typical = 0.0
    coefficients, trust = np.zeros(features.shape[1]), np.ones(len(kept))
    for _ in range(_FIT_ROUNDS):
        weights = trust / predicted
        coefficients = _least_squares(features * weights[:, None], seconds * weights)
        predicted = np.maximum(features @ coefficients, seconds.mean() / 100)
        errors = np.abs(seconds / predicted - 1)
        typical = float(np.median(errors))
        usual = max(_HUBER * typical, _TINY)
        trust = np.sqrt(usual / np.maximum(errors, usual))
    step_s, *chunks, prefill_context_s, context_token_s, row_s = coefficients.tolist()
    return CostModel(
        step_s=step_s,
        chunks=tuple(zip(sizes, chunks, strict=True)),
        prefill_context_s=prefill_context_s,
        context_token_s=context_token_s,
        row_s=row_s,
        host_s=host_s,
        edge_s=edge_s,
        relative_error=typical,
    )


def _least_squares(features: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Coefficients of at least 0; those that would be less are left out, the worst first."""
    scale = np.abs(features).max(axis=0)
    columns = [at for at in range(features.shape[1]) if scale[at] > 0]
    while True:
        scaled = features[:, columns] / scale[columns]
        found = np.asarray(np.linalg.lstsq(scaled, wanted, rcond=1e-9)[0], np.float64)
        worst = int(found.argmin())
        if found[worst] >= 0 or len(columns) == 1:
            break
        del columns[worst]
    coefficients = np.zeros(features.shape[1])
    coefficients[columns] = found / scale[columns]
    return coefficients


def simulate(
    workload: Workload, config: EngineConfig, cost: CostModel, *, slo: SLO | None = None
) -> Prediction:
    """What the clients of a workload would see of an engine with these settings and costs."""
    world = _VirtualEngine(workload, config, cost)
    world.run()
    return summarise(
        world.timelines,
        slo=slo or SLO(),
        num_refused=world.num_refused,
        num_steps=world.num_steps,
        num_preemptions=world.scheduler.num_preemptions,
        hit_rate=world.scheduler.prefix.stats().hit_rate,
        peak_pages=world.scheduler.pool.peak_owned,
    )


class _VirtualEngine:
    """The scheduler, with a device and clients that only take time."""

    def __init__(self, workload: Workload, config: EngineConfig, cost: CostModel) -> None:
        self.scheduler = Scheduler(config)
        self.timelines: list[Timeline] = []
        self.num_refused = self.num_steps = 0
        self._config = config
        self._cost = cost
        self._now_s = self._device_free_s = 0.0
        self._unsent = deque(enumerate(sorted(workload.arrivals, key=lambda one: one.at_s)))
        self._on_the_way: list[tuple[float, float, int, Arrival]] = []  # a heap: arrives, was sent
        self._live: dict[int, Timeline] = {}  # order -> times
        for _ in range(workload.concurrency or len(self._unsent)):
            self._send()
        self._loop = Loop(
            self.scheduler,
            overlap=config.overlap,
            dispatch=self._dispatch,
            read=self._read,
            take=self._take,
        )

    def run(self) -> None:
        """Until the last token of the last request."""
        while self._on_the_way or self._live or self._loop.under_way:
            if not (self._live or self._loop.under_way):
                self._now_s = max(self._now_s, self._on_the_way[0][0])
            self._receive()
            self._now_s += self._cost.host_s
            self._loop.step()

    def _send(self) -> None:
        """The next request leaves its client; in a closed loop another has just ended."""
        if self._unsent:
            number, arrival = self._unsent.popleft()
            sent_s = max(self._now_s, arrival.at_s)
            heapq.heappush(self._on_the_way, (sent_s + self._cost.edge_s, sent_s, number, arrival))

    def _receive(self) -> None:
        """Takes in what has arrived."""
        while self._on_the_way and self._on_the_way[0][0] <= self._now_s:
            _, sent_s, number, arrival = heapq.heappop(self._on_the_way)
            is_too_long = arrival.num_prompt_tokens >= self._config.max_seq_len
            if is_too_long or len(self.scheduler.waiting) >= self._config.max_waiting:
                self.num_refused += 1
                self._send()
                continue
            sequence = self.scheduler.add(_request(number, arrival))
            self._live[sequence.order] = Timeline(sent_s)
            self.timelines.append(self._live[sequence.order])

    def _dispatch(self, plan: Plan) -> list[tuple[float, int]]:
        """When each of its parts will be there, and its tokens: first ones, then the decode."""
        self.num_steps += 1
        now_s = max(self._now_s, self._device_free_s)
        work, parts = work_of(plan, self._config), list[tuple[float, int]]()
        self._device_free_s = now_s + self._cost.seconds(work)
        context_s = self._cost.prefill_context_s * work.prefill_context / max(1, sum(work.sizes))
        for prefill in prefills(plan.chunks, self._config):
            size, num_sampled = prefill.num_tokens, len(prefill.sampled)
            now_s += self._cost.chunk_s(size) + context_s * size
            parts += [(now_s, num_sampled)] * bool(num_sampled)
        if plan.decodes or not parts:
            return [*parts, (self._device_free_s, len(plan.decodes))]
        return [*parts[:-1], (self._device_free_s, parts[-1][1])]

    def _read(self, plan: Plan, parts: list[tuple[float, int]]) -> Iterator[Items[int]]:
        for time_s, num_tokens in parts:
            self._now_s = max(self._now_s, time_s)
            yield [0] * num_tokens

    def _take(self, sampled: Sampled) -> None:
        sequence: Sequence = sampled.sequence
        if sampled.counts:
            self._live[sequence.order].tokens_s.append(self._now_s)
            if sequence.finish_reason is not None:
                del self._live[sequence.order]
                self._send()


def _request(number: int, arrival: Arrival) -> Request:
    """A request of that size: its first tokens are its group's, the others nobody else's."""
    num_shared = min(arrival.num_shared_tokens, arrival.num_prompt_tokens)
    shared = range(arrival.group * 4096, arrival.group * 4096 + num_shared)
    own = range(_OWN_TOKENS + number, _OWN_TOKENS + number + arrival.num_prompt_tokens - num_shared)
    sampling = SamplingParams(max_tokens=arrival.num_output_tokens, ignore_eos=True)
    return Request(
        request_id=str(number),
        prompt=(*shared, *own),
        sampling=sampling.or_else(JAXINFER_DEFAULTS),
        priority=arrival.priority,
        salt="" if num_shared else str(number),
    )
