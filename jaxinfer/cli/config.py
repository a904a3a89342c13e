"""`jaxinfer config`: the settings, where they come from, and their schema."""

import json

from cyclopts import App

from jaxinfer import config, settings
from jaxinfer.cli import COMMANDS
from jaxinfer.cli.options import COMMON, Common, Json

app = App(name="config", help=COMMANDS["config"])


@app.command
def show(*, as_json: Json = False, common: Common = COMMON) -> None:
    """Prints every setting as TOML that -c reads back, and the hash of all of them.

    Parameters
    ----------
    as_json
        Prints one JSON object instead: key to value.
    """
    loaded = common.load()
    if as_json:
        print(json.dumps({"digest": config.digest(loaded), **dict(settings.flatten(loaded))}))
        return
    print(f"# {config.digest(loaded)}")
    print(config.to_toml(loaded), end="")


@app.command
def diff(
    *,
    against: tuple[str, ...] = (),
    as_json: Json = False,
    common: Common = COMMON,
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
    loaded = settings.apply(config.Config(), layers)
    base = config.load(*against, environ={})
    origins = {".".join(key): setting.origin for key, setting in layers.items()}
    before, other = dict(settings.flatten(base)), " ".join(against) or "default"
    changes = [
        (key, before[key], value, origins.get(key, "default"))
        for key, value in settings.flatten(loaded)
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
            f"{key} = {settings.format_value(value)}"
            f"  # {origin}; {other}: {settings.format_value(was)}"
        )


@app.command
def schema() -> None:
    """Prints the JSON schema of a settings file, for editors that complete and check TOML."""
    print(json.dumps(settings.schema(config.Config), indent=2))
