"""Tile sizes: those of the rule fit, chosen ones are kept or refused; files are read strictly."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from jaxinfer import fingerprint
from jaxinfer.device import Device
from jaxinfer.errors import ConfigError
from jaxinfer.kernels import paged_attention
from jaxinfer.kernels.paged_attention import Needs, tiles, tuned
from jaxinfer.kernels.paged_attention.tuned import Entry
from tests import tiny
from tests.kernels.attention import Case, interpreter, make, relative_error

GPU = Needs("gpu", "9.0", "bfloat16", head_dim=128, page_size=16, block=128)
TPU = GPU._replace(platform="tpu", capability="")
H200 = Entry("pallas_gpu", "NVIDIA H200", "bfloat16", 128, 4, 16, (64, 256, 3), 0.9)
V6E = Entry("pallas_tpu", "TPU v6e", "bfloat16", 128, 4, 16, (8, 64), 0.8)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("longest", [128, 2048, 131072])
def test_what_the_rule_says_could_have_been_chosen(head_dim, longest):
    needs = GPU._replace(head_dim=head_dim)
    sizes = tiles.gpu_tiles(longest, head_dim, block=128)
    assert tiles.misfit("pallas_gpu", tuple(sizes), needs) == ""
    for dtype in ("bfloat16", "float32", "int8"):
        small = tiles.triton_tiles(longest, head_dim, block=128, dtype=dtype)
        assert -(-longest // small.split) <= 16
        assert tiles.misfit("pallas_triton", tuple(small), needs._replace(dtype=dtype)) == ""
    found = tiles.tpu_tiles(512, 8, head_dim, block=128, dtype="bfloat16")
    assert tiles.misfit("pallas_tpu", tuple(found), TPU._replace(head_dim=head_dim)) == ""


@pytest.mark.parametrize(
    ("backend", "needs"), [("pallas_gpu", GPU), ("pallas_triton", GPU), ("pallas_tpu", TPU)]
)
def test_every_candidate_fits_and_is_taken_as_it_is(backend, needs):
    found = tiles.candidates(backend, needs, num_kv_heads=8, longest=2048)
    assert len(found) > 10 and len(set(found)) == len(found)
    for sizes in found:
        assert tiles.misfit(backend, sizes, needs) == ""
        if backend == "pallas_gpu":
            assert tiles.gpu_tiles(2048, 128, block=128, chosen=sizes) == sizes
        elif backend == "pallas_triton":
            assert tiles.triton_tiles(2048, 128, block=128, chosen=sizes) == sizes
        else:
            taken = tiles.tpu_tiles(4096, 8, 128, block=128, dtype="bfloat16", chosen=sizes)
            assert taken == sizes


def test_a_kernel_without_tiles_has_no_candidates():
    assert tiles.candidates("reference", GPU, num_kv_heads=8, longest=2048) == ()


def test_chosen_heads_are_a_bound_where_a_mesh_leaves_fewer():
    assert tiles.tpu_tiles(1, 2, 128, block=128, dtype="bfloat16", chosen=(8, 64)).heads == 2
    assert tiles.tpu_tiles(1, 6, 128, block=128, dtype="bfloat16", chosen=(4, 64)).heads == 3


def test_chosen_splits_grow_before_they_are_too_many():
    assert tiles.gpu_tiles(8192, 128, block=128, chosen=(64, 128, 2)).split == 128
    assert tiles.gpu_tiles(65536, 128, block=128, chosen=(64, 128, 2)).split == 1024


@pytest.mark.parametrize(
    ("backend", "sizes", "reason"),
    [
        ("reference", (64,), "has no tiles"),
        ("pallas_gpu", (64, 512), "takes 3 sizes of at least 1: keys, split, stages"),
        ("pallas_gpu", (64, 512, 0), "at least 1"),
        ("pallas_gpu", (32, 512, 2), "multiple of 64"),
        ("pallas_gpu", (64, 320, 2), "divide split"),
        ("pallas_gpu", (64, 512, 1), "at least 2"),
        ("pallas_gpu", (128, 512, 6), "bytes on the chip"),
        ("pallas_triton", (64, 48, 512, 4, 3), "powers of two"),
        ("pallas_triton", (8, 32, 512, 4, 3), "at least 16"),
        ("pallas_triton", (64, 32, 512, 32, 3), "warps at most 16"),
        ("pallas_triton", (64, 32, 320, 4, 3), "divide split"),
        ("pallas_triton", (64, 128, 512, 4, 5), "bytes on the chip"),
        ("pallas_tpu", (8, 20), "rows must be a multiple of 16"),
        ("pallas_tpu", (512, 256), "bytes on the chip"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_when_an_engine_is_built(backend, sizes, reason):
    config = tiny.engine_config(attention=backend, attention_block=128, attention_tiles=sizes)
    with pytest.raises(ConfigError, match=rf"engine.attention_tiles is \[.*{reason}"):
        tuned.settle(config, GPU, group=4)


def test_a_file_gives_an_engine_the_sizes_of_its_place(tmp_path):
    path = tmp_path / "tiles.toml"
    tuned.write(path, [H200, V6E])
    config = tiny.engine_config(attention="pallas_gpu", attention_block=128, tiles=str(path))
    settled = tuned.settle(config, GPU, group=4, device="NVIDIA H200")
    assert settled.attention_tiles == (64, 256, 3)
    given = tiny.engine_config(
        attention="pallas_gpu", attention_block=128, tiles=str(path), attention_tiles=(64, 512, 2)
    )
    assert tuned.settle(given, GPU, group=4, device="NVIDIA H200") == given
    plain = tiny.engine_config(attention="pallas_gpu", attention_block=128)
    assert tuned.settle(plain, GPU, group=4) == plain


def test_what_is_built_ahead_has_the_sizes_that_an_engine_takes(tmp_path, monkeypatch):
    here = jax.devices()
    path = tmp_path / "tiles.toml"
    tuned.write(path, [H200, replace(H200, device=here[0].device_kind, sizes=(128, 512, 2))])
    monkeypatch.setattr(fingerprint, "needs_of", lambda model, engine: GPU)
    config = tiny.engine_config(attention="pallas_gpu", attention_block=128, tiles=str(path))
    model = replace(tiny.MODEL, num_heads=8, num_kv_heads=2)
    settled = fingerprint.settle_here(model, config, here).engine
    assert settled.attention_tiles == (128, 512, 2)
    assert settled.attention == "pallas_gpu"


@pytest.mark.parametrize(
    ("changes", "device"),
    [
        ({}, "NVIDIA H100 80GB HBM3"),
        ({"head_dim": 64}, "NVIDIA H200"),
        ({"dtype": "float16"}, "NVIDIA H200"),
        ({"page_size": 32}, "NVIDIA H200"),
    ],
)
def test_sizes_of_another_place_are_refused(tmp_path, changes, device):
    path = tmp_path / "tiles.toml"
    tuned.write(path, [H200])
    config = tiny.engine_config(attention="pallas_gpu", attention_block=128, tiles=str(path))
    with pytest.raises(ConfigError, match=r"no sizes for pallas_gpu .*it has pallas_gpu on 'NVIDI"):
        tuned.settle(config, GPU._replace(**changes), group=4, device=device)


def test_sizes_from_a_file_must_fit_the_settings_too(tmp_path):
    path = tmp_path / "tiles.toml"
    tuned.write(path, [H200])
    config = tiny.engine_config(attention="pallas_gpu", attention_block=512, tiles=str(path))
    with pytest.raises(ConfigError, match=r"with \[64, 256, 3\] here; .*attention_block = 512"):
        tuned.settle(config, GPU._replace(block=512), group=4, device="NVIDIA H200")


def test_an_engine_whose_attention_has_no_tiles_refuses_a_file_of_them():
    config = tiny.engine_config(tiles="h200.toml")
    with pytest.raises(ConfigError, match="attention by reference has no tiles"):
        Device(tiny.params(), tiny.MODEL, config)


def test_what_is_written_is_read_back_and_other_places_stay(tmp_path):
    path = tmp_path / "tiles.toml"
    tuned.write(path, [H200])
    assert tuned.read(path) == (H200,)
    newer = Entry(**{**vars(H200), "sizes": (128, 512, 2)})
    tuned.write(path, [V6E, newer])
    assert set(tuned.read(path)) == {newer, V6E}


ENTRY = """[[tiles]]
backend = "pallas_gpu"
device = "NVIDIA H200"
dtype = "bfloat16"
head_dim = 128
group = 4
page_size = 16
sizes = [64, 256, 3]
"""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (ENTRY.replace("pallas_gpu", "triton"), "backend is 'triton'; kernels with tiles are"),
        (ENTRY.replace("group = 4\n", ""), "tiles 1: group is missing"),
        (ENTRY + "warps = 8\n", "unknown key warps"),
        (ENTRY.replace("128", '"128"'), "head_dim"),
        (ENTRY.replace("[64, 256, 3]", "[64, 256]"), "pallas_gpu takes keys, split, stages"),
        (ENTRY + ENTRY, "two entries for pallas_gpu on 'NVIDIA H200'"),
        ("tile = 3\n" + ENTRY, "unknown key tile"),
        ("tiles = 3\n", "must be a list of tables"),
        ("tiles = [3]\n", "must be a table"),
        ("[[tiles\n", "not valid TOML"),
    ],
)
def test_a_file_is_read_strictly(tmp_path, text, reason):
    path = tmp_path / "tiles.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=reason):
        tuned.read(path)


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="nowhere.toml: can't be read"):
        tuned.read("nowhere.toml")


@pytest.mark.parametrize(
    ("backend", "sizes"), [("pallas_gpu", (64, 128, 3)), ("pallas_tpu", (1, 32))]
)
def test_a_kernel_computes_the_same_with_chosen_sizes(backend, sizes):
    check(backend, sizes, Case(((0, 5), (60, 17), (150, 1)), window=40))


@pytest.mark.full
@pytest.mark.parametrize("backend", ["pallas_gpu", "pallas_triton", "pallas_tpu"])
def test_a_kernel_computes_the_same_with_one_candidate_in_four(backend):
    case = Case(((0, 5), (60, 17), (150, 1)), page_size=16, block=128, longest=256)
    needs = GPU._replace(head_dim=case.head_dim)
    for sizes in tiles.candidates(backend, needs, num_kv_heads=2, longest=case.longest)[::4]:
        check(backend, sizes, case)


def check(backend, sizes, case):
    call, expected = make(case, "bfloat16")
    with interpreter(backend):
        attend = paged_attention.backend(backend)
        out = attend(*call, block=case.block, window=case.window, tiles=sizes)
        assert relative_error(np.asarray(jax.block_until_ready(out)), expected) < 2e-2


@pytest.mark.full
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_candidate_for_a_gpu_lowers(head_dim):
    needs = GPU._replace(head_dim=head_dim)
    case = Case(((0, 1), (300, 1)), 2, 4, head_dim, page_size=16, block=128, longest=512)
    call, _ = make(case, "bfloat16")
    kinds = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in call]
    for sizes in tiles.candidates("pallas_gpu", needs, num_kv_heads=2, longest=case.longest):

        def attend(*call: Any, sizes: tuple[int, ...] = sizes) -> Any:
            return paged_attention.backend("pallas_gpu")(*call, block=case.block, tiles=sizes)

        text = jax.jit(attend).trace(*kinds).lower(lowering_platforms=("cuda",)).as_text()
        assert "@mosaic_gpu_v2(" in text
