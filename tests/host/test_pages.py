"""The page pool: all or none, lowest first, everything adds up."""

import pytest

from jaxinfer.errors import OutOfPages
from jaxinfer.host.pages import PagePool


def test_take_gives_the_lowest_ids_all_or_none():
    pool = PagePool(5)
    assert pool.take(3) == [0, 1, 2]
    pool.release([1])
    with pytest.raises(OutOfPages, match="asked for 4 pages, 3 of 5 are free"):
        pool.take(4)
    assert pool.num_available == 3
    assert pool.take(2) == [1, 3]
    assert (pool.num_owned, pool.peak_owned) == (4, 4)
    assert pool.take(0) == []


def test_a_page_can_not_be_released_twice():
    pool = PagePool(2)
    pages = pool.take(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="nobody owned"):
        pool.release(pages)


def test_integrity_is_checked_against_the_owners():
    pool = PagePool(4)
    first, second = pool.take(1), pool.take(2)
    pool.check_integrity([*second, *first])
    with pytest.raises(AssertionError, match="owners are"):
        pool.check_integrity(first)
    with pytest.raises(AssertionError, match="owners are"):
        pool.check_integrity([*first, *second, *second])
