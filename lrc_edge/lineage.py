"""Lineage: where each axis of a student comes from, and how its weights are composed from the teacher's.

The residual stream of the student is the teacher's times a trained matrix of (teacher's width, student's width), one
for each weight: a projection. The other axes of a layer are the teacher's as they are, or follow from them by a fixed
block map. Layers have a source, too: each layer of the student names one of the teacher's. The clone and the fold read
nothing else about how the two models are related. The value is stored with the trained tensors and in the student's
provenance.
"""
from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from lrc_edge.block_map import BlockMap
from lrc_edge.errors import UserError
from lrc_edge.families import RESIDUAL, Role, Weight
from lrc_edge.shape import ModelShape

if TYPE_CHECKING:
    import torch

MAPPED_AXES = ("intermediate_size", "q_size", "k_size", "v_size", "o_size")  # those that may have block maps
COPIED_AXES = ("vocab_size", "head_dim")  # always as in the teacher
# What a trained file has: P of each composed matrix, and norms; or every weight of the student.
Holds = Literal["projections", "weights"]
METADATA_KEY = "lrc_edge"  # the only one: safetensors does not keep the order of several


@dataclass(frozen=True)
class Lineage:
    """Both shapes, the teacher's layer of each layer of the student, and the block maps: axis -> one for each layer.

    Layers between two named ones are left out. Raises ValueError if these do not fit together.
    """

    teacher: ModelShape
    student: ModelShape
    layers: tuple[int, ...]
    maps: Mapping[str, Sequence[BlockMap]] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, teacher: ModelShape, student: ModelShape) -> Lineage:
        """Return the lineage of a student that differs from its teacher only in the residual width, if at all."""
        return cls(teacher, student, tuple(range(teacher.num_hidden_layers)))

    def __post_init__(self) -> None:
        if unknown := self.maps.keys() - set(MAPPED_AXES):
            raise ValueError(f"lineage: maps of {sorted(unknown)}; known: {', '.join(MAPPED_AXES)}")
        for axis in (*COPIED_AXES, *MAPPED_AXES):
            sizes = getattr(self.teacher, axis), getattr(self.student, axis)
            if axis not in self.maps and sizes[0] != sizes[1]:
                raise ValueError(f"lineage: {axis} has no map, but is {sizes[0]} in the teacher and {sizes[1]} in the "
                                 "student")
            for found in self.maps.get(axis, ()):
                if (found.teacher_size, found.student_size) != sizes:
                    raise ValueError(f"lineage: a map of {axis} is from {found.teacher_size} to {found.student_size}, "
                                     f"need {sizes[0]} to {sizes[1]}")
            if len(self.maps.get(axis, self.layers)) != len(self.layers):
                raise ValueError(f"lineage: {len(self.maps[axis])} maps of {axis} for {len(self.layers)} layers")
        if len(self.layers) != self.student.num_hidden_layers or self.layers[0] != 0 or \
                sorted({*self.layers}) != [*self.layers] or self.layers[-1] >= self.teacher.num_hidden_layers:
            raise ValueError(f"lineage: layers {self.layers} of a teacher with {self.teacher.num_hidden_layers} do not "
                             f"make a student of {self.student.num_hidden_layers}; the first is always kept")

    def then(self, second: Lineage) -> Lineage:
        """Return the lineage of a student that `second` makes from this one's student."""
        maps: dict[str, list[BlockMap]] = {}
        for axis in self.maps.keys() | second.maps.keys():
            own = [self.map_of(axis, layer) for layer in second.layers]
            further = [second.map_of(axis, layer) for layer in range(len(second.layers))]
            maps[axis] = [a.then(b) if a and b else a or b for a, b in zip(own, further, strict=True)]  # type: ignore[misc]
        return Lineage(self.teacher, second.student, tuple(self.layers[layer] for layer in second.layers), maps)

    def teacher_layers(self, layer: int) -> range:
        """Return the teacher's layers that a layer of the student stands for: its own, and those left out after it."""
        following = (*self.layers[1:], self.teacher.num_hidden_layers)
        return range(self.layers[layer], following[layer])

    def source_of(self, weight: Weight) -> str:
        """Return the name of the teacher's weight that a weight of the student comes from."""
        return weight.role.weight.format(i=None if weight.layer is None else self.layers[weight.layer])

    def map_of(self, axis: str, layer: int | None) -> BlockMap | None:
        """Return the map of an axis; None if the axis has none."""
        return self.maps[axis][layer] if layer is not None and axis in self.maps else None

    def mapped(self, weight: Weight, teacher: torch.Tensor) -> torch.Tensor:
        """Apply the block maps of all axes of the student's `weight` to the teacher's weight that it comes from."""
        for dim, axis in enumerate(weight.role.axes):
            found = self.map_of(axis, weight.layer)
            teacher = found.apply(teacher, dim) if found else teacher
        return teacher

    def has_maps(self, role: Role) -> bool:
        return any(axis in self.maps for axis in role.axes)

    def sources(self, trimmed: bool = False) -> str:
        """Return, as JSON for the provenance of a student, what the two shapes do not show. trimmed: whether the
        teacher's vocabulary was reduced before."""
        kinds = {axis: "selection" if all(m.is_selection for m in maps) else "block map"
                 for axis, maps in self.maps.items()}
        copied = dict.fromkeys((*COPIED_AXES, *MAPPED_AXES), "identity")
        narrower = self.student.hidden_size < self.teacher.hidden_size
        if trimmed:
            copied["vocab_size"] = "selection"
        return json.dumps({**copied, RESIDUAL: "projection" if narrower else "identity", **kinds,
                           "layers": self.layers})

    def metadata(self, holds: Holds) -> dict[str, str]:
        """Return the safetensors metadata of a file of trained tensors; `tensors` goes into the same file."""
        return {METADATA_KEY: json.dumps({"holds": holds, "teacher": self.teacher.as_dict(), "maps": [*self.maps],
                                          "student": self.student.as_dict(), "layers": self.layers})}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the block maps as tensors of a file, by names that no weight has."""
        # Copies: a safetensors file refuses tensors that share memory.
        return {name: tensor.clone() for axis, maps in self.maps.items() for layer, found in enumerate(maps)
                for name, tensor in zip(_map_names(axis, layer), (found.index_JM, found.factor_JMTS), strict=True)}


def is_map(name: str) -> bool:
    """Whether a tensor of a trained file belongs to a block map."""
    return name.startswith("map.")


def _map_names(axis: str, layer: int) -> tuple[str, str]:
    return f"map.{axis}.{layer}.index", f"map.{axis}.{layer}.factor"


def read_lineage(file: Any, where: Path) -> tuple[Lineage, Holds]:
    """Read what `Lineage.metadata` and `Lineage.tensors` wrote. `file`: the opened safetensors file `where`. Raises
    UserError if it is missing or invalid."""
    try:
        table: dict[str, Any] = json.loads((file.metadata() or {})[METADATA_KEY])
        if table["holds"] not in get_args(Holds):
            raise ValueError(f"holds = {table['holds']!r}; known: {', '.join(get_args(Holds))}")
        teacher, student = ModelShape.from_dict(table["teacher"]), ModelShape.from_dict(table["student"])
        maps = {axis: tuple(_read_maps(file, axis, student.num_hidden_layers, getattr(teacher, axis)))
                for axis in table["maps"]}
        return Lineage(teacher, student, tuple(table["layers"]), maps), table["holds"]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"{where}: its metadata does not describe a student ({error}); another version of lrc-edge "
                        "wrote it: delete it, then run lrc-edge build or train again") from error


def _read_maps(file: Any, axis: str, n_layers: int, teacher_size: int) -> Iterator[BlockMap]:
    names = set(file.keys())
    for layer in range(n_layers):
        if missing := [name for name in _map_names(axis, layer) if name not in names]:
            raise ValueError(f"tensor {missing[0]} is missing")
        index_JM, factor_JMTS = (file.get_tensor(name) for name in _map_names(axis, layer))
        yield BlockMap(index_JM, factor_JMTS, teacher_size)


def compose(role: Role, base: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """Compose a matrix of the student from a projection P (teacher's width, student's width).

    `base` is the teacher's matrix W after its block maps. A matrix that reads the residual stream becomes W P, one that
    writes it P^T W (Low-Rank Clone, arXiv 2505.12781, section 3). The result has the operands' type; callers choose the
    precision.
    """
    return projection.T @ base if role.writes_stream else base @ projection
