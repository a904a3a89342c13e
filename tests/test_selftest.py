"""The self-test of a start: planted faults are found, and the engine goes on without them."""

import functools
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxinfer import compile as programs_of
from jaxinfer import selftest
from jaxinfer.compile import ALLOCATE, READ_PAGES
from jaxinfer.engine import Engine
from jaxinfer.engine_config import CacheConfig
from jaxinfer.inputs import packed_width, unpack
from jaxinfer.store import Shape, StoreAhead, open_store
from tests import tiny
from tests.closed_world import kept, make_engine

# XLA:CPU rounds exp otherwise in arrays below 4096 elements, so the vocabulary is not that small.
MODEL = replace(tiny.MODEL, vocab_size=8192)
CONFIG = tiny.engine_config(
    prefill_chunks=(8, 16), prefill_rows=(1, 2), decode_rows=(16, 32), num_slots=32
)
SMALL, LARGE = Shape("decode", 16, 1), Shape("decode", 32, 1)
SHORT, LONG = Shape("prefill", 1, 8), Shape("prefill", 1, 16)
TWO_SHORT = Shape("prefill", 2, 8)
REQUESTS = tiny.random_requests(12, seed=5, max_prompt=40, max_tokens=8)


@functools.cache
def built():
    params = tiny.params(model=MODEL)
    programs = programs_of.build(params, MODEL, CONFIG)
    programs[ALLOCATE] = programs_of.build_allocate(params, MODEL, CONFIG)
    programs[READ_PAGES] = programs_of.build_read_pages(params, MODEL, CONFIG)
    return programs


def with_fault(fault, *shapes):
    """All programs, of which some have their results changed: fault(cache, output, packed)."""
    programs = dict(built())
    for shape in shapes:
        program = programs[shape]

        def run(params, cache, packed, program=program):
            return fault(*program.run(params, cache, packed), packed)

        programs[shape] = replace(program, run=run)
    return programs


def run(programs, config=CONFIG):
    return selftest.run(tiny.params(model=MODEL), MODEL, config, programs, rebuild=never)


def never(shape):
    raise AssertionError(f"{shape} was rebuilt")


def flip_logprobs(cache, output, packed):
    """The last bit of every logprob."""
    bits = np.array(output.logprobs).view(np.uint32) ^ 1
    return cache, output._replace(logprobs=bits.view(np.float32))


def flip_one_place(cache, output, packed):
    """The same, only for the third row."""
    bits = np.array(output.logprobs).view(np.uint32)
    bits[2] ^= 1
    return cache, output._replace(logprobs=bits.view(np.float32))


def flip_when_alone(cache, output, packed):
    """The same, only where all other rows are inert."""
    is_alone = np.sum(unpack(packed, tokens=1).lengths) == 1
    return flip_logprobs(cache, output, packed) if is_alone else (cache, output)


def flip_values(cache, output, packed):
    """The last bit of one value that each row stores for its first token."""
    tokens = packed.shape[1] - packed_width(0, CONFIG.pages_per_seq)
    batch, pages = unpack(packed, tokens=tokens), np.array(cache.v[-1])
    for row in np.flatnonzero(batch.lengths):
        page, offset = divmod(batch.starts[row], CONFIG.cache.page_size)
        pages.view(np.uint32)[1, batch.page_table[row, page], offset, 3] ^= 1
    return cache._replace(v=(*cache.v[:-1], jax.device_put(pages))), output


def test_programs_that_agree_are_all_kept():
    found = run(built())
    assert found.report.is_exact and found.config is CONFIG
    prefills = ("prefill-2x8", "prefill-1x16", "prefill-1x8")
    assert found.report.groups == (("decode-32x1", "decode-16x1", *prefills),)
    assert found.report.num_tokens > CONFIG.attention_block
    assert list(found.programs) == list(built())


@pytest.mark.parametrize("fault", [flip_logprobs, flip_values], ids=lambda one: one.__name__)
@pytest.mark.parametrize(
    ("shape", "kept"),
    [
        (SMALL, (TWO_SHORT, SHORT, LONG, LARGE)),
        (SHORT, (LONG, SMALL, LARGE)),  # who has no program for one has none for two
        (LONG, (SHORT, SMALL, LARGE)),  # two rows would be more than the longest chunk
        (TWO_SHORT, (SHORT, LONG, SMALL, LARGE)),
    ],
    ids=lambda one: one.name if isinstance(one, Shape) else "",
)
def test_a_program_that_differs_by_one_bit_is_not_used(caplog, fault, shape, kept):
    found = run(with_fault(fault, shape))
    steps = {one for one in found.programs if one.rows}
    assert steps == set(kept) == set(programs_of.shapes(found.config))
    assert found.report.dropped == (shape.name,)
    assert found.report.is_exact, "what is left agrees"
    assert f"{shape.name} gives other bits" in caplog.text


def test_where_only_decode_differs_from_prefill_it_says_what_is_not_promised(caplog):
    found = run(with_fault(flip_logprobs, SMALL, LARGE))
    assert found.config is CONFIG and not found.report.dropped
    prefills = ("prefill-2x8", "prefill-1x16", "prefill-1x8")
    assert found.report.groups == (("decode-32x1", "decode-16x1"), prefills)
    assert not found.report.is_exact
    assert "prefix cache" in caplog.text and "interrupted" in caplog.text


@pytest.mark.parametrize("fault", [flip_one_place, flip_when_alone], ids=lambda one: one.__name__)
def test_a_program_whose_rows_depend_on_place_or_neighbours_is_found(caplog, fault):
    found = run(with_fault(fault, LARGE))
    assert found.report.unsteady == ("decode-32x1",) and not found.report.is_exact
    assert "may depend on what runs beside it" in caplog.text
    steady = run(with_fault(fault, SMALL))
    assert steady.report.dropped == ("decode-16x1",) and steady.report.is_exact


def test_two_decodes_that_agree_with_every_prefill_and_not_with_each_other():
    def flip_at_the_start(cache, output, packed):
        is_first = np.asarray(unpack(packed, tokens=1).starts) == 0
        bits = np.array(output.logprobs).view(np.uint32) ^ is_first.astype(np.uint32)
        return cache, output._replace(logprobs=bits.view(np.float32))

    found = run(with_fault(flip_at_the_start, SMALL))
    assert found.report.dropped == ("decode-16x1",)


def test_an_engine_goes_on_with_what_agrees(monkeypatch):
    plain = Engine(tiny.params(model=MODEL), MODEL, tiny.TokenText(), CONFIG)
    steps = {one: program for one, program in with_fault(flip_logprobs, SMALL).items() if one.rows}
    monkeypatch.setattr(programs_of, "build", lambda *_, **__: steps)
    engine = Engine(tiny.params(model=MODEL), MODEL, tiny.TokenText(), CONFIG)
    assert engine.self_test.dropped == ("decode-16x1",)
    assert engine.config.row_counts == (32,) and SMALL not in engine.programs
    wanted, found = tiny.run(plain, REQUESTS), tiny.run(engine, REQUESTS)
    for name, answer in wanted.items():
        assert (found[name].tokens, found[name].logprobs) == (answer.tokens, answer.logprobs)


def test_fast_engines_test_nothing_and_take_any_row_count():
    fast = tiny.make_engine(bits="fast", decode_rows=(2, 8), prefill_chunks=(4, 16))
    assert fast.self_test.num_tokens == 0 and not fast.self_test.is_exact
    assert not fast.self_test.broken_promises
    answers = tiny.run(fast, REQUESTS)
    assert all(answer.tokens for answer in answers.values())


@pytest.mark.parametrize(
    "changes",
    [
        {"max_seq_len": 16, "num_slots": 1},
        {"max_seq_len": 8, "num_slots": 1, "cache": CacheConfig(page_size=1, num_pages=8)},
        {"max_seq_len": 32, "num_slots": 8, "cache": CacheConfig(page_size=32, num_pages=1)},
        {"max_seq_len": 2, "num_slots": 2, "cache": CacheConfig(page_size=16)},
    ],
)
def test_the_smallest_pools_can_be_tested(changes):
    engine = tiny.make_engine(prefill_chunks=(8,), attention_block=32, **changes)
    assert 0 < engine.self_test.num_tokens <= engine.config.max_seq_len
    assert len(engine.self_test.groups) >= 1


def break_program(program):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: a kernel is missing")

    return replace(program, run=fail)


@pytest.mark.parametrize("phase", ["decode", "prefill", "allocate", "pages"])
def test_a_stored_program_that_does_not_run_is_built_again(monkeypatch, caplog, phase):
    store = open_store(kept().folder)
    load = programs_of._load_from

    def load_broken(store):
        def one(recipe):
            program = load(store)(recipe)
            return break_program(program) if recipe.shape.phase == phase else program

        return one

    monkeypatch.setattr(programs_of, "_load_from", load_broken)
    engine = make_engine(store)
    assert "fails when it runs, so it is compiled again" in caplog.text
    answers = tiny.run(engine, REQUESTS[:3])
    assert all(answer.tokens for answer in answers.values())
    assert engine.stats().num_compiles_after_start == 0


def test_a_program_that_was_just_compiled_and_fails_ends_the_start():
    programs = {**built(), SMALL: break_program(built()[SMALL])}
    with pytest.raises(jax.errors.JaxRuntimeError, match="kernel is missing"):
        run(programs)


def test_programs_are_loaded_while_weights_are_read():
    kept()
    ahead = programs_of.load_ahead(tiny.MODEL, kept().engine.config, open_store(kept().folder))
    assert isinstance(ahead, StoreAhead)
    before = programs_of.num_compiles()
    engine = make_engine(ahead)
    assert programs_of.num_compiles() == before
    found = [future.result() for future in ahead.under_way.values()]
    loaded = {id(one.run) for one in found if one is not None}
    assert {id(program.run) for program in engine.programs.values()} <= loaded


def test_what_a_start_has_found_of_stored_programs_holds_for_the_next():
    store = open_store(kept().folder)
    first, second = make_engine(store), make_engine(store)
    assert second.self_test.is_recalled and second.self_test.is_exact
    assert second.self_test.groups == first.self_test.groups
    wanted, found = tiny.run(first, REQUESTS[:3]), tiny.run(second, REQUESTS[:3])
    assert all(found[name].logprobs == answer.logprobs for name, answer in wanted.items())


def test_a_damaged_verdict_is_found_anew(tmp_path, caplog):
    shutil.copytree(kept().folder, tmp_path / "programs")
    store = open_store(tmp_path / "programs")
    assert make_engine(store).self_test.is_recalled
    for path in store.folder.glob("*.verdict"):
        path.write_bytes(path.read_bytes().replace(b"decode", b"edocde"))
    again = make_engine(store)
    assert again.self_test.is_exact and not again.self_test.is_recalled
    assert "is damaged" in caplog.text


def test_programs_that_were_just_compiled_are_compared(tmp_path):
    engine = make_engine(open_store(tmp_path / "programs"))
    assert engine.self_test.is_exact and not engine.self_test.is_recalled
