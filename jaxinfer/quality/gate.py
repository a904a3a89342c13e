"""Whether a quantised model may be loaded: what its report says, against the bounds."""

from pathlib import Path

from jaxinfer.config import QuantConfig
from jaxinfer.errors import QualityRefused
from jaxinfer.quality.report import FILE, Report, missed, read
from jaxinfer.weights import Source
from jaxinfer.weights.checkpoint import digest

OFF = "with --quant.gate off it is loaded all the same"


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
