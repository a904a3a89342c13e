"""Hugging Face folders: the right values in the right place, and every damage named."""

import json
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxinfer import spec, weights
from jaxinfer.errors import CheckpointError
from tests.weights import folders


def load(folder, dtype="float32", **options):
    return weights.load(folder, dtype=dtype, **options)


def leaves_of(params):
    return {
        spec.dotted(path): np.asarray(leaf) for path, leaf in jax.tree.flatten_with_path(params)[0]
    }


@pytest.mark.parametrize("architecture", folders.ARCHITECTURES)
def test_every_tensor_lands_in_its_place(tmp_path, architecture):
    document = folders.config(architecture)
    values = folders.write_hf(tmp_path, document)
    loaded = load(tmp_path)
    params, config = loaded.params, loaded.config
    assert config.architecture == architecture
    np.testing.assert_array_equal(params.embedding, values["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params.final_norm, values["model.norm.weight"])
    assert (params.head is None) == config.tie_embeddings
    if params.head is not None:
        np.testing.assert_array_equal(params.head, values["lm_head.weight"])
    for index, layer in enumerate(params.layers):
        assert_is_layer(layer, values, f"model.layers.{index}.", config)


def assert_is_layer(layer, values, at, config):
    def same(leaf, name):
        assert (leaf is None) == (at + name not in values)
        if leaf is not None:
            np.testing.assert_array_equal(
                np.asarray(leaf).reshape(values[at + name].shape), values[at + name]
            )

    same(layer.attention_norm, "input_layernorm.weight")
    same(layer.mlp_norm, "post_attention_layernorm.weight")
    same(layer.mlp.gate_up[0], "mlp.gate_proj.weight")
    same(layer.mlp.gate_up[1], "mlp.up_proj.weight")
    same(layer.mlp.down, "mlp.down_proj.weight")
    same(layer.attention.output, "self_attn.o_proj.weight")
    same(layer.attention.output_bias, "self_attn.o_proj.bias")
    same(layer.attention.q_norm, "self_attn.q_norm.weight")
    same(layer.attention.k_norm, "self_attn.k_norm.weight")
    size, group = config.head_dim, config.num_heads // config.num_kv_heads
    for kind, leaf in (("weight", layer.attention.qkv), ("bias", layer.attention.qkv_bias)):
        assert (leaf is None) == (f"{at}self_attn.q_proj.{kind}" not in values)
        for head in range(config.num_heads if leaf is not None else 0):
            rows = values[f"{at}self_attn.q_proj.{kind}"][head * size : (head + 1) * size]
            np.testing.assert_array_equal(leaf[head // group, head % group], rows)
        for head in range(config.num_kv_heads if leaf is not None else 0):
            for place, name in ((group, "k"), (group + 1, "v")):
                rows = values[f"{at}self_attn.{name}_proj.{kind}"]
                np.testing.assert_array_equal(
                    leaf[head, place], rows[head * size : (head + 1) * size]
                )


def test_shards_load_as_one_file_does(tmp_path):
    folders.write_hf(tmp_path / "one")
    folders.write_hf(tmp_path / "three", num_shards=3)
    one, three = load(tmp_path / "one"), load(tmp_path / "three")
    assert three.name == "three"
    jax.tree.map(np.testing.assert_array_equal, one.params, three.params)


@pytest.mark.parametrize("stored", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_float_comes_out_in_the_dtype_asked_for(tmp_path, stored, dtype):
    document = folders.config()
    values = folders.tensors(document)
    folders.write_hf(
        tmp_path, document, {name: value.astype(stored) for name, value in values.items()}
    )
    params = load(tmp_path, dtype).params
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    np.testing.assert_array_equal(
        np.asarray(params.embedding, np.float32), values["model.embed_tokens.weight"]
    )


def test_rounding_is_to_nearest_even(tmp_path):
    document = folders.config()
    values = folders.tensors(document)
    values["model.norm.weight"] = np.random.default_rng(1).normal(size=32).astype(np.float32)
    folders.write_hf(tmp_path, document, values)
    expected = jnp.asarray(values["model.norm.weight"]).astype(jnp.bfloat16)
    np.testing.assert_array_equal(load(tmp_path, "bfloat16").params.final_norm, expected)


def test_a_tied_head_may_be_stored_twice(tmp_path):
    document = folders.config("qwen2")
    values = folders.tensors(document)
    values["lm_head.weight"] = values["model.embed_tokens.weight"]
    values["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    folders.write_hf(tmp_path, document, values)
    assert load(tmp_path).params.head is None


def test_sharding_is_asked_for_every_leaf(tmp_path):
    folders.write_hf(tmp_path)
    mesh = jax.make_mesh((1,), ("X",), axis_types=(jax.sharding.AxisType.Auto,))
    seen = []

    def sharding(leaf):
        seen.append(leaf)
        return jax.sharding.NamedSharding(
            mesh, jax.sharding.PartitionSpec(*[None] * len(leaf.shape))
        )

    params = load(tmp_path, sharding=sharding).params
    leaves = jax.tree.leaves(params)
    assert [leaf.shape for leaf in leaves] == [leaf.shape for leaf in seen]
    assert all(isinstance(leaf.sharding, jax.sharding.NamedSharding) for leaf in leaves)


def test_progress_counts_bytes_to_the_end(tmp_path):
    folders.write_hf(tmp_path)
    calls = []
    params = load(tmp_path, progress=lambda *call: calls.append(call)).params
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert calls[0] == ("load", 0, total) and calls[-1] == ("load", total, total)
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)


def test_weights_are_never_twice_in_memory(tmp_path):
    document = folders.config(num_hidden_layers=16, hidden_size=128, intermediate_size=512)
    folders.write_hf(tmp_path, document)
    load(tmp_path)
    tracemalloc.start()
    params = load(tmp_path).params
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
    assert peak < sum(sizes) + 4 * max(sizes)


NAME = "model.layers.1.mlp.up_proj.weight"


def damaged(change):
    """Tensors of a folder with one of them changed."""
    values = folders.tensors(folders.config())
    change(values)
    return values


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda values: values.pop(NAME), f"{NAME} is missing"),
        (lambda values: values.update(odd=np.ones(3, np.float32)), "tensor odd is not a part"),
        (lambda values: values.update({NAME: values[NAME].T.copy()}), r"has shape \[32, 64\]"),
        (lambda values: values[NAME].__setitem__((3, 4), np.nan), f"{NAME} holds 1 NaN"),
        (lambda values: values[NAME].__setitem__(3, np.inf), f"{NAME} holds 32 NaN or infinite"),
        (lambda values: values.update({NAME: values[NAME].astype(np.int8)}), "stored as I8"),
        (
            lambda values: values.update({NAME: values[NAME].astype(ml_dtypes.float8_e4m3fn)}),
            "stored as F8_E4M3",
        ),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_tensor_is_named_with_its_file(tmp_path, change, says, dtype):
    folders.write_hf(tmp_path, values=damaged(change))
    with pytest.raises(CheckpointError, match=says) as caught:
        load(tmp_path, dtype)
    assert str(tmp_path / "model.safetensors") in str(caught.value)


def test_a_value_too_large_for_the_dtype_is_an_error(tmp_path):
    values = {name: value.astype(np.float64) for name, value in damaged(lambda _: None).items()}
    values[NAME][0, 0] = 1e300
    folders.write_hf(tmp_path, values=values)
    with pytest.raises(CheckpointError, match="overflows float32"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_a_cut_file_is_named(tmp_path, keep):
    folders.write_hf(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or cut off"):
        load(tmp_path)


def test_a_bad_header_is_named(tmp_path):
    folders.write_hf(tmp_path)
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8:12] = b"\xff\xff\xff\xff"
    file.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        load(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    folders.write_hf(tmp_path, num_shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is missing"):
        load(tmp_path)


def test_index_and_shards_must_agree(tmp_path):
    folders.write_hf(tmp_path, num_shards=2)
    index = tmp_path / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    whole = dict(document["weight_map"])
    document["weight_map"] = whole | {"odd": "model-00001-of-00002.safetensors"}
    index.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="tensor odd is in model.safetensors.index.json but"):
        load(tmp_path)
    home = whole.pop(NAME)
    document["weight_map"] = whole
    index.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=f"tensor {NAME} is in {home} but not in"):
        load(tmp_path)


@pytest.mark.parametrize(
    "home", ["../model.safetensors", "/model.safetensors", 3, "sub/x.safetensors"]
)
def test_an_index_stays_in_its_folder(tmp_path, home):
    folders.write_hf(tmp_path, num_shards=1)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {NAME: home}}))
    with pytest.raises(CheckpointError, match="not a file here"):
        load(tmp_path)


@pytest.mark.parametrize("document", ["", "[]", '{"weight_map": {}}', '{"weight_map": 3}', "{"])
def test_a_bad_index_is_named(tmp_path, document):
    folders.write_hf(tmp_path, num_shards=1)
    (tmp_path / "model.safetensors.index.json").write_text(document)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        load(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(tmp_path, file):
    folders.write_hf(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(CheckpointError, match=file):
        load(tmp_path)


def test_describe_reads_no_weights(tmp_path):
    folders.write_hf(tmp_path)
    save_file(damaged(lambda values: values[NAME].fill(np.nan)), tmp_path / "model.safetensors")
    source = weights.describe(tmp_path)
    assert source.kind == "hugging_face" and source.config.num_layers == 2
    assert source.num_bytes == (tmp_path / "model.safetensors").stat().st_size
