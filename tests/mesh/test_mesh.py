"""A tiny model over virtual devices: the tokens of one, few sums, and the memory of the plan."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxinfer import cache as paged
from jaxinfer import cli, models, sharding, weights
from jaxinfer.compile import Shape, build_allocate
from jaxinfer.engine import Engine
from jaxinfer.errors import ConfigError
from jaxinfer.nn import heads
from jaxinfer.plan import abstract_params
from jaxinfer.scoring import Scorer, score
from jaxinfer.spec import paths
from tests import cli_model, tiny
from tests.mesh.spread import bytes_by_device, collectives, mesh_of, spread

DEVICES = (1, 2, 4, 8)
SMALL = {"prefill_chunks": (8,), "decode_rows": (8,)}  # programs take long to build
SUMS = 2 * tiny.MODEL.num_layers + 1  # two a layer, and one for the embedding
PROMPTS = [[3 + number, 5, 7] * (1 + number % 5) for number in range(6)]
HF = Path(__file__).parents[1] / "golden" / "smollm2"


@pytest.fixture(scope="module")
def eight():
    """An engine over eight devices."""
    wide, params = spread(8)
    return Engine(params, wide, tiny.TokenText(), tiny.engine_config(**SMALL), store=tiny.store())


@pytest.fixture(scope="module")
def answers(eight):
    """What the eight say, greedily."""
    requests = [tiny.make_request(f"r{n}", prompt) for n, prompt in enumerate(PROMPTS)]
    return list(tiny.run(eight, requests).values())


@pytest.mark.parametrize("num_devices", DEVICES)
def test_any_number_of_devices_finds_the_tokens_of_eight_likeliest(answers, num_devices):
    wide, params = spread(num_devices)
    scorer = Scorer(params, wide, tiny.engine_config(score_chunk=32), store=tiny.store())
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        found = score(scorer, [*prompt, *answer.tokens])
        own = slice(len(prompt) - 1, None)
        assert found.is_likeliest[own].all()
        assert np.abs(found.logprobs[own] - answer.logprobs).max() < 1e-3
    sums = collectives(scorer.program.text())["all-reduce", "f32[1,32,64]"]
    assert sums == (SUMS if num_devices > 1 else 0)


def test_a_decode_step_sums_twice_a_layer_and_gathers_few_tokens(eight):
    found = collectives(eight.programs[Shape("decode", 8, 1)].text())
    rows, candidates, vocabulary = 128, 32 * 8, tiny.MODEL.vocab_size
    assert found == {
        ("all-reduce", f"f32[8,1,{tiny.MODEL.d_model}]"): SUMS,
        ("all-reduce", f"f32[{rows}]"): 3,  # log sums, with and without temperature; one logit
        ("all-gather", f"s32[2,{rows},{candidates}]"): 1,
        ("all-gather", f"f32[{rows},{vocabulary}]"): 1,  # runs where the few can't decide
    }


def test_the_pool_is_donated_and_each_device_has_its_part(eight):
    own = bytes_by_device(eight.device.cache)
    assert len(own) == 8
    for program in eight.programs.values():
        assert program.alias_bytes >= max(own.values())
    whole = paged.bytes_per_token(tiny.MODEL, eight.config) * eight.config.cache.page_size
    pages = eight.config.num_pages + 1
    assert sum(own.values()) == pytest.approx(4 * whole * pages, rel=0.01)  # 2 kv heads are 8 here


def test_bits_are_tested_at_the_start_and_nothing_compiles_afterwards(eight, answers):
    assert eight.self_test.is_exact
    assert not eight.self_test.dropped
    assert eight.stats().num_compiles_after_start == 0
    again = tiny.run(eight, [tiny.make_request("alone", PROMPTS[3])])["alone"]
    assert (again.tokens, again.logprobs) == answers[3][:2]


def test_the_next_start_loads_the_programs(eight):
    config = tiny.engine_config(**SMALL)
    again = Engine(eight.device.params, eight.model, tiny.TokenText(), config, store=tiny.store())
    assert all(program.load_s for program in again.programs.values())


def test_programs_of_other_rules_are_others():
    config, whole = tiny.engine_config(**SMALL), mesh_of(2)
    keys = set()
    for rules in (whole.rules, whole.rules[:2], whole.rules[2:]):
        params = abstract_params(tiny.MODEL, config, replace(whole, rules=rules))
        keys.add(build_allocate(params, tiny.MODEL, config).key)
    assert len(keys) == 3


@pytest.mark.parametrize("num_devices", DEVICES[1:])
def test_devices_hold_what_the_plan_says(tmp_path, capsys, monkeypatch, num_devices):
    monkeypatch.setenv("JAXINFER_CACHE_DIR", str(tmp_path / "cache"))
    folder = cli_model.save(tmp_path)
    options = ["-m", str(folder), "-c", str(tmp_path / "tiny.toml")]
    assert cli.run(["plan", *options, "-c", f"mesh/tensor-{num_devices}", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    mesh = mesh_of(num_devices)
    loaded = weights.load(
        folder,
        dtype="float32",
        sharding=sharding.placement(mesh),
        fit=partial(sharding.fit, config=mesh),
    )
    held = bytes_by_device(loaded.params)
    assert len(held) == num_devices
    for own in held.values():
        assert own == pytest.approx(plan["weight_bytes"], rel=0.05)
    wide, expected = spread(num_devices)
    assert loaded.config == wide
    jax.tree.map(np.testing.assert_array_equal, loaded.params, expected)
    where = [[leaf.sharding for leaf in jax.tree.leaves(one)] for one in (loaded.params, expected)]
    assert where[0] == where[1]


def test_the_plan_counts_the_pages_of_one_device(eight):
    held = bytes_by_device((eight.device.params, eight.device.cache))
    plan = eight.device.memory
    for own in held.values():
        assert own == pytest.approx(plan.weight_bytes + plan.cache_bytes, rel=0.05)
    assert plan.temp_bytes == max(program.temp_bytes for program in eight.programs.values())


def test_a_mesh_that_is_not_here_can_be_planned(tmp_path, capsys):
    many = tmp_path / "many.toml"
    many.write_text(
        "[mesh]\nshape = [64]\naxes = ['X']\n"
        "rules = [['heads', 'X'], ['kv_heads', 'X'], ['ffw', 'X'], ['vocab', 'X']]\n"
    )
    found = {}
    for files in ([], ["-c", str(many)]):
        assert cli.run(["plan", "-m", "smollm2-135m", *files, "--json"]) == 0
        found[len(files)] = json.loads(capsys.readouterr().out)["weight_bytes"]
    assert found[2] < found[0] / 16


def test_a_mesh_that_is_not_here_is_not_built():
    mesh = replace(mesh_of(8), shape=(64,))
    wide, config = (
        sharding.fit(tiny.MODEL, replace(mesh, rules=mesh.rules[:3])),
        tiny.engine_config(),
    )
    params = abstract_params(wide, config, replace(mesh, rules=mesh.rules[:3]))
    with pytest.raises(ConfigError, match="needs 64 devices; 8 are here"):
        build_allocate(params, wide, config)


@pytest.mark.full
@pytest.mark.parametrize(("queries", "keys", "num_devices"), [(3, 3, 5), (24, 3, 2)])
def test_int8_heads_are_moved_only_where_each_was_rotated_by_itself(
    tmp_path, queries, keys, num_devices
):
    model = replace(tiny.MODEL, num_heads=queries, num_kv_heads=keys, quant="w8a8")
    mesh = replace(mesh_of(2), shape=(num_devices,), rules=mesh_of(2).rules[:2])
    plain = cli_model.save(tmp_path, replace(model, quant="none"))
    whole = weights.load(plain, dtype="float32", quant="w8a8")
    folder = weights.save(whole, tmp_path / "int8")
    fit, place = partial(sharding.fit, config=mesh), sharding.placement(mesh)
    if queries == 24:
        with pytest.raises(ConfigError, match="take the model that it was made from"):
            weights.load(folder, dtype="float32", sharding=place, fit=fit)
        folder = plain
    found = weights.load(folder, dtype="float32", quant="w8a8", sharding=place, fit=fit)
    assert found.config.num_heads == fit(model).num_heads > queries
    before, after = (one.params.layers[1].attention.output for one in (whole, found))
    padded = (0, found.config.num_heads - queries)
    if queries == 3:
        codes = np.pad(np.asarray(before.codes), ((0, 0), padded, (0, 0)))
        np.testing.assert_array_equal(after.codes, codes)
    assert after.codes.sharding.shard_shape(after.shape)[1] * num_devices == after.shape[1]


@pytest.mark.parametrize("num_devices", DEVICES[1:])
def test_hugging_face_weights_are_regrouped_as_they_are_read(num_devices):
    mesh = mesh_of(num_devices)
    plain = weights.load(HF, dtype="float32")
    wide = sharding.fit(plain.config, mesh)
    found = weights.load(
        HF,
        dtype="float32",
        sharding=sharding.placement(mesh),
        fit=partial(sharding.fit, config=mesh),
    )
    assert found.config == wide
    specs = paths(models.spec_of(wide))
    for (name, one), whole, leaf in zip(
        specs.items(), jax.tree.leaves(plain.params), jax.tree.leaves(found.params), strict=True
    ):
        expected = heads.regroup(np.asarray(whole), one.axes, plain.config, wide)
        np.testing.assert_array_equal(leaf, expected, err_msg=name)
        assert leaf.sharding.mesh.size == num_devices
