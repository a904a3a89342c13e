"""Random scenarios: each draws its own few features, so that rare mixtures come up often."""

import random

from jaxinfer.engine_config import CacheConfig, EngineConfig
from jaxinfer.host.request import JAXINFER_DEFAULTS, Request, SamplingParams
from jaxinfer.host.scenario import PHASES, STEP, Event, Scenario

EOS = 13


def random_scenario(seed: int) -> Scenario:
    """The scenario of a seed: always the same one."""
    rng = random.Random(seed)
    config = _config(rng)
    has = {name: rng.random() < 0.4 for name in ("cancel", "fail", "nan", "flush", "time", "again")}
    requests = _requests(rng, config, has_deadlines=has["time"])
    return Scenario(
        config=config,
        requests=requests,
        events=_events(rng, len(requests), has),
        eos=(EOS,) if rng.random() < 0.5 else (),
        key=rng.randrange(1000),
        is_packed=rng.random() < 0.2,
        pace=rng.choice([(0.0, 0.0), (0.05, 0.5), (0.2, 0.1)]) if has["time"] else (0.0, 0.0),
    )


def _config(rng: random.Random) -> EngineConfig:
    page_size = rng.choice([1, 2, 4, 4, 8, 8])
    max_seq_len = rng.choice([24, 40, 64])
    longest = -(-max_seq_len // page_size)
    return EngineConfig(
        num_slots=rng.choice([1, 2, 3, 3, 5]),
        max_seq_len=max_seq_len,
        prefill_chunks=rng.choice([(8,), (8, 16), (8, 32)]),
        prefill_rows=rng.choice([(1,), (1, 2), (1, 2, 4)]),
        max_prefill_tokens=rng.choice([1, 8, 16, 64]),
        prefill_per_decode=rng.choice([0, 1, 3, 32]),
        attention_block=8,
        overlap=rng.random() < 0.7,
        cache=CacheConfig(
            page_size=page_size,
            num_pages=longest + rng.choice([0, 0, 1, longest // 2, 2 * longest]),
            prefix=rng.random() < 0.85,
        ),
    )


def _requests(
    rng: random.Random, config: EngineConfig, *, has_deadlines: bool
) -> tuple[Request, ...]:
    vocab = rng.choice([1, 50])
    shared = [rng.choices(range(vocab), k=rng.choice([0, 8, 16])) for _ in range(2)]
    has_salts, has_bypass, has_priorities, has_stops = (rng.random() < 0.3 for _ in range(4))
    requests = []
    for number in range(rng.randint(1, 7)):
        own = rng.choices(range(vocab), k=rng.choice([1, 1, 3, 7, 8, 9, 20, 40]))
        prompt = [*rng.choice(shared), *own][: config.max_seq_len - 1]
        if rng.random() < 0.2:
            prompt[rng.randrange(len(prompt))] += 1
        max_tokens = rng.choice([1, 2, 3, 6, 12, None])
        sampling = SamplingParams(
            seed=rng.choice([None, 1, 2**40 + 7]),
            max_tokens=max_tokens,
            min_tokens=rng.choice([0, 0, min(3, max_tokens or 3)]),
            ignore_eos=rng.random() < 0.3,
            stop=tuple(str(token) for token in rng.sample(range(50), 8)) if has_stops else (),
            stop_token_ids=tuple(rng.sample(range(50), 3)) if has_stops else (),
        )
        requests.append(
            Request(
                request_id=f"r{number}",
                prompt=tuple(prompt),
                sampling=sampling.or_else(JAXINFER_DEFAULTS),
                priority=rng.choice([0, 1, 2]) if has_priorities else 0,
                salt=rng.choice(["", "a"]) if has_salts else "",
                use_prefix_cache=not has_bypass or rng.random() < 0.6,
                deadline_s=rng.choice([None, 5.0, 10.0]) if has_deadlines else None,
            )
        )
    return tuple(requests)


def _events(rng: random.Random, num_requests: int, has: dict[str, bool]) -> tuple[Event, ...]:
    arrivals = list(range(num_requests))
    haste = rng.choice([0.2, 0.5, 0.9])
    events: list[Event] = []
    for number in range(rng.randint(5, 25)):
        while arrivals and rng.random() < haste:
            events.append(Event("submit", arrivals.pop(0)))
        index = rng.randrange(num_requests)
        if has["again"] and rng.random() < 0.1 and index not in arrivals:
            events.append(Event("submit", index))
        if has["cancel"] and rng.random() < 0.1:
            events.append(Event("cancel", index, rng.choice(PHASES)))
        if has["flush"] and rng.random() < 0.1:
            events.append(Event("flush"))
        if has["time"] and rng.random() < 0.1:
            events.append(Event("time", at=float(number)))
        if has["nan"] and rng.random() < 0.1:
            events.append(Event("nan", index))
        elif has["fail"] and rng.random() < 0.1:
            events.append(Event("fail", phase=rng.choice(["", "read", "part"])))
        else:
            events.append(STEP)
    events += [Event("submit", index) for index in arrivals]
    return tuple(events)
