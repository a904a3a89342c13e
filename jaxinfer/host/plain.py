"""Requests and settings as plain JSON values, and back."""

import dataclasses
from typing import Any, cast

from jaxinfer.config import CacheConfig, EngineConfig
from jaxinfer.host.request import Request, SamplingParams

Record = dict[str, Any]


def request_to_plain(request: Request) -> Record:
    """A request as JSON values; what is unset is left out of its sampling."""
    plain = dataclasses.asdict(request)
    sampling = {name: value for name, value in plain["sampling"].items() if value not in (None, ())}
    return plain | {"sampling": sampling}


def request_from_plain(plain: Record) -> Request:
    """The request again."""
    return Request(**tuples(plain | {"sampling": SamplingParams(**tuples(plain["sampling"]))}))


def engine_from_plain(plain: Record) -> EngineConfig:
    """An engine's settings; what the values don't say is as it is by default."""
    return EngineConfig(**tuples(plain | {"cache": CacheConfig(**plain["cache"])}))


def tuples(plain: Record) -> Record:
    """With a tuple for each list: JSON knows no other."""
    return {
        name: tuple(cast(list[Any], value)) if isinstance(value, list) else value
        for name, value in plain.items()
    }
