"""The arithmetic that the kernels share: tops, fades, and splits that are merged in order."""

import jax.numpy as jnp
import numpy as np

from jaxinfer.kernels.paged_attention import online
from jaxinfer.kernels.paged_attention.tiles import (
    GPU_SMEM,
    TPU_VMEM,
    gpu_bytes,
    gpu_tiles,
    tpu_bytes,
    tpu_tiles,
)


def test_a_top_is_a_whole_number_above_all_logits_and_never_falls():
    logits = jnp.array([-np.inf, -1e30, -3.5, -0.0, 0.25, 2.0, 17.75])
    top = online.new_top(jnp.full(7, online.NOTHING), logits)
    assert top.tolist() == [online.NOTHING, online.NOTHING, -2, 1, 1, 3, 18]
    np.testing.assert_array_equal(online.new_top(top + 5, logits), jnp.maximum(top + 5, top))


def test_a_fade_is_a_power_of_two_exactly_and_nothing_far_below():
    old = jnp.array([0, -1, -20, -126, -127, -1000, online.NOTHING])
    fade = np.asarray(online.fade(old, jnp.zeros_like(old)))
    assert fade.tolist() == [1.0, 0.5, 2.0**-20, 2.0**-126, 0.0, 0.0, 0.0]


def test_a_split_without_keys_adds_no_bit_whatever_it_holds():
    rng = np.random.default_rng(3)
    top = jnp.asarray(rng.integers(-5, 5, (4, 3)), jnp.int32)
    total = jnp.asarray(rng.uniform(1, 2, (4, 3)), jnp.float32)
    out = jnp.asarray(rng.normal(size=(4, 3, 16)), jnp.float32)
    merged = online.merge(top, total, out)
    weights = np.exp2(np.asarray(top, np.float64))[..., None]
    expected = (out * weights).sum(1) / (np.asarray(total)[..., None] * weights).sum(1)
    np.testing.assert_allclose(merged, expected, rtol=1e-5)
    more = online.merge(
        jnp.pad(top, ((0, 0), (0, 5)), constant_values=online.NOTHING),
        jnp.pad(total, ((0, 0), (0, 5))),
        jnp.pad(out, ((0, 0), (0, 5), (0, 0)), constant_values=np.nan),
    )
    np.testing.assert_array_equal(merged, more)


def test_a_row_without_keys_is_zeros():
    top, total = jnp.full((1, 2), online.NOTHING), jnp.zeros((1, 2))
    assert not online.merge(top, total, jnp.full((1, 2, 8), np.nan)).any()


def test_a_soft_cap_bounds_logits_and_none_leaves_them():
    logits = jnp.array([-1e4, -1.0, 0.0, 1.0, 1e4])
    assert online.capped(logits, 0.0) is logits
    nats = np.asarray(logits, np.float64) / online.LOG2_E
    expected = 30 * np.tanh(nats / 30) * online.LOG2_E
    np.testing.assert_allclose(online.capped(logits, 30.0), expected, rtol=1e-5)


def test_tiles_fit_where_they_have_to():
    for head_dim in (64, 128, 256):
        for longest in (100, 2048, 131072):
            tiles = gpu_tiles(longest, head_dim, block=128)
            assert tiles.split % 128 == 0 and tiles.keys == 64 and tiles.stages >= 2
            assert -(-longest // tiles.split) <= 16 and gpu_bytes(tiles, head_dim) <= GPU_SMEM
        for rows, heads, block in ((1, 1, 128), (4, 8, 128), (2048, 8, 512), (512, 64, 1024)):
            tpu = tpu_tiles(rows, heads, head_dim, block=block, dtype=jnp.bfloat16)
            assert heads % tpu.heads == 0 and tpu.rows % 16 == 0
            assert tpu_bytes(tpu, head_dim, block=block, dtype=jnp.bfloat16) <= TPU_VMEM
