"""Attention in C++: the same bits however a prompt is cut, int8 pages, and an engine with it."""

import resource
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import cache as paged
from jaxinfer.engine import Engine
from jaxinfer.engine_config import CacheConfig, EngineConfig
from jaxinfer.kernels import native as library
from jaxinfer.kernels.paged_attention import rounded
from jaxinfer.store import open_store
from tests import tiny
from tests.closed_world import SMALL
from tests.kernels.attention import Case, make, relative_error, run

pytestmark = pytest.mark.skipif(
    bool(library.refusal()), reason=f"no native kernels: {library.refusal()}"
)
WIDE = {"head_dim": 48, "block": 32, "longest": 256}
CASES = {
    "more queries than a piece holds": Case(((3, 80), (0, 17)), 1, 3, **WIDE),
    "more heads than a piece holds": Case(((30, 2), (64, 1)), 1, 64, **WIDE),
    "a window over an edge": Case(((60, 70), (0, 100)), 2, 2, window=40, **WIDE),
    "a window of one": Case(((100, 9),), 1, 2, window=1, **WIDE),
    "empty rows": Case(((5, 1), (0, 0), (63, 1), (64, 1), (127, 1)), 2, 3, **WIDE),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_it_matches_float64_whatever_free_pages_hold(case, dtype):
    call, expected = make(CASES[case], dtype)
    assert relative_error(run("native", call, CASES[case]), expected) < 1e-5


@pytest.mark.parametrize("window", [0, 40])
def test_a_querys_bits_are_the_same_however_a_prompt_is_cut(window):
    """A chunk of 80 tokens, the same in chunks of 1, 7, 16 and 64, and beside other rows."""
    case = Case(((0, 5), (23, 80), (40, 61)), 1, 3, window=window, **WIDE)
    call, _ = make(case, "bfloat16", poison=0.0)
    whole = run("native", call, case)
    for size in (1, 7, 16, 64):
        for first in range(0, 80, size):
            count = min(size, 80 - first)
            part = call._replace(
                q=jnp.asarray(np.asarray(call.q)[1:2, first : first + size]),
                page_table=call.page_table[1:2],
                starts=call.starts[1:2] + first,
                lengths=jnp.asarray([count], jnp.int32),
            )
            found = run("native", part, case)
            assert found[0, :count].tobytes() == whole[1, first : first + count].tobytes()


def test_rows_that_share_pages_get_the_bits_that_each_gets_alone():
    """Some share three blocks of 64, some one, some end in what they share, one is inert."""
    ends = (250, 230, 192, 191, 70, 64, 240, 0, 255, 199, 130)
    case = Case(tuple((end, int(end > 0)) for end in ends), 2, 3, **WIDE)
    call, _ = make(case, "bfloat16", poison=0.0)
    table = np.array(call.page_table)
    for row, num_shared in {1: 12, 2: 12, 3: 11, 4: 4, 5: 4, 8: 13, 9: 8, 10: 8}.items():
        table[row, :num_shared] = table[0, :num_shared]
    call = call._replace(page_table=jnp.asarray(table))
    together = run("native", call, case)
    for row in range(len(ends)):
        own = (slice(row, row + 1),)
        alone = call._replace(
            q=call.q[own],
            page_table=call.page_table[own],
            starts=call.starts[own],
            lengths=call.lengths[own],
        )
        assert run("native", alone, case).tobytes() == together[row].tobytes(), ends[row]
    assert (together[np.array(ends) > 0] != 0).any(axis=(1, 2, 3)).all()


def test_pages_in_int8_are_what_their_codes_stand_for():
    case = Case(((0, 5), (60, 17), (12, 0), (100, 1), (191, 1)), **WIDE)
    call, expected = make(case, "float32")
    pages = [rounded.pack(pool) for pool in (call.k_pages, call.v_pages)]
    values = [rounded.unpack(pool[..., :-4], pool[..., -4:], "float32") for pool in pages]
    out = run("native", call._replace(k_pages=pages[0], v_pages=pages[1]), case)
    plain = run("native", call._replace(k_pages=values[0], v_pages=values[1]), case)
    assert out.tobytes() == plain.tobytes()
    assert 1e-4 < relative_error(out, expected) < 0.05


def test_what_is_not_finite_stays_in_its_row():
    case = Case(((60, 1), (70, 1), (9, 1)), **WIDE)
    call, _ = make(case, "float32")
    clean = run("native", call, case)
    for bad in (np.nan, np.inf):
        q = np.array(call.q)
        q[1] = bad
        found = run("native", call._replace(q=jnp.asarray(q)), case)
        assert not np.isfinite(found[1]).any()
        assert np.delete(found, 1, 0).tobytes() == np.delete(clean, 1, 0).tobytes()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"starts": [0, 250]}, "row 1 is at positions 250 to 257, and its page table reaches to"),
        ({"starts": [-1, 0]}, "row 0 is at positions -1 to 6"),
        ({"lengths": [7, -2]}, "row 1 is at positions 0 to -2"),
        ({"page_table": 1 << 30}, "row 0 reads page 1073741824 of"),
        ({"page_table": -1}, "row 0 reads page -1 of"),
    ],
)
def test_what_is_not_there_is_an_error_and_not_read(changed, message):
    case = Case(((0, 7), (0, 7)), 2, 3, **WIDE)
    call, _ = make(case, "bfloat16")
    new = {
        name: jnp.broadcast_to(jnp.asarray(value, jnp.int32), getattr(call, name).shape)
        for name, value in changed.items()
    }
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        run("native", call._replace(**new), case)


def test_pages_that_a_row_does_not_reach_may_have_any_number():
    """Behind its end, before its window, and in a row of no tokens."""
    case = Case(((150, 3), (0, 0)), 2, 3, window=20, **WIDE)
    call, expected = make(case, "float32")
    table = np.array(call.page_table)
    size = WIDE["longest"] // table.shape[1]
    table[0, : 128 // size], table[0, -(-153 // size) :], table[1] = -1, 1 << 30, 1 << 30
    out = run("native", call._replace(page_table=jnp.asarray(table)), case)
    assert relative_error(out, expected) < 1e-5


def test_a_start_reads_no_further_than_a_page_table_reaches(tmp_path):
    """The largest chunk is longer than any sequence; what is stored is run, not compared again."""
    config = tiny.engine_config(attention="native", max_seq_len=32, prefill_chunks=(8, 64))
    store = open_store(tmp_path / "programs")
    assert config.prefill_chunks[-1] > config.pages_per_seq * config.cache.page_size
    for is_recalled in (False, True):
        engine = Engine(tiny.params(), tiny.MODEL, tiny.TokenText(), config, store=store)
        assert engine.self_test.is_exact and engine.self_test.is_recalled == is_recalled
    assert all(one.load_s for one in engine.programs.values())


@pytest.mark.parametrize("pages", ["auto", "int8"])
def test_an_engine_keeps_its_promises_and_its_programs(pages, tmp_path):
    def make_engine() -> Engine:
        cache = CacheConfig(dtype=pages)
        config = tiny.engine_config(attention="native", cache=cache, **SMALL)
        store = open_store(tmp_path / "programs")
        return Engine(tiny.params(), tiny.MODEL, tiny.TokenText(), config, store=store)

    engine = make_engine()
    assert engine.self_test.is_exact, engine.self_test.broken_promises
    requests = tiny.random_requests(8, seed=3, max_prompt=30, max_tokens=12)
    together = tiny.run_alone_and_together(engine, requests, alone=3)
    assert engine.stats().num_compiles_after_start == 0
    again = make_engine()
    assert all(one.load_s for one in again.programs.values())
    assert tiny.run(again, requests[:1])["r0"].logprobs == together["r0"].logprobs


def test_pages_are_kept_as_the_reference_keeps_them():
    """A scatter of bfloat16 copies the pool on a CPU, whichever backend reads it."""
    plain, own = (
        paged.page_dtype(EngineConfig(attention=name)) for name in ("reference", "native")
    )
    assert plain == own


def test_pages_that_were_never_used_take_no_memory():
    def resident() -> int:
        pages = Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * resource.getpagesize()

    config = tiny.engine_config(attention="native", cache=CacheConfig(num_pages=100_000))
    before = resident()
    made = jax.block_until_ready(jax.jit(lambda: paged.make(tiny.MODEL, config))())
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(made))
    assert whole > 500_000_000 and resident() - before < whole / 10
    assert len({leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(made)}) == len(
        jax.tree.leaves(made)
    )
    assert not np.asarray(made.last_tokens).any()
