"""The table of architectures: name -> the module that describes and runs it."""

from types import ModuleType
from typing import Any

from jaxinfer import quant
from jaxinfer.config import ModelConfig
from jaxinfer.errors import UnsupportedModel
from jaxinfer.models import llama

ARCHITECTURES: dict[str, ModuleType] = {
    "llama": llama,
    "mistral": llama,
    "qwen2": llama,
    "qwen3": llama,
}


def spec_of(config: ModelConfig) -> Any:
    """Describes every parameter as it is in memory, quantised or not."""
    return quant.describe(module_of(config).spec(config), config.quant)


def module_of(config: ModelConfig) -> ModuleType:
    """The module whose spec(), forward() and head() serve this architecture."""
    if config.architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"architecture {config.architecture!r} is not supported; "
            f"there are: {', '.join(sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[config.architecture]
