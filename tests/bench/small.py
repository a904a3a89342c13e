"""The smallest engine that a workload can be run on: three programs, compiled once."""

from typing import Any

from jaxinfer.config import EngineConfig
from jaxinfer.engine import Engine
from tests import tiny


def config(**changes: Any) -> EngineConfig:
    plain: dict[str, Any] = {
        "num_slots": 2,
        "max_seq_len": 96,
        "decode_rows": (2,),
        "prefill_chunks": (16,),
        "bits": "fast",
    }
    return tiny.engine_config(**(plain | changes))


def make_engine(**changes: Any) -> Engine:
    tokenizer = tiny.TokenText()
    return Engine(tiny.params(), tiny.MODEL, tokenizer, config(**changes), store=tiny.store())
