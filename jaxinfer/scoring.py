"""How likely a model finds given text: prompts in chunks, on pages of their own, beside serving."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxinfer import compile as programs_of
from jaxinfer.compile import Program
from jaxinfer.config import EngineConfig, ModelConfig
from jaxinfer.errors import EngineFailed
from jaxinfer.inputs import Scores, inert_batch, pack
from jaxinfer.store import Store


class Scored(NamedTuple):
    """A part of a prompt: what each token's predecessors said of it."""

    logprobs: np.ndarray
    """f32, one a token; the first token of a prompt has none."""
    is_likeliest: np.ndarray
    """bool: greedy decoding would have gone on with it."""


class Scorer:
    """Scores one prompt at a time, chunk by chunk; the scheduler knows nothing of it.

    So it changes no request's pages, plan or journal. A row's bits depend on no other row, so a
    token that was generated scores as its own log probability.
    """

    def __init__(
        self, params: Any, model: ModelConfig, engine: EngineConfig, *, store: Store | None = None
    ) -> None:
        self.chunk, self._params, self._config = engine.score_chunk, params, engine.scoring
        self.before: Callable[[list[int], int], None] = lambda tokens, start: None
        shape = programs_of.score_shape(engine)
        self.program: Program = programs_of.build(
            params, model, self._config, wanted=[shape], store=store
        )[shape]
        self.allocate = programs_of.build_allocate(params, model, self._config, store=store)
        self._cache: Any = self.allocate.run()
        self.part([0, 0], 0)  # the first run of a program is slow

    def part(self, tokens: list[int], start: int) -> Scored:
        """The tokens after `start`, as many as a chunk has; `start` goes up from 0 by chunks.

        Raises EngineFailed where the device failed; the prompt can be scored again from 0. Other
        processes that share the model must do the same: `before` is told of it.
        """
        self.before(tokens, start)
        given, targets = tokens[start:-1][: self.chunk], tokens[start + 1 :][: self.chunk]
        config = self._config
        rows = inert_batch(
            1,
            self.chunk,
            pages_per_seq=config.pages_per_seq,
            trash_slot=config.num_slots,
            trash_page=config.num_pages,
        )
        rows.tokens[0, : len(given)] = given
        rows.page_table[0] = np.arange(config.pages_per_seq)
        rows.starts[0], rows.lengths[0] = start, len(given)
        wanted = np.zeros((1, self.chunk), np.int32)
        wanted[0, : len(targets)] = targets
        try:
            found = self._run(np.concatenate([pack(rows), wanted], axis=1))
        except jax.errors.JaxRuntimeError as error:
            self._cache = None
            self._cache = self.allocate.run()  # the failed step took the donated one with it
            raise EngineFailed("the device failed while it scored; ask again") from error
        return Scored(*(np.asarray(leaf)[0, : len(targets)] for leaf in found))

    def _run(self, packed: np.ndarray) -> Scores:
        self._cache, found = self.program.run(self._params, self._cache, packed)
        return jax.block_until_ready(found)


def score(scorer: Scorer, tokens: list[int]) -> Scored:
    """A whole prompt at once."""
    parts = [scorer.part(tokens, start) for start in range(0, len(tokens) - 1, scorer.chunk)]
    parts = parts or [Scored(np.zeros(0, np.float32), np.zeros(0, bool))]
    return Scored(*(np.concatenate(leaves) for leaves in zip(*parts, strict=True)))
