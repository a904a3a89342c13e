"""The engine on a tiny model: what clients get, whatever happens around them."""

import gc
import random
import re
import weakref

import jax
import numpy as np
import pytest

from jaxinfer.compile import Shape
from jaxinfer.engine_config import CacheConfig
from jaxinfer.errors import EngineFailed, InvalidRequest
from jaxinfer.host.request import FinishReason
from tests import tiny

REQUESTS = tiny.random_requests(24, seed=1)
SMALL_PAGES = {"cache": CacheConfig(page_size=8), "num_slots": 16}


@pytest.fixture(scope="module")
def engine():
    return tiny.make_engine(prefill_rows=(1, 4))


@pytest.fixture(scope="module")
def answers(engine):
    return tiny.run(engine, REQUESTS)


def tokens_of(answers):
    return {name: answer.tokens for name, answer in answers.items()}


def test_each_request_gets_the_tokens_that_it_gets_alone(engine, answers):
    for request in REQUESTS[:8]:
        alone = tiny.run(engine, [request])[request.request_id]
        assert alone.tokens == answers[request.request_id].tokens


@pytest.mark.parametrize(
    "changes",
    [
        {"overlap": False},
        {"num_slots": 32},
        SMALL_PAGES,
        {"max_prefill_tokens": 8},
        {"prefill_chunks": (8,)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_tokens_do_not_depend_on_how_the_engine_is_set_up(answers, changes):
    other = tiny.run(tiny.make_engine(**changes), REQUESTS)
    assert tokens_of(other) == tokens_of(answers)


def test_short_prompts_share_a_prefill_program_and_get_what_they_get_alone(monkeypatch, engine):
    engine.flush_prefix_cache()
    ran, run = [], engine.device.run

    def spied(shape, packed):
        ran.append(shape.name)
        return run(shape, packed)

    monkeypatch.setattr(engine.device, "run", spied)
    rng = random.Random(0)
    requests = [
        tiny.make_request(f"s{length}", rng.choices(range(50), k=length), temperature=1.0)
        for length in range(1, 9)
    ]
    tiny.run_alone_and_together(engine, requests, alone=8)
    prefills = [name for name in ran if name.startswith("prefill")]
    assert prefills == ["prefill-4x8"] * 2 + ["prefill-1x8"] * 8


def test_a_pool_too_small_for_all_finishes_everyone_by_preemption(answers):
    small = tiny.make_engine(cache=CacheConfig(num_pages=16))
    other = tiny.run(small, REQUESTS, arrivals_per_step=2)
    stats = small.stats()
    assert stats.num_preemptions > 0
    assert stats.num_free_pages == stats.num_pages == 16
    assert tokens_of(other) == tokens_of(answers)
    assert sum(answer.last.num_preemptions for answer in other.values()) == stats.num_preemptions


def test_an_engine_that_is_dropped_is_gone_with_its_weights_pages_and_programs():
    engine = tiny.make_engine()
    engine.submit(REQUESTS[0])
    engine.step()  # and one more is under way
    pages = engine.device.cache.k[0]
    held = [weakref.ref(engine), weakref.ref(engine.device), weakref.ref(pages)]
    held += [weakref.ref(program) for program in engine.programs.values()]
    gc.collect()
    gc.disable()  # what is in a cycle waits for the collector, and is frozen at the next start
    try:
        del engine, pages
        assert [one() for one in held] == [None] * len(held)
    finally:
        gc.enable()


def test_nothing_compiles_after_start(engine, answers):
    tiny.run(engine, tiny.random_requests(200, seed=2, max_prompt=60, max_tokens=12))
    assert engine.stats().num_compiles_after_start == 0


def test_no_page_is_lost_and_little_is_wasted():
    engine = tiny.make_engine(**SMALL_PAGES)
    live, held = [], []

    def measure(number, outputs):
        running = engine._scheduler.running
        if len(running) >= 12:
            live.append(sum(sequence.num_stored for sequence in running))
            held.append(8 * sum(len(sequence.pages) for sequence in running))

    tiny.run(engine, tiny.random_requests(100, seed=3), each_step=measure)
    assert len(held) > 50
    assert 1 - sum(live) / sum(held) < 0.10
    assert engine.stats().num_free_pages == engine.stats().num_pages


def test_a_cancelled_request_frees_its_slot_and_pages_within_one_step(engine):
    engine.submit(tiny.make_request("stays", [1, 2, 3], max_tokens=30))
    engine.submit(tiny.make_request("leaves", [4, 5, 6] * 20, max_tokens=100))
    for _ in range(4):
        engine.step()
    held = engine.stats().num_free_pages
    engine.cancel("leaves")
    ended = [output for output in engine.step() if output.request_id == "leaves"]
    assert [output.finish_reason for output in ended] == [FinishReason.CANCELLED]
    assert engine.stats().num_running == 1
    assert engine.stats().num_free_pages > held
    engine.cancel("leaves")
    rest = tiny.run(engine, [])
    assert list(rest) == ["stays"]


def test_a_waiting_request_can_be_cancelled(engine):
    for number in range(9):
        engine.submit(tiny.make_request(f"c{number}", [number + 1], max_tokens=4))
    engine.step()
    engine.cancel("c8")
    rest = tiny.run(engine, [])
    assert rest["c8"].last.finish_reason is FinishReason.CANCELLED
    assert rest["c7"].last.finish_reason is FinishReason.LENGTH


def test_a_deadline_ends_a_request():
    now = [0.0]
    config, store = tiny.engine_config(), tiny.store()
    parts = (tiny.params(), tiny.MODEL, tiny.TokenText(), config)
    engine = tiny.Engine(*parts, clock=lambda: now[0], store=store)
    request = tiny.make_request("late", [1, 2], max_tokens=200)
    object.__setattr__(request, "deadline_s", 5.0)
    engine.submit(request)

    def tick(number, outputs):
        now[0] += 1.0

    answer = tiny.run(engine, [], each_step=tick)["late"]
    assert answer.last.finish_reason is FinishReason.DEADLINE
    assert 1 <= len(answer.tokens) <= 12


def test_ends_by_length_eos_stop_token_stop_string_and_context(engine, answers):
    def end(**sampling):
        request = tiny.make_request("one", [11, 12, 13], **sampling)
        answer = tiny.run(engine, [request])["one"]
        return answer, answer.last

    free, last = end(max_tokens=20)
    assert (last.finish_reason, len(free.tokens)) == (FinishReason.LENGTH, 20)
    third = free.tokens[2]
    place = free.tokens.index(third)
    answer, last = end(stop_token_ids=(third,))
    assert (last.finish_reason, last.stop) == (FinishReason.STOP_TOKEN, third)
    assert answer.tokens == free.tokens[: place + 1]
    assert f"<{third}>" not in answer.text
    answer, last = end(stop=(f"<{third}>",))
    assert (last.finish_reason, last.stop) == (FinishReason.STOP_STRING, f"<{third}>")
    assert f"<{third}>" not in answer.text
    answer, last = end(max_tokens=None)
    assert last.finish_reason is FinishReason.CONTEXT
    assert len(answer.tokens) == 256 - 3


def test_min_tokens_holds_end_tokens_back(engine):
    free = tiny.run(engine, [tiny.make_request("one", [11, 12, 13])])["one"]
    stop = free.tokens[0]
    request = tiny.make_request("one", [11, 12, 13], stop_token_ids=(stop,), min_tokens=5)
    held = tiny.run(engine, [request])["one"]
    assert stop not in held.tokens[:5]
    assert len(held.tokens) >= 5


def test_eos_ends_and_can_be_ignored():
    model_eos = tiny.run(tiny.make_engine(), [tiny.make_request("one", [11, 12, 13])])["one"]
    eos = model_eos.tokens[3]
    model = tiny.MODEL.__class__(**{**vars(tiny.MODEL), "eos_token_ids": (eos,)})
    parts = (tiny.params(), model, tiny.TokenText(), tiny.engine_config())
    engine = tiny.Engine(*parts, store=tiny.store())
    request = tiny.make_request("one", [11, 12, 13], ignore_eos=False)
    answer = tiny.run(engine, [request])["one"]
    assert answer.last.finish_reason is FinishReason.EOS
    assert answer.tokens == model_eos.tokens[: model_eos.tokens.index(eos) + 1]
    request = tiny.make_request("one", [11, 12, 13], ignore_eos=True)
    assert tiny.run(engine, [request])["one"].tokens == model_eos.tokens


def test_bad_requests_are_refused_and_hurt_nobody(engine):
    for prompt, sampling in (
        ([], {}),
        ([1] * 256, {}),
        ([256], {}),
        ([-1], {}),
        ([1], {"stop_token_ids": (999,)}),
    ):
        with pytest.raises(InvalidRequest):
            engine.submit(tiny.make_request("bad", prompt, **sampling))
    engine.submit(tiny.make_request("twice", [1]))
    with pytest.raises(InvalidRequest, match="in use"):
        engine.submit(tiny.make_request("twice", [1]))
    assert list(tiny.run(engine, [])) == ["twice"]


def test_a_failed_step_is_survived_with_the_same_tokens(engine, answers):
    shape = Shape("decode", 8, 1)
    program = engine.programs[shape]
    calls = []

    def fail_once(params, cache, packed):
        calls.append(1)
        if len(calls) == 20:
            jax.block_until_ready(program.run(params, cache, packed))
            raise jax.errors.JaxRuntimeError("INTERNAL: planted")
        return program.run(params, cache, packed)

    engine.programs[shape] = program.__class__(**{**vars(program), "run": fail_once})
    try:
        assert tokens_of(tiny.run(engine, REQUESTS)) == tokens_of(answers)
    finally:
        engine.programs[shape] = program
    assert engine.stats().num_recoveries == 1


def test_a_device_that_fails_every_time_ends_the_engine():
    engine = tiny.make_engine()

    def fail(params, cache, packed):
        raise jax.errors.JaxRuntimeError("INTERNAL: planted")

    for shape, program in engine.programs.items():
        engine.programs[shape] = program.__class__(**{**vars(program), "run": fail})
    engine.submit(tiny.make_request("one", [1]))
    with pytest.raises(EngineFailed):
        for _ in range(10):
            engine.step()


def test_programs_donate_the_cache_and_copy_neither_it_nor_the_weights(engine):
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(engine.device.cache))
    pool = engine.device.cache.k[0].shape
    big = {"[" + ",".join(map(str, pool)) + "]"}
    big |= {
        "[" + ",".join(map(str, leaf.shape)) + "]"
        for leaf in jax.tree.leaves(tiny.params())
        if leaf.size >= 64 * 64
    }
    for program in engine.programs.values():
        assert program.alias_bytes >= cache_bytes
        copies = re.findall(r"= \w+(\[[\d,]+\])\S* (?:copy|convert|transpose)\(", program.text())
        assert not big & set(copies), f"{program.shape.name} copies {big & set(copies)}"


def test_free_pages_full_of_nan_change_nothing(engine, answers):
    engine.flush_prefix_cache()
    nan = jax.tree.map(
        lambda leaf: leaf if leaf.ndim == 1 else np.full(leaf.shape, np.nan, leaf.dtype),
        engine.device.cache,
    )
    engine.device.cache = jax.tree.map(jax.numpy.asarray, nan)
    again = tiny.run(engine, REQUESTS)
    for name, answer in answers.items():
        assert again[name].tokens == answer.tokens
        assert again[name].logprobs == answer.logprobs


def test_a_row_without_finite_logits_ends_alone(answers):
    params = tiny.params()
    poisoned = params._replace(embedding=params.embedding.at[255].set(np.nan))
    parts = (poisoned, tiny.MODEL, tiny.TokenText(), tiny.engine_config())
    engine = tiny.Engine(*parts, store=tiny.store())
    good = [request for request in REQUESTS if 255 not in request.prompt][:6]
    bad = tiny.make_request("bad", [1, 255, 2])
    mixed = tiny.run(engine, [*good[:3], bad, *good[3:]])
    assert mixed["bad"].last.finish_reason is FinishReason.ERROR
    assert "not finite" in mixed["bad"].last.error
    for request in good:
        expected = answers[request.request_id].tokens
        if 255 not in expected:
            assert mixed[request.request_id].tokens == expected
    assert engine.stats().num_free_pages == engine.stats().num_pages


def test_a_first_token_is_told_before_the_decodes_behind_it():
    engine, early = tiny.make_engine(overlap=False), []
    engine.submit(tiny.make_request("old", range(5)))
    engine.step(tell=early.append)
    assert [one.request_id for (one,) in early] == ["old"], "the first token, and then its decode"
    engine.submit(tiny.make_request("new", range(20)))
    engine.submit(tiny.make_request("brief", range(9), max_tokens=1))
    early.clear()
    rest = {one.request_id: one for one in engine.step(tell=early.append)}
    told = {one.request_id: one for part in early for one in part}
    assert len(early) == 2 and set(told) == {"new", "brief"} and set(rest) == {"old", "new"}
    assert told["brief"].finish_reason is FinishReason.LENGTH
    assert len(told["new"].token_ids) == len(rest["new"].token_ids) == 1
    whole = tiny.run(engine, [])
    alone = tiny.run(tiny.make_engine(), [tiny.make_request("new", range(20))])["new"]
    tokens = (*told["new"].token_ids, *rest["new"].token_ids, *whole["new"].tokens)
    assert tokens == alone.tokens
