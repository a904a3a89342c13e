"""The closed world: every program is built or loaded before the first step, and none after it."""

import threading

import jax
import numpy as np
import pytest

from jaxinfer import compile as programs_of
from jaxinfer.compile import ALLOCATE, Shape
from jaxinfer.engine_config import CacheConfig
from jaxinfer.errors import CompileAfterStart
from jaxinfer.store import open_store
from tests import tiny
from tests.closed_world import REQUESTS, every_program, kept, make_engine, results


def test_a_program_for_each_chunk_size_each_row_count_and_the_cache():
    config = tiny.engine_config(prefill_chunks=(8, 64), prefill_rows=(1, 4), num_slots=40)
    assert [shape.name for shape in programs_of.shapes(config)] == [
        *("prefill-1x8", "prefill-4x8", "prefill-1x64"),
        *("decode-1x1", "decode-8x1", "decode-32x1", "decode-40x1"),
    ]
    names = [program.shape.name for program in every_program(kept().engine)]
    assert names == ["prefill-1x8", "decode-1x1", "decode-8x1", "allocate"]


def test_costs_add_up():
    engine = kept().engine
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(engine.device.cache))
    weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(engine.device.params))
    for program in engine.programs.values():
        assert program.alias_bytes >= cache_bytes
        assert weight_bytes + cache_bytes <= program.argument_bytes
        assert cache_bytes <= program.output_bytes < cache_bytes + 4096
        assert program.temp_bytes > 0
        assert min(program.trace_s, program.compile_s) > 0
        assert (program.load_s, program.seconds) == (0, program.trace_s + program.compile_s)
    assert cache_bytes <= engine.device.allocate.output_bytes < cache_bytes + 4096


def test_a_step_computes_the_rotation_once_for_all_layers_and_heads():
    for program in kept().engine.programs.values():
        text = program.text()
        assert (text.count(" cosine("), text.count(" sine(")) == (1, 1)


def test_a_second_start_neither_traces_nor_compiles_and_answers_with_the_same_bits():
    before = programs_of.num_compiles()
    traced = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: traced.append(event)
    )
    engine = make_engine(open_store(kept().folder))
    assert programs_of.num_compiles() == before
    assert not [event for event in traced if "trace" in event or "compile" in event]
    assert all(program.load_s > 0 for program in every_program(engine))
    assert [program.key for program in every_program(engine)] == [
        program.key for program in every_program(kept().engine)
    ]
    assert results(engine) == kept().answers
    for program in engine.programs.values():
        assert program.run.memory_analysis().alias_size_in_bytes == program.alias_bytes


def test_a_loaded_program_gives_its_cache_away():
    engine = make_engine(open_store(kept().folder))
    old = engine.device.cache.k[0]
    tiny.run(engine, REQUESTS[:1])
    assert old.is_deleted()
    engine._recover(jax.errors.JaxRuntimeError("INTERNAL: planted"))
    assert engine.stats().num_compiles_after_start == 0
    assert results(engine) == kept().answers


def test_the_cache_comes_from_a_program_too():
    engine = make_engine(open_store(kept().folder))
    assert engine.device.allocate.shape == ALLOCATE
    cache = engine.device.allocate.run()
    addresses = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache)]
    assert len(set(addresses)) == len(addresses)
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(cache))


def compile_something():
    jax.jit(lambda x: x * 3 + 1)(1.0)


def plant(engine, action):
    """Has an engine do something in its next decode of one sequence."""
    shape = Shape("decode", 1, 1)
    program = engine.programs[shape]
    left = [1]

    def run(params, cache, packed):
        if left:
            left.pop()
            action()
        return program.run(params, cache, packed)

    engine.programs[shape] = program.__class__(**{**vars(program), "run": run})


def test_a_compile_in_a_step_raises_once_and_is_counted(caplog):
    engine = make_engine(open_store(kept().folder))
    plant(engine, compile_something)
    engine.submit(tiny.make_request("one", [1, 2, 3]))
    with pytest.raises(CompileAfterStart, match=r"1 programs were compiled .*<lambda>"):
        for _ in range(5):
            engine.step()
    assert engine.stats().num_compiles_after_start == 1
    assert "compiled in a step" in caplog.text
    tiny.run(engine, [])
    assert engine.stats().num_compiles_after_start == 1


def test_a_lenient_engine_counts_a_compile_and_goes_on(caplog):
    engine = make_engine(open_store(kept().folder), strict_compiles=False)
    assert engine.programs[Shape("decode", 8, 1)].load_s > 0, "strictness changes no program"
    plant(engine, compile_something)
    assert results(engine) == kept().answers
    assert engine.stats().num_compiles_after_start == 1


def test_compiles_elsewhere_are_not_the_engines():
    engine = make_engine(open_store(kept().folder))

    def on_another_thread():
        thread = threading.Thread(target=compile_something)
        thread.start()
        thread.join()

    before = programs_of.num_compiles()
    plant(engine, on_another_thread)
    engine.submit(tiny.make_request("one", [1, 2, 3]))
    while engine.has_work:
        engine.step()
        compile_something()  # between steps, on the engine's own thread
    assert programs_of.num_compiles() > before + 2
    assert engine.stats().num_compiles_after_start == 0


def test_mixed_requests_compile_nothing():
    engine = tiny.make_engine()
    requests = tiny.random_requests(500, seed=11, max_prompt=100, max_tokens=12)
    tiny.run(engine, requests, arrivals_per_step=3)
    assert engine.stats().num_compiles_after_start == 0


@pytest.mark.full
def test_ten_thousand_mixed_requests_compile_nothing():
    engine = tiny.make_engine(num_slots=32, cache=CacheConfig(num_pages=200))
    for number in range(10):
        requests = tiny.random_requests(1000, seed=number, max_tokens=20)
        tiny.run(engine, requests, arrivals_per_step=5)
    assert engine.stats().num_preemptions > 0
    assert engine.stats().num_compiles_after_start == 0
