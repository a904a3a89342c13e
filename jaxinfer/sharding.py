"""Where arrays lie: a mesh of devices, and a table from logical axes to mesh axes."""

import math
from collections.abc import Callable

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxinfer.config import MeshConfig
from jaxinfer.errors import ConfigError
from jaxinfer.spec import ArraySpec

Placement = Callable[[ArraySpec], NamedSharding]


def make_mesh(config: MeshConfig) -> Mesh:
    """The first devices of this process, in the shape that the config asks for."""
    if len(config.shape) != len(config.axes):
        raise ConfigError(f"mesh.shape {config.shape} and mesh.axes {config.axes} differ in length")
    wanted, found = math.prod(config.shape), jax.devices()
    if wanted > len(found):
        raise ConfigError(
            f"mesh.shape {config.shape} needs {wanted} devices; {len(found)} are here"
        )
    kinds = (AxisType.Auto,) * len(config.axes)
    return jax.make_mesh(config.shape, config.axes, axis_types=kinds, devices=found[:wanted])


def placement(config: MeshConfig) -> Placement:
    """A function from a spec to its sharding: changing a layout edits a table, not this."""
    mesh, rules = make_mesh(config), dict(config.rules)
    for logical, axis in config.rules:
        if axis not in mesh.axis_names:
            raise ConfigError(
                f"mesh.rules puts {logical!r} along {axis!r}; the mesh has {mesh.axis_names}"
            )

    def place(spec: ArraySpec) -> NamedSharding:
        axes = [rules.get(name) if name else None for name in spec.axes]
        for size, name, axis in zip(spec.shape, spec.axes, axes, strict=True):
            if axis and size % mesh.shape[axis]:
                raise ConfigError(
                    f"{name} has {size} entries, which {mesh.shape[axis]} devices along {axis} "
                    "can't share evenly; drop its rule or use fewer devices"
                )
        used = [axis for axis in axes if axis]
        if len(used) != len(set(used)):
            raise ConfigError(f"mesh.rules put two of the axes {spec.axes} along one mesh axis")
        return NamedSharding(mesh, PartitionSpec(*axes))

    return place
