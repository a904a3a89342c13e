"""Runs cases of paged attention on a CPU: shared by tests of kernels."""

import importlib
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from jaxinfer.bench.hardware.cases import Call, Case, load_of, make, relative_error
from jaxinfer.kernels import paged_attention
from jaxinfer.kernels.paged_attention import Needs, pallas_triton
from tests.kernels import mosaic_gpu

__all__ = [
    "Call",
    "Case",
    "interpreter",
    "make",
    "needs",
    "no_gpu_here",
    "relative_error",
    "run",
]
# Else on the CPU itself.
PLACES = {
    "pallas_tpu": ("tpu", ""),
    "pallas_gpu": ("gpu", "9.0"),
    "pallas_triton": ("gpu", "8.0"),
}


def run(backend: str, call: Call, case: Case, dtype: str = "") -> np.ndarray:
    """What a backend returns, on the CPU; kernels run in their interpreters."""
    options: dict[str, Any] = {"soft_cap": case.soft_cap} if case.soft_cap else {}
    options |= {"load": load_of(dtype)} if dtype == "int8" else {}
    with interpreter(backend):
        out = paged_attention.backend(backend)(
            *call, block=case.block, window=case.window, **options
        )
        return np.asarray(out)


def interpreter(backend: str) -> AbstractContextManager[None]:
    """Where a kernel runs without the hardware; memory that was never written holds NaN."""
    if backend == "pallas_tpu":
        return pltpu.force_tpu_interpret_mode()
    if backend == "pallas_gpu":
        return mosaic_gpu.interpreter()
    if backend == "pallas_triton":
        return pallas_triton.interpreter()
    return nullcontext()


@contextmanager
def no_gpu_here() -> Iterator[None]:
    """Where Triton kernels are lowered for a GPU that is not there, which jax 0.11 must be told.

    It asks for the device inside `shard_map` too, where the mesh is of the devices that there are.
    """
    if jax.__version_info__ < (0, 11):
        yield
        return
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA A100", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    registration = importlib.import_module("jax._src.pallas.triton.pallas_call_registration")
    asked = registration.gpu_info_lib
    with jax.sharding.use_abstract_mesh(mesh):
        told = asked.get_gpu_info()
    with warnings.catch_warnings(), mock.patch.object(asked, "get_gpu_info", lambda: told):
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated")
        yield


def needs(backend: str, case: Case, dtype: str) -> Needs:
    """The needs of a case, on the hardware that the backend is for."""
    platform, capability = PLACES.get(backend, ("cpu", ""))
    compute_dtype = "bfloat16" if dtype == "int8" else dtype
    return Needs(
        platform, capability, dtype, case.head_dim, case.page_size, case.block, compute_dtype
    )
