"""Products in native code: against whole numbers in NumPy, against XLA's, and who is chosen."""

import dataclasses
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import compile as programs_of
from jaxinfer.compile import compile_function
from jaxinfer.config import load
from jaxinfer.engine import Engine
from jaxinfer.errors import ConfigError
from jaxinfer.fingerprint import program_key, settle
from jaxinfer.kernels import native
from jaxinfer.kernels import products as kernels
from jaxinfer.quant import QTensor, products, quantise, using
from jaxinfer.store import open_store
from tests import tiny
from tests.closed_world import SMALL
from tests.kernels.spoilt import check_row_alone
from tests.quant.test_products import rotated
from tests.test_quantised import MODEL, quantised

ROOT = Path(__file__).parents[2]
ROWS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 128, 512)
SHAPES = [(576, 960), (1536, 576), (64, 12), (64, 13), (260, 100), (48, 17), (7, 5), (1, 3)]
HERE = kernels.Needs("cpu", num_devices=1, weights="int8")
needs_native = pytest.mark.skipif(
    bool(native.refusal()), reason=f"no native kernels: {native.refusal()}"
)


def weight_of(inner: int, outer: int, digits: int) -> QTensor:
    rng = np.random.default_rng(inner + outer)
    plain = rng.normal(size=(outer, inner)) * rng.uniform(0.01, 3, (outer, 1))
    plain[0] = 0
    made = quantise("w", plain.astype(np.float32), contract=1, digits=digits)
    return using(jax.tree.map(jnp.asarray, made), "native")


def activations(rows: int, inner: int) -> np.ndarray:
    """Rows of very different size, with outliers; one of zeros, and one almost so."""
    rng = np.random.default_rng(rows * inner)
    x = rng.normal(size=(rows, inner)) * 10.0 ** rng.integers(-3, 4, (rows, 1))
    x[:, rng.integers(inner)] *= 300
    if rows > 6:
        x[1], x[6] = 0, x[6] * 1e-36
    return x.astype(np.float32)


@functools.cache
def compiled(rows: int, inner: int, outer: int, digits: int, name: str = "native"):
    """A function of activations, by shape."""
    weight = using(weight_of(inner, outer, digits), name)
    run = functools.partial(products.project, contract=1)
    program = compile_function(run, jnp.ones((rows, inner)), weight)
    return lambda x: np.asarray(program(jnp.asarray(x), weight))


@needs_native
@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize(("inner", "outer"), SHAPES)
def test_sums_are_those_of_the_whole_numbers(inner, outer, digits):
    """Of activations that are whole numbers already, the largest so that none is rounded."""
    weight = dataclasses.replace(weight_of(inner, outer, digits), block=1)
    top = 127 if digits == 1 else 127 * 257
    rng = np.random.default_rng(0)
    for rows in (3, 40):
        whole = rng.integers(-top, top + 1, (rows, inner))
        whole[:, 0] = top
        found = np.asarray(products.project(jnp.asarray(whole, jnp.float32), weight, contract=1))
        wanted = whole @ np.asarray(weight.codes, np.int64).T * np.float64(weight.scale)
        size = np.linalg.norm(wanted, axis=1, keepdims=True)
        assert np.all(np.abs(found - wanted) <= 1e-6 * (np.abs(wanted) + (digits - 1) * size))
        assert not found[:, 0].any(), "an output without weights is zero"


@needs_native
@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize(("inner", "outer"), [(576, 960), (260, 100), (7, 5)])
def test_a_product_is_near_xlas(inner, outer, digits):
    """As near as rounding allows: a value that lies between two may go to either."""
    x = activations(40, inner)
    found, wanted = (compiled(40, inner, outer, digits, name)(x) for name in ("native", "xla"))
    size = np.linalg.norm(wanted, axis=1, keepdims=True)
    error = np.linalg.norm(found - wanted, axis=1, keepdims=True)
    assert np.all(error <= (0.01 if digits == 1 else 1e-4) * size)
    assert not found[1].any() and not found[6].any()


@needs_native
def test_rotation_is_the_hadamard_matrix():
    """Through a weight that is the identity, with all the digits that there are."""
    for inner in (2, 8, 16, 32, 128, 192):
        block = min(128, inner & -inner)
        weight = QTensor(
            jnp.eye(inner, dtype=jnp.int8), jnp.ones(inner), digits=2, block=block, product="native"
        )
        x = np.random.default_rng(inner).normal(size=(5, inner)).astype(np.float32)
        found = np.asarray(products.project(jnp.asarray(x), weight, contract=1))
        np.testing.assert_allclose(found, rotated(x, block).reshape(5, inner), atol=2e-4)


@needs_native
@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize(("inner", "outer"), [(576, 100), (48, 17), (7, 5)])
def test_a_rows_bits_are_the_same_in_every_number_of_rows(inner, outer, digits):
    x = activations(512, inner)
    whole = compiled(512, inner, outer, digits)(x)
    for rows in ROWS:
        run = compiled(rows, inner, outer, digits)
        assert run(x[:rows]).tobytes() == whole[:rows].tobytes(), rows
        assert run(x[-rows:]).tobytes() == whole[-rows:].tobytes(), rows
    order = np.random.default_rng(0).permutation(512)
    assert compiled(512, inner, outer, digits)(x[order]).tobytes() == whole[order].tobytes()
    for number in (0, 1, 6, 100, 511):
        alone = compiled(1, inner, outer, digits)(x[number : number + 1])
        assert alone.tobytes() == whole[number].tobytes(), number


@needs_native
@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize("rows", [3, 40])
def test_what_is_not_finite_stays_so_in_its_row_alone(rows, digits):
    x, run = activations(rows, 576), compiled(rows, 576, 100, digits)
    check_row_alone(run, x)


@needs_native
def test_an_engine_with_native_products_keeps_its_promises(tmp_path):
    def make() -> Engine:
        config = tiny.engine_config(compute_dtype="bfloat16", products="native", **SMALL)
        return Engine(
            quantised(), MODEL, tiny.TokenText(), config, store=open_store(tmp_path / "programs")
        )

    engine = make()
    assert engine.config.products == "native" and engine.self_test.is_exact
    target = native.library().target("product")
    assert all(target in (one.text() or "") for one in engine.programs.values())
    requests = tiny.random_requests(8, seed=3, max_prompt=30, max_tokens=12)
    together = tiny.run_alone_and_together(engine, requests, alone=3)
    assert engine.stats().num_compiles_after_start == 0
    before = programs_of.num_compiles()
    again = make()
    assert programs_of.num_compiles() == before, "every program came out of the store"
    assert all(one.load_s for one in again.programs.values())
    assert tiny.run(again, requests[:3])["r0"].tokens == together["r0"].tokens


@needs_native
def test_a_stored_program_is_one_of_this_code(monkeypatch):
    """Programs of XLA's products, of native ones, and of other native ones have other keys."""

    def key(name: str) -> object:
        engine = tiny.engine_config(products=name)
        return program_key("x", MODEL, engine, arguments=(), devices=jax.devices()[:1])["engine"]

    assert key("auto") == key("native") != key("xla")
    before = key("native")
    monkeypatch.setattr(native, "library", lambda: native.Library("another"))
    assert key("native") != before


def test_bfloat16_is_native_where_the_processor_has_it(monkeypatch):
    floats = HERE._replace(weights="bfloat16")
    monkeypatch.setattr(native, "refusal", lambda: "")
    monkeypatch.setattr(native, "_cpu_flags", lambda: {*native.NEEDED, "avx512_bf16"})
    assert kernels.choose("auto", floats) == ("native", "")
    monkeypatch.setattr(native, "_cpu_flags", lambda: set(native.NEEDED))
    assert kernels.choose("auto", floats) == ("xla", "this processor has no avx512_bf16")
    assert kernels.choose("auto", HERE) == ("native", "")
    with pytest.raises(ConfigError, match="no avx512_bf16"):
        kernels.choose("native", floats)


def test_who_multiplies_is_chosen_by_what_can(monkeypatch):
    monkeypatch.setattr(native, "refusal", lambda: "")
    assert kernels.choose("auto", HERE) == ("native", "")
    assert kernels.choose("native", HERE) == ("native", "")
    assert kernels.choose("xla", HERE) == ("xla", "")
    assert kernels.choose("native", HERE._replace(weights="float32")) == ("xla", "")
    for needs, reason in (
        (HERE._replace(platform="gpu"), "this is a gpu"),
        (HERE._replace(num_devices=2), "2 devices share"),
    ):
        assert kernels.choose("auto", needs).name == "xla"
        with pytest.raises(ConfigError, match=f"engine.products is 'native'.*{reason}"):
            kernels.choose("native", needs)
    with pytest.raises(ConfigError, match="there are: auto, native, xla"):
        kernels.choose("openvino", HERE)
    with pytest.raises(ConfigError, match="engine.products"):
        load("engine.products=fast")


@pytest.mark.parametrize("lacking", ["compiler", "processor", "working compiler"])
def test_where_native_code_cannot_be_built_xla_multiplies_and_says_why(
    lacking, monkeypatch, tmp_path
):
    """One that asked for native code is refused."""
    if lacking != "processor":
        monkeypatch.setattr(native, "_cpu_flags", lambda: set(native.NEEDED))
        monkeypatch.setattr("platform.machine", lambda: "x86_64")
    if lacking == "compiler":
        monkeypatch.setattr("shutil.which", lambda name: None)
        reason = "no C\\+\\+ compiler is installed"
    elif lacking == "processor":
        monkeypatch.setattr(native, "_cpu_flags", lambda: {"avx2"})
        reason = "this processor has no avx512f"
    else:
        broken = tmp_path / "c++"
        broken.write_text("#!/bin/sh\n[ $1 = --version ] || { echo 'error: no' >&2; exit 1; }\n")
        broken.chmod(0o700)
        monkeypatch.setattr("shutil.which", lambda name: str(broken))
        reason = "error: no"
    monkeypatch.setattr(native, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(native, "_load", functools.cache(native._load.__wrapped__))
    settled = settle(MODEL, tiny.engine_config(), jax.devices()[:1])
    assert settled.engine.products == "xla"
    assert re.search(reason, settled.reason)
    with pytest.raises(ConfigError, match=f"can't be: .*{reason}"):
        kernels.choose("native", HERE)
    with pytest.raises(ConfigError, match=reason):
        native.library()


@needs_native
def test_what_others_can_write_to_is_not_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "cache_dir", lambda: tmp_path)
    wanted = native.plan()
    assert isinstance(wanted, native.Plan)
    wanted.path.parent.mkdir()
    wanted.path.write_bytes(b"")
    wanted.path.chmod(0o777)
    assert "can be written by others" in str(native._load.__wrapped__())
    wanted.path.chmod(0o700)
    assert "can't be built or loaded" in str(native._load.__wrapped__()), "it is no library"


@needs_native
@pytest.mark.full
def test_native_code_is_built_once_and_whole_whoever_asks(tmp_path):
    """Four processes at once in an empty folder all get the same file, and leave no other."""
    script = "from jaxinfer.kernels import native; print(native.library().digest)"
    environ = {"JAXINFER_CACHE_DIR": str(tmp_path), "JAX_PLATFORMS": "cpu", "PATH": os.defpath}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script], env=environ, cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    said = {one.communicate()[0].strip() for one in running}
    assert len(said) == 1 and "" not in said
    assert [path.name for path in (tmp_path / "native").iterdir()] == [f"kernels-{said.pop()}.so"]


def test_a_step_takes_xlas_products_where_nobody_chose():
    """Functions of step without an engine: engine.products = auto is nobody's name."""
    tree = using(quantised(), "auto")
    assert tree.embedding.product == "auto"
    x = jnp.ones((2, MODEL.d_model))
    found, wanted = (
        np.asarray(products.project(x, using(leaf, name).head, contract=1))
        for leaf, name in ((tree, "auto"), (quantised(), "xla"))
    )
    assert found.tobytes() == wanted.tobytes()
