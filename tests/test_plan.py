"""The memory plan: what an engine takes, and what to lower where the device is too small."""

import re

import jax
import pytest

from jaxinfer import compile as programs_of
from jaxinfer import models, spec
from jaxinfer.config import override
from jaxinfer.engine_config import CacheConfig, EngineConfig
from jaxinfer.errors import ConfigError
from jaxinfer.plan import check_memory, device_memory, estimate_temp, plan_memory
from jaxinfer.weights.demo import DEMOS
from tests import tiny

SMOLLM2 = DEMOS["smollm2-135m"].config
MEASURED_TEMPS = {  # of SmolLM2's steps in bfloat16, jax 0.10.2 on a CPU
    programs_of.Shape("prefill", 1, 32): 2779736,
    programs_of.Shape("prefill", 1, 128): 11092184,
    programs_of.Shape("prefill", 1, 512): 44341976,
    programs_of.Shape("decode", 8, 1): 3546392,
}
LONG = EngineConfig(max_seq_len=32768, num_slots=64, cache=CacheConfig(num_pages=4096))
GIB = 2**30


@pytest.fixture(scope="module")
def engine():
    return tiny.make_engine(prefill_chunks=(8,))


def test_the_parts_are_those_of_the_built_engine(engine):
    plan = engine.device.memory
    assert plan.weight_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(engine.device.params))
    pages = [*engine.device.cache.k, *engine.device.cache.v]
    assert plan.cache_bytes == sum(leaf.nbytes for leaf in pages)
    assert plan.temp_bytes == max(program.temp_bytes for program in engine.programs.values())
    assert not plan.is_temp_estimate
    assert plan.total_bytes == plan.weight_bytes + plan.cache_bytes + plan.temp_bytes


def test_without_programs_only_the_temporaries_are_an_estimate(engine):
    plan = plan_memory(tiny.MODEL, engine.config)
    assert plan.is_temp_estimate
    assert plan.weight_bytes == engine.device.memory.weight_bytes
    assert plan.cache_bytes == engine.device.memory.cache_bytes
    assert 0.5 < plan.temp_bytes / engine.device.memory.temp_bytes < 2


@pytest.mark.parametrize("shape", MEASURED_TEMPS, ids=lambda shape: shape.name)
def test_the_estimate_is_near_what_was_measured(shape):
    ratio = estimate_temp(shape, SMOLLM2, EngineConfig()) / MEASURED_TEMPS[shape]
    assert 0.7 < ratio < 1.7


def test_how_many_sequences_of_32k_fit():
    plan = plan_memory(SMOLLM2, LONG, device_bytes=16 * GIB)
    assert plan.page_bytes == 16 * 30 * 2 * 3 * 64 * 2
    assert plan.num_sequences(32768) == 2  # 4096 pages of 16 tokens
    assert plan.num_sequences(1024) == 64  # all slots
    assert plan.num_sequences(32769) == 0  # longer than max_seq_len
    room = 16 * GIB - plan.weight_bytes - plan.temp_bytes - plan.page_bytes
    assert plan.max_pages == room // plan.page_bytes
    assert plan.max_sequences(32768) == plan.max_pages // 2048 > 16


def test_the_answer_is_tight():
    plan = plan_memory(SMOLLM2, LONG, device_bytes=4 * GIB)

    def free(num_pages):
        config = override(LONG, f"cache.num_pages={num_pages}")
        return plan_memory(SMOLLM2, config, device_bytes=4 * GIB).free_bytes

    assert free(plan.max_pages) >= 0 > free(plan.max_pages + 1)


def test_weights_that_are_quantised_or_abstract_count_as_they_are():
    weights = spec.abstract(models.module_of(SMOLLM2).spec(SMOLLM2), "int8")
    plan = plan_memory(SMOLLM2, EngineConfig(), params=weights, device_bytes=GIB)
    full = plan_memory(SMOLLM2, EngineConfig(), device_bytes=GIB)
    assert plan.weight_bytes * 2 == full.weight_bytes


def test_a_device_that_says_nothing_refuses_nothing(monkeypatch):
    monkeypatch.setattr("jaxinfer.plan.device_memory", lambda: None)
    plan = plan_memory(SMOLLM2, LONG)
    check_memory(plan)
    assert (plan.free_bytes, plan.max_pages, plan.max_sequences(10)) == (None, None, None)


def test_a_cpu_has_the_memory_of_the_machine_or_its_container():
    assert 2**28 < device_memory() < 2**50


def refusal(config, device_bytes):
    plan = plan_memory(SMOLLM2, config, device_bytes=device_bytes)
    with pytest.raises(ConfigError) as caught:
        check_memory(plan)
    return str(caught.value)


def test_a_pool_too_large_is_refused_with_a_number_that_fits():
    config = EngineConfig(num_slots=64)
    message = refusal(config, GIB)
    assert "GiB of weights" in message and "of pages" in message
    pages = int(re.search(r"num_pages to at most (\d+) \(it is 8192\)", message)[1])
    check_memory(
        plan_memory(SMOLLM2, override(config, f"cache.num_pages={pages}"), device_bytes=GIB)
    )
    refusal(override(config, f"cache.num_pages={pages + 1}"), GIB)


def test_a_sequence_too_long_is_refused_with_a_length_that_fits():
    config = EngineConfig(max_seq_len=65536, num_slots=1)
    message = refusal(config, GIB)
    length = int(re.search(r"max_seq_len to at most (\d+)", message)[1])
    pages = int(re.search(r"num_pages to (\d+)", message)[1])
    smaller = override(config, f"max_seq_len={length}", f"cache.num_pages={pages}")
    check_memory(plan_memory(SMOLLM2, smaller, device_bytes=GIB))


def test_weights_too_large_are_refused_as_such():
    assert "smaller model" in refusal(EngineConfig(), 2**27)


def test_an_estimate_alone_refuses_nothing():
    plan = plan_memory(SMOLLM2, EngineConfig(), device_bytes=10 * GIB)
    edge = plan.total_bytes - plan.temp_bytes // 2
    check_memory(plan_memory(SMOLLM2, EngineConfig(), device_bytes=edge))


def test_an_engine_that_does_not_fit_is_not_built(monkeypatch):
    monkeypatch.setattr("jaxinfer.plan.device_memory", lambda: 2**20)
    tiny.params()  # drawing the weights compiles
    before = programs_of.num_compiles()
    with pytest.raises(ConfigError, match="the device has 1.0 MiB"):
        tiny.make_engine()
    assert programs_of.num_compiles() == before
