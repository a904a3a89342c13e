"""The demo model in engines that the tests of one run share: one for each dtype."""

import functools
from typing import Any

import pytest

from jaxinfer import weights
from jaxinfer.config import Config, EngineConfig
from jaxinfer.llm import LLM

NUM_SLOTS = 32
needed = pytest.mark.skipif(
    not weights.is_ready("smollm2-135m"), reason="the demo model is not here; scripts/demo gets it"
)


@functools.cache
def shared_llm(dtype: Any) -> LLM:
    """Built once, for to compile its programs is what takes long; each test leaves it idle."""
    engine = EngineConfig(num_slots=NUM_SLOTS, max_seq_len=1024, compute_dtype=dtype)
    return LLM(config=Config(engine=engine))
