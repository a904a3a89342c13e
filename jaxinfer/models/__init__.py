"""The table of architectures: name -> the module that describes and runs it."""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer import quant
from jaxinfer.config import ModelConfig
from jaxinfer.dims import Leaf
from jaxinfer.errors import UnsupportedModel
from jaxinfer.kernels.products import NATIVE, Floats
from jaxinfer.models import llama
from jaxinfer.spec import ArraySpec, is_spec

ARCHITECTURES: dict[str, ModuleType] = {
    "llama": llama,
    "mistral": llama,
    "qwen2": llama,
    "qwen3": llama,
}


def spec_of(config: ModelConfig) -> Any:
    """Describes every parameter as it is in memory, quantised or not."""
    return quant.describe(module_of(config).spec(config), config.quant)


def using(params: Any, config: ModelConfig, product: str) -> Any:
    """A tree of params for a program, whose matrices are multiplied by `product`."""

    def one(spec: ArraySpec, leaf: Leaf) -> Leaf:
        if isinstance(leaf, quant.QTensor):
            return quant.using(leaf, product)
        if product != NATIVE or not spec.contract or isinstance(leaf, quant.Watched):
            return leaf
        return Floats(leaf) if leaf.dtype == jnp.bfloat16 else leaf

    return jax.tree.map(one, module_of(config).spec(config), params, is_leaf=is_spec)


def module_of(config: ModelConfig) -> ModuleType:
    """The module whose spec(), forward() and head() serve this architecture."""
    if config.architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"architecture {config.architecture!r} is not supported; "
            f"there are: {', '.join(sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[config.architecture]
