"""What rounding weights can learn from a text: where channels are large, how they go together."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxinfer import models
from jaxinfer.compile import Progress
from jaxinfer.config import EngineConfig
from jaxinfer.errors import InvalidRequest
from jaxinfer.quality import texts
from jaxinfer.quality.compare import Model
from jaxinfer.quality.moments import moments
from jaxinfer.quality.texts import Document, Window
from jaxinfer.quant import Factors, Rounding, round_to_nearest
from jaxinfer.quant.balance import balance
from jaxinfer.quant.gptq import calibrated
from jaxinfer.spec import paths
from jaxinfer.text.tokenizer import Tokenizer
from jaxinfer.weights import Checkpoint

FILE = "calibration.json"


class Calibration(NamedTuple):
    """What `weights.quantised` is given."""

    rounding: Rounding
    factors: Mapping[str, Factors]
    num_tokens: int
    text_digest: str


NEAREST = Calibration(round_to_nearest, {}, 0, "")
"""Nothing learnt."""


def calibrate(
    reference: Checkpoint,
    *,
    engine: EngineConfig,
    files: Sequence[Path] = (),
    max_tokens: int = 32_768,
    window: int = 512,
    progress: Progress = lambda stage, done, total: None,
) -> Calibration:
    """Runs the model over a text: the files, or the one that comes with this package.

    The text is one stream of tokens in windows of one length; documents may begin within one.
    """
    documents = [
        one for file in files for one in texts.read(file, flag="calibration")
    ] or texts.for_calibration()
    pieces = stream(documents, Tokenizer(reference.text), size=window, max_tokens=max_tokens)
    if not pieces:
        raise InvalidRequest(
            f"the text to calibrate with has not one window of {window} tokens; give more of it, "
            "or a smaller --window",
            field="calibrate",
        )
    model = Model(reference.params, reference.config)
    found = moments(model, [one.tokens for one in pieces], engine=engine, progress=progress)
    names = paths(models.module_of(reference.config).spec(reference.config))
    leaves = dict(zip(names, jax.tree.leaves(reference.params), strict=True))
    made = balance(lambda path: np.asarray(leaves[path]), found, reference.config)
    return Calibration(
        rounding=calibrated(found, channels=made.channels),
        factors=made.factors,
        num_tokens=window * len(pieces),
        text_digest=texts.digest(pieces),
    )


def write(learnt: Calibration, path: Path) -> None:
    """What a folder was calibrated with, for people."""
    said = {
        "method": "channels balanced (SmoothQuant), columns compensated (GPTQ)",
        "num_tokens": learnt.num_tokens,
        "text_digest": learnt.text_digest,
    }
    path.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def stream(
    documents: Sequence[Document], tokenizer: texts.Encodes, *, size: int, max_tokens: int
) -> list[Window]:
    """Whole windows of all documents in a row, spread evenly over them."""
    tokens = np.concatenate(
        [
            np.zeros(0, np.int32),
            *(np.asarray(tokenizer.encode(one.text), np.int32) for one in documents),
        ]
    )
    every = tokens[: len(tokens) // size * size].reshape(-1, size)
    count = min(len(every), max(1, max_tokens // size))
    chosen = np.arange(count) * len(every) // max(count, 1)
    return [Window(every[place], "") for place in chosen]
