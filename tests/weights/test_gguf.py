"""GGUF files: the same leaves as the Hugging Face folder, and every damage named."""

from dataclasses import replace

import gguf
import jax
import numpy as np
import pytest

from jaxinfer import weights
from jaxinfer.config import RopeScaling
from jaxinfer.errors import CheckpointError, UnsupportedModel
from jaxinfer.nn.rope import inverse_frequencies
from jaxinfer.weights.gguf import unpermute
from tests.weights import folders

Kind = gguf.GGMLQuantizationType
WRITABLE = (Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0)
READABLE = (
    *(Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.TQ1_0, Kind.TQ2_0),
    *(Kind.IQ2_XXS, Kind.IQ2_XS, Kind.IQ2_S, Kind.IQ3_XXS, Kind.IQ3_S, Kind.IQ1_S, Kind.IQ1_M),
    *(Kind.IQ4_NL, Kind.IQ4_XS, Kind.MXFP4),
)
DOCUMENT = folders.config("llama", attention_bias=False, head_dim=16)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "tiny.gguf"


def load(file, dtype="float32", **options):
    return weights.load(file, dtype=dtype, **options)


@pytest.mark.parametrize("architecture", folders.ARCHITECTURES)
def test_a_file_loads_as_its_folder_does(tmp_path, file, architecture):
    document = folders.config(architecture)
    values = folders.write_hf(tmp_path / "folder", document)
    windows = {"llama.attention.sliding_window": 16} if architecture == "mistral" else {}
    folders.write_gguf(file, document, values, extra=windows)
    from_file, from_folder = load(file), load(tmp_path / "folder")
    jax.tree.map(np.testing.assert_array_equal, from_file.params, from_folder.params)
    ours, theirs = from_file.config, from_folder.config
    assert ours.layer_windows == theirs.layer_windows
    assert (ours.qkv_bias, ours.output_bias, ours.qk_norm, ours.tie_embeddings) == (
        *(theirs.qkv_bias, theirs.output_bias, theirs.qk_norm, theirs.tie_embeddings),
    )
    assert (ours.rope_theta, ours.norm_eps) == (1e4, 1e-5)
    assert (ours.bos_token_id, ours.eos_token_ids) == (1, (2,))
    assert from_file.name == "tiny"
    assert from_file.text.eos_token == "</s>"


@pytest.mark.parametrize("kind", WRITABLE, ids=lambda kind: kind.name)
def test_every_kind_that_can_be_written_is_read(file, kind):
    values = folders.tensors(DOCUMENT)
    folders.write_gguf(file, DOCUMENT, values, kind=kind)
    params = load(file).params

    def stored(name):
        return gguf.dequantize(gguf.quants.quantize(values[name], kind), kind)

    np.testing.assert_array_equal(params.embedding, stored("model.embed_tokens.weight"))
    layer = params.layers[1]
    np.testing.assert_array_equal(layer.mlp.down, stored("model.layers.1.mlp.down_proj.weight"))
    queries = stored("model.layers.1.self_attn.q_proj.weight").reshape(2, 3, 16, 32)
    np.testing.assert_array_equal(layer.attention.qkv[:, :3], queries)


@pytest.mark.parametrize("kind", READABLE, ids=lambda kind: kind.name)
def test_every_kind_that_can_be_dequantised_is_read(file, kind):
    document = folders.config("qwen2", hidden_size=256, intermediate_size=256)
    values = folders.tensors(document)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    shape = (48, 256 // block * size)
    # Bytes below 0x3c keep every float16 scale finite.
    packed = np.random.default_rng(0).integers(0, 0x3C, shape).astype(np.uint8)
    table = values.pop("model.embed_tokens.weight")
    assert table.shape == (48, 256)
    write_packed(file, document, values, packed, kind)
    expected = gguf.dequantize(packed, kind)
    np.testing.assert_array_equal(load(file).params.embedding, expected)


def write_packed(file, document, values, packed, kind):
    """A file whose embedding is `packed` as it stands."""
    original = gguf.GGUFWriter.write_header_to_file

    class Writer(gguf.GGUFWriter):
        def write_header_to_file(self, path=None):
            self.add_tensor("token_embd.weight", packed, raw_dtype=kind)
            original(self, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", Writer)
        folders.write_gguf(file, document, values)


def test_a_kind_that_cannot_be_dequantised_is_refused(file):
    document = folders.config("qwen2", hidden_size=256, intermediate_size=256)
    values = folders.tensors(document)
    del values["model.embed_tokens.weight"]
    packed = np.zeros((48, 292), np.uint8)
    write_packed(file, document, values, packed, Kind.Q8_K)
    with pytest.raises(UnsupportedModel, match="token_embd.weight is stored as Q8_K"):
        load(file)


def test_unpermute_undoes_the_converter():
    rows = np.arange(6 * 8 * 3).reshape(48, 3)
    np.testing.assert_array_equal(unpermute(folders.permute(rows, 6), 6), rows)
    bias = np.arange(48)
    np.testing.assert_array_equal(unpermute(folders.permute(bias, 6), 6), bias)


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
        RopeScaling("llama3", 32.0, 1.0, 4.0, 8192),
        RopeScaling("linear", 4.0),
    ],
)
def test_rope_factors_of_llama3_are_recognised(file, scaling):
    document = folders.config("llama", attention_bias=False, head_dim=64, rope_theta=5e5)
    values = folders.tensors(document)
    folders.write_gguf(file, document, values)
    plain = weights.describe(file).config
    stretched = inverse_frequencies(replace(plain, rope_scaling=scaling))
    factors = {"rope_freqs.weight": inverse_frequencies(plain) / stretched}
    folders.write_gguf(file, document, values, more=factors)
    assert load(file).config.rope_scaling == scaling


@pytest.mark.parametrize("factors", [np.linspace(1, 3, 8), np.ones(5), np.ones(0)])
def test_unknown_rope_factors_are_refused(file, factors):
    more = {"rope_freqs.weight": factors.astype(np.float32)}
    folders.write_gguf(file, DOCUMENT, folders.tensors(DOCUMENT), more=more)
    with pytest.raises(CheckpointError, match="rope_freqs.weight|whole GGUF file"):
        load(file)


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type is 'yarn'"),
        ({"llama.expert_count": 8}, "llama.expert_count is 8"),
        ({"llama.logit_scale": 0.5}, "llama.logit_scale is 0.5"),
        ({"split.count": 2}, "split.count is 2"),
    ],
)
def test_what_cannot_run_is_refused_by_key_and_value(file, extra, says):
    folders.write_gguf(file, DOCUMENT, folders.tensors(DOCUMENT), extra=extra)
    with pytest.raises(UnsupportedModel, match=says) as caught:
        load(file)
    assert str(caught.value).startswith(str(file))


def test_linear_scaling_is_read(file):
    extra = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    folders.write_gguf(file, DOCUMENT, folders.tensors(DOCUMENT), extra=extra)
    assert load(file).config.rope_scaling == RopeScaling("linear", 4.0)


def test_another_architecture_is_refused(file):
    document = folders.config("qwen3", architectures=["GemmaForCausalLM"])
    folders.write_gguf(file, document, folders.tensors(document))
    with pytest.raises(UnsupportedModel, match="general.architecture is 'gemma'"):
        load(file)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda values: values.pop("model.layers.1.mlp.up_proj.weight"),
            "blk.1.ffn_up.weight is mis",
        ),
        (lambda values: values.pop("model.norm.weight"), "output_norm.weight is missing"),
        (
            lambda values: values.update({"model.norm.weight": np.ones(16, np.float32)}),
            r"output_norm.weight has shape \[16\]",
        ),
        (
            lambda values: values["model.norm.weight"].__setitem__(3, np.nan),
            "output_norm.weight holds 1 NaN",
        ),
    ],
)
def test_a_wrong_tensor_is_named_with_its_file(file, change, says):
    values = folders.tensors(DOCUMENT)
    change(values)
    folders.write_gguf(file, DOCUMENT, values)
    with pytest.raises(CheckpointError, match=says) as caught:
        load(file)
    assert str(caught.value).startswith(str(file))


def test_an_unknown_tensor_is_named(file):
    more = {"blk.0.odd.weight": np.ones(4, np.float32)}
    folders.write_gguf(file, DOCUMENT, folders.tensors(DOCUMENT), more=more)
    with pytest.raises(CheckpointError, match="tensor blk.0.odd.weight is not a part"):
        load(file)


@pytest.mark.parametrize("keep", [0, 3, 4, 20, 40, 200, 1000, 2000, 0.5, -1, -100])
def test_a_cut_file_is_named(file, keep):
    folders.write_gguf(file, DOCUMENT, folders.tensors(DOCUMENT))
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep) if keep == 0.5 else keep])
    with pytest.raises(CheckpointError, match=r"tiny\.gguf is not a whole GGUF file"):
        load(file)


def test_a_flipped_header_byte_never_hangs_or_escapes(file):
    folders.write_gguf(file, DOCUMENT, folders.tensors(DOCUMENT))
    content = file.read_bytes()
    random = np.random.default_rng(0)
    for place in random.integers(0, 3000, 150):
        broken = bytearray(content)
        broken[place] ^= int(random.integers(1, 256))
        file.write_bytes(bytes(broken))
        try:
            weights.describe(file)
        except CheckpointError as error:
            assert str(file) in str(error)
