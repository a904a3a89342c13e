"""Heads for a mesh: every query keeps its key and value, and what is padded is zero."""

from dataclasses import replace

import numpy as np
import pytest

from jaxinfer.config import ModelConfig
from jaxinfer.models import llama
from jaxinfer.nn import heads
from jaxinfer.spec import paths
from tests import tiny

PARTS = (1, 2, 3, 4, 5, 8, 16, 32)


def model_of(num_heads: int, num_kv_heads: int) -> ModelConfig:
    return replace(tiny.MODEL, num_heads=num_heads, num_kv_heads=num_kv_heads, qkv_bias=True)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize(("queries", "keys"), [(9, 3), (6, 2), (32, 8), (5, 1), (14, 2), (8, 8)])
def test_each_query_stays_with_its_key_and_the_rest_is_zero(queries, keys, parts):
    narrow = model_of(queries, keys)
    wide = heads.fit(narrow, parts)
    assert wide.num_kv_heads % parts == wide.num_heads % parts == 0
    old, new = (paths(llama.spec(one)) for one in (narrow, wide))
    leaves = {}
    for name in ("qkv", "qkv_bias", "output"):
        path = f"layers.0.attention.{name}"
        size = np.prod(old[path].shape)
        whole = np.arange(1, size + 1, dtype=np.float64).reshape(old[path].shape)
        leaves[name] = whole, heads.regroup(whole, new[path].axes, narrow, wide)
        assert leaves[name][1].shape == new[path].shape
    (qkv, wide_qkv), (bias, wide_bias), (output, wide_output) = leaves.values()
    group, seen = queries // keys, []
    for head in range(wide.num_heads):
        kv_head, place = divmod(head, wide.num_heads // wide.num_kv_heads)
        rows, column = wide_qkv[kv_head], wide_output[:, head]
        if not rows[place].any():
            assert not column.any()
            assert not wide_bias[kv_head, place].any()
            continue
        old_kv, old_place = np.argwhere((qkv[:, :group] == rows[place]).all((-1, -2)))[0]
        assert (rows[-2:] == qkv[old_kv, -2:]).all()
        assert (wide_bias[kv_head, [place, -2, -1]] == bias[old_kv, [old_place, -2, -1]]).all()
        assert (column == output[:, old_kv * group + old_place]).all()
        seen.append(old_kv * group + old_place)
    assert sorted(seen) == list(range(queries))


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_heads_that_divide_stay_as_they_are(parts):
    assert heads.fit(model_of(32, 8), parts) == model_of(32, 8)


def test_pages_decide_before_heads():
    found = [heads.fit(model_of(9, 3), parts) for parts in (2, 4, 8)]
    assert [(one.num_heads, one.num_kv_heads) for one in found] == [(12, 4), (12, 4), (16, 8)]
