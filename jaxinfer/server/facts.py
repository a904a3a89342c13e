"""What a server says about itself and its start; secrets are left out."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from jaxinfer import config as settings
from jaxinfer.config import Config

if TYPE_CHECKING:
    from jaxinfer.engine import Engine


@dataclass(frozen=True)
class Facts:
    """What stays the same from start to end."""

    device: str = ""
    config_toml: str = ""
    programs: tuple[str, ...] = ()
    broken_promises: tuple[str, ...] = ()


def gather(engine: "Engine", config: Config) -> Facts:
    """The facts of a loaded engine and the settings that it was loaded with."""
    return Facts(
        device=_devices(engine),
        config_toml=settings.to_toml(without_secrets(config)),
        programs=tuple(shape.name for shape in engine.programs),
        broken_promises=engine.self_test.broken_promises,
    )


def without_secrets(config: Config) -> Config:
    """Whoever may look at a server must not be able to guess what others have cached."""
    return replace(config, server=replace(config.server, prefix_salt=""))


def _devices(engine: "Engine") -> str:
    import jax  # the engine has it already; a server of another engine needs none

    found = {device for leaf in jax.tree.leaves(engine.device.params) for device in leaf.devices()}
    kinds = Counter(f"{device.device_kind} ({device.platform})" for device in found)
    return ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items()))
