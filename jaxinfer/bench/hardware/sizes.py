"""How large everything of a check is: for a device in earnest, or tiny, to see that it runs."""

import random
from dataclasses import dataclass
from typing import NamedTuple

from jaxinfer.config import ModelConfig

BUDGETS: dict[str, float] = {
    "device": 35.0,
    "kernels": 100.0,
    "attention": 90.0,
    "matmuls": 45.0,
    "bits": 60.0,
    "steps": 115.0,
    "serving": 75.0,
    "peers": 80.0,
}
"""The parts of a check in their order, and seconds that each may take; together under ten minutes.
"""

LLAMA_8B = ModelConfig(
    architecture="llama",
    vocab_size=128_256,
    num_layers=32,
    d_model=4096,
    d_ff=14_336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_positions=131_072,
    rope_theta=500_000.0,
)
LLAMA_1B = ModelConfig(
    architecture="llama",
    vocab_size=128_256,
    num_layers=16,
    d_model=2048,
    d_ff=8192,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    max_positions=131_072,
    rope_theta=500_000.0,
    tie_embeddings=True,
)
SMALL = ModelConfig(
    architecture="llama",
    vocab_size=2048,
    num_layers=4,
    d_model=512,
    d_ff=1024,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    max_positions=4096,
)
TOY = ModelConfig(
    architecture="llama",
    vocab_size=256,
    num_layers=1,
    d_model=64,
    d_ff=128,
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
    max_positions=512,
)


@dataclass(frozen=True)
class Load:
    """One call of attention."""

    batch: int
    context: int
    queries: int = 1
    page_size: int = 64


class Serving(NamedTuple):
    """More requests than slots, of mixed lengths."""

    slots: int
    requests: int
    longest_prompt: int
    longest_answer: int
    prefill_chunks: tuple[int, ...]
    decode_rows: tuple[int, ...]


class Asked(NamedTuple):
    """One of them."""

    prompt: tuple[int, ...]
    num_out: int


def work(serving: Serving, vocab_size: int) -> list[Asked]:
    """The requests; the same ones for everybody. The shortest are an eighth of the longest."""
    rng = random.Random(0)

    def one() -> Asked:
        num_in = rng.randint(serving.longest_prompt // 8, serving.longest_prompt)
        num_out = rng.randint(serving.longest_answer // 8, serving.longest_answer)
        return Asked(tuple(rng.randrange(vocab_size) for _ in range(num_in)), num_out)

    return [one() for _ in range(serving.requests)]


class Turns(NamedTuple):
    """How a program goes through what is read."""

    layers: int
    """Pools, one after another."""
    repeats: int
    """Of all of them."""


@dataclass(frozen=True)
class Sizes:
    """All of a check."""

    is_tiny: bool
    rounds: int
    probe_bytes: int
    peak_side: int
    """Rows, columns and depth of the product that gives the peak."""
    cold_bytes: int
    """Of weights or pages that are read in turn, so that no cache keeps them."""
    moved_bytes: int
    """By one run of a program: its start should not show."""
    cases: tuple[str, ...]
    """Of cases.CASES; () for all."""
    dtypes: tuple[str, ...]
    """Of pages, in these cases."""
    heads: ModelConfig
    """Whose attention is timed."""
    loads: tuple[Load, ...]
    matmul_shapes: tuple[tuple[int, int], ...]
    """(outputs, inputs)."""
    matmul_rows: tuple[int, ...]
    models: tuple[tuple[str, ModelConfig], ...]
    batches: tuple[int, ...]
    context: int
    dtype: str
    block: int
    steps: int
    """That are dispatched before one waits for them."""
    same_bits: ModelConfig
    requests: int
    answer: int
    """Tokens of each."""
    serving: Serving


REAL = Sizes(
    is_tiny=False,
    rounds=9,
    probe_bytes=4 * 2**30,
    peak_side=8192,
    cold_bytes=2**29,
    moved_bytes=2**33,
    cases=(),
    dtypes=("bfloat16", "float16", "float32", "int8"),
    heads=LLAMA_8B,
    loads=(
        Load(16, 2048),
        Load(64, 2048),
        Load(1, 2048),
        Load(16, 8192),
        Load(64, 8192),
        Load(16, 2048, page_size=16),
        Load(1, 2048, queries=2048),
        Load(1, 8192, queries=512),
    ),
    matmul_shapes=((28_672, 4096), (4096, 14_336)),
    matmul_rows=(8, 32, 64, 256, 2048),
    models=(("llama-8b", LLAMA_8B), ("llama-1b", LLAMA_1B)),
    batches=(1, 8, 32, 64),
    context=2048,
    dtype="bfloat16",
    block=128,
    steps=20,
    same_bits=SMALL,
    requests=12,
    answer=48,
    serving=Serving(64, 192, 1024, 256, (128, 512), (64,)),
)
TINY = Sizes(
    is_tiny=True,
    rounds=2,
    probe_bytes=2**20,
    peak_side=64,
    cold_bytes=2**10,
    moved_bytes=2**16,
    cases=("decode of one head",),
    dtypes=("bfloat16", "int8"),
    heads=TOY,
    loads=(Load(2, 40, page_size=16),),
    matmul_shapes=((128, 64),),
    matmul_rows=(2,),
    models=(("toy", TOY),),
    batches=(1, 2),
    context=64,
    dtype="float32",
    block=64,
    steps=2,
    same_bits=TOY,
    requests=3,
    answer=5,
    serving=Serving(2, 4, 24, 8, (16,), (2,)),
)
