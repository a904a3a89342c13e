"""Quantised models: the engine's promises, checkpoints, and the commands that make them."""

import json
from dataclasses import asdict, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import models, weights
from jaxinfer.cli import run
from jaxinfer.config import EngineConfig, QuantConfig, load
from jaxinfer.engine import Engine
from jaxinfer.errors import QualityRefused
from jaxinfer.fingerprint import program_key
from jaxinfer.llm import load_engine
from jaxinfer.plan import plan_memory
from jaxinfer.quality import gate
from jaxinfer.quality import report as quality
from jaxinfer.quality.compare import Model, compare
from jaxinfer.quality.report import figures
from jaxinfer.quality.texts import Window
from jaxinfer.quant import QTensor, quantise, restore
from jaxinfer.quant.rounding import Rounded
from jaxinfer.spec import check
from jaxinfer.weights.assemble import quantise_leaves
from tests import cli_model, tiny
from tests.weights.folders import config, write_hf

MODEL = replace(tiny.MODEL, quant="w8a8")


def quantised(plain=None):
    plain = tiny.params("bfloat16") if plain is None else plain
    leaves = quantise_leaves(jax.tree.leaves(plain), MODEL)
    return jax.tree.unflatten(jax.tree.structure(plain), leaves)


def make_engine(**changes) -> Engine:
    config = tiny.engine_config(compute_dtype="bfloat16", **changes)
    return Engine(quantised(), MODEL, tiny.TokenText(), config, store=tiny.store())


def test_the_tree_is_the_one_that_the_config_describes():
    params = quantised()
    check(models.spec_of(MODEL), params, "bfloat16")
    layer = params.layers[0]
    matrices = (params.embedding, params.head, layer.attention.qkv, layer.attention.output)
    for leaf in (*matrices, layer.mlp.gate_up, layer.mlp.down):
        assert isinstance(leaf, QTensor) and leaf.codes.dtype == jnp.int8
    for leaf in (params.final_norm, layer.attention_norm, layer.mlp_norm):
        assert leaf.dtype == jnp.bfloat16


def test_programs_and_memory_follow_the_scheme():
    engine = tiny.engine_config(compute_dtype="bfloat16")
    keys = [
        program_key("x", model, engine, arguments=(), devices=jax.devices()[:1])
        for model in (tiny.MODEL, MODEL, replace(MODEL, quant="w8a16"))
    ]
    assert len({json.dumps(key, sort_keys=True) for key in keys}) == 3
    plain, eight = (plan_memory(model, engine).weight_bytes for model in (tiny.MODEL, MODEL))
    assert 0.5 < eight / plain < 0.56
    assert eight == plan_memory(MODEL, engine, params=quantised()).weight_bytes


def test_answers_have_the_same_bits_alone_and_beside_others():
    engine = make_engine(num_slots=8)
    assert engine.self_test.is_exact, engine.self_test.broken_promises
    assert engine.self_test.dropped == ()
    requests = tiny.random_requests(8, seed=3, max_prompt=100, max_tokens=12)
    tiny.run_alone_and_together(engine, requests, alone=4)
    assert engine.stats().num_compiles_after_start == 0


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same model as Hugging Face has it, in our own format, and in int8."""
    root = tmp_path_factory.mktemp("quantised")
    write_hf(root / "hf", config("qwen3"))
    reference = weights.load(root / "hf", dtype="bfloat16")
    weights.save(reference, root / "plain")
    weights.save(weights.quantised(reference, "w8a8"), root / "eight")
    return root


def bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_quantised_at_load_and_by_command_are_the_same(folders):
    stored = weights.load(folders / "eight", dtype="bfloat16")
    assert stored.config.quant == "w8a8"
    for source in (folders / "hf", folders / "plain"):
        loaded = weights.load(source, dtype="bfloat16", quant="w8a8")
        assert loaded.config == stored.config
        assert jax.tree.structure(loaded.params) == jax.tree.structure(stored.params)
        assert bits(loaded.params) == bits(stored.params)
    two = weights.load(folders / "eight", dtype="bfloat16", quant="w8a16")
    assert two.config.quant == "w8a16" and two.params.embedding.digits == 2
    assert bits(two.params) == bits(stored.params)
    assert weights.describe(folders / "plain", quant="w8a8").config == stored.config
    assert weights.shape_of(folders / "plain", quant="w8a8")[1] == stored.config


def test_a_folder_from_before_quantisation_is_read(folders):
    path = folders / "plain" / "model.json"
    document = json.loads(path.read_text())
    del document["config"]["quant"]
    path.write_text(json.dumps(document))
    assert weights.describe(folders / "plain").config.quant == "none"


def test_another_method_of_rounding_can_take_its_place(folders):
    reference, seen = weights.load(folders / "hf", dtype="float32"), []

    def halved(path: str, values: np.ndarray) -> Rounded:
        seen.append(path)
        scale = np.max(np.abs(values), axis=1) / np.float32(63)
        return Rounded(np.rint(values / scale[:, None]).astype(np.int8), scale)

    made = weights.quantised(reference, "w8a8", rounding=halved)
    assert "layers.0.mlp.down" in seen and "final_norm" not in seen
    assert np.max(np.abs(np.asarray(made.params.layers[0].mlp.down.codes))) == 63


def test_a_comparison_sees_what_is_done_to_a_layer():
    rng = np.random.default_rng(0)
    plain = jax.tree.map(lambda leaf: leaf / 3, tiny.params("float32"))
    pieces = [Window(rng.integers(0, 256, size).astype(np.int32), "") for size in (40, 64, 5)]
    engine = EngineConfig(compute_dtype="float32", attention_block=32)

    def against(params, model=tiny.MODEL):
        sides = Model(plain, tiny.MODEL), Model(params, model)
        found = compare(*sides, pieces, engine=engine, size=64)
        assert [len(one.kl) for one in found] == [39, 63, 4]
        return figures("x", found)

    same = against(plain)
    assert (same.kl.value, same.top1.value, same.num_lost) == (0.0, 1.0, 0)
    assert same.perplexity_ratio.value == 1.0
    eight = against(quantised(plain), MODEL)
    assert 0 < eight.kl.value < 0.05
    down = plain.layers[1].mlp.down
    worse = plain._replace(
        layers=(
            plain.layers[0],
            plain.layers[1]._replace(mlp=plain.layers[1].mlp._replace(down=1.5 * down)),
        )
    )
    assert against(worse).kl.value > 2 * eight.kl.value


def test_figures_are_those_of_the_definition():
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 256, 33).astype(np.int32)
    plain = tiny.params("float32")
    engine = EngineConfig(compute_dtype="float32", attention_block=32)
    restored = quantise_leaves(jax.tree.leaves(plain), MODEL)
    floats = [
        jnp.asarray(restore(leaf, contract=leaf.codes.ndim - leaf.scale.ndim))
        if isinstance(leaf, QTensor)
        else leaf
        for leaf in restored
    ]
    near = jax.tree.unflatten(jax.tree.structure(plain), floats)
    sides = Model(plain, tiny.MODEL), Model(near, tiny.MODEL)
    (found,) = compare(*sides, [Window(tokens, "")], engine=engine, size=40)
    both = [_logprobs(params, tokens) for params in (plain, near)]
    kl = np.sum(np.exp(both[0]) * (both[0] - both[1]), axis=-1)
    np.testing.assert_allclose(found.kl, kl[:-1], rtol=1e-2, atol=1e-6)
    for name, side in zip(("reference", "candidate"), both, strict=True):
        chosen = side[np.arange(32), tokens[1:]]
        np.testing.assert_allclose(getattr(found, f"{name}_logprob"), chosen, rtol=1e-4)
        assert np.array_equal(getattr(found, f"{name}_top"), np.argmax(side, -1)[:-1])


def _logprobs(params, tokens) -> np.ndarray:
    """Without pages: every position attends to those before it at once."""

    def attend(layer, q, k, v):
        k, v = (np.repeat(np.asarray(x), 3, axis=2) for x in (k, v))
        logits = np.einsum("bqnh,bknh->bnqk", q, k) / np.sqrt(q.shape[-1])
        logits = np.where(np.tri(len(tokens), dtype=bool), logits, -np.inf)
        chances = np.exp(logits - logits.max(-1, keepdims=True))
        chances /= chances.sum(-1, keepdims=True)
        return jnp.asarray(np.einsum("bnqk,bknh->bqnh", chances, v), jnp.float32)

    module, given = models.module_of(tiny.MODEL), jnp.asarray(tokens)[None]
    positions = jnp.arange(len(tokens))[None]
    x = module.forward(params, given, positions, attend, config=tiny.MODEL)
    logits = np.asarray(module.head(params, x, config=tiny.MODEL), np.float64)[0]
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))


def test_quantised_leaves_say_what_they_stand_for():
    values = np.asarray(tiny.params("float32").layers[0].attention.output)
    leaf = quantise("x", values, contract=2, digits=1)
    back = restore(leaf, contract=2)
    assert back.shape == values.shape
    assert np.linalg.norm(back - values) < 0.01 * np.linalg.norm(values)


def test_quantize_writes_a_folder_and_its_report_and_a_load_looks_there(tmp_path, capsys):
    model, out = cli_model.save(tmp_path), tmp_path / "eight"
    mine = tmp_path / "mine.txt"
    mine.write_text("My own text is compared too. " * 9)
    common = ("-c", str(tmp_path / "tiny.toml"), "--tokens", "300", "--window", "64")
    lenient = ("--quant.max-kl", "1", "--quant.min-top1", "0", "--quant.max-perplexity-ratio", "2")
    argv = ["quantize", "-m", str(model), "-o", str(out), "--text", str(mine), *common, *lenient]
    assert run([*argv, "--calibration-tokens", "500"]) == 0
    assert json.loads((out / "calibration.json").read_text())["num_tokens"] == 448
    shown = capsys.readouterr().out
    assert "tiny as w8a8, against tiny" in shown and "quality.json" in shown
    report = quality.read(out / "quality.json")
    assert [one.name for one in report.texts] == ["bundled text", str(mine)]
    assert report.scheme == "w8a8" and 0 < report.texts[0].kl.value < 1
    assert report.texts[0].num_tokens <= 300
    source = weights.describe(out)
    assert gate.find(source) == report
    gate.check(source, QuantConfig(max_kl=1.0, min_top1=0.0, max_perplexity_ratio=2.0))
    settings = load(str(tmp_path / "tiny.toml"), f"model={out}", "quant.max_kl=0.0")
    with pytest.raises(QualityRefused, match=r"mean KL .* > 0.0 on bundled text"):
        load_engine(settings)
    validate = ["validate", "-m", str(out), "--reference", str(model), *common, "--json"]
    assert run([*validate, "--quant.max-kl", "0"]) == 1
    again = json.loads(capsys.readouterr().out)
    assert again["missed"] and again["texts"][0] == asdict(report.texts[0])
    for wrong, words in (
        (["quantize", "-m", str(model), "-o", str(out)], "already there"),
        (["quantize", "-m", str(out), "-o", str(tmp_path / "x")], "quantised already"),
        (["quantize", "-m", str(model), "-o", "x", "--calibration-tokens", "9"], "hold a --window"),
        (["validate", "-m", str(model)], "give --quant w8a8"),
        (["validate", "-m", str(out)], "--reference is missing"),
        (["validate", "-m", str(model), "--quant", "w8a8", "--window", "3"], "at least 8"),
    ):
        assert run(wrong) == 2
        assert words in capsys.readouterr().err
