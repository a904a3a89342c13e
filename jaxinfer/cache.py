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
from jaxinfer.kernels import native
from jaxinfer.kernels.paged_attention import rounded
from jaxinfer.kernels.paged_attention.rounded import Rounded
from jaxinfer.spec import ArraySpec, map_specs

ON_CPU = ("reference", "native")  # backends of attention that run there
_LANES = 128  # of a TPU's vector registers
# XLA:CPU of jax 0.10 turns a bfloat16 scatter into a float32 copy of the whole pool; bits of
# the same width go through untouched (fixed in 0.11).
_STORES_BITS = tuple(int(part) for part in jax.__version__.split(".")[:2]) < (0, 11)


class Cache(NamedTuple):
    """All that the device remembers between steps; a step consumes one and returns the next."""

    k: tuple[Leaf, ...]  # L x [K, P, C, H]; int8 pages have scales, see kernels' `rounded`
    v: tuple[Leaf, ...]
    last_tokens: Leaf  # i32 [slots + 1]: each slot's last sampled token; the last entry is trash


def spec(model: ModelConfig, engine: EngineConfig) -> Cache:
    """Describes every array of the cache; the pool's last page is the trash page."""
    size, count = engine.cache.page_size, (model.num_kv_heads, engine.num_pages + 1)
    width, dtype = head_width(model.head_dim, engine), page_dtype(engine)
    axes = ("kv_heads", None, None, None)
    pages: Leaf = ArraySpec((*count, size, width), axes, dtype=dtype, init="zeros")
    if has_scales_apart(engine):
        scales = ArraySpec((*count, 1, size), axes, dtype=jnp.float32, init="zeros")
        pages = Rounded(pages, scales)
    return Cache(
        k=(pages,) * model.num_layers,
        v=(pages,) * model.num_layers,
        last_tokens=ArraySpec((engine.num_slots + 1,), (None,), dtype=jnp.int32, init="zeros"),
    )


def make(model: ModelConfig, engine: EngineConfig) -> Cache:
    """An empty cache, allocated once.

    Nothing depends on what is in a page before it is written. Beside native kernels the pages
    are left as they come, so that those that were never used take no memory.
    """

    def pool(leaf: ArraySpec) -> Array:
        return native.untouched(leaf.shape, jnp.dtype(leaf.dtype))

    def empty(leaf: ArraySpec) -> Array:
        return jnp.zeros(leaf.shape, leaf.dtype)

    made = spec(model, engine)
    pages = pool if engine.attention == native.NATIVE else empty
    return Cache(
        k=map_specs(pages, made.k),
        v=map_specs(pages, made.v),
        last_tokens=empty(made.last_tokens),
    )


def bytes_per_token(model: ModelConfig, engine: EngineConfig) -> int:
    """Bytes that one token takes in the pool, over all layers."""
    head = head_width(model.head_dim, engine) * page_dtype(engine).itemsize
    if has_scales_apart(engine):
        head += rounded.SCALE_BYTES
    return 2 * model.num_layers * model.num_kv_heads * head


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


def has_scales_apart(engine: EngineConfig) -> bool:
    """Whether int8 pages keep their scales in a pool beside them, as the Pallas kernels need it.

    On a CPU one read brings a token's codes and its scale.
    """
    return engine.cache.dtype == "int8" and engine.attention not in ON_CPU


def head_width(head_dim: int, engine: EngineConfig) -> int:
    """Elements of a token and head in a page: in int8 on a CPU the scale is behind the codes.

    Whole lanes for the TPU's kernel, zeros at the end: XLA:TPU lays a narrower pool out another
    way round, and copies all of it for a kernel.
    """
    if engine.cache.dtype == "int8" and not has_scales_apart(engine):
        return head_dim + rounded.SCALE_BYTES
    return -(-head_dim // _LANES) * _LANES if engine.attention == "pallas_tpu" else head_dim


def to_pages(x: Float[Array, "... H"], pages: Leaf) -> Leaf:
    """Rounds the values of heads to what the pages hold; zeros where a page is wider."""
    if isinstance(pages, Rounded):
        codes, scales = rounded.round_heads(x)
        return Rounded(_widened(codes, pages.codes), scales)
    if pages.dtype == jnp.int8:
        return rounded.pack(x)
    if pages.dtype == jnp.uint16:
        return lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    return _widened(x.astype(pages.dtype), pages)


def pool_of(x: Float[Array, "K P C H"], pages: Leaf) -> Leaf:
    """A pool like `pages` that holds these values."""
    kept = to_pages(x, pages)
    if isinstance(kept, Rounded):
        return kept._replace(scales=jnp.swapaxes(kept.scales, 2, 3))
    return kept


def _widened(kept: Array, pages: Leaf) -> Array:
    spare = pages.shape[-1] - kept.shape[-1]
    return jnp.pad(kept, (*((0, 0),) * (kept.ndim - 1), (0, spare))) if spare else kept


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
    """What some pages hold, as whole numbers: keys of every layer, then values.

    Scales that lie apart are behind their codes here.
    """

    def bits(pool: Leaf) -> Array:
        if isinstance(pool, Rounded):
            scales = jnp.swapaxes(pool.scales.at[:, pages].get(mode="promise_in_bounds"), 2, 3)
            parts = (bits(pool.codes), lax.bitcast_convert_type(scales, jnp.uint8)[..., 0, :])
            return jnp.concatenate(parts, axis=-1)
        found = pool.at[:, pages].get(mode="promise_in_bounds")
        return lax.bitcast_convert_type(found, jnp.dtype(f"uint{8 * found.dtype.itemsize}"))

    return jnp.moveaxis(jnp.stack([bits(pool) for pool in (*cache.k, *cache.v)]), 2, 0)


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


def write(pages: Leaf, new: Float[Array, "B T K H"], where: Places) -> Leaf:
    """The pool with the tokens of a step in their places; in place when the pool is donated."""
    kept = to_pages(new, pages)
    rows = jax.tree.map(lambda leaf: jnp.swapaxes(leaf.reshape(-1, *leaf.shape[2:]), 0, 1), kept)
    if isinstance(rows, Rounded):
        return _written_apart(pages, rows, where)
    return pages.at[:, where.pages, where.offsets].set(rows)


def _written_apart(pages: Rounded, rows: Rounded, where: Places) -> Rounded:
    """The same for codes [K, rows, H] and scales [K, rows, 1] of their own.

    One axis of heads, pages and offsets: for several XLA:TPU lays int8 out another way round, and
    copies all of the pool there and back.
    """
    num_heads, num_pages, page_size, width = pages.codes.shape
    heads = jnp.arange(num_heads, dtype=jnp.int32)[:, None]
    index = (heads * num_pages + where.pages) * page_size + where.offsets
    codes = pages.codes.reshape(-1, width).at[index].set(rows.codes)
    scales = pages.scales.reshape(-1).at[index].set(rows.scales[..., 0])
    return Rounded(codes.reshape(pages.codes.shape), scales.reshape(pages.scales.shape))
