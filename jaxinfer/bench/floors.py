"""What a step cannot do without: bytes that a decode reads, operations that a prefill computes."""

import math
from typing import Any

import jax

from jaxinfer import cache as paged
from jaxinfer import models, spec
from jaxinfer.config import EngineConfig, ModelConfig
from jaxinfer.spec import ArraySpec


def decode_bytes(
    params: Any, model: ModelConfig, engine: EngineConfig, *, active: int, context: int
) -> int:
    """Bytes that one decode step must read: every weight once, and the cached tokens."""
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if not model.tie_embeddings:
        weights -= sum(leaf.nbytes for leaf in jax.tree.leaves(params.embedding))
    return weights + active * context * paged.bytes_per_token(model, engine)


def prefill_flops(model: ModelConfig, tokens: int) -> int:
    """Operations of a prompt's prefill: matrices, causal attention, one row of logits."""
    table = model.vocab_size * model.d_model
    matrices = sum(
        math.prod(leaf.shape)
        for name, leaf in spec.paths(models.module_of(model).spec(model)).items()
        if isinstance(leaf, ArraySpec) and leaf.contract and name not in ("embedding", "head")
    )
    pairs = tokens * (tokens + 1) // 2
    attention = 4 * pairs * model.num_heads * model.head_dim * model.num_layers
    return 2 * matrices * tokens + attention + 2 * table
