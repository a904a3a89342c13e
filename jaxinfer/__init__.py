"""Pure-functional LLM inference on JAX: paged cache, fixed programs, the same bits every time."""

from typing import TYPE_CHECKING, Any

from jaxinfer.config import Config, EngineConfig, ModelConfig
from jaxinfer.errors import JaxinferError
from jaxinfer.host.request import FinishReason, SamplingParams

if TYPE_CHECKING:
    from jaxinfer.llm import LLM, Completion

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "Completion",
    "Config",
    "EngineConfig",
    "FinishReason",
    "JaxinferError",
    "ModelConfig",
    "SamplingParams",
]


def __getattr__(name: str) -> Any:
    """Loads what needs JAX only when it is asked for, so that a client or `--help` starts fast."""
    if name in ("LLM", "Completion"):
        from jaxinfer import llm

        return getattr(llm, name)
    raise AttributeError(f"module 'jaxinfer' has no attribute {name!r}")
