"""What an engine tells its server, as JSON values and back: outputs, counts, model and text."""

from dataclasses import asdict, astuple, fields
from typing import Any

from jaxinfer.config import ModelConfig, RopeScaling
from jaxinfer.host.plain import Record, tuples
from jaxinfer.host.request import (
    EngineStats,
    FinishReason,
    Limits,
    Output,
    SamplingParams,
    Timings,
)
from jaxinfer.text.assets import TextAssets

NAMES = tuple(one.name for one in fields(Output))


def output_to_plain(output: Output) -> list[Any]:
    """One request's part of a step."""
    values = {name: getattr(output, name) for name in NAMES}
    return [*(values | {"timings": astuple(output.timings)}).values()]


def output_from_plain(plain: list[Any]) -> Output:
    """The same again."""
    values = tuples(dict(zip(NAMES, plain, strict=True)))
    reason = values["finish_reason"]
    return Output(
        **values
        | {
            "timings": Timings(*values["timings"]),
            "finish_reason": None if reason is None else FinishReason(reason),
        }
    )


def stats_to_plain(stats: EngineStats) -> list[Any]:
    """Counts in the order of their fields."""
    return [*astuple(stats)]


def stats_from_plain(plain: list[Any]) -> EngineStats:
    """The same again."""
    return EngineStats(*plain)


def model_to_plain(
    model: ModelConfig, limits: Limits, defaults: SamplingParams, text: TextAssets
) -> Record:
    """All that a server needs of a model whose weights it does not hold."""
    return {
        "config": asdict(model),
        "limits": asdict(limits),
        "defaults": asdict(defaults),
        "text": asdict(text),
    }


def model_from_plain(
    plain: Record,
) -> tuple[ModelConfig, Limits, SamplingParams, TextAssets]:
    """The same again."""
    config = tuples(plain["config"])
    config["rope_scaling"] = RopeScaling(**config["rope_scaling"])
    return (
        ModelConfig(**config),
        Limits(**tuples(plain["limits"])),
        SamplingParams(**tuples(plain["defaults"])),
        TextAssets(**tuples(plain["text"])),
    )
