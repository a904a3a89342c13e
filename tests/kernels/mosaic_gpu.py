"""The interpreter of Mosaic GPU, with what the kernels use and jax 0.10 leaves out.

It has no public name yet; no rule for a cast of layouts, which changes no value; and of wgmma only
the form whose operands lie in shared memory as they are. The kernels multiply by transposed tiles,
and by weights that are in registers.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax._src.interpreters import mlir
from jax._src.pallas.mosaic.interpret import utils
from jax._src.pallas.mosaic_gpu.core import layout_cast_p
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, params
from jax._src.state.types import TransposeTransform

mlir.register_lowering(layout_cast_p, lambda ctx, x, **_: [x], platform="cpu")


@contextmanager
def interpreter() -> Iterator[None]:
    """Kernels that are called inside run on the CPU; memory that nobody wrote holds NaN."""
    with (
        mock.patch.object(gpu_callbacks, "wgmma", _wgmma),
        params.force_gpu_interpret_mode(params.InterpretGPUParams()),
    ):
        yield


def _wgmma(
    *,
    token: Any,
    device_id: Any,
    grid_point_coords: Any,
    thread_id: Any,
    acc_allocation_key_as_array: Any,
    acc_transforms: tuple[Any, ...],
    acc_dtype: Any,
    a_allocation_key_as_array: Any,
    a_transforms: tuple[Any, ...],
    b_allocation_key_as_array: Any,
    b_transforms: tuple[Any, ...],
    source_info: Any = None,
) -> Any:
    """acc += a @ b, as gpu_callbacks.wgmma, for operands of every kind."""
    del source_info
    memory = gpu_callbacks._get_shared_memory()
    thread = memory.get_global_thread_id(int(device_id), int(thread_id))
    logging = utils.GPULoggingInfo(
        device_id=int(device_id),
        grid_point_coords=tuple(map(int, grid_point_coords)),
        thread_id=int(thread_id),
    )
    read = functools.partial(_read, memory, thread, logging)
    a = read(a_allocation_key_as_array, a_transforms)
    b = read(b_allocation_key_as_array, b_transforms)
    key = gpu_callbacks.HostAllocationKey.from_array(acc_allocation_key_as_array)
    acc = read(acc_allocation_key_as_array, acc_transforms)
    product = np.matmul(a.astype(acc_dtype), b.astype(acc_dtype))
    memory.store_buffer_content(key, (), acc + product, thread, logging_info=logging)
    return token


def _read(memory: Any, thread: Any, logging: Any, operand: Any, transforms: Any) -> np.ndarray:
    """An operand's values: in registers they are at hand, otherwise `operand` says where."""
    operand = np.asarray(operand)
    if not np.issubdtype(operand.dtype, np.integer):
        return operand
    places = [
        jax.tree.map(int, transform)
        for transform in transforms
        if not isinstance(transform, (*gpu_callbacks.NOOP_TRANSFORMS, TransposeTransform))
    ]
    key = gpu_callbacks.HostAllocationKey.from_array(operand)
    found, _, _ = memory.get_buffer_content(
        key, utils.to_range(places), thread, logging_info=logging
    )
    is_transposed = sum(isinstance(one, TransposeTransform) for one in transforms) % 2
    return np.swapaxes(found, -1, -2) if is_transposed else found
