"""Prompts into chunks: the programs that take a number of tokens with the least work."""

import itertools

import pytest

from jaxinfer.host.plan import CHUNK_OVERHEAD, chunk_size


def cover(num_tokens, sizes):
    """The chunks that a prompt of so many tokens goes through."""
    found = []
    while num_tokens > 0:
        found.append(chunk_size(num_tokens, sizes))
        num_tokens -= found[-1]
    return found


def least_work(num_tokens, sizes):
    """Every multiset of chunks, up to as many of each as could be wanted."""
    most = [range(-(-num_tokens // size) + 1) for size in sizes]
    enough = (
        counts
        for counts in itertools.product(*most)
        if sum(count * size for count, size in zip(counts, sizes, strict=True)) >= num_tokens
    )
    return min(
        sum(count * (size + CHUNK_OVERHEAD) for count, size in zip(counts, sizes, strict=True))
        for counts in enough
    )


@pytest.mark.parametrize("sizes", [(32, 128, 512), (8, 16), (16, 96, 160), (64,), (1, 40)])
def test_below_the_largest_chunk_no_cover_is_less_work(sizes):
    for num_tokens in range(1, sizes[-1] + 1):
        found = cover(num_tokens, sizes)
        assert sum(size + CHUNK_OVERHEAD for size in found) == least_work(num_tokens, sizes)
        assert found == sorted(found, reverse=True)


def test_padding_is_weighed_against_another_program():
    sizes = (32, 128, 512)
    assert cover(32, sizes) == [32] and cover(33, sizes) == [32, 32]
    assert cover(140, sizes) == [128, 32] and cover(400, sizes) == [512]
    assert cover(1100, sizes) == [512, 512, 128]
