"""`jaxinfer config`: the settings, where they come from, and their schema."""

import json
from typing import Annotated

from cyclopts import App, Parameter

from jaxinfer import config
from jaxinfer.cli.options import Common


def make_app(plain: Parameter) -> App:
    """The subcommands of `config`."""
    app = App(
        name="config", help="Shows, compares and describes settings.", default_parameter=plain
    )
    app.command(show)
    app.command(diff)
    app.command(schema)
    return app


def show(
    *, as_json: Annotated[bool, Parameter(name="--json")] = False, common: Common = Common()
) -> None:
    """Prints every setting as TOML that -c reads back, and the hash of all of them.

    Parameters
    ----------
    as_json
        Prints one JSON object instead: key to value.
    """
    settings = common.load()
    if as_json:
        print(json.dumps({"digest": config.digest(settings), **dict(config.flatten(settings))}))
        return
    print(f"# {config.digest(settings)}")
    print(config.to_toml(settings), end="")


def diff(
    *,
    against: tuple[str, ...] = (),
    as_json: Annotated[bool, Parameter(name="--json")] = False,
    common: Common = Common(),
) -> None:
    """Prints the settings that differ from the defaults, and who set them.

    Parameters
    ----------
    against
        A file or preset to compare with, instead of the defaults; repeatable.
    as_json
        Prints one JSON object instead: key to the two values and the origin.
    """
    layers = config.gather(*common.sources())
    settings = config.override(config.Config(), layers)
    base = config.load(*against, environ={})
    origins = {".".join(key): setting.origin for key, setting in layers.items()}
    before, other = dict(config.flatten(base)), "/".join(against) or "defaults"
    changes = [
        (key, before[key], value, origins.get(key, "defaults"))
        for key, value in config.flatten(settings)
        if before[key] != value
    ]
    if as_json:
        print(
            json.dumps(
                {
                    key: {"value": value, "was": was, "origin": origin}
                    for key, was, value, origin in changes
                }
            )
        )
        return
    for key, was, value, origin in changes:
        print(
            f"{key} = {config.format_value(value)}"
            f"  # {origin}; {other}: {config.format_value(was)}"
        )


def schema() -> None:
    """Prints the JSON schema of a settings file, for editors that complete and check TOML."""
    print(json.dumps(config.schema(), indent=2))
