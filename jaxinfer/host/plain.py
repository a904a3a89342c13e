"""Requests and settings as plain JSON values, and back."""

import dataclasses
from typing import Any, cast

from jaxinfer.engine_config import CacheConfig, EngineConfig
from jaxinfer.host.request import Request, SamplingParams

Record = dict[str, Any]


def request_to_plain(request: Request) -> Record:
    """A request as JSON values; what is unset is left out of its sampling."""
    sampling = {
        name: list(cast(tuple[Any, ...], value)) if isinstance(value, tuple) else value
        for name, value in _fields(request.sampling).items()
        if value not in (None, ())
    }
    return _fields(request) | {"prompt": list(request.prompt), "sampling": sampling}


def request_from_plain(plain: Record) -> Request:
    """The request again."""
    return Request(**tuples(plain | {"sampling": SamplingParams(**tuples(plain["sampling"]))}))


def engine_from_plain(plain: Record) -> EngineConfig:
    """An engine's settings; what the values don't say is as it is by default.

    Those without prefill_rows are older than it: their prefill programs had one row.
    """
    known = {"prefill_rows": [1]} | plain | {"cache": CacheConfig(**plain["cache"])}
    return EngineConfig(**tuples(known))


def _fields(value: Any) -> Record:
    """The fields by name, each as it is: dataclasses.asdict would copy a prompt token by token."""
    return {one.name: getattr(value, one.name) for one in dataclasses.fields(value)}


def tuples(plain: Record) -> Record:
    """With a tuple for each list: JSON knows no other."""
    return {
        name: tuple(cast(list[Any], value)) if isinstance(value, list) else value
        for name, value in plain.items()
    }
