"""Factors between activations and weights: the model stays what it is, and rounds better."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import models, spec
from jaxinfer.compile import compile_function
from jaxinfer.quant.balance import balance, divisors, multiply
from jaxinfer.spec import paths
from tests import tiny

BIASED = replace(tiny.MODEL, qkv_bias=True, tie_embeddings=False)
TIED = replace(tiny.MODEL, tie_embeddings=True)


def leaves_of(model, dtype: str) -> dict[str, np.ndarray]:
    """Weights with biases that are not zero, and gains that are not all alike."""
    specs = models.module_of(model).spec(model)
    tree = spec.initialise(specs, jax.random.key(1), jnp.float32)
    rng = np.random.default_rng(0)
    found = {}
    for path, leaf in zip(paths(specs), jax.tree.leaves(tree), strict=True):
        plain = np.ones(leaf.shape) if path.endswith("bias") else np.asarray(leaf)
        found[path] = (plain * rng.uniform(0.2, 4, leaf.shape[-1])).astype(jnp.dtype(dtype))
    return found


def moments_of(leaves: dict[str, np.ndarray], model) -> dict[str, np.ndarray]:
    rng, found = np.random.default_rng(2), {}
    for path, one in paths(models.module_of(model).spec(model)).items():
        if one.contract:
            width = int(np.prod(one.shape[len(one.shape) - one.contract :]))
            x = rng.normal(size=(50, width)) * 10.0 ** rng.uniform(-2, 2, width)
            found[path] = (x.T @ x).astype(np.float32)
    return found


def logits(leaves: dict[str, jax.Array], model) -> jax.Array:
    """Without pages: every position attends to those before it at once."""
    module = models.module_of(model)
    tree = jax.tree.structure(module.spec(model), is_leaf=spec.is_spec)
    names = paths(module.spec(model))
    params = jax.tree.unflatten(tree, [leaves[name] for name in names])
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, 256, (1, 9)))

    def attend(layer, q, k, v):
        group = model.num_heads // model.num_kv_heads
        k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
        scores = jnp.einsum("bqnh,bknh->bnqk", q, k) / np.sqrt(model.head_dim)
        scores = jnp.where(np.tri(9, dtype=bool), scores, -jnp.inf)
        return jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(scores), v)

    x = module.forward(params, tokens, jnp.arange(9)[None], attend, config=model)
    return module.head(params, x, config=model)


@pytest.mark.parametrize("model", [BIASED, TIED], ids=["biased", "tied"])
def test_a_model_with_its_factors_is_the_same_function(model):
    leaves = leaves_of(model, "float32")
    made = balance(leaves.__getitem__, moments_of(leaves, model), model)
    changed = {path: multiply(leaf, made.factors.get(path, ())) for path, leaf in leaves.items()}
    moved = {path for path, leaf in leaves.items() if not np.allclose(leaf, changed[path])}
    kept = {"embedding", "final_norm"} if model is TIED else {"embedding"}
    assert moved == set(leaves) - kept
    both = [jax.tree.map(jnp.asarray, one) for one in (leaves, changed)]
    program = compile_function(functools.partial(logits, model=model), both[0])
    wanted, found = (np.asarray(program(one)) for one in both)
    np.testing.assert_allclose(found, wanted, atol=2e-4 * np.abs(wanted).max())


def test_a_gain_in_bfloat16_is_divided_by_what_its_columns_are_multiplied_with():
    leaves = leaves_of(tiny.MODEL, "bfloat16")
    made = balance(leaves.__getitem__, moments_of(leaves, tiny.MODEL), tiny.MODEL)
    gain = leaves["layers.1.mlp_norm"]
    (factor,) = made.factors["layers.1.mlp_norm"]
    after = multiply(gain, (factor,))
    np.testing.assert_allclose(after, after.astype(jnp.bfloat16).astype(np.float32), rtol=1e-6)
    columns = made.factors["layers.1.mlp.gate_up"][-1]
    np.testing.assert_allclose(after * columns, gain.astype(np.float32), rtol=1e-6)
    assert np.array_equal(made.channels["layers.1.mlp.gate_up"], factor)


def test_a_gain_of_zero_stays_zero():
    leaves = leaves_of(tiny.MODEL, "float32")
    leaves["layers.0.mlp_norm"][3] = 0
    made = balance(leaves.__getitem__, moments_of(leaves, tiny.MODEL), tiny.MODEL)
    assert made.factors["layers.0.mlp_norm"][0][3] == 1
    assert all(np.isfinite(one).all() for some in made.factors.values() for one in some)


def test_no_other_divisors_leave_smaller_errors():
    rng = np.random.default_rng(4)
    c, v = 10.0 ** rng.uniform(-3, 3, (2, 40))

    def harm(divisor: np.ndarray) -> float:
        return float(np.sum(c / divisor**2) * np.sum(v * divisor**2))

    best = divisors(c, v).astype(np.float64)
    assert harm(best) < 0.5 * harm(np.ones(40))
    for _ in range(50):
        assert harm(best) <= harm(best * np.exp(0.1 * rng.normal(size=40))) * (1 + 1e-6)
    assert np.isfinite(divisors(np.zeros(3), np.array([0.0, 1, 2]))).all()


def test_channels_undo_what_columns_are_multiplied_with():
    leaves = leaves_of(tiny.MODEL, "float32")
    made = balance(leaves.__getitem__, moments_of(leaves, tiny.MODEL), tiny.MODEL)
    path = "layers.0.attention.output"
    columns = multiply(leaves[path], made.factors[path]).reshape(64, -1)
    x = np.random.default_rng(5).normal(size=(4, 96)).astype(np.float32)
    found = (x * made.channels[path]) @ columns.T
    wanted = x @ leaves[path].reshape(64, -1).T
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)
    assert set(made.channels) == {
        f"layers.{layer}.{name}"
        for layer in range(2)
        for name in ("attention.qkv", "attention.output", "mlp.gate_up", "mlp.down")
    } | {"head"}
