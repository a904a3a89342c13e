"""Same bits on this device: the self-test of a start, then requests alone and beside each other."""

import random
from dataclasses import replace
from functools import partial
from typing import Any

import jax

from jaxinfer import models, spec
from jaxinfer.bench.hardware.part import Part
from jaxinfer.engine import Engine
from jaxinfer.engine_config import CacheConfig, EngineConfig
from jaxinfer.host.request import JAXINFER_DEFAULTS, Request, SamplingParams

Answers = dict[str, list[tuple[int, float]]]


def measure(part: Part) -> None:
    """A row a kernel: what the self-test says, and whether company changed any answer."""
    config = engine_config(part)
    chosen = part.best(config, head_dim=part.sizes.same_bits.head_dim)
    for name in dict.fromkeys((chosen.attention, "reference")):
        engine = replace(config, attention=name)
        part.attempt(f"same bits with {name}", partial(_compare, part, engine))


def engine_config(part: Part) -> EngineConfig:
    """Small programs of several sizes; no prefix is found again."""
    tiny = part.sizes.is_tiny
    return EngineConfig(
        num_slots=2 if tiny else 16,
        max_seq_len=64 if tiny else 512,
        decode_rows=(2,) if tiny else (1, 8, 16),
        prefill_chunks=(16,) if tiny else (32, 128),
        compute_dtype="float32" if tiny else "bfloat16",
        attention_block=part.sizes.block,
        cache=CacheConfig(page_size=16, prefix=False),
    )


def _compare(part: Part, config: EngineConfig) -> None:
    model = part.sizes.same_bits
    params = spec.initialise(models.spec_of(model), jax.random.key(0), config.compute_dtype)
    params = jax.tree.map(lambda leaf: 3 * leaf, params)  # logits that differ from token to token
    engine = Engine(params, model, NoText(), config)
    tested = engine.self_test
    requests = _requests(part)
    together = _answers(engine, requests)
    alone: Answers = {}
    for request in requests:
        alone |= _answers(engine, [request])
    differ = [name for name in together if together[name] != alone[name]]
    part.add(
        kernel=config.attention,
        self_test_exact=tested.is_exact,
        groups=[list(group) for group in tested.groups],
        dropped=list(tested.dropped),
        unsteady=list(tested.unsteady),
        broken_promises=list(tested.broken_promises),
        requests=len(requests),
        differ_in_company=differ,
        ok=not differ,
    )


def _requests(part: Part) -> list[Request]:
    rng, size = random.Random(0), part.sizes
    longest = engine_config(part).max_seq_len - size.answer
    found = []
    for number in range(size.requests):
        prompt = [
            rng.randrange(size.same_bits.vocab_size) for _ in range(rng.randint(1, longest // 2))
        ]
        sampling = SamplingParams(
            temperature=(0.0, 0.8)[number % 2],
            top_p=0.9,
            max_tokens=size.answer,
            ignore_eos=True,
            seed=number,
        )
        found.append(Request(f"r{number}", tuple(prompt), sampling.or_else(JAXINFER_DEFAULTS)))
    return found


def _answers(engine: Engine, requests: list[Request]) -> Answers:
    found: Answers = {request.request_id: [] for request in requests}
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        for output in engine.step():
            found[output.request_id] += zip(output.token_ids, output.logprobs, strict=True)
    return found


class NoText:
    """Stands in for a tokenizer: tokens are compared, not text."""

    def stream(self, prompt_tail: Any = (), *, stop: tuple[str, ...] = ()) -> "NoText":
        return self

    def push(self, token: int) -> "NoText":
        return self

    def finish(self) -> str:
        return ""

    text = ""
    stop = None
