"""What crosses the border between host and device: one batch in, one output back."""

import functools
from typing import Any, NamedTuple

import numpy as np

from jaxinfer.dims import Leaf

MAX_BANNED = 16  # token ids that one row can forbid


class Batch(NamedTuple):
    """Every decision of the host for one step; B rows of T tokens, of which `lengths` are real.

    A row with length 0 is inert: it reads nothing, writes to the trash page, and its output means
    nothing. All fields are data: no value of them changes the program.
    """

    tokens: Leaf  # i32 [B, T]
    take_last: Leaf  # i32 [B]: 1 takes the slot's last sampled token, which lies on the device
    slots: Leaf  # i32 [B]: whose last token this is; num_slots for an inert row
    starts: Leaf  # i32 [B]: position of the row's first token
    lengths: Leaf  # i32 [B]: real tokens of the row
    sample: Leaf  # i32 [B]: 1 keeps the sampled token as the slot's last one
    temperature: Leaf  # f32 [B]: 0 is greedy
    top_k: Leaf  # i32 [B]: 0 keeps all
    top_p: Leaf  # f32 [B]: 1 keeps all
    min_p: Leaf  # f32 [B]: 0 keeps all
    seed: Leaf  # u32 [B, 2]: low and high half
    banned: Leaf  # i32 [B, MAX_BANNED]: forbidden token ids, -1 for none
    page_table: Leaf  # i32 [B, M]: the row's pages in order; any page id where there is none


class StepOutput(NamedTuple):
    """What a step returns to the host."""

    tokens: Leaf  # i32 [B]: the next token of each row; -1 where the logits are not finite
    logprobs: Leaf  # f32 [B]: its log probability under the model, before temperature and cuts


class Scores(NamedTuple):
    """What scoring a chunk returns: of each given token, as the one after its place."""

    logprobs: Leaf  # f32 [B, T]
    is_likeliest: Leaf  # bool [B, T]: no other token has a higher one


class _Column(NamedTuple):
    """Where one field lies in a packed row."""

    field: str
    width: int
    dtype: type
    is_flat: bool


def inert_batch(
    rows: int, tokens: int, *, pages_per_seq: int, trash_slot: int, trash_page: int
) -> Batch:
    """A batch of inert rows, in NumPy, for the host to fill in."""
    return Batch(
        tokens=np.zeros((rows, tokens), np.int32),
        take_last=np.zeros(rows, np.int32),
        slots=np.full(rows, trash_slot, np.int32),
        starts=np.zeros(rows, np.int32),
        lengths=np.zeros(rows, np.int32),
        sample=np.zeros(rows, np.int32),
        temperature=np.zeros(rows, np.float32),
        top_k=np.zeros(rows, np.int32),
        top_p=np.ones(rows, np.float32),
        min_p=np.zeros(rows, np.float32),
        seed=np.zeros((rows, 2), np.uint32),
        banned=np.full((rows, MAX_BANNED), -1, np.int32),
        page_table=np.full((rows, pages_per_seq), trash_page, np.int32),
    )


def packed_width(tokens: int, pages_per_seq: int) -> int:
    """Columns of a packed batch."""
    return sum(column.width for column in _columns(tokens, pages_per_seq))


def pack(batch: Batch) -> np.ndarray:
    """One i32 [B, W] array: a step is dispatched with one small transfer instead of thirteen."""
    rows = len(batch.slots)
    return np.concatenate(
        [np.ascontiguousarray(field).view(np.int32).reshape(rows, -1) for field in batch], axis=1
    )


def unpack(packed: Any, *, tokens: int) -> Batch:
    """The batch in a packed array; `packed` may be a NumPy array or one that is being traced."""
    fixed = packed_width(tokens, 0)
    fields, start = {}, 0
    for column in _columns(tokens, packed.shape[1] - fixed):
        part = packed[:, start : start + column.width]
        part = part if column.dtype is np.int32 else part.view(column.dtype)
        fields[column.field] = part[:, 0] if column.is_flat else part
        start += column.width
    return Batch(**fields)


@functools.cache
def _columns(tokens: int, pages_per_seq: int) -> tuple[_Column, ...]:
    widths = {"tokens": tokens, "seed": 2, "banned": MAX_BANNED, "page_table": pages_per_seq}
    dtypes = {
        "temperature": np.float32,
        "top_p": np.float32,
        "min_p": np.float32,
        "seed": np.uint32,
    }
    return tuple(
        _Column(name, widths.get(name, 1), dtypes.get(name, np.int32), name not in widths)
        for name in Batch._fields
    )
