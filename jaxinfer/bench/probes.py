"""What this machine moves through its memory, measured beside what is compared with it."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxinfer import compile as programs_of

_BYTES = 256 * 2**20  # larger than any cache of a processor


class Probes:
    """Reads and rewrites a large array with all cores; call each once a round."""

    def __init__(self, size: int | None = None) -> None:
        self._data = jnp.ones(((size or _BYTES) // 4 // 4096, 4096), jnp.float32)
        self._read = programs_of.compile_function(lambda x: jnp.sum(x, axis=1), self._data)
        self._copy = programs_of.compile_function(lambda x: x + 1, self._data, donated=(0,))
        self.read_bytes_per_s()
        self.copy_bytes_per_s()

    def read_bytes_per_s(self) -> float:
        """Bytes that a sum reads in a second."""
        return self._data.nbytes / seconds(self._read, self._data)

    def copy_bytes_per_s(self) -> float:
        """Bytes read and bytes written in a second, both counted; no new memory is touched."""
        started = time.perf_counter()
        self._data = jax.block_until_ready(self._copy(self._data))
        return 2 * self._data.nbytes / (time.perf_counter() - started)


def seconds(function: Callable[..., object], *arguments: object) -> float:
    """How long a compiled function takes, to its last result."""
    started = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - started
