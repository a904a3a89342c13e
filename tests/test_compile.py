"""The closed world: every program is built or loaded before the first step, and none after it."""

import ast
import hashlib
import json
import logging
import os
import re
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer
from jaxinfer import compile as programs_of
from jaxinfer import fingerprint, manifest
from jaxinfer.compile import ALLOCATE, Shape
from jaxinfer.config import CacheConfig
from jaxinfer.errors import CompileAfterStart, ConfigError, ProgramRefused
from jaxinfer.store import MAGIC, SUFFIX, find_store, open_store
from tests import tiny

SMALL = {"prefill_chunks": (8,), "max_seq_len": 64}
REQUESTS = tiny.random_requests(12, seed=7, max_prompt=30, max_tokens=12)


def make_engine(store=None, model=tiny.MODEL, **changes):
    config = tiny.engine_config(**(SMALL | changes))
    return tiny.Engine(tiny.params(), model, tiny.TokenText(), config, store=store)


def every_program(engine):
    return [*engine.programs.values(), engine.allocate]


def results(engine):
    return {
        name: (answer.tokens, answer.logprobs)
        for name, answer in tiny.run(engine, REQUESTS).items()
    }


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder of programs, the engine that wrote it, and what that engine answers."""
    folder = tmp_path_factory.mktemp("cache") / "programs"
    engine = make_engine(open_store(folder))
    return folder, engine, results(engine)


@pytest.fixture
def folder(kept, tmp_path):
    """A copy that a test may damage."""
    copy = tmp_path / "programs"
    open_store(copy)
    for path in kept[0].iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
        (copy / path.name).chmod(0o600)
    return copy


def test_a_program_for_each_chunk_size_each_row_count_and_the_cache(kept):
    config = tiny.engine_config(prefill_chunks=(8, 64), num_slots=40)
    assert [shape.name for shape in programs_of.shapes(config)] == [
        *("prefill-1x8", "prefill-1x64"),
        *("decode-8x1", "decode-32x1", "decode-40x1"),
    ]
    names = [program.shape.name for program in every_program(kept[1])]
    assert names == ["prefill-1x8", "decode-8x1", "allocate"]


def test_costs_add_up(kept):
    engine = kept[1]
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(engine._cache))
    weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(engine.params))
    for program in engine.programs.values():
        assert program.alias_bytes >= cache_bytes
        assert weight_bytes + cache_bytes <= program.argument_bytes
        assert cache_bytes <= program.output_bytes < cache_bytes + 4096
        assert program.temp_bytes > 0
        assert min(program.trace_s, program.compile_s) > 0
        assert (program.load_s, program.seconds) == (0, program.trace_s + program.compile_s)
    assert cache_bytes <= engine.allocate.output_bytes < cache_bytes + 4096


def test_a_second_start_neither_traces_nor_compiles_and_answers_with_the_same_bits(kept):
    before = programs_of.num_compiles()
    traced = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: traced.append(event)
    )
    engine = make_engine(open_store(kept[0]))
    assert programs_of.num_compiles() == before
    assert not [event for event in traced if "trace" in event or "compile" in event]
    assert all(program.load_s > 0 for program in every_program(engine))
    assert [program.key for program in every_program(engine)] == [
        program.key for program in every_program(kept[1])
    ]
    assert results(engine) == kept[2]
    for program in engine.programs.values():
        assert program.run.memory_analysis().alias_size_in_bytes == program.alias_bytes


def test_a_loaded_program_gives_its_cache_away(kept):
    engine = make_engine(open_store(kept[0]))
    old = engine._cache.k[0]
    tiny.run(engine, REQUESTS[:1])
    assert old.is_deleted()
    engine._recover(jax.errors.JaxRuntimeError("INTERNAL: planted"))
    assert engine.stats().num_compiles_after_start == 0
    assert results(engine) == kept[2]


@pytest.mark.parametrize(
    "changes",
    [
        {"num_slots": 9},
        {"max_seq_len": 96},
        {"attention_block": 64},
        {"cache": CacheConfig(page_size=8)},
        {"cache": CacheConfig(num_pages=9)},
        {"compute_dtype": "bfloat16"},
    ],
    ids=str,
)
def test_another_config_has_other_programs(kept, changes):
    one, other = tiny.engine_config(**SMALL), tiny.engine_config(**(SMALL | changes))
    store = open_store(kept[0])
    assert len(programs_of.stored_costs(tiny.MODEL, one, store)) == 3
    assert not programs_of.stored_costs(tiny.MODEL, other, store)


def test_another_model_place_or_version_has_other_programs(kept, monkeypatch):
    def stored(model=tiny.MODEL):
        store = open_store(kept[0])
        return len(programs_of.stored_costs(model, tiny.engine_config(**SMALL), store))

    assert stored() == 3
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
    assert stored() == 3


def test_the_key_changes_with_the_weights(kept):
    params = tiny.params()
    wider = params._replace(embedding=jnp.zeros((300, 64), jnp.float32))
    kinds = (params, wider, params._replace(embedding=params.embedding.astype(jnp.bfloat16)))
    assert len({fingerprint.arguments_digest(kind) for kind in kinds}) == 3
    abstract = jax.tree.map(programs_of._abstract_leaf, params)
    assert fingerprint.arguments_digest(abstract) == fingerprint.arguments_digest(params)


def test_all_code_that_a_program_can_come_from_is_part_of_its_key():
    root = Path(jaxinfer.__file__).parent
    seen, todo = set(), ["step", "compile"]
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
    assert "kernels.paged_attention.reference" in seen
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
    config, params = tiny.engine_config(**SMALL), tiny.params()
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
    prefill, decode = (next(folder.glob(f"{kind}-*{SUFFIX}")) for kind in ("prefill", "decode"))
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
        allocate = programs_of.build_allocate(
            tiny.params(), tiny.MODEL, tiny.engine_config(**SMALL), store=store
        )
        assert "can't be loaded" in caplog.text
        assert allocate.load_s == 0
        jax.block_until_ready(allocate.run())


def test_others_must_not_be_able_to_write_programs(folder, tmp_path, caplog):
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    path = next(folder.glob(f"decode-*{SUFFIX}"))
    path.chmod(0o620)
    config = tiny.engine_config(**SMALL)
    assert len(programs_of.stored_costs(tiny.MODEL, config, open_store(folder))) == 2
    assert "has mode 0620" in caplog.text
    target = tmp_path / "elsewhere"
    path.rename(target)
    path.symlink_to(target)
    assert len(programs_of.stored_costs(tiny.MODEL, config, open_store(folder))) == 2
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
    allocate = programs_of.build_allocate(
        tiny.params(), tiny.MODEL, tiny.engine_config(**SMALL), store=store
    )
    assert allocate.load_s == 0
    assert "can't be kept: [Errno 28]" in caplog.text
    assert list(store.folder.iterdir()) == []


def test_writers_at_the_same_time_leave_one_whole_file(tmp_path, caplog):
    store = open_store(tmp_path / "programs")
    config = tiny.engine_config(**SMALL)

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
    monkeypatch.setattr("jaxinfer.store.MAX_FILES", 2)
    open_store(folder).prune()
    assert sorted(folder.iterdir()) == sorted([*used[1:], fresh])


def test_the_manifest_lists_everything_and_comes_back_the_same(kept, tmp_path):
    engine = kept[1]
    config = engine.config
    written = manifest.describe(every_program(engine), tiny.MODEL, config)
    path = tmp_path / "manifest.json"
    manifest.write(written, path)
    assert manifest.read(path) == written
    entry = json.loads(path.read_text())["programs"][1]
    assert (entry["name"], entry["phase"], entry["rows"], entry["tokens"]) == (
        *("decode-8x1", "decode"),
        *(8, 1),
    )
    assert all(entry[f"{part}_bytes"] > 0 for part in ("argument", "output", "alias", "temp"))
    stored = programs_of.stored_costs(tiny.MODEL, config, open_store(kept[0])).values()
    again = manifest.describe(stored, tiny.MODEL, config)
    assert (again.digest, manifest.compare(written, again)) == (written.digest, ())


def test_manifests_say_what_differs(kept):
    engine = kept[1]
    one = manifest.describe(every_program(engine), tiny.MODEL, engine.config)
    other_engine = make_engine(num_slots=9)
    other = manifest.describe(every_program(other_engine), tiny.MODEL, other_engine.config)
    lines = manifest.compare(one, other)
    assert lines[0] == "engine.num_slots: 8 -> 9"
    assert "decode-16x1: new" in lines
    assert "decode-16x1: gone" in manifest.compare(other, one)
    assert any(re.match(r"prefill-1x8: argument_bytes \d+ -> \d+", line) for line in lines)
    assert one.digest != other.digest


def test_a_damaged_manifest_is_refused(kept, tmp_path):
    path = tmp_path / "manifest.json"
    manifest.write(
        manifest.describe(every_program(kept[1]), tiny.MODEL, kept[1].config), path
    )
    text = path.read_text()
    for wrong in (
        *("", "[]", "{}", text[:-20]),
        text.replace('"num_slots": 8', '"num_slots": 7'),
        text.replace('"format": 1', '"format": 2'),
        text.replace('"temp_bytes"', '"tmp_bytes"'),
    ):
        path.write_text(wrong)
        with pytest.raises(ProgramRefused):
            manifest.read(path)
    with pytest.raises(ProgramRefused, match="can't be read"):
        manifest.read(tmp_path / "none.json")


def compile_something():
    jax.jit(lambda x: x * 3 + 1)(1.0)


def plant(engine, action):
    """Has an engine do something in its next decode."""
    shape = Shape("decode", 8, 1)
    program = engine.programs[shape]
    left = [1]

    def run(params, cache, packed):
        if left:
            left.pop()
            action()
        return program.run(params, cache, packed)

    engine.programs[shape] = program.__class__(**{**vars(program), "run": run})


def test_a_compile_in_a_step_raises_once_and_is_counted(kept, caplog):
    engine = make_engine(open_store(kept[0]))
    plant(engine, compile_something)
    engine.submit(tiny.make_request("one", [1, 2, 3]))
    with pytest.raises(CompileAfterStart, match=r"1 programs were compiled .*<lambda>"):
        for _ in range(5):
            engine.step()
    assert engine.stats().num_compiles_after_start == 1
    assert "compiled in a step" in caplog.text
    tiny.run(engine, [])
    assert engine.stats().num_compiles_after_start == 1


def test_a_lenient_engine_counts_a_compile_and_goes_on(kept, caplog):
    engine = make_engine(open_store(kept[0]), strict_compiles=False)
    assert engine.programs[Shape("decode", 8, 1)].load_s > 0, "strictness changes no program"
    plant(engine, compile_something)
    assert results(engine) == kept[2]
    assert engine.stats().num_compiles_after_start == 1


def test_compiles_elsewhere_are_not_the_engines(kept):
    engine = make_engine(open_store(kept[0]))

    def on_another_thread():
        thread = threading.Thread(target=compile_something)
        thread.start()
        thread.join()

    before = programs_of.num_compiles()
    plant(engine, on_another_thread)
    engine.submit(tiny.make_request("one", [1, 2, 3]))
    while engine.has_work:
        engine.step()
        compile_something()  # between steps, on the engine's own thread
    assert programs_of.num_compiles() > before + 2
    assert engine.stats().num_compiles_after_start == 0


def test_mixed_requests_compile_nothing():
    engine = tiny.make_engine()
    tiny.run(engine, tiny.random_requests(500, seed=11, max_prompt=100, max_tokens=12), arrivals_per_step=3)
    assert engine.stats().num_compiles_after_start == 0


@pytest.mark.full
def test_ten_thousand_mixed_requests_compile_nothing():
    engine = tiny.make_engine(num_slots=32, cache=CacheConfig(num_pages=200))
    for number in range(10):
        requests = tiny.random_requests(1000, seed=number, max_tokens=20)
        tiny.run(engine, requests, arrivals_per_step=5)
    assert engine.stats().num_preemptions > 0
    assert engine.stats().num_compiles_after_start == 0


def test_the_cache_comes_from_a_program_too(kept):
    engine = make_engine(open_store(kept[0]))
    assert engine.allocate.shape == ALLOCATE
    cache = engine.allocate.run()
    addresses = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache)]
    assert len(set(addresses)) == len(addresses)
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(cache))
