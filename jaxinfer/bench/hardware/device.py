"""The device by itself: what it is, what it copies in a second, and what it multiplies."""

import platform
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np

from jaxinfer import compile as programs_of
from jaxinfer import config
from jaxinfer.bench.hardware.part import Part
from jaxinfer.bench.hardware.sizes import Sizes
from jaxinfer.bench.probes import Probes, seconds

_PRODUCTS = 8  # one after another in a program


def measure(part: Part) -> None:
    """Facts only."""
    device = jax.devices()[0]
    memory = device.memory_stats() or {}
    part.fact(
        device=str(device.device_kind),
        platform=str(device.platform),
        num_devices=len(jax.devices()),
        capability=str(device.compute_capability) if device.platform == "gpu" else "",
        runtime=" ".join(device.client.platform_version.split())[:200],
        memory_bytes=memory.get("bytes_limit", 0),
        jax=jax.__version__,
        jaxlib=jaxlib.version.__version__,
        python=platform.python_version(),
        compiler_flags=config.compiler_flags(),
    )
    part.attempt("bandwidth", lambda: part.fact(**bandwidth(part.sizes)))
    for dtype in ("bfloat16", "int8"):
        name = f"peak_{dtype}_tflops"
        part.attempt(name, lambda dtype=dtype, name=name: part.fact(**{name: peak(part, dtype)}))
    part.attempt("dispatch", lambda: part.fact(dispatch_us=_dispatch_us()))


def bandwidth(sizes: Sizes) -> dict[str, float]:
    """Median GB/s of copies (read and write both counted) and of reads."""
    probes = Probes(sizes.probe_bytes)
    copies, reads = zip(
        *((probes.copy_bytes_per_s(), probes.read_bytes_per_s()) for _ in range(sizes.rounds)),
        strict=True,
    )
    return {"copy_gb_per_s": median(copies) / 1e9, "read_gb_per_s": median(reads) / 1e9}


def peak(part: Part, dtype: str) -> float:
    """TFLOP/s of large square products of random values, one after another."""
    run, flops = product(part.sizes.peak_side, dtype)
    run()
    return flops / median(run() for _ in range(part.sizes.rounds)) / 1e12


def product(side: int, dtype: str) -> tuple[Callable[[], float], int]:
    """A run of products that returns its seconds, and the operations in it."""
    one, two = jax.random.split(jax.random.key(0))
    if dtype == "int8":
        x, w = (jax.random.randint(key, (side, side), -127, 128, jnp.int8) for key in (one, two))
    else:
        x, w = (jax.random.normal(key, (side, side), jnp.dtype(dtype)) for key in (one, two))
        w *= side**-0.5

    def run(x: Any, w: Any) -> Any:
        for _ in range(_PRODUCTS):
            kind = jnp.int32 if dtype == "int8" else x.dtype
            out = jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=kind)
            x = (out >> 12).astype(x.dtype) if dtype == "int8" else out
        return x

    program = programs_of.compile_function(run, x, w)
    return lambda: seconds(program, x, w), _PRODUCTS * 2 * side**3


def _dispatch_us(count: int = 50) -> float:
    """Microseconds from the call of a program that does next to nothing to its result."""
    x = jnp.zeros(8, jnp.float32)
    program = programs_of.compile_function(lambda x: x + 1, x)
    np.asarray(program(x))
    started = time.perf_counter()
    for _ in range(count):
        np.asarray(program(x))
    return 1e6 * (time.perf_counter() - started) / count
