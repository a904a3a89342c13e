"""The self-test of a start: the same tokens through every program, compared bit by bit."""

import hashlib
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxinfer import verdict
from jaxinfer.cache import Cache
from jaxinfer.compile import ALLOCATE, PAGES_READ, READ_PAGES, Program, Programs, shapes
from jaxinfer.config import EngineConfig, ModelConfig
from jaxinfer.inputs import Batch, StepOutput, inert_batch, pack
from jaxinfer.store import Shape, Store
from jaxinfer.verdict import SelfTest

_STEPS = 3  # decode steps that each tested row takes at least
_ROW_STEPS = 64  # a program of few rows takes more: one bit in thousands may be all that differs
_MAX_STEPS = 8
_SAMPLED = {"temperature": 0.8, "top_k": 40, "top_p": 0.95}  # of every other page; else greedy
Seen = Mapping[str, frozenset[bytes]]
"""What one program gave: by position and kind, the bits; more than one where they changed."""
log = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """An engine's parts after the test: programs that ran, and a config that uses those alone."""

    report: SelfTest
    config: EngineConfig
    programs: Programs
    cache: Cache


class _Plan(NamedTuple):
    """Where the test's tokens lie."""

    tokens: np.ndarray
    home: np.ndarray  # pages of the sequence, as the first prefill program wrote it
    spare: np.ndarray  # other pages, to write the same again


def run(
    params: Any,
    model: ModelConfig,
    config: EngineConfig,
    programs: Programs,
    *,
    rebuild: Callable[[Shape], Program],
    store: Store | None = None,
) -> Outcome:
    """Runs every step, and where there is a program that reads pages compares what they give.

    Steps that differ from the rest are dropped. A stored program that fails when it runs is
    replaced by what `rebuild` compiles. What was found of stored programs is kept beside them: a
    start that loads all of them from there runs each once, and compares none again.
    """
    while True:
        bench = _Bench(params, config, programs)
        try:
            return _run(bench, model, store)
        except jax.errors.JaxRuntimeError as error:
            if not programs[bench.last].load_s or jax.process_count() > 1:
                raise  # no process may compile alone what others run
            log.warning(
                "the stored program %s fails when it runs, so it is compiled again: %s",
                bench.last.name,
                str(error)[:200],
            )
            programs = {**programs, bench.last: rebuild(bench.last)}


def _run(bench: "_Bench", model: ModelConfig, store: Store | None) -> Outcome:
    started, config = time.monotonic(), bench.config
    bench.allocate()
    compares = READ_PAGES in bench.programs
    key = verdict.key_of(bench.programs, Path(__file__))
    known = verdict.recall(store, key, bench.programs) if compares else SelfTest(0)
    if known is not None:
        for shape in bench.steps:
            bench.touch(shape)
        if compares:
            bench.read(np.zeros(1, np.int32))
        report = known
    else:
        plan = _plan(model, config)
        report = _judge(_observe(bench, plan), config, num_tokens=len(plan.tokens))
        if store is not None:
            verdict.remember(store, key, report)
    report = replace(report, seconds=time.monotonic() - started)
    for sentence in _warnings(report):
        log.warning("self-test: %s", sentence)
    steps = [shape for shape in bench.steps if shape.name not in report.dropped]
    config = _narrowed(config, steps)
    unused = {*bench.steps} - {*shapes(config)}
    left = {shape: one for shape, one in bench.programs.items() if shape not in unused}
    return Outcome(report, config, left, bench.cache)


class _Bench:
    """Runs programs on a new cache, one at a time, and knows which one ran last."""

    def __init__(self, params: Any, config: EngineConfig, programs: Programs) -> None:
        self._params, self.config, self.programs = params, config, programs
        self.steps = tuple(shape for shape in programs if shape.rows)
        self.last = ALLOCATE
        self.cache: Any = None

    def allocate(self) -> None:
        """Makes the cache."""
        self.last = ALLOCATE
        self.cache = jax.block_until_ready(self.programs[ALLOCATE].run())

    def batch(self, shape: Shape) -> Batch:
        """Inert rows for one program."""
        return inert_batch(
            shape.rows,
            shape.tokens,
            pages_per_seq=self.config.pages_per_seq,
            trash_slot=self.config.num_slots,
            trash_page=self.config.num_pages,
        )

    def touch(self, shape: Shape) -> None:
        """Runs a program on the trash page: the first request then pays for no page fault."""
        batch = self.batch(shape)
        batch.lengths[:] = min(shape.tokens, self.config.max_seq_len)
        self.run(shape, batch)

    def run(self, shape: Shape, batch: Batch) -> StepOutput:
        """One step; its results in NumPy."""
        self.last = shape
        self.cache, output = self.programs[shape].run(self._params, self.cache, pack(batch))
        return StepOutput(*map(np.asarray, output))

    def read(self, pages: np.ndarray) -> np.ndarray:
        """The bits of some pages: [pages, layers, heads, tokens, ...]."""
        self.last = READ_PAGES
        parts = []
        for first in range(0, len(pages), PAGES_READ):
            some = pages[first : first + PAGES_READ]
            ids = np.resize(some, PAGES_READ).astype(np.int32)
            parts.append(np.asarray(self.programs[READ_PAGES].run(self.cache, ids))[: len(some)])
        return np.concatenate(parts)


def _num_pages(config: EngineConfig) -> int:
    """Pages of the test's sequence: past the end of an attention block where there is room."""
    page_size = config.cache.page_size
    wanted = config.attention_block // page_size + 2
    longest = min(config.max_seq_len // page_size, config.num_pages // 2)
    return max(1, min(wanted, longest))


def _plan(model: ModelConfig, config: EngineConfig) -> _Plan:
    page_size, count = config.cache.page_size, _num_pages(config)
    steps = min(_STEPS, page_size, config.max_seq_len)
    rng = np.random.default_rng(0)
    # Few pages, none at its own place: a mix-up of pages would show.
    pages = rng.permutation(config.num_pages)[::-1]
    return _Plan(
        tokens=rng.integers(0, model.vocab_size, (count - 1) * page_size + steps),
        home=pages[:count],
        spare=pages[count:] if len(pages) > count else pages,
    )


def _observe(bench: _Bench, plan: _Plan) -> dict[Shape, Seen]:
    """The bits that each program gives; the largest chunk goes first and fills the home pages."""
    chunks = [one for one in bench.steps if one.phase == "prefill"]
    chunks.sort(key=lambda one: (-one.tokens, one.rows))
    decodes = [one for one in bench.steps if one.phase == "decode"]
    seen: dict[Shape, Seen] = {chunks[0]: _fill(bench, plan, chunks[0])}
    for shape in chunks[1:]:
        seen[shape] = _refill(bench, plan, shape)
    for shape in decodes:
        seen[shape] = _decode(bench, plan, shape)
    return seen


def _fill(bench: _Bench, plan: _Plan, shape: Shape) -> Seen:
    """The whole sequence, in as few pieces as it takes."""
    found = _Found(bench.config)
    for start in range(0, len(plan.tokens), shape.tokens):
        output = _prefill(bench, plan, shape, start, plan.home, [0])
        stop = min(len(plan.tokens), start + shape.tokens)
        found.add_output(stop - 1, output, 0)
    found.add_pages(bench.read(plan.home), 0, len(plan.tokens))
    return found.seen()


def _refill(bench: _Bench, plan: _Plan, shape: Shape) -> Seen:
    """A full chunk at the start, and a last piece that goes on where a cached prefix ends.

    Of several rows each goes on where the one before it ends; in the second run they have changed
    places, and in a third one the last place alone is taken.
    """
    found, page_size = _Found(bench.config), bench.config.cache.page_size
    count, end, places = len(plan.home), len(plan.tokens), list(range(shape.rows))
    runs = [(0, places)]
    for some in (places[::-1], places[-1:]):
        last = max(0, -(-(end - len(some) * shape.tokens) // page_size)) * page_size
        runs += [(last, some)] if (last, some) not in runs else []
    for start, some in runs:
        own = np.resize(plan.spare, count)
        pages = np.concatenate([plan.home[: start // page_size], own])[:count]
        output = _prefill(bench, plan, shape, start, pages, some)
        stops = [min(end, start + row * shape.tokens) for row in range(1, len(some) + 1)]
        for place, stop in zip(some, dict.fromkeys(stops), strict=False):
            found.add_output(stop - 1, output, place)
        found.add_pages(bench.read(pages[start // page_size :]), start, stops[-1])
    return found.seen()


def _decode(bench: _Bench, plan: _Plan, shape: Shape) -> Seen:
    """Rows that go on from different places of the sequence, side by side; then one of them alone.

    Each row reads the home pages up to its own place and writes to a page of its own; between
    two steps all rows change places.
    """
    found, page_size = _Found(bench.config), bench.config.cache.page_size
    count = len(plan.home)
    num_rows = min(shape.rows, len(plan.spare))
    row_pages, spare = [count - 1 - row % count for row in range(num_rows)], plan.spare.tolist()
    rng = np.random.default_rng(shape.rows)
    num_steps = min(page_size, max(_STEPS, min(_MAX_STEPS, _ROW_STEPS // shape.rows)))
    ends = [min(page * page_size + num_steps, len(plan.tokens)) for page in row_pages]
    for step in range(num_steps):
        order = rng.permutation(shape.rows)[:num_rows].tolist()
        batch, taken = bench.batch(shape), []
        for row, place in enumerate(order):
            position = row_pages[row] * page_size + step
            if position < ends[row]:
                _set_row(batch, place, plan, position, spare[row], page_size)
                taken.append((position, place))
        if not taken:
            break
        output = bench.run(shape, batch)
        for position, place in taken:
            found.add_output(position, output, place)
    batch, place = bench.batch(shape), shape.rows - 1
    _set_row(batch, place, plan, len(plan.tokens) - 1, spare[0], page_size)
    found.add_output(len(plan.tokens) - 1, bench.run(shape, batch), place)
    bits = bench.read(plan.spare[:num_rows])
    for row, page in enumerate(row_pages):
        found.add_pages(bits[row : row + 1], page * page_size, ends[row])
    return found.seen()


def _set_row(
    batch: Batch, place: int, plan: _Plan, position: int, own: int, page_size: int
) -> None:
    page = position // page_size
    batch.tokens[place, 0] = plan.tokens[position]
    batch.starts[place], batch.lengths[place] = position, 1
    batch.page_table[place, : page + 1] = [*plan.home[:page], own]
    _set_sampling(batch, place, page)


def _prefill(
    bench: _Bench, plan: _Plan, shape: Shape, start: int, pages: np.ndarray, places: list[int]
) -> StepOutput:
    """One run with the tokens from `start` on, as many as go into these rows in this order."""
    batch = bench.batch(shape)
    for place in places:
        some = plan.tokens[start : start + shape.tokens]
        if not len(some):
            break
        batch.tokens[place, : len(some)] = some
        batch.starts[place], batch.lengths[place] = start, len(some)
        batch.page_table[place, : len(pages)] = pages
        start += len(some)
        _set_sampling(batch, place, (start - 1) // bench.config.cache.page_size)
    return bench.run(shape, batch)


def _set_sampling(batch: Batch, place: int, page: int) -> None:
    """How the token after a place on this page is sampled: every other page is greedy."""
    batch.seed[place] = (page, 1)
    if page % 2:
        for name, value in _SAMPLED.items():
            getattr(batch, name)[place] = value


class _Found:
    """Collects what one program gave."""

    def __init__(self, config: EngineConfig) -> None:
        self._page_size = config.cache.page_size
        self._seen: dict[str, set[bytes]] = defaultdict(set)

    def add_output(self, position: int, output: StepOutput, place: int) -> None:
        """The token and logprob that follow a position."""
        bits = output.tokens[place].tobytes() + output.logprobs[place].tobytes()
        self._seen[f"output {position}"].add(bits)

    def add_pages(self, bits: np.ndarray, start: int, stop: int) -> None:
        """Keys and values of positions [start, stop); `bits` begins with the page of `start`."""
        for position in range(start, stop):
            page, offset = divmod(position - start, self._page_size)
            token = bits[page, :, :, offset].tobytes()
            self._seen[f"kv {position}"].add(hashlib.blake2b(token, digest_size=16).digest())

    def seen(self) -> Seen:
        """All of it."""
        return {key: frozenset(values) for key, values in self._seen.items()}


def _judge(seen: Mapping[Shape, Seen], config: EngineConfig, *, num_tokens: int) -> SelfTest:
    """Groups the programs that agree, and picks those to keep.

    The largest decode covers all slots, so it comes first and its group stays; of the prefill
    programs those that agree with it, or where none does, those that agree with the largest one.
    """
    groups: list[list[Shape]] = []
    top_first = sorted(seen, key=lambda shape: (shape.phase, -shape.rows, -shape.tokens))
    for shape in top_first:
        home = next((one for one in groups if _agrees(seen, shape, one)), None)
        if home is None:
            groups.append([shape])
        else:
            home.append(shape)
    top = Shape("decode", config.row_counts[-1], 1)
    largest = Shape("prefill", 1, config.prefill_chunks[-1])
    decode_home, chunk_home = _home(groups, top), _home(groups, largest)
    if any(shape.phase == "prefill" for shape in decode_home):
        chunk_home = decode_home
    kept = {shape for shape in decode_home if shape.phase == "decode"}
    kept |= {shape for shape in chunk_home if shape.phase == "prefill"}
    return SelfTest(
        num_tokens,
        groups=tuple(tuple(shape.name for shape in group) for group in groups),
        unsteady=tuple(one.name for one in seen if not _is_steady(seen[one])),
        dropped=tuple(one.name for one in seen if one not in kept),
    )


def _home(groups: list[list[Shape]], shape: Shape) -> list[Shape]:
    return next(group for group in groups if shape in group)


def _agrees(seen: Mapping[Shape, Seen], shape: Shape, group: list[Shape]) -> bool:
    """With every member: two decodes have more in common than either has with a prefill."""
    own = seen[shape]
    return all(own[key] == seen[one][key] for one in group for key in own.keys() & seen[one].keys())


def _is_steady(seen: Seen) -> bool:
    return all(len(values) == 1 for values in seen.values())


def _narrowed(config: EngineConfig, steps: list[Shape]) -> EngineConfig:
    """The config that uses these programs and no others.

    Without the smallest chunk for one row it has none for several.
    """
    if len(steps) == len(shapes(config)):
        return config
    prefills = [one for one in steps if one.phase == "prefill"]
    chunks = tuple(one.tokens for one in prefills if one.rows == 1)
    several = (one.rows for one in prefills if one.rows > 1 and one.tokens == chunks[0])
    return replace(
        config,
        decode_rows=tuple(one.rows for one in steps if one.phase == "decode"),
        prefill_chunks=chunks,
        prefill_rows=(1, *several),
    )


def _warnings(report: SelfTest) -> Iterator[str]:
    if report.dropped:
        yield (
            f"{', '.join(report.dropped)} gives other bits than the rest, so it is not used: "
            "answers stay the same beside others, and some steps cost more"
        )
    yield from report.broken_promises
