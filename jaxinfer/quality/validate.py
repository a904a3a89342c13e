"""A whole comparison: texts to windows, windows to figures, figures to a report."""

from collections.abc import Sequence
from pathlib import Path

import jax

from jaxinfer.compile import Progress
from jaxinfer.config import EngineConfig
from jaxinfer.errors import ConfigError, InvalidRequest
from jaxinfer.quality import texts
from jaxinfer.quality.compare import Compared, Model, compare
from jaxinfer.quality.report import FORMAT, Figures, Report, figures
from jaxinfer.quality.texts import Window
from jaxinfer.text.tokenizer import Tokenizer
from jaxinfer.weights import Checkpoint

BUNDLED = "bundled text"


def validate(
    reference: Checkpoint,
    candidate: Checkpoint,
    *,
    engine: EngineConfig,
    files: Sequence[Path] = (),
    max_tokens: int = 50_000,
    window: int = 512,
    weights: str = "",
    progress: Progress = lambda stage, done, total: None,
) -> Report:
    """Compares on the bundled text and on each file, `max_tokens` of each."""
    if reference.text.tokenizer_json != candidate.text.tokenizer_json:
        raise ConfigError(
            f"{reference.name} and {candidate.name} have different tokenizers; --reference must "
            "be the model that the candidate was made of"
        )
    tokenizer = Tokenizer(reference.text)
    named = {BUNDLED: texts.bundled()} | {str(file): texts.read(file) for file in files}
    pieces = {
        name: texts.windows(documents, tokenizer, size=window, max_tokens=max_tokens)
        for name, documents in named.items()
    }
    for name, some in pieces.items():
        if not some:
            raise InvalidRequest(f"{name} has no two tokens in a row to compare", field="text")
    flat = [piece for some in pieces.values() for piece in some]
    first, second = (Model(one.params, one.config) for one in (reference, candidate))
    found = compare(first, second, flat, engine=engine, size=window, progress=progress)
    sums, done = [], 0
    for name, some in pieces.items():
        sums.append(figures(name, found[done : done + len(some)]))
        done += len(some)
    return Report(
        format=FORMAT,
        reference=reference.name,
        candidate=candidate.name,
        scheme=_scheme(candidate, engine),
        weights=weights,
        compute_dtype=engine.compute_dtype,
        environment=f"jax {jax.__version__}, {jax.devices()[0].device_kind}",
        text_digest=texts.digest(flat),
        window=window,
        texts=tuple(sums),
        kinds=_by_kind(pieces[BUNDLED], found),
    )


def _scheme(candidate: Checkpoint, engine: EngineConfig) -> str:
    kept = engine.cache.dtype
    return candidate.config.quant if kept == "auto" else f"{candidate.config.quant}, {kept} pages"


def _by_kind(pieces: Sequence[Window], found: Sequence[Compared]) -> tuple[Figures, ...]:
    kinds: dict[str, list[Compared]] = {}
    for piece, one in zip(pieces, found, strict=False):
        kinds.setdefault(piece.kind, []).append(one)
    return tuple(figures(kind, some) for kind, some in kinds.items())
