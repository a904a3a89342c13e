"""Products of few rows with int8 weights on a GPU: whole sums, those of XLA to the last bit."""

import re
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import cache as paged
from jaxinfer import compile as programs_of
from jaxinfer import models, step
from jaxinfer.config import EngineConfig, load
from jaxinfer.errors import ConfigError
from jaxinfer.inputs import inert_batch
from jaxinfer.kernels import products as kernels
from jaxinfer.kernels.products import pallas_gpu
from jaxinfer.nn.linear import project
from jaxinfer.quant import QTensor
from jaxinfer.spec import abstract
from tests import tiny
from tests.kernels import mosaic_gpu

H200 = kernels.Needs("gpu", 1, "int8", "9.0")
REFUSED = {
    "a cpu": (H200._replace(platform="cpu", capability=""), "Hopper GPUs, and this is a cpu"),
    "an older GPU": (H200._replace(capability="8.0"), "compute capability is 8.0"),
    "other weights": (H200._replace(weights="bfloat16"), "these are bfloat16: see --quant"),
}
MODEL = replace(tiny.MODEL, d_model=128, d_ff=256, head_dim=64, num_heads=4, quant="w8a8")


def digits(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-127, 128, shape).astype(np.int8)


def check_sums(rows: int, outputs: int, channels: int) -> None:
    x, table = digits(rows, channels), digits(outputs, channels, seed=1)
    with mosaic_gpu.interpreter():
        found = pallas_gpu.sums(jnp.asarray(x), jnp.asarray(table))
    np.testing.assert_array_equal(found, x.astype(np.int64) @ table.T.astype(np.int64))


def test_sums_are_exact():
    check_sums(3, 128, 384)


@pytest.mark.full
@pytest.mark.parametrize("rows", [1, 8, 9, 33, 64, 100, 128])
@pytest.mark.parametrize(("outputs", "channels"), [(64, 128), (64, 2176), (192, 1152)])
def test_sums_are_exact_for_every_number_of_rows(rows, outputs, channels):
    check_sums(rows, outputs, channels)


def test_many_stages_and_parts_leave_no_channel_out_and_fit_the_chip():
    for rows in (8, 16, 32, 64, 128):
        for outputs, channels in ((64, 128), (4096, 14336), (28672, 4096), (128256, 4096)):
            blocks = channels // 128
            kind, parts = pallas_gpu._kind(rows, outputs, blocks)
            assert (parts - 1) * kind.part < blocks <= parts * kind.part
            assert kind.stages >= 2
            assert kind.stages * (rows + 64) * 128 + rows * 64 * 4 < 200 * 1024
            assert parts == 1 or parts * outputs // 64 < 2 * 264


@pytest.mark.full
@pytest.mark.parametrize("scheme_digits", [1, 2])
def test_a_product_has_the_bits_of_xla(scheme_digits):
    weight = QTensor(
        codes=jnp.asarray(digits(192, 256)),
        scale=jnp.linspace(0.01, 0.02, 192),
        digits=scheme_digits,
        block=128,
    )
    for rows in (1, 5, 64, 70):  # 70 rows of two digits are XLA's
        x = jnp.asarray(np.random.default_rng(2).normal(size=(rows, 256)), jnp.float32)
        plain = np.asarray(project(x, weight))
        with mosaic_gpu.interpreter():
            own = np.asarray(project(x, replace(weight, product=kernels.PALLAS_GPU)))
        assert own.tobytes() == plain.tobytes()


@pytest.mark.parametrize("case", REFUSED)
def test_where_it_cannot_be_had_it_is_refused(case):
    needs, reason = REFUSED[case]
    with pytest.raises(ConfigError, match=f"engine.products is 'pallas_gpu'.*{reason}"):
        kernels.choose("pallas_gpu", needs)


def test_it_is_taken_where_it_was_asked_for_and_only_there():
    assert kernels.choose("pallas_gpu", H200) == ("pallas_gpu", "")
    assert kernels.choose("auto", H200).name == "xla"
    assert load("engine.products=pallas_gpu").engine.products == "pallas_gpu"


def test_an_engine_on_a_cpu_refuses_it():
    config = tiny.engine_config(products="pallas_gpu")
    with pytest.raises(ConfigError, match="this is a cpu"):
        programs_of._every_recipe(MODEL, config)


@pytest.mark.full
@pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
def test_every_product_of_a_decode_is_lowered_to_the_kernel(scheme):
    model = replace(MODEL, quant=scheme)
    config = tiny.engine_config(products="pallas_gpu", compute_dtype="bfloat16")
    batch = inert_batch(
        8,
        1,
        pages_per_seq=config.pages_per_seq,
        trash_slot=config.num_slots,
        trash_page=config.num_pages,
    )
    arguments: tuple[Any, ...] = (
        abstract(models.spec_of(model), "bfloat16"),
        abstract(paged.spec(model, config), "bfloat16"),
        jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), batch),
    )

    def lowered(config: EngineConfig) -> str:
        decode = jax.jit(partial(step.decode, model=model, engine=config), donate_argnums=1)
        return decode.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()

    text = lowered(config)
    # Queries, keys and values; output; gate and up; down: four a layer, and the head.
    assert text.count("@mosaic_gpu_v2(") == 4 * model.num_layers + 1
    assert not re.search(r"dot_general.*xi8>", text), "XLA has no product of int8 left"
    assert re.search(r"dot_general.*xi8>", lowered(replace(config, products="xla")))
