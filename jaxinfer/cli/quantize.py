"""`jaxinfer quantize`: a checkpoint with int8 weights, and how far it is from the model."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from jaxinfer.cli import progress
from jaxinfer.cli.options import COMMON, Common, Json
from jaxinfer.cli.validate import check_numbers, say
from jaxinfer.errors import ConfigError


def quantize(
    *,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    text: tuple[Path, ...] = (),
    tokens: int = 50_000,
    window: int = 512,
    calibrate: bool = True,
    calibration: tuple[Path, ...] = (),
    calibration_tokens: int = 32_768,
    validate: bool = True,
    as_json: Json = False,
    common: Common = COMMON,
) -> int:
    """Writes a folder with the model's weights in int8, w8a8 unless --quant says otherwise.

    Then it compares the two, stores the report in the folder, and exits with 1 beyond a bound:
    the folder is there, and a load of it is refused.

    Parameters
    ----------
    out
        The folder to write; it must not be there yet.
    text
        A file of your own to compare on: text, or JSONL with a `text` on each line; repeatable.
    tokens
        How many tokens of the bundled text, and of each file, are compared.
    window
        Tokens that are looked at together.
    calibrate
        `--calibrate false` rounds to the nearest codes, as --quant does at load: worse, and faster.
    calibration
        A file to calibrate with instead of the text that comes with jaxinfer; repeatable. Give
        what the model is to be used for, and no text that you compare on.
    calibration_tokens
        How many tokens of it are used, in whole windows.
    validate
        `--validate false` leaves the comparison out; `jaxinfer validate` makes it later.
    as_json
        Prints the report as one JSON object.
    """
    settings = common.load()
    check_numbers(tokens, window)
    if calibration_tokens < window:
        raise ConfigError(
            f"--calibration-tokens is {calibration_tokens}; it must hold a --window of {window}"
        )
    from jaxinfer import weights
    from jaxinfer.engine_config import CacheConfig
    from jaxinfer.quality import calibrate as calibration_of
    from jaxinfer.quality import report
    from jaxinfer.quality.validate import validate as compare
    from jaxinfer.weights.checkpoint import digest

    scheme = "w8a8" if settings.quant.scheme == "none" else settings.quant.scheme
    if out.exists():
        raise ConfigError(f"--out {out} is already there; give a new folder")
    with progress.shown() as show:
        reference = weights.load(settings.model, dtype=settings.engine.compute_dtype, progress=show)
        if reference.config.quant != "none":
            raise ConfigError(f"{reference.name} is quantised already; give the model it is from")
        learnt = calibration_of.NEAREST
        if calibrate:
            given = {"files": calibration, "max_tokens": calibration_tokens, "window": window}
            engine = settings.engine
            learnt = calibration_of.calibrate(reference, engine=engine, progress=show, **given)
        candidate = weights.quantised(
            reference, scheme, rounding=learnt.rounding, factors=learnt.factors, progress=show
        )
        weights.save(candidate, out)
        if calibrate:
            calibration_of.write(learnt, out / calibration_of.FILE)
        if not validate:
            return 0
        found = compare(
            reference,
            candidate,
            engine=replace(settings.engine, cache=CacheConfig()),  # the report is of the weights
            files=text,
            max_tokens=tokens,
            window=window,
            weights=digest(out),
            progress=show,
        )
    report.write(found, out / report.FILE)
    return say(found, settings, [out / report.FILE], as_json=as_json)
