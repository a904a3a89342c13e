"""What bits that never change cost: decode steps of the exact mode against faster ones."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from rich.table import Table

from jaxinfer import compile as programs_of
from jaxinfer.config import EngineConfig
from jaxinfer.engine import Engine
from jaxinfer.inputs import inert_batch, pack
from jaxinfer.store import Shape, Store

BAR = 0.05
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Price:
    """One load: a decode step as exact mode runs it, and the fastest one of any row count."""

    active: int
    exact_rows: int
    """Rows of the program that exact mode runs; those without a stream are inert."""
    fast_rows: int
    """Rows of the fastest program with engine.bits=fast."""
    exact_ms: float
    fast_ms: float
    price: float
    """Median over rounds of exact / fast - 1."""
    low: float
    """The first quartile of the same."""
    high: float


@dataclass(frozen=True)
class Report:
    """Everything of one run."""

    model: str
    compute_dtype: str
    context: int
    rounds: int
    prices: tuple[Price, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "bar": BAR}


class _Decode:
    """One decode program on a cache of its own, ready to be timed."""

    def __init__(
        self, engine: Engine, config: EngineConfig, active: int, context: int, store: Store | None
    ) -> None:
        shape = Shape("decode", next(rows for rows in config.row_counts if rows >= active), 1)
        params, model = engine.device.params, engine.model
        self.rows, self._params = shape.rows, params
        self._program = programs_of.build(params, model, config, wanted=[shape], store=store)[shape]
        self._cache = programs_of.build_allocate(params, model, config, store=store).run()
        batch = inert_batch(
            shape.rows,
            1,
            pages_per_seq=config.pages_per_seq,
            trash_slot=config.num_slots,
            trash_page=config.num_pages,
        )
        pages = -(-context // config.cache.page_size)
        for row in range(active):
            batch.page_table[row, :pages] = (np.arange(pages) + row * pages) % config.num_pages
        batch.lengths[:active], batch.starts[:active] = 1, context - 1
        self._packed = pack(batch)

    def seconds(self) -> float:
        """One step, to its tokens."""
        started = time.perf_counter()
        self._cache, output = self._program.run(self._params, self._cache, self._packed)
        np.asarray(output.tokens)
        return time.perf_counter() - started


def measure(
    engine: Engine,
    *,
    name: str,
    context: int = 256,
    actives: tuple[int, ...] = (1, 8, 32),
    rounds: int = 30,
    store: Store | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Report:
    """Times, round by round and side by side, each load in exact mode and in faster modes.

    The faster modes run as many rows as there are streams, and as many as exact mode does.
    """
    prices = []
    actives = tuple(active for active in actives if active <= engine.config.num_slots)
    for number, active in enumerate(actives):
        exact, *fast = _contenders(engine, active, context, store)
        times: dict[_Decode, list[float]] = {decode: [] for decode in (exact, *fast)}
        for decode in times:
            decode.seconds()  # the first run of a program is slow
        for turn in range(rounds):
            for decode in list(times)[:: 1 if turn % 2 else -1]:
                times[decode].append(decode.seconds())
            progress("measure", number * rounds + turn + 1, rounds * len(actives))
        prices.append(_price(active, exact, fast, times))
    return Report(
        model=name,
        compute_dtype=engine.config.compute_dtype,
        context=context,
        rounds=rounds,
        prices=tuple(prices),
    )


def table(report: Report) -> Table:
    """The report for people."""
    title = f"{report.model}, {report.compute_dtype}, {report.context} tokens a stream"
    found = Table("streams", "exact ms", "rows", "fastest ms", "rows", "price", "half", title=title)
    for one in report.prices:
        found.add_row(
            str(one.active),
            f"{one.exact_ms:.1f}",
            str(one.exact_rows),
            f"{one.fast_ms:.1f}",
            str(one.fast_rows),
            f"{one.price:+.1%}",
            f"{one.low:+.1%} to {one.high:+.1%}",
        )
    return found


def _contenders(engine: Engine, active: int, context: int, store: Store | None) -> list[_Decode]:
    """The exact step first; the caches are as small as the load allows, and equal."""
    pages = -(-context // engine.config.cache.page_size)
    config = replace(
        engine.config,
        bits="exact",
        num_slots=active,
        max_seq_len=context,
        cache=replace(engine.config.cache, num_pages=active * pages),
        max_prefill_tokens=context,
    )
    exact = _Decode(engine, config, active, context, store)
    counts = sorted({active, exact.rows})
    return [
        exact,
        *(
            _Decode(
                engine,
                replace(config, bits="fast", decode_rows=(rows,)),
                active,
                context,
                store,
            )
            for rows in counts
        ),
    ]


def _price(
    active: int, exact: _Decode, fast: list[_Decode], times: dict[_Decode, list[float]]
) -> Price:
    fastest = min(fast, key=lambda decode: np.median(times[decode]))
    ratios = np.array(times[exact]) / np.array(times[fastest]) - 1
    low, price, high = np.percentile(ratios, [25, 50, 75]).tolist()
    return Price(
        active=active,
        exact_rows=exact.rows,
        fast_rows=fastest.rows,
        exact_ms=1e3 * float(np.median(times[exact])),
        fast_ms=1e3 * float(np.median(times[fastest])),
        price=price,
        low=low,
        high=high,
    )
