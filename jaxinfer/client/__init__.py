"""A typed gRPC client, sync and async, that needs no JAX."""

from jaxinfer.client.aio import AsyncClient
from jaxinfer.client.results import (
    Completed,
    Completion,
    Delta,
    Model,
    Score,
    Stamps,
    Timings,
    Usage,
)
from jaxinfer.client.sync import Client
from jaxinfer.client.translate import Options
from jaxinfer.host.request import FinishReason, SamplingParams

__all__ = [
    "AsyncClient",
    "Client",
    "Completed",
    "Completion",
    "Delta",
    "FinishReason",
    "Model",
    "Options",
    "SamplingParams",
    "Score",
    "Stamps",
    "Timings",
    "Usage",
]
