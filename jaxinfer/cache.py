"""The paged cache: per layer a pool of key pages and a pool of value pages."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt

from jaxinfer.config import EngineConfig, ModelConfig
from jaxinfer.dims import Leaf
from jaxinfer.kernels.paged_attention import rounded
from jaxinfer.spec import ArraySpec, map_specs

ON_CPU = ("reference", "native")  # backends of attention that run there
_LANES = 128  # of a TPU's vector registers
# XLA:CPU of jax 0.10 turns a bfloat16 scatter into a float32 copy of the whole pool; bits of
# the same width go through untouched (fixed in 0.11).
_STORES_BITS = tuple(int(part) for part in jax.__version__.split(".")[:2]) < (0, 11)


class Cache(NamedTuple):
    """All that the device remembers between steps; a step consumes one and returns the next."""

    k: tuple[Leaf, ...]  # L x [K, P, C, H]; in int8 [K, P, C, H + 4], see kernels' `rounded`
    v: tuple[Leaf, ...]
    last_tokens: Leaf  # i32 [slots + 1]: each slot's last sampled token; the last entry is trash


def spec(model: ModelConfig, engine: EngineConfig) -> Cache:
    """Describes every array of the cache; the pool's last page is the trash page."""
    width = head_width(model.head_dim, engine)
    shape = (model.num_kv_heads, engine.num_pages + 1, engine.cache.page_size, width)
    pages = ArraySpec(shape, ("kv_heads", None, None, None), dtype=page_dtype(engine), init="zeros")
    return Cache(
        k=(pages,) * model.num_layers,
        v=(pages,) * model.num_layers,
        last_tokens=ArraySpec((engine.num_slots + 1,), (None,), dtype=jnp.int32, init="zeros"),
    )


def make(model: ModelConfig, engine: EngineConfig) -> Cache:
    """An empty cache, allocated once."""
    return map_specs(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), spec(model, engine))


def bytes_per_token(model: ModelConfig, engine: EngineConfig) -> int:
    """Bytes that one token takes in the pool, over all layers."""
    width = 2 * model.num_kv_heads * head_width(model.head_dim, engine)
    return model.num_layers * width * page_dtype(engine).itemsize


def kept_dtype(engine: EngineConfig) -> str:
    """What the values in pages are rounded to."""
    return engine.compute_dtype if engine.cache.dtype == "auto" else engine.cache.dtype


def page_dtype(engine: EngineConfig) -> jnp.dtype:
    """The dtype in which pages are stored; kernels find the values as they are.

    They run where a bfloat16 scatter is in place.
    """
    dtype = jnp.dtype(kept_dtype(engine))
    stores_bits = _STORES_BITS and engine.attention in ON_CPU and dtype == jnp.bfloat16
    return jnp.dtype(jnp.uint16) if stores_bits else dtype


def head_width(head_dim: int, engine: EngineConfig) -> int:
    """Elements of a token and head in a page: in int8 the scale is behind the values.

    Whole lanes for the TPU's kernel, zeros at the end: XLA:TPU lays a narrower pool out another
    way round, and copies all of it for a kernel.
    """
    if engine.cache.dtype == "int8":
        return head_dim + rounded.SCALE_BYTES
    return -(-head_dim // _LANES) * _LANES if engine.attention == "pallas_tpu" else head_dim


def to_pages(x: Float[Array, "... H"], pages: Leaf) -> Array:
    """Rounds the values of heads to what the pages hold."""
    if pages.dtype == jnp.int8:
        return rounded.pack(x)
    if pages.dtype == jnp.uint16:
        return lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    return x.astype(pages.dtype)


def reader(engine: EngineConfig) -> Callable[..., Array]:
    """The function that makes values of what is read from pages: `load` of paged attention."""
    if engine.cache.dtype == "int8":
        return functools.partial(rounded.unpack, dtype=engine.compute_dtype)
    return _values


def _values(stored: Array) -> Array:
    if stored.dtype == jnp.uint16:
        return lax.bitcast_convert_type(stored, jnp.bfloat16)
    return stored


def read_bits(cache: Cache, pages: Int[Array, " W"]) -> UInt[Array, "W L2 K C H"]:
    """What some pages hold, as whole numbers: keys of every layer, then values."""
    found = jnp.stack(
        [pool.at[:, pages].get(mode="promise_in_bounds") for pool in (*cache.k, *cache.v)]
    )
    kind = jnp.dtype(f"uint{8 * found.dtype.itemsize}")
    return jnp.moveaxis(lax.bitcast_convert_type(found, kind), 2, 0)


class Places(NamedTuple):
    """Where the tokens of a step go."""

    pages: Int[Array, " rows"]
    offsets: Int[Array, " rows"]


def places(
    page_table: Int[Array, "B M"],
    positions: Int[Array, "B T"],
    is_real: Array,
    *,
    page_size: int,
    trash_page: int,
) -> Places:
    """The page and offset of each token, row by row; tokens that are not real go to the trash."""
    owned = jnp.take_along_axis(page_table, positions // page_size, axis=1, mode="clip")
    pages = jnp.where(is_real, owned, trash_page)
    return Places(pages.reshape(-1), (positions % page_size).reshape(-1))


def write(pages: Leaf, new: Float[Array, "B T K H"], where: Places) -> Array:
    """The pool with the tokens of a step in their places; in place when the pool is donated."""
    kept = to_pages(new, pages)
    spare = pages.shape[-1] - kept.shape[-1]
    kept = jnp.pad(kept, ((0, 0), (0, 0), (0, 0), (0, spare))) if spare else kept
    rows = kept.reshape(-1, *kept.shape[2:])
    return pages.at[:, where.pages, where.offsets].set(jnp.swapaxes(rows, 0, 1))
