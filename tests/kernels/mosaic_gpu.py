"""The interpreter of Mosaic GPU, with what the kernels use and jax leaves out.

It has no public name yet, and of wgmma only the form whose operands lie in shared memory; the
kernels multiply by weights that are in registers. Older ones have no rule for a cast of layouts
either, which changes no value, nor for operands that are transposed where they lie.
"""

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

TRANSPOSES_BY_ITSELF = jax.__version_info__ >= (0, 11, 2)
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
    acc_allocation_key_as_array: Any,
    acc_transforms: tuple[Any, ...],
    a_allocation_key_as_array: Any,
    a_transforms: tuple[Any, ...],
    b_allocation_key_as_array: Any,
    b_transforms: tuple[Any, ...],
    **caller: Any,
) -> Any:
    """acc += a @ b, as gpu_callbacks.wgmma, for operands of every kind."""
    memory = _Memory(caller)
    a = memory.operand(a_allocation_key_as_array, a_transforms)
    b = memory.operand(b_allocation_key_as_array, b_transforms)
    acc = memory.read(acc_allocation_key_as_array, acc_transforms)
    product = np.matmul(a.astype(acc.dtype), b.astype(acc.dtype))
    memory.write(acc_allocation_key_as_array, acc + product)
    return token


class _Memory:
    """The memory as the thread that calls sees it."""

    def __init__(self, caller: dict[str, Any]) -> None:
        self.memory = gpu_callbacks._get_shared_memory()
        if "thread" in caller:
            self.thread = caller["thread"]
            self.logging = gpu_callbacks.memory.GPULoggingInfo(caller["mesh_location"], self.thread)
            return
        device, thread = int(caller["device_id"]), int(caller["thread_id"])
        self.thread = self.memory.get_global_thread_id(device, thread)
        self.logging = utils.GPULoggingInfo(
            device_id=device,
            grid_point_coords=tuple(map(int, caller["grid_point_coords"])),
            thread_id=thread,
        )

    def operand(self, operand: Any, transforms: tuple[Any, ...]) -> np.ndarray:
        """Its values: in registers they are at hand, otherwise `operand` says where."""
        operand = np.asarray(operand)
        if not np.issubdtype(operand.dtype, np.integer):
            return operand
        return self.read(operand, transforms)

    def read(self, place: Any, transforms: tuple[Any, ...]) -> np.ndarray:
        """The values of a buffer, seen through transforms."""
        key = gpu_callbacks.HostAllocationKey.from_array(place)
        steps = [one for one in transforms if not isinstance(one, gpu_callbacks.NOOP_TRANSFORMS)]
        turns: list[Any] = []
        if not TRANSPOSES_BY_ITSELF:
            turns = [one for one in steps if isinstance(one, TransposeTransform)]
            steps = [one for one in steps if not isinstance(one, TransposeTransform)]
        found, _, _ = self.memory.get_buffer_content(
            key, self._access(key, steps), self.thread, logging_info=self.logging
        )
        return np.swapaxes(found, -1, -2) if len(turns) % 2 else found

    def write(self, place: Any, values: np.ndarray) -> None:
        """All of a buffer's values."""
        key = gpu_callbacks.HostAllocationKey.from_array(place)
        self.memory.store_buffer_content(
            key, self._access(key, []), values, self.thread, logging_info=self.logging
        )

    def _access(self, key: Any, transforms: list[Any]) -> Any:
        steps = jax.tree.map(int, transforms)
        if TRANSPOSES_BY_ITSELF:
            return self.memory.access(key, steps)
        return utils.to_range(steps)
