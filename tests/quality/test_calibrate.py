"""What is learnt from a text, against the model's own arithmetic."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import weights
from jaxinfer.config import EngineConfig
from jaxinfer.errors import ConfigError, InvalidRequest
from jaxinfer.nn.norm import rms_norm
from jaxinfer.quality import moments as summed
from jaxinfer.quality import texts
from jaxinfer.quality.calibrate import calibrate, stream
from jaxinfer.quality.compare import Model, compare
from jaxinfer.quality.moments import moments
from jaxinfer.quality.report import figures
from jaxinfer.quality.texts import Document, Window
from jaxinfer.text.tokenizer import Tokenizer
from tests import cli_model, tiny

ENGINE = EngineConfig(compute_dtype="float32", attention_block=32)
ONE = replace(tiny.MODEL, num_layers=1)
TIED = replace(ONE, tie_embeddings=True)


def windows(count: int, size: int = 32) -> list[np.ndarray]:
    rng = np.random.default_rng(count)
    return [rng.integers(0, 256, size).astype(np.int32) for _ in range(count)]


def test_moments_are_those_of_what_products_are_given():
    params, some = tiny.params(model=ONE), windows(3)
    found = moments(Model(params, ONE), some, engine=ENGINE)
    assert set(found) == {
        "embedding",
        "head",
        "layers.0.attention.qkv",
        "layers.0.attention.output",
        "layers.0.mlp.gate_up",
        "layers.0.mlp.down",
    }
    gain = params.layers[0].attention_norm
    x = np.asarray(
        rms_norm(params.embedding[np.concatenate(some)], gain, eps=ONE.norm_eps), np.float64
    )
    np.testing.assert_allclose(found["layers.0.attention.qkv"], x.T @ x, rtol=1e-3, atol=1e-2)
    assert found["layers.0.attention.output"].shape == (96, 96)
    for path, one in found.items():
        assert (np.trace(one) > 0) == (path != "embedding"), path


def test_a_table_that_is_embedding_and_head_has_the_heads_moments():
    params = tiny.params(model=TIED)
    found = moments(Model(params, TIED), windows(2), engine=ENGINE)
    assert "head" not in found
    size = 2 * 32 * 64 * 3**2  # the mean square of a norm's output is its gain's, which is 3
    assert np.trace(found["embedding"]) == pytest.approx(size, rel=0.01)


def test_several_passes_find_the_same(monkeypatch):
    model, some, told = Model(tiny.params(model=ONE), ONE), windows(2), []
    whole = moments(model, some, engine=ENGINE)
    monkeypatch.setattr(summed, "BYTES_AT_ONCE", 4 * 128 * 128)
    parts = moments(model, some, engine=ENGINE, progress=lambda *said: told.append(said))
    assert set(parts) == set(whole)
    assert len(told) > 2 * len(some) and told[-1] == ("calibrate", len(told), len(told))
    for path, one in whole.items():
        np.testing.assert_allclose(parts[path], one, rtol=1e-5, atol=1e-4)


def test_windows_of_different_lengths_are_refused():
    model = Model(tiny.params(model=ONE), ONE)
    for some in ([], [*windows(1), *windows(1, 16)]):
        with pytest.raises(ConfigError, match="windows of one length"):
            moments(model, some, engine=ENGINE)


class Letters:
    """A token a letter."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def test_a_stream_is_whole_windows_from_all_over_the_text():
    documents = [Document("a" * 95), Document("b" * 105)]
    every = stream(documents, Letters(), size=10, max_tokens=1000)
    assert [len(one.tokens) for one in every] == [10] * 20
    assert set(every[9].tokens.tolist()) == {97, 98}
    some = stream(documents, Letters(), size=10, max_tokens=59)
    assert [chr(one.tokens[0]) for one in some] == list("aaabb")
    assert stream([Document("abc")], Letters(), size=10, max_tokens=100) == []
    assert stream([], Letters(), size=10, max_tokens=100) == []


def test_the_text_to_calibrate_with_is_none_of_the_text_to_compare_on():
    words = [one.text for one in texts.for_calibration()]
    assert len(words) == 200 and sum(map(len, words)) > 100_000
    judged = "\n".join(one.text for one in texts.bundled())
    for text in words:
        for first in range(0, len(text) - 60, 60):
            assert text[first : first + 60] not in judged


def outlying(model) -> weights.Checkpoint:
    """A model with a few channels that are much larger than the others."""
    params = jax.tree.map(lambda leaf: leaf / 3, tiny.params(model=model))
    loud = jnp.ones(64).at[jnp.asarray([3, 40])].set(40.0)
    layers = tuple(
        layer._replace(attention_norm=layer.attention_norm * loud, mlp_norm=layer.mlp_norm * loud)
        for layer in params.layers
    )
    text = cli_model.TextAssets(tokenizer_json=cli_model.tokenizer_json())
    return weights.Checkpoint(
        "tiny", model, params._replace(layers=layers), text, cli_model.SamplingParams()
    )


def test_a_calibrated_model_is_nearer_than_one_that_is_rounded_to_nearest():
    reference = outlying(ONE)
    learnt = calibrate(reference, engine=ENGINE, max_tokens=2048, window=64)
    assert learnt.num_tokens == 2048 and learnt.text_digest
    tokenizer = Tokenizer(reference.text)
    judged = texts.windows(texts.bundled(), tokenizer, size=64, max_tokens=800)
    base = Model(reference.params, reference.config)
    divergence = []
    for given in ({}, {"rounding": learnt.rounding, "factors": learnt.factors}):
        made = weights.quantised(reference, "w8a8", **given)
        candidate = Model(made.params, made.config)
        found = compare(base, candidate, judged, engine=ENGINE, size=64)
        divergence.append(figures("x", found).kl.value)
    assert divergence[1] < 0.7 * divergence[0]


def test_a_text_without_a_window_is_refused(tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    with pytest.raises(InvalidRequest, match="not one window of 64 tokens"):
        calibrate(outlying(ONE), engine=ENGINE, files=(short,), window=64)
    with pytest.raises(InvalidRequest, match="--calibration .*nothing.txt can't be read"):
        calibrate(outlying(ONE), engine=ENGINE, files=(tmp_path / "nothing.txt",))


def test_pieces_know_their_tokens():
    pieces = stream([Document("ab" * 20)], Letters(), size=8, max_tokens=40)
    assert texts.digest(pieces) == texts.digest([Window(one.tokens, "x") for one in pieces])
