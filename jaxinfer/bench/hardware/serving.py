"""A whole engine with random weights under more requests than it has slots: tokens a second."""

import time
from functools import partial

import jax

from jaxinfer import models, spec
from jaxinfer.bench.hardware.bits import NoText
from jaxinfer.bench.hardware.part import Part
from jaxinfer.bench.hardware.sizes import Asked, work
from jaxinfer.config import ModelConfig
from jaxinfer.engine import Engine
from jaxinfer.engine_config import CacheConfig, EngineConfig
from jaxinfer.host.request import JAXINFER_DEFAULTS, Request, SamplingParams


def measure(part: Part) -> None:
    """One row, of the first model; `peers` has the same requests in transformers."""
    name, model = part.sizes.models[0]
    engine = part.attempt(f"{name}: weights and engine", partial(_engine, part, model))
    if engine is not None:
        part.attempt(f"{name}: serving", partial(_serve, part, name, engine))


def _engine(part: Part, model: ModelConfig) -> Engine:
    size = part.sizes.serving
    longest = size.longest_prompt + size.longest_answer
    page_size = 16 if part.sizes.is_tiny else 64
    config = part.best(
        EngineConfig(
            num_slots=size.slots,
            max_seq_len=-(-longest // part.sizes.block) * part.sizes.block,
            decode_rows=size.decode_rows,
            prefill_chunks=size.prefill_chunks,
            max_prefill_tokens=size.prefill_chunks[-1],
            max_waiting=size.requests,
            compute_dtype="float32" if part.sizes.dtype == "float32" else "bfloat16",
            attention_block=part.sizes.block,
            cache=CacheConfig(page_size=page_size, prefix=False),
        ),
        head_dim=model.head_dim,
    )
    started = time.perf_counter()
    params = spec.initialise(models.spec_of(model), jax.random.key(0), part.sizes.dtype)
    engine = Engine(jax.block_until_ready(params), model, NoText(), config)
    part.fact(start_s=time.perf_counter() - started)
    return engine


def _serve(part: Part, name: str, engine: Engine) -> None:
    """All requests at once: the line is never empty before the last ones run."""
    asked = work(part.sizes.serving, engine.model.vocab_size)
    _answer(engine, asked[: engine.config.num_slots], "warm")
    started, before = time.perf_counter(), engine.stats()
    count = _answer(engine, asked, "timed")
    seconds, after = time.perf_counter() - started, engine.stats()
    part.add(
        model=name,
        attention=engine.config.attention,
        slots=engine.config.num_slots,
        requests=len(asked),
        prompt_tokens=sum(len(one.prompt) for one in asked),
        output_tokens=count,
        seconds=seconds,
        tokens_per_s=count / seconds,
        steps=after.num_steps - before.num_steps,
        waited_for_device=(after.wait_s - before.wait_s) / seconds,
    )


def _answer(engine: Engine, asked: list[Asked], label: str) -> int:
    """Tokens of all answers."""
    for number, one in enumerate(asked):
        sampling = SamplingParams(
            temperature=0.0, max_tokens=one.num_out, ignore_eos=True, seed=number
        )
        request = Request(f"{label}{number}", one.prompt, sampling.or_else(JAXINFER_DEFAULTS))
        engine.submit(request)
    count = 0
    while engine.has_work:
        count += sum(len(output.token_ids) for output in engine.step())
    assert count == sum(one.num_out for one in asked), "an answer ended early"
    return count
