"""The settings of one engine: what it holds and how it steps; read through jaxinfer.config."""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from jaxinfer.errors import ConfigError

Dtype = Literal["bfloat16", "float32"]
MIN_ROWS = 8  # below 8 rows a CPU matmul has other bits: design.md section 6


@dataclass(frozen=True)
class CacheConfig:
    """The page pool."""

    page_size: int = 16
    """Tokens in one page."""
    num_pages: int = 0
    """Pages in the pool, without the trash page; 0 gives every slot its longest sequence."""
    prefix: bool = True
    """Keep the pages of finished requests for others that begin the same way."""
    dtype: Literal["auto", "int8"] = "auto"
    """What keys and values are kept in. auto: engine.compute_dtype. int8: each head of each token
    by a scale of its own, in about half the memory of bfloat16: docs/quantisation.md."""


@dataclass(frozen=True)
class EngineConfig:
    """What one engine can hold and how it steps."""

    num_slots: int = 8
    """Sequences that decode at once."""
    max_seq_len: int = 2048
    """Longest sequence, prompt and output together, in tokens."""
    decode_rows: tuple[int, ...] = ()
    """Row counts of the decode programs; () means 1, 8, 32, 128... up to num_slots."""
    prefill_chunks: tuple[int, ...] = (32, 128, 512)
    """Token counts of the prefill programs, ascending; prompts are cut at the largest."""
    prefill_rows: tuple[int, ...] = (1, 4)
    """Row counts of the smallest prefill program, ascending from 1: so many pieces of prompts go
    into one program. Those with more tokens than the largest chunk are left out."""
    max_prefill_tokens: int = 512
    """Prefill work between two decode steps, in padded tokens (one chunk is always allowed)."""
    prefill_per_decode: int = 12
    """The same on average, for prompts of several chunks behind requests that decode: the next
    chunk waits until so many tokens for each decode step make up for the last one. 0: no wait."""
    shared_prefill_tokens: int = 64
    """The same in one step for a tenant that holds its share of the slots while others ask too."""
    max_waiting: int = 256
    """Requests that may wait; one more is refused."""
    batching: Literal["continuous", "static"] = "continuous"
    """continuous: a request gets a slot as soon as one is free. static: only once all are, and
    with all prompts of a batch in one step; to compare with."""
    compute_dtype: Dtype = "bfloat16"
    attention: Literal[
        "auto", "reference", "native", "pallas_tpu", "pallas_triton", "pallas_gpu"
    ] = "reference"
    """The kernel that attends: docs/kernels.md says which are proven where. auto: the platform's
    best that can serve the model. One that is named and can't is refused at the start."""
    attention_block: int = 128
    """Tokens that attention reduces at a time: a multiple of the page size."""
    tiles: str = ""
    """A file of `jaxinfer tune`: the kernel takes the tile sizes that were fastest on this device
    for these heads and pages; without an entry for them it is refused. Empty: sizes by rule."""
    attention_tiles: tuple[int, ...] = ()
    """The sizes themselves, before any file; `jaxinfer tune` names those of each kernel. [] leaves
    them to `tiles`, or to the rule."""
    products: Literal["auto", "native", "xla", "pallas_gpu"] = "auto"
    """Who multiplies. native: C++ built here, for CPUs: int8 (AVX-512 VNNI) and bfloat16 (BF16).
    pallas_gpu: a kernel for few rows on Hopper GPUs, with the sums of xla."""
    overlap: bool = True
    """Plan and dispatch step n+1 while step n runs."""
    score_chunk: int = 0
    """Tokens at a time of the program that gives prompts their log probabilities; 0 leaves it out.
    It has pages of its own for one sequence."""
    strict_compiles: bool = True
    """A program that is compiled in a step ends the engine; otherwise it is counted and logged."""
    bits: Literal["exact", "fast"] = "exact"
    """exact: an answer's bits never depend on its neighbours, tested at the start. fast: not
    promised and not tested, and row and chunk counts below 8 are allowed."""
    cache: CacheConfig = field(default_factory=CacheConfig)

    def __post_init__(self) -> None:
        check_engine(self)

    @property
    def pages_per_seq(self) -> int:
        """Entries of a page table row: whole attention blocks that cover max_seq_len."""
        blocks = -(-self.max_seq_len // self.attention_block)
        return blocks * (self.attention_block // self.cache.page_size)

    @property
    def prefill_row_counts(self) -> tuple[int, ...]:
        """Row counts of the smallest prefill program that there are, ascending from 1."""
        smallest, largest = self.prefill_chunks[0], self.prefill_chunks[-1]
        return tuple(rows for rows in self.prefill_rows if rows == 1 or rows * smallest <= largest)

    @property
    def prefix_step(self) -> int:
        """A cached prefix ends at a multiple of this many tokens: a chunk edge, and a page edge."""
        return math.lcm(self.prefill_chunks[0], self.cache.page_size)

    @property
    def num_pages(self) -> int:
        """Pages that sequences can own; the device holds one more, the trash page."""
        longest = -(-self.max_seq_len // self.cache.page_size)
        return self.cache.num_pages or self.num_slots * longest

    @property
    def scoring(self) -> "EngineConfig":
        """The same for the one sequence whose prompt is scored."""
        pages = replace(self.cache, num_pages=self.pages_per_seq, prefix=False)
        return replace(self, num_slots=1, decode_rows=(1,), cache=pages)

    @property
    def row_counts(self) -> tuple[int, ...]:
        """Row counts of the decode programs, ascending; the last one covers all slots."""
        if self.decode_rows:
            return self.decode_rows
        counts, rows = [1], MIN_ROWS
        while rows < self.num_slots:
            counts.append(rows)
            rows *= 4
        if self.num_slots > 1:
            counts.append(-(-self.num_slots // MIN_ROWS) * MIN_ROWS)
        return tuple(counts)


def check_engine(config: EngineConfig) -> None:
    """Raises ConfigError, naming the key, where an engine could not be built."""
    page_size = config.cache.page_size
    for key, value in (
        ("num_slots", config.num_slots),
        ("max_seq_len", config.max_seq_len),
        ("max_prefill_tokens", config.max_prefill_tokens),
        ("shared_prefill_tokens", config.shared_prefill_tokens),
        ("max_waiting", config.max_waiting),
        ("cache.page_size", page_size),
    ):
        if value < 1:
            raise ConfigError(f"engine.{key} is {value}; it must be at least 1")
    if config.attention_block < 1 or config.attention_block % page_size:
        raise ConfigError(
            f"engine.attention_block is {config.attention_block}; it must be a multiple of "
            f"engine.cache.page_size, which is {page_size}"
        )
    if config.prefill_per_decode < 0:
        raise ConfigError(
            f"engine.prefill_per_decode is {config.prefill_per_decode}; it must be at least 0"
        )
    longest = -(-config.max_seq_len // page_size)
    if config.cache.num_pages < 0 or 0 < config.cache.num_pages < longest:
        raise ConfigError(
            f"engine.cache.num_pages is {config.cache.num_pages}; one sequence of "
            f"engine.max_seq_len = {config.max_seq_len} tokens needs {longest}"
        )
    chunks = config.prefill_chunks
    if not chunks or list(chunks) != sorted(set(chunks)) or chunks[0] < 1:
        raise ConfigError(
            f"engine.prefill_chunks is {list(chunks)}; it must be ascending, each at least 1"
        )
    rows = config.prefill_rows
    if rows[:1] != (1,) or list(rows) != sorted(set(rows)):
        raise ConfigError(
            f"engine.prefill_rows is {list(rows)}; it must be ascending, and begin with 1"
        )
    if config.score_chunk < 0 or config.score_chunk % MIN_ROWS:
        raise ConfigError(
            f"engine.score_chunk is {config.score_chunk}; it must be a multiple of {MIN_ROWS}, or 0"
        )
    rows = config.row_counts
    if list(rows) != sorted(set(rows)) or rows[0] < 1 or rows[-1] < config.num_slots:
        raise ConfigError(
            f"engine.decode_rows is {list(rows)}; it must be ascending, each at least 1, "
            f"and the last must cover engine.num_slots = {config.num_slots}"
        )
