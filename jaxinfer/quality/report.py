"""How far apart two models are, as figures with their uncertainty, and as a file."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from jaxinfer.config import QuantConfig
from jaxinfer.quality.compare import Compared
from jaxinfer.weights.json_file import read_json
from jaxinfer.weights.records import from_json

FORMAT = 1
FILE = "quality.json"
NUM_RESAMPLES = 2000
MIDDLE = (0.025, 0.975)


@dataclass(frozen=True)
class Interval:
    """A figure, and where it lies with 95 % confidence: windows are drawn again at random."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Figures:
    """Candidate against reference on one text, or on one kind of it."""

    name: str
    num_tokens: int
    kl: Interval
    """Mean divergence a token, in nats."""
    kl_p99: float
    kl_p999: float
    top1: Interval
    """Share of tokens for which both find the same one likeliest."""
    reference_perplexity: float
    perplexity_ratio: Interval
    rms_delta_p: float
    """Of the probability of the token that the text goes on with."""
    num_lost: int
    """Tokens that the reference predicts and the candidate does not."""
    num_gained: int
    """The other way round."""
    mcnemar_p: float
    """How likely such a difference of lost and gained is by chance; exact."""


@dataclass(frozen=True)
class Report:
    """One comparison."""

    format: int
    reference: str
    candidate: str
    scheme: str
    """Of the weights; and of the pages, where they are kept in another way than the reference's."""
    weights: str
    """A digest of the candidate's folder; empty where it was quantised as it was loaded."""
    compute_dtype: str
    environment: str
    """JAX, and the device."""
    text_digest: str
    window: int
    texts: tuple[Figures, ...]
    """Of the bundled text, and of each file of the user's: these are held to the bounds."""
    kinds: tuple[Figures, ...]
    """The bundled text by kind."""


def figures(name: str, pieces: Sequence[Compared]) -> Figures:
    """Sums up what was compared; a piece is one block of the bootstrap."""
    whole = Compared(*map(np.concatenate, zip(*pieces, strict=True)))
    right = whole.reference_top == whole.targets, whole.candidate_top == whole.targets
    num_lost = int(np.sum(right[0] & ~right[1]))
    num_gained = int(np.sum(right[1] & ~right[0]))
    chances = np.exp(whole.candidate_logprob) - np.exp(whole.reference_logprob)
    counts = np.array([len(piece.kl) for piece in pieces], float)
    agreed = [np.sum(piece.reference_top == piece.candidate_top) for piece in pieces]
    lost = [np.sum(piece.reference_logprob - piece.candidate_logprob) for piece in pieces]
    ratio = _interval(np.array(lost, float), counts)
    return Figures(
        name=name,
        num_tokens=len(whole.kl),
        kl=_interval(np.array([np.sum(piece.kl) for piece in pieces], float), counts),
        kl_p99=float(np.quantile(whole.kl, 0.99)),
        kl_p999=float(np.quantile(whole.kl, 0.999)),
        top1=_interval(np.array(agreed, float), counts),
        reference_perplexity=math.exp(-float(np.mean(whole.reference_logprob, dtype=float))),
        perplexity_ratio=Interval(*map(math.exp, (ratio.value, ratio.low, ratio.high))),
        rms_delta_p=float(np.sqrt(np.mean(np.square(chances, dtype=float)))),
        num_lost=num_lost,
        num_gained=num_gained,
        mcnemar_p=_mcnemar(num_lost, num_gained),
    )


def missed(report: Report, bounds: QuantConfig) -> tuple[str, ...]:
    """The bounds that a report is beyond, in words; a figure that is not a number is beyond."""
    said = []
    for one in report.texts:
        for ok, what in (
            (one.kl.value <= bounds.max_kl, f"mean KL {one.kl.value:.4g} > {bounds.max_kl}"),
            (
                one.top1.value >= bounds.min_top1,
                f"top-1 agreement {one.top1.value:.2%} < {bounds.min_top1:.0%}",
            ),
            (
                one.perplexity_ratio.value <= bounds.max_perplexity_ratio,
                f"perplexity ratio {one.perplexity_ratio.value:.4f} > "
                f"{bounds.max_perplexity_ratio}",
            ),
        ):
            if not ok:
                said.append(f"{what} on {one.name}")
    return tuple(said)


def write(report: Report, path: Path) -> None:
    """Writes the file, all of it or nothing."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def read(path: Path) -> Report:
    """Reads the file, strictly; CheckpointError where it is damaged."""
    return from_json(Report, read_json(path), where=str(path))


def _interval(sums: np.ndarray, counts: np.ndarray) -> Interval:
    """The mean of all tokens, and of as many blocks drawn with replacement."""
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), NUM_RESAMPLES)
    low, high = np.quantile(drawn @ sums / (drawn @ counts), MIDDLE)
    return Interval(float(np.sum(sums) / np.sum(counts)), float(low), float(high))


def _mcnemar(lost: int, gained: int) -> float:
    """Twice the binomial tail of the smaller of two counts, at even odds (McNemar 1947)."""
    count, fewer = lost + gained, min(lost, gained)
    logs = [
        math.lgamma(count + 1) - math.lgamma(place + 1) - math.lgamma(count - place + 1)
        for place in range(fewer + 1)
    ]
    tail = sum(math.exp(value - count * math.log(2)) for value in logs)
    return min(1.0, 2 * tail)
