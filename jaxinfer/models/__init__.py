"""The table of architectures: name -> the module that describes and runs it."""

from types import ModuleType

from jaxinfer.config import ModelConfig
from jaxinfer.errors import UnsupportedModel
from jaxinfer.models import llama

ARCHITECTURES: dict[str, ModuleType] = {
    "llama": llama,
    "mistral": llama,
    "qwen2": llama,
    "qwen3": llama,
}


def module_of(config: ModelConfig) -> ModuleType:
    """The module whose spec(), forward() and head() serve this architecture."""
    if config.architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"architecture {config.architecture!r} is not supported; "
            f"there are: {', '.join(sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[config.architecture]
