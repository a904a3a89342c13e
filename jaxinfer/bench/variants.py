"""Engines of one model beside each other in a process: they share what they can of its weights."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from jaxinfer import config as settings
from jaxinfer.bench import memory
from jaxinfer.config import Config
from jaxinfer.engine import Engine
from jaxinfer.errors import ConfigError
from jaxinfer.quality import gate
from jaxinfer.store import find_store
from jaxinfer.text.tokenizer import Tokenizer
from jaxinfer.weights import Checkpoint

Show = Callable[[str, int, int], None]


class Kind(NamedTuple):
    """What two engines must have in common to share weights."""

    scheme: str
    dtype: str


class Variants:
    """Builds engines of one model; each kind of weights is read once."""

    def __init__(self, model: str, *, progress: Show = lambda stage, done, total: None) -> None:
        self._model = model
        self._progress = progress
        self._checkpoints: dict[Kind, Checkpoint] = {}
        self._store = find_store(settings.cache_dir() / "programs")

    def checkpoint(self, config: Config) -> Checkpoint:
        """The weights that a config asks for, if their quality report lets them in."""
        if config.mesh.rules:
            raise ConfigError("engines beside each other are on one device; leave mesh.rules out")
        kind = Kind(config.quant.scheme, config.engine.compute_dtype)
        if kind not in self._checkpoints:
            wanted = replace(config, model=self._model)
            self._checkpoints[kind] = gate.load(wanted, progress=self._progress)
        return self._checkpoints[kind]

    def tokenizer(self, config: Config) -> Tokenizer:
        """How the model reads text."""
        return Tokenizer(self.checkpoint(config).text)

    def engine(self, config: Config) -> Engine:
        """An engine of its own for a config."""
        checkpoint = self.checkpoint(config)
        engine = Engine(
            checkpoint.params,
            checkpoint.config,
            self.tokenizer(config),
            config.engine,
            store=self._store,
            progress=self._progress,
        )
        memory.release()
        return engine


def with_engine(config: Config, **changes: object) -> Config:
    """The config with some keys of its engine changed."""
    return replace(config, engine=replace(config.engine, **changes))  # type: ignore[arg-type]
