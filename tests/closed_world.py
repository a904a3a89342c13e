"""A small engine whose programs are kept: shared by the tests of programs, store and manifest."""

import functools
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from jaxinfer.compile import Program
from jaxinfer.config import ModelConfig
from jaxinfer.engine import Engine
from jaxinfer.store import Store, open_store
from tests import tiny

SMALL: dict[str, Any] = {"prefill_chunks": (8,), "max_seq_len": 64}
CONFIG = tiny.engine_config(**SMALL)
REQUESTS = tiny.random_requests(12, seed=7, max_prompt=30, max_tokens=12)


class Kept(NamedTuple):
    folder: Path
    engine: Engine  # which compiled the programs and wrote them
    answers: dict[str, Any]
    owner: tempfile.TemporaryDirectory[str]


def make_engine(
    store: Store | None = None, model: ModelConfig = tiny.MODEL, **changes: Any
) -> Engine:
    config = tiny.engine_config(**(SMALL | changes))
    return Engine(tiny.params(), model, tiny.TokenText(), config, store=store)


def every_program(engine: Engine) -> list[Program]:
    return [*engine.programs.values(), engine.device.allocate]


def results(engine: Engine) -> dict[str, Any]:
    """Tokens and logprobs of every request."""
    answers = tiny.run(engine, REQUESTS)
    return {name: (answer.tokens, answer.logprobs) for name, answer in answers.items()}


@functools.cache
def kept() -> Kept:
    """Built once for all tests of a run; none of them changes it."""
    owner = tempfile.TemporaryDirectory()
    folder = Path(owner.name, "programs")
    engine = make_engine(open_store(folder))
    return Kept(folder, engine, results(engine), owner)
