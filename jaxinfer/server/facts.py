"""What a server says about itself and its start; secrets are left out."""

from collections import Counter
from collections.abc import Iterable
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


def gather(config: Config, *engines: "Engine") -> Facts:
    """The facts of loaded engines of one model and the settings that they were loaded with."""
    broken = (text for engine in engines for text in engine.self_test.broken_promises)
    return Facts(
        device=_devices(engines),
        config_toml=settings.to_toml(without_secrets(config)),
        programs=tuple(shape.name for shape in engines[0].programs),
        broken_promises=tuple(dict.fromkeys(broken)),
    )


def without_secrets(config: Config) -> Config:
    """Whoever may look at a server must not be able to guess what others have cached."""
    return replace(config, server=replace(config.server, prefix_salt=""))


def _devices(engines: Iterable["Engine"]) -> str:
    import jax  # the engines have it already; a server of another engine needs none

    leaves = (leaf for engine in engines for leaf in jax.tree.leaves(engine.device.params))
    found = {device for leaf in leaves for device in leaf.devices()}
    kinds = Counter(f"{device.device_kind} ({device.platform})" for device in found)
    return ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items()))
