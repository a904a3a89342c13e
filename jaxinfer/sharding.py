"""Where arrays lie: a mesh of devices, a table from logical axes to its axes, and programs on it.

The table alone decides: weights are placed by it, and what the weights' own shardings say is what
a program is made for, so that the two can't differ.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxinfer import spec
from jaxinfer.config import MeshConfig, ModelConfig
from jaxinfer.errors import ConfigError
from jaxinfer.nn import heads
from jaxinfer.parallel import Ordered, Split
from jaxinfer.quant.leaf import block_of
from jaxinfer.spec import ArraySpec

Placement = Callable[[ArraySpec], NamedSharding]
KINDS = ("heads", "kv_heads", "ffw", "vocab")
"""The logical axes that a step can split. `expert` is kept for later; `batch` makes replicas."""
REPLICAS = "batch"


def replicas(config: MeshConfig) -> tuple[MeshConfig, ...]:
    """The meshes of engines beside each other; the mesh itself where it holds one engine.

    The axis of the rule `batch` is cut: each of its places is a mesh of the other axes, on the
    devices that follow those of the place before.
    """
    count, shape, axes = 1, config.shape, config.axes
    rules = tuple(rule for rule in config.rules if rule[0] != REPLICAS)
    for _, axis in (rule for rule in config.rules if rule[0] == REPLICAS):
        _num_devices(config)
        if axis not in config.axes or any(axis == other for _, other in rules):
            raise ConfigError(
                f"mesh.rules puts {REPLICAS!r} along {axis!r}; it takes one of mesh.axes "
                f"{config.axes} for itself"
            )
        at = config.axes.index(axis)
        count = config.shape[at]
        shape, axes = (*shape[:at], *shape[at + 1 :]), (*axes[:at], *axes[at + 1 :])
    if count == 1 and len(rules) == len(config.rules):
        return (config,)
    size = math.prod(shape)
    starts = range(config.first_device, config.first_device + count * size, size)
    return tuple(
        MeshConfig(shape or (1,), axes or ("X",), rules, first_device=start) for start in starts
    )


def is_plain(config: MeshConfig) -> bool:
    """Whether it is the first device alone, which needs no mesh."""
    return not config.rules and not config.first_device


def make_mesh(config: MeshConfig) -> Mesh:
    """Devices of this process, in the shape that the config asks for."""
    wanted, found = _num_devices(config), jax.devices()[config.first_device :]
    if wanted > len(found):
        where = f" from number {config.first_device} on" if config.first_device else ""
        raise ConfigError(
            f"mesh.shape {config.shape} needs {wanted} devices{where}; {len(found)} are here"
        )
    kinds = (AxisType.Auto,) * len(config.axes)
    return jax.make_mesh(config.shape, config.axes, axis_types=kinds, devices=found[:wanted])


def is_here(config: MeshConfig) -> bool:
    """Whether this process has the devices of a mesh."""
    return config.first_device + _num_devices(config) <= len(jax.devices())


def placement(config: MeshConfig, *, real: bool = True) -> Placement:
    """A function from a spec to its sharding: changing a layout edits a table, not this.

    Where it need not be `real`, the devices need not be here either.
    """
    if real:
        mesh: Mesh | AbstractMesh = make_mesh(config)
    else:
        _num_devices(config)
        mesh = AbstractMesh(config.shape, config.axes)
    rules = dict(config.rules)
    for logical, axis in config.rules:
        if axis not in mesh.axis_names:
            raise ConfigError(
                f"mesh.rules puts {logical!r} along {axis!r}; the mesh has {mesh.axis_names}"
            )

    def place(spec: ArraySpec) -> NamedSharding:
        axes = _partition(spec, rules)
        for size, name, axis in zip(spec.shape, spec.axes, axes, strict=True):
            if axis and size % mesh.shape[axis]:
                raise ConfigError(
                    f"{name} has {size} entries, which {mesh.shape[axis]} devices along {axis} "
                    "can't share evenly; drop its rule or use fewer devices"
                )
        used = [axis for axis in axes if axis]
        if len(used) != len(set(used)):
            raise ConfigError(f"mesh.rules put two of the axes {spec.axes} along one mesh axis")
        return NamedSharding(mesh, axes)

    return place


def fit(model: ModelConfig, config: MeshConfig) -> ModelConfig:
    """The model as a mesh holds it: kv heads repeated and heads padded where they don't divide.

    Raises ConfigError where the mesh can't split it.
    """
    if not config.rules:
        if math.prod(config.shape) > 1:
            raise ConfigError(
                f"mesh.shape is {config.shape} and mesh.rules is empty, so that all devices but "
                "one would idle; take configs/mesh/tensor-2 as an example, or shape (1,)"
            )
        return model
    sizes, rules = dict(zip(config.axes, config.shape, strict=False)), dict(config.rules)
    if REPLICAS in rules:
        raise ConfigError(
            f"mesh.rules asks for replicas ({REPLICAS!r}), and one engine is built here; `serve` "
            "takes replicas, and here the rule has to go"
        )
    for name in rules:
        if name not in KINDS:
            raise ConfigError(
                f"mesh.rules splits {name!r}; what can be split is {', '.join(KINDS)}"
            )
    if rules.get("heads") != rules.get("kv_heads"):
        raise ConfigError(
            "mesh.rules must put heads and kv_heads along the same mesh axis: the queries of a kv "
            "head need its pages"
        )
    parts = {name: sizes.get(axis, 1) for name, axis in rules.items()}
    for name, key in (("ffw", "d_ff"), ("vocab", "vocab_size")):
        size, count = getattr(model, key), parts.get(name, 1)
        if size % count:
            raise ConfigError(
                f"{name} has {size} entries, which {count} devices along {rules[name]} can't "
                "share evenly; drop its rule or use fewer devices"
            )
    wide = heads.fit(model, parts.get("heads", 1))
    if model.quant != "none":
        _check_blocks(wide, parts)
    return wide


def _check_blocks(model: ModelConfig, parts: Mapping[str, int]) -> None:
    """Quantised weights are rotated in blocks of channels, which must stay on one device."""
    for name, channels in (("heads", model.num_heads * model.head_dim), ("ffw", model.d_ff)):
        block, own = block_of(channels), channels // parts.get(name, 1)
        if own % block:
            raise ConfigError(
                f"{model.quant} mixes {block} channels of {name} at a time, and a device would "
                f"have {own} of them; use fewer devices or quant.scheme 'none'"
            )


@dataclass(frozen=True)
class Layout:
    """How a model's arrays lie, read off their shardings; over one device everything is whole."""

    devices: list[Any]
    """In the order in which programs number them."""
    mesh: Mesh | AbstractMesh | None = None
    """None where nothing is split."""
    rules: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What programs that differ in nothing else differ in."""
        if self.mesh is None:
            return ""
        return f"{dict(self.mesh.shape)} {sorted(self.rules.items())}"

    @property
    def size(self) -> int:
        """How many devices share the arrays."""
        return 1 if self.mesh is None else self.mesh.size

    def on_devices(self) -> "Layout":
        """The same, if its devices are here; ConfigError where it can be planned and not built."""
        if isinstance(self.mesh, AbstractMesh):
            raise ConfigError(
                f"the mesh needs {self.size} devices; {len(jax.devices())} are here, so that it "
                "can be planned and not built"
            )
        return self

    @property
    def split(self) -> Split:
        """The same for a step."""
        kinds = (self.rules.get(name) for name in ("heads", "ffw", "vocab"))
        return Split(*(Ordered(axis) if axis and self._is_ring else axis for axis in kinds))

    @property
    def _is_ring(self) -> bool:
        """Whether sums go round in a ring, as gloo's do; of two parts, order is no matter."""
        processes = {device.process_index for device in self.devices}
        is_gloo = len(processes) > 1 and self.devices[0].platform == "cpu"
        return is_gloo and len(self.devices) > 2

    def local(self, model: ModelConfig) -> ModelConfig:
        """The part of a model that one device has."""
        if self.mesh is None:
            return model
        split = self.split
        return replace(
            model,
            num_heads=model.num_heads // self._size(split.heads),
            num_kv_heads=model.num_kv_heads // self._size(split.heads),
            d_ff=model.d_ff // self._size(split.ffw),
            vocab_size=model.vocab_size // self._size(split.vocab),
        )

    def abstract(self, specs: Any, dtype: DTypeLike) -> Any:
        """Shapes and dtypes of a tree of specs, and where they lie."""
        shapes, mesh = spec.abstract(specs, dtype), self.mesh
        if mesh is None:
            return shapes
        return jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, where)
            ),
            shapes,
            self.partitions(specs),
        )

    def partitions(self, specs: Any) -> Any:
        """The tree of PartitionSpecs for a tree of specs."""
        return spec.map_specs(lambda leaf: _partition(leaf, self.rules), specs)

    def over_devices(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], results: Any
    ) -> Callable[..., Any]:
        """A function of one device's parts as one of whole arrays; itself where nothing is split.

        Arguments without a sharding and results without an axis are the same on every device.
        """
        if self.mesh is None:
            return function
        given = jax.tree.map(_partition_of, arguments)
        # What is the same on every device is so by arithmetic that the checker can't follow: it
        # is gathered, or comes out of a sum and is used in branches.
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=given, out_specs=results, check_vma=False
        )

    def _size(self, axis: str | None) -> int:
        return 1 if axis is None or self.mesh is None else self.mesh.shape[axis]


def layout_of(specs: Any, params: Any) -> Layout:
    """The layout of params, arrays or abstract ones, that `specs` describes."""
    leaves = jax.tree.leaves(params)
    sharding = leaves[0].sharding
    if not isinstance(sharding, NamedSharding):
        return Layout(list(sharding.device_set) if sharding else jax.devices()[:1])
    mesh = sharding.mesh
    devices = mesh.devices.ravel().tolist() if isinstance(mesh, Mesh) else jax.devices()[:1]
    if mesh.size == 1:
        return Layout(devices)
    described = jax.tree.leaves(specs, is_leaf=spec.is_spec)
    rules: dict[str, str] = {}
    for leaf, one in zip(leaves, described, strict=True):
        found = zip(one.axes, leaf.sharding.spec, strict=False)
        rules.update({name: axis for name, axis in found if name and axis})
    for leaf, one in zip(leaves, described, strict=True):
        lies = leaf.sharding.spec
        whole = (*lies, *(None,) * (len(one.axes) - len(lies)))
        if not set(rules) <= set(KINDS) or whole != tuple(_partition(one, rules)):
            raise ConfigError(
                f"an array with axes {one.axes} lies as {lies}; what can be split is "
                f"{', '.join(KINDS)}, each along one axis of the mesh and in all arrays alike"
            )
    return Layout(devices, mesh, rules)


def _partition_of(leaf: Any) -> PartitionSpec:
    sharding = leaf.sharding
    return sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()


def _partition(spec: ArraySpec, rules: Mapping[str, str]) -> PartitionSpec:
    return PartitionSpec(*(rules.get(name) if name else None for name in spec.axes))


def _num_devices(config: MeshConfig) -> int:
    if len(config.shape) != len(config.axes):
        raise ConfigError(f"mesh.shape {config.shape} and mesh.axes {config.axes} differ in length")
    return math.prod(config.shape)
