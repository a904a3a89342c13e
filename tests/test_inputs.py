"""The packed batch: every field comes back as it went in, on both sides of the border."""

import jax
import numpy as np

from jaxinfer.inputs import Batch, inert_batch, pack, packed_width, unpack


def random_batch(rows=3, tokens=5, pages=7):
    rng = np.random.default_rng(0)
    empty = inert_batch(rows, tokens, pages_per_seq=pages, trash_slot=9, trash_page=99)
    return Batch(
        *(rng.integers(0, 2**31, field.shape, np.int32).view(field.dtype) for field in empty)
    )


def test_unpack_undoes_pack_in_numpy_and_under_jit():
    batch = random_batch()
    packed = pack(batch)
    assert packed.dtype == np.int32
    assert packed.shape == (3, packed_width(5, 7))
    for unpacked in (unpack(packed, tokens=5), jax.jit(lambda x: unpack(x, tokens=5))(packed)):
        for name, field in batch._asdict().items():
            other = np.asarray(getattr(unpacked, name))
            assert other.dtype == field.dtype
            assert np.array_equal(other.view(np.int32), field.view(np.int32)), name


def test_numpy_fields_are_views_into_the_packed_array():
    packed = pack(random_batch())
    fields = unpack(packed, tokens=5)
    fields.starts[:] = 42
    fields.temperature[1] = 0.5
    again = unpack(packed, tokens=5)
    assert again.starts.tolist() == [42, 42, 42]
    assert again.temperature[1] == 0.5
