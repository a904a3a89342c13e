"""Which backend serves an engine: the one asked for or none, and the platform's best for auto."""

import logging
from typing import get_args, get_type_hints

import pytest

from jaxinfer.config import EngineConfig
from jaxinfer.device import Device
from jaxinfer.errors import ConfigError
from jaxinfer.kernels import paged_attention
from jaxinfer.kernels.paged_attention import (
    AUTO,
    BACKENDS,
    Needs,
    backend,
    choose,
    pallas_triton,
    pick,
)
from tests import tiny

TPU = Needs("tpu", "", "bfloat16", head_dim=128, page_size=16, block=128)
CPU = TPU._replace(platform="cpu")
H200 = TPU._replace(platform="gpu", capability="9.0")
A100 = H200._replace(capability="8.0")
INT8 = {"dtype": "int8", "compute_dtype": "bfloat16"}
REFUSED = {
    "a TPU kernel on a CPU": ("pallas_tpu", CPU, "needs a TPU, and this is a cpu"),
    "native code on a TPU": ("native", TPU, "is for CPUs, and this is a tpu"),
    "heads of 8 in native code": ("native", CPU._replace(head_dim=8), "multiple of 16, not of 8"),
    "float16 in native code": ("native", CPU._replace(dtype="float16"), "not of float16"),
    "float16 on a TPU": ("pallas_tpu", TPU._replace(dtype="float16"), "not of float16"),
    "tiny pages on a TPU": ("pallas_tpu", TPU._replace(page_size=4), "a multiple of 8 tokens"),
    "huge blocks on a TPU": ("pallas_tpu", TPU._replace(block=2**15), "attention_block = 32768"),
    "a GPU kernel on a CPU": ("pallas_gpu", CPU, "needs a GPU, and this is a cpu"),
    "an older GPU": ("pallas_gpu", H200._replace(capability="8.0"), "compute capability is 8.0"),
    "small int8 pages on a TPU": (
        "pallas_tpu",
        TPU._replace(**INT8),
        "multiple of 128 tokens, not of 16: set engine.cache.page_size to 128",
    ),
    "small int8 pages on a GPU": (
        "pallas_gpu",
        H200._replace(**INT8),
        "multiple of 32 tokens, not of 16: set engine.cache.page_size to 32 or 64",
    ),
    "int8 pages in float32 on a GPU": (
        "pallas_gpu",
        H200._replace(**INT8 | {"page_size": 64, "compute_dtype": "float32"}),
        "engine.compute_dtype is float32",
    ),
    "int8 pages in float16 on a TPU": (
        "pallas_tpu",
        TPU._replace(**INT8 | {"page_size": 128, "compute_dtype": "float16"}),
        "engine.compute_dtype is float16",
    ),
    "float32 on a GPU": ("pallas_gpu", H200._replace(dtype="float32"), "not of float32"),
    "heads of 80 on a GPU": ("pallas_gpu", H200._replace(head_dim=80), "multiple of 64, not of 80"),
    "huge heads on a GPU": ("pallas_gpu", H200._replace(head_dim=512), "hold heads of 512"),
    "odd pages on a GPU": (
        "pallas_gpu",
        H200._replace(page_size=24, block=192),
        "64 keys at a time",
    ),
    "odd blocks on a GPU": ("pallas_gpu", H200._replace(block=96), "attention_block 96"),
    "Triton on a CPU": ("pallas_triton", CPU, "needs a GPU, and this is a cpu"),
    "Triton on Turing": ("pallas_triton", A100._replace(capability="7.5"), "this one's is 7.5"),
    "Triton on an AMD GPU": (
        "pallas_triton",
        A100._replace(capability="gfx942"),
        "GPU of NVIDIA with compute capability 8.0 or later, and this one's is gfx942",
    ),
    "heads of 80 in Triton": ("pallas_triton", A100._replace(head_dim=80), "256, not of 80"),
    "heads of 512 in Triton": ("pallas_triton", A100._replace(head_dim=512), "256, not of 512"),
    "odd blocks in Triton": ("pallas_triton", A100._replace(block=72), "attention_block is 72"),
    "float8 in Triton": ("pallas_triton", A100._replace(dtype="float8_e4m3fn"), "not of float8"),
    "int8 pages in float32 in Triton": (
        "pallas_triton",
        A100._replace(**INT8 | {"compute_dtype": "float32"}),
        "engine.compute_dtype is float32",
    ),
    "no such backend": ("triton", TPU, "there are: reference, "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_was_asked_for_and_cannot_serve_is_refused(case):
    name, needs, reason = REFUSED[case]
    with pytest.raises(ConfigError, match=f"engine.attention is '{name}'.*{reason}"):
        choose(name, needs)


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("pallas_tpu", TPU),
        ("pallas_gpu", H200),
        ("pallas_tpu", TPU._replace(**INT8 | {"page_size": 128})),
        ("pallas_gpu", H200._replace(**INT8 | {"page_size": 32})),
        ("pallas_triton", A100),
        ("pallas_triton", A100._replace(capability="8.9", head_dim=256, page_size=24)),
        ("pallas_triton", A100._replace(dtype="float32")),
        ("pallas_triton", A100._replace(**INT8)),
        ("pallas_triton", H200),
    ],
)
def test_what_was_asked_for_and_can_serve_is_taken(name, needs):
    assert choose(name, needs) == name
    assert choose("reference", needs) == "reference"


def test_auto_takes_the_best_of_the_platform_and_says_so(caplog, monkeypatch):
    monkeypatch.setattr("jaxinfer.kernels.native.refusal", lambda: "")
    caplog.set_level(logging.INFO)
    assert choose(AUTO, TPU) == "pallas_tpu"
    assert "attention: pallas_tpu" in caplog.text
    assert choose(AUTO, H200) == "pallas_gpu"
    assert choose(AUTO, CPU) == pick(AUTO, CPU) == "native"
    monkeypatch.setattr("jaxinfer.kernels.native.refusal", lambda: "no compiler")
    assert choose(AUTO, CPU) == pick(AUTO, CPU) == "reference"
    assert "not native, which can't be had: no compiler" in caplog.text


def test_auto_on_a_gpu_is_triton_where_the_kernel_for_hopper_cannot_serve(caplog):
    caplog.set_level(logging.INFO)
    assert choose(AUTO, A100) == pick(AUTO, A100) == "pallas_triton"
    assert "not pallas_gpu, which needs a Hopper GPU" in caplog.text
    assert "attention: pallas_triton, the best of" in caplog.text
    assert choose(AUTO, H200._replace(dtype="float32")) == "pallas_triton"
    assert choose(AUTO, H200._replace(**INT8)) == "pallas_triton"  # in pages of 16
    assert choose(AUTO, A100._replace(capability="7.5")) == "reference"
    assert "not pallas_triton, which needs a GPU of NVIDIA" in caplog.text


def test_a_jax_without_triton_is_said(monkeypatch):
    monkeypatch.setattr(pallas_triton, "plt", None)
    assert pick(AUTO, A100) == "reference"
    with pytest.raises(ConfigError, match="needs jax.experimental.pallas.triton, which jax .* has"):
        choose("pallas_triton", A100)


def test_auto_falls_back_and_says_why(caplog):
    assert choose(AUTO, TPU._replace(dtype="float16")) == "reference"
    assert "not pallas_tpu, which reads pages of bfloat16 or float32" in caplog.text


def test_the_setting_names_every_backend():
    assert set(get_args(get_type_hints(EngineConfig)["attention"])) == {AUTO, *BACKENDS}


def test_an_unknown_backend_is_refused():
    with pytest.raises(ConfigError, match="there are: reference"):
        backend("triton")


def test_an_engine_on_a_cpu_refuses_a_kernel_for_tpus():
    config = tiny.engine_config(attention="pallas_tpu")
    with pytest.raises(ConfigError, match="needs a TPU, and this is a cpu"):
        Device(None, tiny.MODEL, config)


def test_the_needs_of_this_process_are_those_of_a_cpu():
    needs = paged_attention.needs_here(dtype="bfloat16", head_dim=64, page_size=16, block=128)
    assert needs == Needs("cpu", "", "bfloat16", 64, 16, 128)
