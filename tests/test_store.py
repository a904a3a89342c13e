"""The store of programs: a file is used when it is whole, private and made for exactly this."""

import ast
import hashlib
import logging
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer
from jaxinfer import compile as programs_of
from jaxinfer import fingerprint
from jaxinfer.compile import ALLOCATE, Shape
from jaxinfer.engine_config import CacheConfig
from jaxinfer.errors import ConfigError
from jaxinfer.kernels.paged_attention import BACKENDS
from jaxinfer.store import MAGIC, SUFFIX, find_store, open_store
from tests import tiny
from tests.closed_world import CONFIG, SMALL, every_program, kept, make_engine, results


@pytest.fixture
def folder(tmp_path):
    """A copy that a test may damage."""
    copy = tmp_path / "programs"
    open_store(copy)
    for path in kept().folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
        (copy / path.name).chmod(0o600)
    return copy


def num_programs() -> int:
    return len(every_program(kept().engine))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_slots": 9},
        {"max_seq_len": 96},
        {"attention_block": 64},
        {"attention_tiles": (64, 512, 2)},
        {"cache": CacheConfig(page_size=8)},
        {"cache": CacheConfig(num_pages=9)},
        {"compute_dtype": "bfloat16"},
    ],
    ids=str,
)
def test_another_config_has_other_programs(changes):
    other = tiny.engine_config(**(SMALL | changes))
    store = open_store(kept().folder)
    assert len(programs_of.stored_costs(tiny.MODEL, CONFIG, store)) == num_programs()
    assert not programs_of.stored_costs(tiny.MODEL, other, store)


def test_another_model_place_or_version_has_other_programs(monkeypatch):
    def stored(model=tiny.MODEL):
        store = open_store(kept().folder)
        return len(programs_of.stored_costs(model, CONFIG, store))

    assert stored() == num_programs()
    assert not stored(tiny.MODEL.__class__(**{**vars(tiny.MODEL), "rope_theta": 5000.0}))
    for place, name, value in (
        (fingerprint, "processor", lambda: "another CPU"),
        (fingerprint, "source_digest", lambda: "another source"),
        (jax, "__version__", "0.0.1"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value)
            assert not stored()
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
        assert not stored()
    with jax.default_matmul_precision("highest"):
        assert not stored()
    assert stored() == num_programs()


def test_the_key_changes_with_the_weights():
    params = tiny.params()
    wider = params._replace(embedding=jnp.zeros((300, 64), jnp.float32))
    kinds = (params, wider, params._replace(embedding=params.embedding.astype(jnp.bfloat16)))
    assert len({fingerprint.arguments_digest(kind) for kind in kinds}) == 3
    abstract = jax.tree.map(programs_of._abstract_leaf, params)
    assert fingerprint.arguments_digest(abstract) == fingerprint.arguments_digest(params)


def test_all_code_that_a_program_can_come_from_is_part_of_its_key():
    root = Path(jaxinfer.__file__).parent
    # Backends of attention are imported by their names.
    seen = set()
    todo = ["step", "compile", *(f"kernels.paged_attention.{name}" for name in BACKENDS)]
    while todo:
        name = todo.pop()
        path = root / (name.replace(".", "/") + ".py")
        path = path if path.is_file() else root / name.replace(".", "/") / "__init__.py"
        if name in seen or not path.is_file():
            continue
        seen.add(name)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxinfer"):
                module = (node.module or "").removeprefix("jaxinfer").removeprefix(".")
                names = [f"{module}.{alias.name}".lstrip(".") for alias in node.names]
                todo += [module, *names] if module else names
    left_out = {name for name in seen if {name.split(".")[0], f"{name}.py"} & fingerprint.HOST_ONLY}
    assert "kernels.paged_attention.online" in seen
    assert left_out <= {"errors", "settings", "store"}


def damaged(path):
    """Every way in which a file can be wrong, with what the warning says."""
    content = path.read_bytes()
    start = len(MAGIC) + 32
    yield "empty", b"", "not a program of this version"
    yield "magic", b"jaxinfer program 0\n" + content[len(MAGIC) :], "not a program of this version"
    for cut in (len(MAGIC) + 7, start + 100, len(content) // 2, len(content) - 1):
        yield f"cut at {cut}", content[:cut], "damaged"
    places = np.random.default_rng(0).integers(len(MAGIC), len(content), 24)
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(place % 8)
        yield f"flip at {place}", bytes(flipped), "damaged"
    yield "longer", content + b"\0", "damaged"


def test_damaged_files_are_refused_rebuilt_and_replaced(folder, caplog):
    shape = Shape("decode", 8, 1)
    path = next(folder.glob(f"decode-8x1-*{SUFFIX}"))
    whole = path.read_bytes()
    config, params = CONFIG, tiny.params()
    for number, (what, content, reason) in enumerate(damaged(path)):
        path.write_bytes(content)
        caplog.clear()
        if number % 16:  # compiling each time would take long: the refusal is what matters
            costs = programs_of.stored_costs(tiny.MODEL, config, open_store(folder))
            assert shape not in costs, what
        else:
            built = programs_of.build(params, tiny.MODEL, config, store=open_store(folder))
            assert built[shape].load_s == 0, what
            assert path.read_bytes()[: len(MAGIC)] == MAGIC
            assert shape in programs_of.stored_costs(tiny.MODEL, config, open_store(folder))
        warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warnings) == 1 and reason in warnings[0].getMessage(), what
    path.write_bytes(whole)
    caplog.clear()
    assert results(make_engine(open_store(folder)))
    assert not caplog.records


def test_a_program_of_another_key_under_this_name_is_refused(folder, caplog):
    prefill, decode = (next(folder.glob(f"{kind}-*{SUFFIX}")) for kind in ("prefill", "decode-8x1"))
    decode.write_bytes(prefill.read_bytes())
    engine = make_engine(open_store(folder))
    assert engine.programs[Shape("decode", 8, 1)].load_s == 0
    assert engine.programs[Shape("prefill", 1, 8)].load_s > 0
    assert "was made for another arguments, program" in caplog.text


def test_whole_bytes_that_are_no_executable_are_refused(folder, caplog):
    store = open_store(folder)
    path = next(folder.glob(f"allocate-*{SUFFIX}"))
    body = path.read_bytes()[len(MAGIC) + 32 :]
    header_len = int.from_bytes(body[:4], "big")
    for executable in (b"", b"nonsense", body[4 + header_len :][:-1000]):
        forged = body[: 4 + header_len] + executable
        path.write_bytes(MAGIC + hashlib.sha256(forged).digest() + forged)
        caplog.clear()
        allocate = programs_of.build_allocate(tiny.params(), tiny.MODEL, CONFIG, store=store)
        assert "can't be loaded" in caplog.text
        assert allocate.load_s == 0
        jax.block_until_ready(allocate.run())


def test_others_must_not_be_able_to_write_programs(folder, tmp_path, caplog):
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    path = next(folder.glob(f"decode-*{SUFFIX}"))
    path.chmod(0o620)
    config, num_left = CONFIG, num_programs() - 1
    assert len(programs_of.stored_costs(tiny.MODEL, config, open_store(folder))) == num_left
    assert "has mode 0620" in caplog.text
    target = tmp_path / "elsewhere"
    path.rename(target)
    path.symlink_to(target)
    assert len(programs_of.stored_costs(tiny.MODEL, config, open_store(folder))) == num_left
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match="has mode 0777"):
        open_store(folder)
    assert find_store(folder) is None
    assert "programs are compiled at each start" in caplog.text
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ConfigError, match="can't be used"):
        open_store(blocked)


def test_a_store_that_can_not_be_written_costs_a_warning_only(tmp_path, monkeypatch, caplog):
    store = open_store(tmp_path / "programs")

    def full(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    allocate = programs_of.build_allocate(tiny.params(), tiny.MODEL, CONFIG, store=store)
    assert allocate.load_s == 0
    assert "can't be kept: [Errno 28]" in caplog.text
    assert list(store.folder.iterdir()) == []


def test_writers_at_the_same_time_leave_one_whole_file(tmp_path, caplog):
    store = open_store(tmp_path / "programs")
    config = CONFIG

    def build(_):
        return programs_of.build_allocate(tiny.params(), tiny.MODEL, config, store=store)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(build, range(8)))
    assert len(list(store.folder.iterdir())) == 1
    assert build(None).load_s > 0
    assert not caplog.records


def test_the_store_is_bounded_and_forgets_what_writers_left(folder, monkeypatch):
    stray = folder / f"decode-8x1-0{SUFFIX}.abc"
    fresh = folder / f"decode-8x1-0{SUFFIX}.def"
    for path in (stray, fresh):
        path.write_bytes(b"half")
    os.utime(stray, (0, 0))
    used = sorted(folder.glob(f"*{SUFFIX}"))
    os.utime(used[0], (1, 1))
    monkeypatch.setattr("jaxinfer.store.MAX_FILES", len(used) - 1)
    open_store(folder).prune()
    notes = folder.glob("*.verdict")
    assert sorted(folder.iterdir()) == sorted([*used[1:], fresh, *notes])


BESIDE_JAX_CACHE = """
import sys, pathlib, jax, jax.numpy as jnp
from jaxinfer import compile as programs_of, store
from tests import tiny
folder = pathlib.Path(sys.argv[1])
programs_of.use_compilation_cache(folder / "xla")
for name, is_loaded in (("a", False), ("b", False), ("a", True), ("b", False)):
    allocate = programs_of.build_allocate(
        jnp.zeros(1), tiny.MODEL, tiny.engine_config(), store=store.open_store(folder / name)
    )
    assert (allocate.load_s > 0) == is_loaded, name
    jax.block_until_ready(allocate.run())
    jax.clear_caches()
"""


def test_what_jax_had_in_its_own_cache_is_not_stored_without_its_code(tmp_path):
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", BESIDE_JAX_CACHE, str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "a").iterdir())) == 1
    assert not list((tmp_path / "b").iterdir())


BUILD_ONCE = """
import sys, pathlib, jax.numpy as jnp
from jaxinfer import compile as programs_of, store
from tests import tiny
programs_of.build_allocate(
    jnp.zeros(1), tiny.MODEL, tiny.engine_config(),
    store=store.open_store(pathlib.Path(sys.argv[1]))
)
"""


def test_two_processes_share_a_store(tmp_path):
    command = [sys.executable, "-c", BUILD_ONCE, str(tmp_path / "programs")]
    root = Path(__file__).parent.parent
    running = [
        subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert [process.communicate()[1] for process in running] == ["", ""]
    store = open_store(tmp_path / "programs")
    costs = programs_of.stored_costs(tiny.MODEL, tiny.engine_config(), store)
    assert list(costs) == [ALLOCATE]
    assert len(list(store.folder.iterdir())) == 1
