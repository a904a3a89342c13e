"""Products with weights by rows and precision: bandwidth where rows are few, operations beyond."""

from statistics import median

import jax

from jaxinfer.bench import kernel_cases
from jaxinfer.bench.hardware.device import product
from jaxinfer.bench.hardware.part import Part
from jaxinfer.bench.probes import Probes
from jaxinfer.errors import ConfigError
from jaxinfer.kernels import products

_PRECISIONS = ("bf16", "int8")
_BY_KERNEL = "int8 pallas_gpu"


def measure(part: Part) -> None:
    """A row a precision, shape and number of rows; precisions take turns in the same rounds."""
    sizes, probes = part.sizes, Probes(part.sizes.probe_bytes)
    run, flops = product(sizes.peak_side, "bfloat16")
    run()
    precisions = _precisions(part)
    for rows in sizes.matmul_rows:
        for outer, inner in sizes.matmul_shapes:
            what = f"{rows} x {inner} x {outer}"
            built = [
                part.attempt(
                    f"{precision}, {what}",
                    lambda precision=precision, outer=outer, inner=inner, rows=rows: _ready(
                        kernel_cases.matmul(
                            precision,
                            rows,
                            outer,
                            inner,
                            cold_bytes=sizes.cold_bytes,
                            repeats=max(1, sizes.moved_bytes // sizes.cold_bytes),
                        )
                    ),
                )
                for precision in precisions
            ]
            cases = [case for case in built if case is not None]
            found = part.attempt(
                what,
                lambda cases=cases: kernel_cases.in_rounds(
                    cases, probes, sizes.rounds, is_late=lambda: part.is_late
                ),
            )
            if found is None:
                continue
            top = flops / run()
            for case, times in zip(cases, found.times, strict=True):
                timing = kernel_cases.timing(case, times, found.copies)
                part.add(
                    kernel=case.kernel,
                    size=case.size,
                    us=timing.us,
                    of_copy=timing.share,
                    tflops=timing.gflops / 1e3,
                    of_bf16_peak=1e9 * timing.gflops / top,
                    copy_gb_per_s=median(found.copies) / 1e9,
                )


def _precisions(part: Part) -> tuple[str, ...]:
    """Those that can be had here."""
    device = jax.devices()[0]
    here = str(device.platform)
    capability = str(device.compute_capability) if here == "gpu" else ""
    try:
        products.choose(products.PALLAS_GPU, products.Needs(here, 1, products.INT8, capability))
    except ConfigError as error:
        part.skip(_BY_KERNEL, str(error))
        return _PRECISIONS
    return (*_PRECISIONS, _BY_KERNEL)


def _ready(case: kernel_cases.Case) -> kernel_cases.Case:
    """The first run of a program is slow."""
    case.run()
    return case
