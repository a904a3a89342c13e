"""Every program of an engine, lowered on this machine for the hardware that the kernels are for."""

import math
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxinfer import cache as paged
from jaxinfer import compile as programs_of
from jaxinfer.config import ModelConfig
from jaxinfer.engine_config import CacheConfig, EngineConfig
from jaxinfer.kernels.paged_attention.rounded import Rounded
from jaxinfer.spec import abstract
from tests import tiny
from tests.kernels.attention import no_gpu_here

MODEL = replace(tiny.MODEL, head_dim=64)
CALLS = {
    "pallas_gpu": ("cuda", "mosaic_gpu_v2"),
    "pallas_triton": ("cuda", "__gpu$xla.gpu.triton"),
    "pallas_tpu": ("tpu", "tpu_custom_call"),
}
FEW = {"decode_rows": (8,), "prefill_chunks": (64,)}
MANY = {"prefill_chunks": (32, 128), "decode_rows": (1, 8), "score_chunk": 32}
INT8 = {
    name: {"cache": CacheConfig(page_size=size, num_pages=100, dtype="int8")}
    for name, size in (("pallas_gpu", 32), ("pallas_triton", 16), ("pallas_tpu", 128))
}
PAGES = ("auto", "int8")


def engine(attention: str, **changes: Any) -> EngineConfig:
    cache = CacheConfig(page_size=16, num_pages=100)
    plain = {"max_seq_len": 1024, "attention": attention, "cache": cache, "num_slots": 8}
    there = {"products": "xla"}  # `auto` asks what this machine can do
    return EngineConfig(**(plain | there | changes))


def lowered(model: ModelConfig, config: EngineConfig, platform: str) -> dict[str, str]:
    """The text of each of the engine's programs, by name."""
    with no_gpu_here():
        return {
            recipe.shape.name: jax.jit(recipe.function, donate_argnums=recipe.donated)
            .trace(*recipe.arguments)
            .lower(lowering_platforms=(platform,))
            .as_text()
            for recipe in programs_of._every_recipe(model, config)
        }


def pages_of(attention: str, pages: str) -> dict[str, Any]:
    """Settings of an engine whose kernel reads such pages."""
    return INT8[attention] if pages == "int8" else {}


def pool_types(config: EngineConfig) -> list[tuple[str, str]]:
    """How the parts of a pool of pages are written in a program: as they are, and as rows.

    Parts of int8 pages are written to as rows.
    """
    pool = abstract(paged.spec(MODEL, config).k[0], config.compute_dtype)
    if not isinstance(pool, Rounded):
        return [(written(pool.shape, "bf16"), "")]
    width, (codes, scales) = pool.codes.shape[-1], (leaf.shape for leaf in pool)
    rows = math.prod(scales)
    return [
        (written(codes, "i8"), written((rows, width), "i8")),
        (written(scales, "f32"), written((rows,), "f32")),
    ]


def written(shape: tuple[int, ...], dtype: str) -> str:
    return f"tensor<{'x'.join(map(str, shape))}x{dtype}>"


def makers(text: str, kind: str) -> Counter[str]:
    """The operations whose result is of a type, counted."""
    kind = re.escape(kind)
    results = re.findall(rf"= \"?([\w.]+)\"?[^=\n]*(?:->|:) {kind}(?: loc.*)?$", text, re.M)
    ended = re.findall(rf"^ *}}\) : .* -> {kind}$", text, re.M)
    return Counter([*results, *["region"] * len(ended)])


@pytest.mark.parametrize("pages", PAGES)
@pytest.mark.parametrize("attention", CALLS)
def test_a_step_calls_the_kernel_and_copies_no_pool(attention, pages):
    config = engine(attention, **FEW, **pages_of(attention, pages))
    check_steps(replace(MODEL, num_layers=1), config)


@pytest.mark.full
@pytest.mark.parametrize("pages", PAGES)
@pytest.mark.parametrize("attention", CALLS)
def test_every_step_calls_the_kernel_once_a_layer_and_copies_no_pool(attention, pages):
    check_steps(MODEL, engine(attention, **MANY, **pages_of(attention, pages)))


def check_steps(model: ModelConfig, config: EngineConfig) -> None:
    platform, call = CALLS[config.attention]
    for name, text in lowered(model, config, platform).items():
        if not name.startswith(("prefill", "decode")):
            continue
        assert text.count(f"@{call}(") == model.num_layers, name
        main = next(line for line in text.splitlines() if "@main(" in line)
        donated = [part for part in main.split("%arg") if "tf.aliasing_output" in part]
        # A pool comes out of the write of new tokens, once a layer for keys and once for values.
        once = 2 * model.num_layers
        for pool, rows in pool_types(config):
            assert sum(pool in part for part in donated) == once
            reshaped = {"stablehlo.reshape": once}  # which moves nothing
            assert makers(text, pool) == (reshaped if rows else {"region": once}), name
            assert not rows or makers(text, rows) == {"region": once} | reshaped, name
        assert text.count('"stablehlo.scatter"') >= once * len(pool_types(config))


def test_a_copied_pool_would_be_seen():
    def copies(pool: jax.Array) -> jax.Array:
        return pool + 1

    kind = jax.ShapeDtypeStruct((2, 101, 16, 64), jnp.bfloat16)
    text = jax.jit(copies).trace(kind).lower(lowering_platforms=("cuda",)).as_text()
    [(pool, _)] = pool_types(engine("pallas_gpu"))
    assert sum(makers(text, pool).values()) >= 1


@pytest.mark.full
@pytest.mark.parametrize("pages", PAGES)
@pytest.mark.parametrize("attention", CALLS)
def test_every_program_of_an_engine_lowers(attention, pages):
    platform, call = CALLS[attention]
    settings = MANY | pages_of(attention, pages)
    for config in (engine(attention, **settings), engine("reference", **settings)):
        texts = lowered(MODEL, config, platform)
        steps = [name for name in texts if name.startswith(("prefill", "decode", "score"))]
        assert len(steps) == 5
        assert all(
            (f"@{call}(" in texts[name]) == (config.attention == attention) for name in steps
        )
