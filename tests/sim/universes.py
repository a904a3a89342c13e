"""Small universes: at most 4 requests, 6 pages and 3 slots, each with a quarrel of its own."""

from typing import Any

from jaxinfer.engine_config import CacheConfig, EngineConfig
from jaxinfer.host.request import JAXINFER_DEFAULTS, Request, SamplingParams
from jaxinfer.host.scenario import Scenario
from tests.sim.explorer import Universe

_SHARED = tuple(range(8))  # one chunk: the shortest prefix that can be found


def config(**changes: Any) -> EngineConfig:
    """Six pages of eight tokens, three slots."""
    cache = CacheConfig(
        page_size=changes.pop("page_size", 8),
        num_pages=changes.pop("num_pages", 6),
        prefix=changes.pop("prefix", True),
    )
    plain = {"num_slots": 3, "max_seq_len": 40, "prefill_chunks": (8,), "attention_block": 8}
    bounds = {"max_prefill_tokens": 8, "prefill_per_decode": 0}
    return EngineConfig(**(plain | bounds | changes), cache=cache)


def request(number: int, prompt: tuple[int, ...], max_tokens: int, **fields: Any) -> Request:
    """A request that ends by its length alone."""
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True).or_else(JAXINFER_DEFAULTS)
    return Request(f"r{number}", prompt, sampling, **fields)


def _universe(config: EngineConfig, *requests: Request, **faults: int) -> Universe:
    return Universe(Scenario(config, requests), **faults)


def small() -> dict[str, Universe]:
    """Three requests: for the first tier."""
    long = request(0, (*_SHARED, *range(20, 27)), 4)
    twin = request(1, (*_SHARED, *range(20, 27)), 4)
    other = request(2, tuple(range(30, 45)), 3)
    growing = [request(number, (*_SHARED, number), 12) for number in range(3)]
    short = config(page_size=4, max_seq_len=24, overlap=False)
    return {
        "long": _universe(config(num_pages=5), long, twin, other, num_cancels=1, num_failures=1),
        "twins": _universe(config(), long, twin, num_cancels=1, num_failures=1, num_nans=1),
        "three growing": _universe(short, *growing, num_cancels=1),
        "two growing, broken": _universe(short, *growing[:2], num_cancels=1, num_nans=2),
    }


def large() -> dict[str, Universe]:
    """Four requests, with and without overlap."""
    shared = request(0, (*_SHARED, *range(20, 27)), 3)
    twin = request(1, (*_SHARED, *range(20, 27)), 4)
    cousin = request(2, (*_SHARED, 1, 2, 3), 7)
    other = request(3, tuple(range(30, 45)), 3)
    four = (shared, twin, cousin, other)
    growing = [request(number, (*_SHARED, number // 2), 7) for number in range(4)]
    late = [
        request(number, one.prompt, one.sampling.max_tokens, deadline_s=deadline_s)
        for number, (one, deadline_s) in enumerate(zip(four, (1.0, 2.0, 1.0, None), strict=True))
    ]
    mixed = [
        request(0, shared.prompt, 3, priority=1, salt="a"),
        request(1, shared.prompt, 4, salt="a"),
        request(2, cousin.prompt, 7, use_prefix_cache=False, priority=1),
        request(3, shared.prompt, 3, salt="b"),
    ]
    tiny = [request(2, (40, 41, 42), 4), request(3, (50, 51, 52, 53, 54), 3)]
    short = config(page_size=4, max_seq_len=24)
    return {
        "cancels": _universe(config(), *four, num_cancels=1),
        "two cancels": _universe(config(), *four, num_cancels=2),
        "failure": _universe(config(), *four, num_failures=1),
        "broken": _universe(config(), *four, num_nans=1),
        "deadlines": _universe(config(), *late, num_ticks=2),
        "mixed": _universe(config(), *mixed, num_cancels=1),
        "turns": _universe(config(overlap=False), *four, num_cancels=1, num_failures=1),
        "growing": _universe(short, *growing, num_cancels=1),
        "growing, broken": _universe(short, *growing, num_nans=1),
        "two slots": _universe(config(num_slots=2, num_pages=5), *four, num_cancels=1),
        "no cache": _universe(config(prefix=False), *four, num_cancels=1, num_failures=1),
        "pauses": _universe(config(prefill_per_decode=3), *four, num_cancels=1, num_failures=1),
        "big chunks": _universe(
            config(prefill_chunks=(8, 16), max_prefill_tokens=32, prefill_rows=(1,)),
            *four,
            num_cancels=2,
        ),
        "side by side": _universe(
            config(prefill_chunks=(8, 16), max_prefill_tokens=32, prefill_rows=(1, 2)),
            *(shared, request(1, other.prompt, 3), *tiny),
            num_cancels=1,
            num_failures=1,
        ),
    }
