"""Every leaf of every architecture has its recipe, and the parts fill it."""

import math
from pathlib import Path

import numpy as np
import pytest

from jaxinfer import models, spec
from jaxinfer.weights import hf_config, names
from tests.weights import folders


@pytest.mark.parametrize("architecture", folders.ARCHITECTURES)
def test_recipes_cover_the_spec(architecture):
    document = folders.config(architecture)
    config = hf_config.translate(document, Path("config.json"))
    leaves = spec.paths(models.module_of(config).spec(config))
    recipes = names.recipes(config)
    assert list(sorted(recipes)) == sorted(leaves)
    for path, recipe in recipes.items():
        marks = np.zeros(leaves[path].shape, int)
        for part in recipe:
            assert marks[part.place].size == math.prod(part.shape)
            marks[part.place] += 1
        assert (marks == 1).all(), path


@pytest.mark.parametrize("architecture", folders.ARCHITECTURES)
def test_recipes_use_every_tensor_once(architecture):
    document = folders.config(architecture)
    config = hf_config.translate(document, Path("config.json"))
    parts = [part for recipe in names.recipes(config).values() for part in recipe]
    found = folders.tensors(document)
    assert sorted(part.tensor for part in parts) == sorted(found)
    assert all(found[part.tensor].shape == part.shape for part in parts)


def test_a_stored_head_is_ignored_only_where_it_is_tied():
    stored = ["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq", "other"]
    tied = hf_config.translate(folders.config("qwen2"), Path("config.json"))
    untied = hf_config.translate(folders.config("llama"), Path("config.json"))
    assert names.ignored(stored, tied) == set(stored[:2])
    assert names.ignored(stored, untied) == {stored[1]}
