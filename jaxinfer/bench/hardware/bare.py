"""Runs in an image that has jax and numpy, and nothing else of what jaxinfer installs."""

import importlib.util
import sys
from types import ModuleType
from typing import Any

_SHAPED = ("Bool", "Float", "Int", "Int8", "Int32", "UInt", "UInt32")


class _Anything:
    """`Float[Array, "B T"]` says what it says, to people."""

    def __class_getitem__(cls, item: Any) -> Any:
        return Any


def prepare() -> bool:
    """Stands in for jaxtyping, which here only annotates; False where it is installed."""
    if importlib.util.find_spec("jaxtyping") is not None:
        return False
    import jax

    module = ModuleType("jaxtyping")
    vars(module).update({name: _Anything for name in _SHAPED}, Array=jax.Array)
    sys.modules["jaxtyping"] = module
    return True
