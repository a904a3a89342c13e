"""Scores of given tokens: against the logits themselves, and against what generation said."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import cache as paged
from jaxinfer import compile as programs_of
from jaxinfer import step
from jaxinfer.errors import ConfigError, EngineFailed
from jaxinfer.inputs import inert_batch
from jaxinfer.scoring import score
from tests import tiny

CHUNK = 16


def make_engine(dtype="float32", **changes):
    return tiny.make_engine(compute_dtype=dtype, score_chunk=CHUNK, num_slots=8, **changes)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def engine(request):
    return make_engine(request.param)


@pytest.mark.parametrize("length", [1, 2, CHUNK, CHUNK + 1, CHUNK + 2, 3 * CHUNK, 100])
def test_scores_are_the_log_softmax_of_all_logits(engine, length):
    tokens = np.random.default_rng(length).integers(1, 256, length).tolist()
    found = score(engine.scorer, tokens)
    logits = np.asarray(logits_of(engine, tokens), np.float64)[: length - 1]
    wanted = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    wanted = np.take_along_axis(wanted, np.array(tokens[1:], int)[:, None], axis=1)[:, 0]
    assert found.logprobs.shape == found.is_likeliest.shape == (length - 1,)
    np.testing.assert_allclose(found.logprobs, wanted, atol=2e-5)
    np.testing.assert_array_equal(found.is_likeliest, logits.argmax(-1) == tokens[1:])


def logits_of(engine, tokens):
    """Every logit of a sequence, in one chunk."""
    config = engine.config.scoring
    batch = inert_batch(
        1,
        128,
        pages_per_seq=config.pages_per_seq,
        trash_slot=config.num_slots,
        trash_page=config.num_pages,
    )
    batch.tokens[0, : len(tokens)] = tokens
    batch.page_table[0] = np.arange(config.pages_per_seq)
    batch.lengths[0] = len(tokens)
    batch = jax.tree.map(jnp.asarray, batch)
    function = partial(step.score, model=engine.model, engine=config)
    cache = paged.make(engine.model, config)
    params = engine.device.params
    run = programs_of.compile_function(function, params, cache, batch)
    return run(params, cache, batch)[1][0]


def test_a_generated_token_scores_as_its_own_log_probability_bit_for_bit(engine):
    prompt = list(range(1, 40))
    request = tiny.make_request("one", prompt, max_tokens=30, ignore_eos=True)
    answer = tiny.run(engine, [request])["one"]
    scored = score(engine.scorer, prompt + list(answer.tokens))
    own = scored.logprobs[len(prompt) - 1 :]
    assert own.view(np.int32).tolist() == np.float32(list(answer.logprobs)).view(np.int32).tolist()
    assert scored.is_likeliest[len(prompt) - 1 :].all()


def test_scoring_changes_nothing_of_what_runs_beside_it(engine):
    request = tiny.make_request("beside", [5, 6, 7], max_tokens=20, ignore_eos=True)
    alone = tiny.run(engine, [request])["beside"]
    engine.submit(request)
    tokens, logprobs = [], []
    for turn in range(40):
        for output in engine.step():
            tokens += output.token_ids
            logprobs += output.logprobs
        engine.scorer.part(list(range(1, 100)), CHUNK * (turn % 6))
    assert (tokens, logprobs) == (list(alone.tokens), list(alone.logprobs))
    assert engine.stats().num_compiles_after_start == 0


def test_a_failed_device_costs_one_text():
    engine = make_engine()
    scorer, tokens = engine.scorer, list(range(1, 30))
    wanted = score(scorer, tokens).logprobs
    program = scorer.program

    def fail(params, cache, packed):
        jax.block_until_ready(program.run(params, cache, packed))
        raise jax.errors.JaxRuntimeError("INTERNAL: planted")

    scorer.program = program.__class__(**{**vars(program), "run": fail})
    with pytest.raises(EngineFailed, match="ask again"):
        score(scorer, tokens)
    scorer.program = program
    assert score(scorer, tokens).logprobs.tolist() == wanted.tolist()


def test_a_chunk_of_odd_size_is_refused():
    with pytest.raises(ConfigError, match="score_chunk is 12; it must be a multiple of 8"):
        make_engine().config.__class__(score_chunk=12)
