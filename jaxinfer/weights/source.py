"""What every kind of checkpoint comes to: a model on disk, and a model in memory."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import numpy as np

from jaxinfer.config import ModelConfig
from jaxinfer.host.request import SamplingParams
from jaxinfer.spec import ArraySpec
from jaxinfer.text.assets import TextAssets

Progress = Callable[[str, int, int], None]
"""Called as (stage, done, total), both in bytes; stages are download, convert and load."""

Sharding = Callable[[ArraySpec], jax.sharding.Sharding] | None
"""Where a leaf goes; None puts everything on the default device."""

Fit = Callable[[ModelConfig], ModelConfig]
"""What a mesh makes of a model's heads, so that its devices share them: see sharding.fit."""


@dataclass(frozen=True)
class Source:
    """A model on disk, described but not loaded."""

    name: str
    path: Path
    kind: Literal["jaxinfer", "hugging_face", "gguf"]
    config: ModelConfig
    text: TextAssets
    sampling: SamplingParams
    num_bytes: int
    """Of the files that hold the weights."""


@dataclass(frozen=True)
class Checkpoint:
    """A model in memory; `params` is the tree that `models` describes for `config`."""

    name: str
    config: ModelConfig
    params: Any
    text: TextAssets
    sampling: SamplingParams
    """What the model's authors advise; None where they say nothing."""


@runtime_checkable
class TensorStore(Protocol):
    """Tensors on disk, by their Hugging Face names and in their Hugging Face layout."""

    def names(self) -> Iterable[str]:
        """Every tensor that is there."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, without reading it."""
        ...

    def read(self, name: str) -> np.ndarray:
        """Its values, in a floating dtype."""
        ...

    def where(self, name: str) -> str:
        """`FILE: tensor NAME`, as an error names it."""
        ...


def as_it_is(config: ModelConfig) -> ModelConfig:
    """Fits a model to one device."""
    return config


def silent(stage: str, done: int, total: int) -> None:
    """Shows no progress."""
