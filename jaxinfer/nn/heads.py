"""Heads that devices share evenly: kv heads are repeated and padded, query heads go with them.

A kv head that is repeated r times gives each copy a part of its queries. What is padded has zero
weights on both sides, so that it adds exactly nothing to what attention returns.
"""

from dataclasses import replace

import numpy as np

from jaxinfer.config import ModelConfig

GROUPED = ("kv_heads", "heads")
"""The axes of leaves that `regroup` changes; the first one has its queries, key and value next."""


def fit(model: ModelConfig, parts: int) -> ModelConfig:
    """The model with heads for so many devices: the fewest kv heads each, then the fewest heads.

    Kv heads decide first, for each takes pages of its own.
    """
    kv_heads, group = model.num_kv_heads, model.num_heads // model.num_kv_heads
    found = []
    for width in range(1, group + 1):
        copies = -(-group // width)
        per_device = -(-kv_heads * copies // parts)
        found.append((per_device, per_device * width, copies, width))
    per_device, _, _, width = min(found)
    count = per_device * parts
    return replace(model, num_kv_heads=count, num_heads=count * width)


def regroup(
    leaf: np.ndarray, axes: tuple[str | None, ...], narrow: ModelConfig, wide: ModelConfig
) -> np.ndarray:
    """A leaf of `narrow` as `wide` has it, where it has an axis of heads; else as it is."""
    if _heads(narrow) == _heads(wide) or not set(GROUPED) & set(axes):
        return leaf
    if axes[0] == "kv_heads":
        return _keys_and_queries(leaf, narrow, wide)
    at = axes.index("heads")
    group, width = _group(narrow), _group(wide)
    heads = np.moveaxis(leaf, at, 0)
    heads = heads.reshape(narrow.num_kv_heads, group, *heads.shape[1:])
    spread = _spread(heads, group=group, width=width, count=wide.num_kv_heads)
    return np.ascontiguousarray(
        np.moveaxis(spread.reshape(wide.num_heads, *spread.shape[2:]), 0, at)
    )


def _keys_and_queries(leaf: np.ndarray, narrow: ModelConfig, wide: ModelConfig) -> np.ndarray:
    """[K, G+2, ...] for other K and G; every copy of a kv head has its key and value."""
    group, width = _group(narrow), _group(wide)
    copies = -(-group // width)
    queries = _spread(leaf[:, :group], group=group, width=width, count=wide.num_kv_heads)
    out = np.zeros((wide.num_kv_heads, width + 2, *leaf.shape[2:]), leaf.dtype)
    out[:, :width] = queries
    out[: narrow.num_kv_heads * copies, width:] = np.repeat(leaf[:, group:], copies, axis=0)
    return out


def _spread(heads: np.ndarray, *, group: int, width: int, count: int) -> np.ndarray:
    """[K, G, ...] as [count, width, ...]: `width` queries a copy, zeros where there are no more."""
    copies = -(-group // width)
    kv_heads, rest = heads.shape[0], heads.shape[2:]
    full = np.zeros((kv_heads, copies * width, *rest), heads.dtype)
    full[:, :group] = heads
    out = np.zeros((count, width, *rest), heads.dtype)
    out[: kv_heads * copies] = full.reshape(kv_heads * copies, width, *rest)
    return out


def _group(model: ModelConfig) -> int:
    return model.num_heads // model.num_kv_heads


def _heads(model: ModelConfig) -> tuple[int, int]:
    return model.num_heads, model.num_kv_heads
