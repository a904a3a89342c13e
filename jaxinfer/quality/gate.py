"""Whether a quantised model may be loaded: what its report says, against the bounds."""

from collections.abc import Callable
from pathlib import Path

from jaxinfer import weights
from jaxinfer.config import Config, QuantConfig
from jaxinfer.errors import QualityRefused
from jaxinfer.quality.report import FILE, Report, missed, read
from jaxinfer.weights import Checkpoint, Progress, Sharding, Source
from jaxinfer.weights.checkpoint import digest
from jaxinfer.weights.source import Fit, as_it_is, silent

OFF = "with --quant.gate off it is loaded all the same"


def load(
    config: Config,
    *,
    sharding: Sharding = None,
    fit: Fit = as_it_is,
    progress: Progress = silent,
    described: Callable[[Source], None] = lambda source: None,
) -> Checkpoint:
    """The model of the settings, to be run; refused before its weights are read.

    Whoever runs a model loads it here, to serve as to measure: what is timed is what would be
    served. `jaxinfer validate` and `jaxinfer quantize` don't, as they write what is asked here.
    """

    def admitted(source: Source) -> None:
        check(source, config.quant)
        described(source)

    return weights.load(
        config.model,
        dtype=config.engine.compute_dtype,
        quant=config.quant.scheme,
        sharding=sharding,
        fit=fit,
        progress=progress,
        described=admitted,
    )


def check(source: Source, bounds: QuantConfig) -> None:
    """Raises QualityRefused for a model that was compared and is too far from its reference."""
    if bounds.gate == "off" or source.config.quant == "none":
        return
    report = find(source)
    if report is None and bounds.gate == "report":
        raise QualityRefused(
            f"{source.path} has no quality report of these weights as {source.config.quant}; "
            f"`jaxinfer validate` makes one of a folder that `jaxinfer quantize` wrote; {OFF}"
        )
    if report is not None and (beyond := missed(report, bounds)):
        raise QualityRefused(
            f"{source.path / FILE}: {'; '.join(beyond)}; quantise in another way, "
            f"or move the bound; {OFF}"
        )


def find(source: Source) -> Report | None:
    """The report beside a folder of ours, if it is of these weights and this scheme."""
    path = source.path / FILE
    if source.kind != "jaxinfer" or not path.is_file():
        return None
    report = read(path)
    fits = report.weights == digest(source.path) and report.scheme == source.config.quant
    return report if fits else None


def place(source: Source) -> Path:
    """Where the report of a folder lies."""
    return source.path / FILE
