"""config.json: what is read, and what is refused by file, key and value."""

from pathlib import Path

import pytest

from jaxinfer.config import ModelConfig, RopeScaling
from jaxinfer.errors import CheckpointError, UnsupportedModel
from jaxinfer.weights import hf_config
from jaxinfer.weights.json_file import read_json
from tests.weights import folders

PATH = Path("folder/config.json")
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def translate(architecture="llama", **changes):
    return hf_config.translate(folders.config(architecture, **changes), PATH)


def test_a_whole_config_is_read():
    assert translate(attention_bias=None) == ModelConfig(
        architecture="llama",
        vocab_size=48,
        num_layers=2,
        d_model=32,
        d_ff=64,
        num_heads=6,
        num_kv_heads=2,
        head_dim=8,
        max_positions=128,
        norm_eps=1e-5,
        bos_token_id=1,
        eos_token_ids=(2,),
    )


def test_absent_keys_mean_what_hugging_face_means():
    config = translate(
        num_key_value_heads=None,
        head_dim=None,
        hidden_size=48,
        rms_norm_eps=None,
        rope_theta=None,
        hidden_act=None,
        tie_word_embeddings=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    assert (config.num_kv_heads, config.head_dim, config.norm_eps) == (6, 8, 1e-6)
    assert (config.rope_theta, config.tie_embeddings) == (10000.0, False)
    assert (config.bos_token_id, config.eos_token_ids) == (None, ())
    assert translate("qwen3", head_dim=None).head_dim == 128


@pytest.mark.parametrize(
    ("architecture", "attention_bias", "expected"),
    [
        ("llama", None, (False, False)),
        ("llama", True, (True, True)),
        ("mistral", False, (False, False)),
        ("qwen2", None, (True, False)),
        ("qwen3", None, (False, False)),
        ("qwen3", True, (True, True)),
    ],
)
def test_each_architecture_has_its_biases(architecture, attention_bias, expected):
    config = translate(architecture, attention_bias=attention_bias)
    assert (config.qkv_bias, config.output_bias) == expected
    assert config.qk_norm == (architecture == "qwen3")


@pytest.mark.parametrize(
    ("changes", "theta", "scaling"),
    [
        ({"rope_theta": 5e5}, 5e5, RopeScaling()),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 1e4, RopeScaling("linear", 2.0)),
        ({"rope_scaling": {"rope_type": "default"}}, 1e4, RopeScaling()),
        ({"rope_scaling": LLAMA3}, 1e4, RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)),
        (
            {"rope_theta": None, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
            1e6,
            RopeScaling(),
        ),
        (
            {"rope_theta": None, "rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
            5e5,
            RopeScaling("llama3", 32.0, 1.0, 4.0, 8192),
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 4}},
            1e4,
            RopeScaling("linear", 4.0),
        ),
        ({"rope_scaling": LLAMA3, "rope_parameters": LLAMA3}, 1e4, RopeScaling("llama3", 32.0)),
    ],
)
def test_rope_is_read_from_the_old_and_the_new_form(changes, theta, scaling):
    config = translate(**changes)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    ("architecture", "changes", "windows"),
    [
        ("llama", {}, ()),
        ("llama", {"layer_types": ["full_attention"] * 2}, ()),
        ("mistral", {}, (16, 16)),
        ("mistral", {"sliding_window": None}, ()),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, (0, 16)),
        ("qwen2", {"sliding_window": 16}, ()),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": False, "max_window_layers": 1}, ()),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True}, ()),  # from layer 28 on
        (
            "qwen2",
            {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1},
            (0, 16),
        ),
        (
            "qwen3",
            {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0},
            (16, 16),
        ),
        (
            "qwen3",
            {
                "sliding_window": 16,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            (16, 0),
        ),
        ("qwen2", {"layer_types": ["full_attention"] * 2, "use_sliding_window": False}, ()),
    ],
)
def test_windows_follow_the_architecture(architecture, changes, windows):
    assert translate(architecture, **changes).layer_windows == windows


@pytest.mark.parametrize(
    ("value", "ids"), [(2, (2,)), ([2, 7, 2], (2, 7)), ([], ()), (None, ()), (0, (0,))]
)
def test_end_tokens_are_one_or_many(value, ids):
    assert translate(eos_token_id=value).eos_token_ids == ids


@pytest.mark.parametrize(
    ("architecture", "changes", "says"),
    [
        (
            "llama",
            {"architectures": ["GPT2LMHeadModel"]},
            r"architectures is \['GPT2LMHeadModel'\]",
        ),
        ("llama", {"architectures": None}, "architectures is absent"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; it must be 'silu'"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved is True"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("llama", {"vocab_size": None}, "vocab_size is absent"),
        ("llama", {"vocab_size": "48"}, "vocab_size is '48'"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ("llama", {"num_hidden_layers": True}, "num_hidden_layers is True"),
        ("llama", {"num_key_value_heads": 4}, "6 query heads can't share 4 kv heads"),
        ("llama", {"head_dim": None}, "hidden_size is 32; 6 attention heads don't divide it"),
        ("llama", {"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny'"),
        ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
        ("llama", {"sliding_window": 16}, "sliding_window is 16; a llama model has no"),
        ("llama", {"layer_types": ["sliding_attention"] * 2}, "a llama model has no sliding"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling.type is 'yarn'"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "dynamic"}},
            "rope_scaling.rope_type is 'dynamic'",
        ),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor is absent"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor is 0.5"),
        ("llama", {"rope_scaling": LLAMA3 | {"low_freq_factor": 4}}, "low_freq_factor is 4"),
        ("llama", {"rope_scaling": 8}, "rope_scaling is 8; it must be an object"),
        (
            "llama",
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "one rope for all layers",
        ),
        (
            "llama",
            {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}},
            "rope_parameters says otherwise",
        ),
        ("llama", {"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ("llama", {"eos_token_id": [2, -1]}, r"eos_token_id is \[2, -1\]"),
        ("mistral", {"attention_bias": True}, "attention_bias is True; a mistral model has none"),
        ("qwen3", {"layer_types": ["full_attention"]}, "layer_types is .* each of 2 layers"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 2}, "layer_types is"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 2}, "without a sliding_window"),
    ],
)
def test_what_cannot_run_is_refused_by_file_key_and_value(architecture, changes, says):
    with pytest.raises(UnsupportedModel, match=says) as caught:
        translate(architecture, **changes)
    assert str(caught.value).startswith(f"{PATH}: ")


def test_keys_that_change_no_number_are_not_looked_at():
    extra = {"torch_dtype": "float16", "use_cache": False, "transformers.js_config": {"a": 1}}
    assert translate(**extra) == translate()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_json(path)
