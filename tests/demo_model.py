"""The demo model in engines that the tests of one run share: one for each dtype."""

import functools
from typing import Any

import pytest

from jaxinfer import weights
from jaxinfer.config import Config, QuantConfig, Scheme
from jaxinfer.engine_config import CacheConfig, EngineConfig
from jaxinfer.llm import LLM

NUM_SLOTS = 32
needed = pytest.mark.skipif(
    not weights.is_ready("smollm2-135m"), reason="the demo model is not here; scripts/demo gets it"
)


def shared_llm(
    dtype: Any, *, kernels: str = "auto", weights: Scheme = "none", pages: Any = "auto"
) -> LLM:
    """Built once, for to compile its programs is what takes long; each test leaves it idle.

    `kernels` is who attends and multiplies; auto leaves attention to the reference.
    """
    return _built(dtype, kernels, weights, pages)


@functools.cache
def _built(dtype: Any, kernels: str, weights: Scheme, pages: Any) -> LLM:
    named: dict[str, Any] = {"attention": kernels, "products": kernels}
    engine = EngineConfig(
        num_slots=NUM_SLOTS,
        max_seq_len=1024,
        compute_dtype=dtype,
        cache=CacheConfig(dtype=pages),
        **({} if kernels == "auto" else named),
    )
    return LLM(config=Config(engine=engine, quant=QuantConfig(scheme=weights)))
