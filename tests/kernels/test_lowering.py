"""Every program of an engine, lowered on this machine for the hardware that the kernels are for."""

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxinfer import cache as paged
from jaxinfer import compile as programs_of
from jaxinfer.config import CacheConfig, EngineConfig, ModelConfig
from tests import tiny

MODEL = replace(tiny.MODEL, head_dim=64)
CALLS = {"pallas_gpu": ("cuda", "mosaic_gpu_v2"), "pallas_tpu": ("tpu", "tpu_custom_call")}
FEW = {"decode_rows": (8,), "prefill_chunks": (64,)}
MANY = {"prefill_chunks": (32, 128), "decode_rows": (1, 8), "score_chunk": 32}


def engine(attention: str, **changes: Any) -> EngineConfig:
    cache = CacheConfig(page_size=16, num_pages=100)
    plain = {"max_seq_len": 1024, "attention": attention, "cache": cache, "num_slots": 8}
    return EngineConfig(**(plain | changes))


def lowered(model: ModelConfig, config: EngineConfig, platform: str) -> dict[str, str]:
    """The text of each of the engine's programs, by name."""
    return {
        recipe.shape.name: jax.jit(recipe.function, donate_argnums=recipe.donated)
        .trace(*recipe.arguments)
        .lower(lowering_platforms=(platform,))
        .as_text()
        for recipe in programs_of._every_recipe(model, config)
    }


def pool_type(config: EngineConfig) -> str:
    """How a pool of pages is written in a program."""
    shape = paged.spec(MODEL, config).k[0].shape
    return f"tensor<{'x'.join(map(str, shape))}xbf16>"


def makers(text: str, kind: str) -> Counter[str]:
    """The operations whose result is of a type, counted."""
    kind = re.escape(kind)
    results = re.findall(rf"= \"?([\w.]+)\"?[^=\n]*(?:->|:) {kind}(?: loc.*)?$", text, re.M)
    ended = re.findall(rf"^ *}}\) : .* -> {kind}$", text, re.M)
    return Counter([*results, *["region"] * len(ended)])


@pytest.mark.parametrize("attention", CALLS)
def test_a_step_calls_the_kernel_and_copies_no_pool(attention):
    check_steps(replace(MODEL, num_layers=1), engine(attention, **FEW))


@pytest.mark.full
@pytest.mark.parametrize("attention", CALLS)
def test_every_step_calls_the_kernel_once_a_layer_and_copies_no_pool(attention):
    check_steps(MODEL, engine(attention, **MANY))


def check_steps(model: ModelConfig, config: EngineConfig) -> None:
    platform, call = CALLS[config.attention]
    for name, text in lowered(model, config, platform).items():
        if not name.startswith(("prefill", "decode")):
            continue
        assert text.count(f"@{call}(") == model.num_layers, name
        main = next(line for line in text.splitlines() if "@main(" in line)
        donated = [part for part in main.split("%arg") if "tf.aliasing_output" in part]
        assert sum(pool_type(config) in part for part in donated) == 2 * model.num_layers
        # A pool comes out of the write of new tokens, once a layer for keys and once for values.
        assert makers(text, pool_type(config)) == {"region": 2 * model.num_layers}, name
        assert text.count('"stablehlo.scatter"') >= 2 * model.num_layers


def test_a_copied_pool_would_be_seen():
    def copies(pool: jax.Array) -> jax.Array:
        return pool + 1

    kind = jax.ShapeDtypeStruct((2, 101, 16, 64), jnp.bfloat16)
    text = jax.jit(copies).trace(kind).lower(lowering_platforms=("cuda",)).as_text()
    assert sum(makers(text, pool_type(engine("pallas_gpu"))).values()) >= 1


@pytest.mark.full
@pytest.mark.parametrize("attention", CALLS)
def test_every_program_of_an_engine_lowers(attention):
    platform, call = CALLS[attention]
    for config in (engine(attention, **MANY), engine("reference", **MANY)):
        texts = lowered(MODEL, config, platform)
        steps = [name for name in texts if name.startswith(("prefill", "decode", "score"))]
        assert len(steps) == 5
        assert all(
            (f"@{call}(" in texts[name]) == (config.attention == attention) for name in steps
        )
