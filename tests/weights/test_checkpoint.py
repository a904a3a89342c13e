"""Our own folder: the same model out as in, whole or not at all."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import weights
from jaxinfer.config import RopeScaling
from jaxinfer.errors import CheckpointError
from jaxinfer.host.request import SamplingParams
from jaxinfer.weights import checkpoint
from tests.weights import folders


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model in bfloat16 whose every setting differs from its default."""
    folder = tmp_path_factory.mktemp("hf")
    folders.write_hf(folder, folders.config("mistral"))
    loaded = weights.load(folder, dtype="bfloat16")
    return replace(
        loaded,
        name="tiny",
        config=replace(loaded.config, rope_scaling=RopeScaling("llama3", 8.0, 1.5, 3.0, 4096)),
        text=replace(loaded.text, chat_template="{{ 'ä' }}", bos_token="<s>", add_bos=True),
        sampling=SamplingParams(temperature=0.5, top_k=7, stop=("end",), stop_token_ids=(3,)),
    )


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    return weights.save(model, tmp_path_factory.mktemp("own") / "tiny")


@pytest.fixture
def folder(written, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(written, tmp_path / "tiny")


def largest(folder):
    return max(
        (folder / "params").rglob("*"), key=lambda file: file.stat().st_size * file.is_file()
    )


ABSENT = object()


def edited(document, changes):
    merged = document | changes
    return {key: value for key, value in merged.items() if value is not ABSENT}


def edit(path, **changes):
    """Changes keys of a JSON file."""
    path.write_text(json.dumps(edited(json.loads(path.read_text()), changes)))


def test_everything_comes_back(model, written):
    loaded = weights.load(written, dtype="bfloat16")
    assert (loaded.name, loaded.config, loaded.text, loaded.sampling) == (
        *(model.name, model.config, model.text, model.sampling),
    )
    assert jax.tree.structure(loaded.params) == jax.tree.structure(model.params)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_leaves_come_in_the_dtype_asked_for(model, written, dtype):
    params = weights.load(written, dtype=dtype).params
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    np.testing.assert_array_equal(params.embedding, model.params.embedding.astype(dtype))


def test_sharding_is_asked_for_every_leaf(written):
    mesh = jax.make_mesh((1,), ("X",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = weights.load(written, dtype="bfloat16", sharding=lambda leaf: spread).params
    assert {leaf.sharding for leaf in jax.tree.leaves(params)} == {spread}


def test_describe_reads_no_weights(model, folder):
    shutil.rmtree(folder / "params")
    source = weights.describe(folder)
    assert (source.kind, source.config, source.sampling) == (
        "jaxinfer",
        model.config,
        model.sampling,
    )
    assert source.num_bytes > sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))


def test_nothing_is_pickled(written):
    found = {file.relative_to(written).parts[0] for file in written.rglob("*")}
    assert found == {"model.json", "params", "tokenizer.json", "text.json", "sampling.json"}
    assert not [file for file in written.rglob("*") if file.suffix in (".pkl", ".pickle", ".npy")]


def test_a_folder_is_never_written_over(model, written, tmp_path):
    with pytest.raises(CheckpointError, match="is already there"):
        weights.save(model, written)
    (tmp_path / "mine").mkdir()
    with pytest.raises(CheckpointError, match="is already there"):
        checkpoint.save(model, tmp_path / "mine", keep_existing=True)


def test_a_write_that_fails_leaves_nothing(model, tmp_path, monkeypatch):
    def fail(path, document):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "_write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        weights.save(model, tmp_path / "out" / "tiny")
    assert list((tmp_path / "out").iterdir()) == []


def test_writers_at_once_leave_one_whole_folder(model, tmp_path):
    with ThreadPoolExecutor(3) as threads:
        paths = list(
            threads.map(
                lambda _: checkpoint.save(model, tmp_path / "tiny", keep_existing=True), range(3)
            )
        )
    assert paths == [tmp_path / "tiny"] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    weights.load(tmp_path / "tiny", dtype="bfloat16")


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: cut(largest(folder)), "bytes instead of"),
        (lambda folder: flip(largest(folder)), "is damaged: its CRC-32 differs"),
        (lambda folder: largest(folder).unlink(), "is missing; remove the folder"),
        (lambda folder: shutil.rmtree(folder / "params"), "is missing"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json can't be read"),
        (lambda folder: (folder / "text.json").unlink(), "text.json is missing"),
        (lambda folder: (folder / "sampling.json").write_text("{"), "sampling.json is not JSON"),
        (lambda folder: cut(folder / "model.json") or cut(folder / "model.json"), "is not JSON"),
        (lambda folder: edit(folder / "model.json", version=2), "version 2; this jaxinfer reads"),
        (lambda folder: edit(folder / "model.json", format="other"), "format 'other'"),
        (lambda folder: edit(folder / "model.json", config=ABSENT), "config is missing"),
        (lambda folder: edit(folder / "model.json", odd=1), "odd is not a key"),
        (lambda folder: edit(folder / "model.json", files={"a": 3}), "files a table of sizes"),
        (lambda folder: edit(folder / "text.json", bos_token=ABSENT), "bos_token is missing"),
        (lambda folder: edit(folder / "text.json", add_bos=1), "add_bos is 1"),
        (lambda folder: edit(folder / "sampling.json", top_p=2.0), "top_p is 2.0"),
        (lambda folder: edit(folder / "sampling.json", top_k="7"), "top_k is '7'"),
    ],
)
def test_damage_is_an_error_that_names_the_file(folder, damage, says):
    damage(folder)
    with pytest.raises(CheckpointError, match=says) as caught:
        weights.load(folder, dtype="bfloat16")
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"vocab_size": 49}, r"embedding is \[48, 32\], but .* asks for \[49, 32\]"),
        ({"num_layers": 3, "layer_windows": []}, "layers.2.attention.output is missing"),
        ({"num_layers": 1, "layer_windows": []}, "layers.1.* asks for no such parameter"),
        ({"num_layers": "2"}, "config: num_layers is '2'"),
        ({"layer_windows": [1]}, "layer_windows has 1 entries for 2 layers"),
        ({"rope_scaling": {"kind": "none"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": ABSENT}, "rope_scaling is missing"),
        ({"bos_token_id": True}, "bos_token_id is True"),
        ({"odd": 3}, "config: odd is not a key"),
    ],
)
def test_a_config_that_does_not_fit_is_an_error(folder, changes, says):
    config = json.loads((folder / "model.json").read_text())["config"]
    edit(folder / "model.json", config=edited(config, changes))
    with pytest.raises(CheckpointError, match=says):
        weights.load(folder, dtype="bfloat16")
