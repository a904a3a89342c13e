"""Every architecture against transformers: in one chunk, in three chunks, token by token."""

from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import cache as paged
from jaxinfer import step, weights
from jaxinfer.compile import compile_function
from jaxinfer.engine_config import CacheConfig, EngineConfig
from jaxinfer.inputs import inert_batch

FOLDER = Path(__file__).parent.parent / "golden"
CASES = sorted(path.parent.name for path in FOLDER.glob("*/golden.npz"))
ENGINE = EngineConfig(
    num_slots=1,
    max_seq_len=64,
    compute_dtype="float32",
    attention_block=16,
    cache=CacheConfig(page_size=8),
)
WAYS = {"one chunk": [48], "three chunks": [20, 7, 21], "token by token": [1] * 48}


@cache
def loaded(name):
    return weights.load(FOLDER / name, dtype="float32")


@cache
def scorer(name, width):
    """step.score for chunks of up to `width` tokens, compiled."""
    model = loaded(name).config
    examples = loaded(name).params, paged.make(model, ENGINE), batch_of([0], 0, width)
    return compile_function(partial(step.score, model=model, engine=ENGINE), *examples)


def batch_of(tokens, start, width):
    batch = inert_batch(
        1, width, pages_per_seq=ENGINE.pages_per_seq, trash_slot=1, trash_page=ENGINE.num_pages
    )
    batch.tokens[0, : len(tokens)] = tokens
    batch.lengths[0], batch.starts[0] = len(tokens), start
    batch.page_table[0] = np.arange(ENGINE.pages_per_seq)[::-1]
    return jax.tree.map(jnp.asarray, batch)


def logits_of(name, prompt, lengths):
    model, params = loaded(name).config, loaded(name).params
    cache, parts, start = paged.make(model, ENGINE), [], 0
    run = scorer(name, max(lengths))
    for length in lengths:
        batch = batch_of(prompt[start : start + length], start, max(lengths))
        cache, logits = run(params, cache, batch)
        parts.append(np.asarray(logits[0, :length]))
        start += length
    return np.concatenate(parts)


def test_there_is_a_golden_for_every_architecture():
    assert {loaded(name).config.architecture for name in CASES} == {
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
    }
    assert len(CASES) == 9


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers(name, way):
    golden = np.load(FOLDER / name / "golden.npz")
    found = logits_of(name, golden["prompt"], WAYS[way])
    assert np.abs(golden["logits"]).max() > 1, "a golden of small logits proves little"
    assert np.abs(found - golden["logits"]).max() < 1e-4
