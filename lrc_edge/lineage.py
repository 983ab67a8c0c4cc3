"""Lineage: where each axis of a student comes from, and how its weights are composed from the teacher's.

Every axis that the roles of lrc_edge.families name has a source: the teacher's coordinates as they are (`identity`), or
those times a trained matrix of (teacher's size, student's size), one per weight (`projection`). Layers have a source,
too: each layer of the student names one of the teacher's. The clone and the fold read nothing else about how the two
models are related. The value is stored next to the trained tensors and in the student's provenance.
"""
from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from lrc_edge.errors import UserError
from lrc_edge.families import RESIDUAL, Role, Weight
from lrc_edge.shape import ModelShape

if TYPE_CHECKING:
    import torch

AXES = ("vocab_size", RESIDUAL, "intermediate_size", "q_size", "kv_size", "head_dim")
Source = Literal["identity", "projection"]
# What a trained file has: P of each composed matrix, and norms; or every weight of the student.
Holds = Literal["projections", "weights"]
METADATA_KEY = "lrc_edge"  # the only one: safetensors does not keep the order of several


@dataclass(frozen=True)
class Lineage:
    """Both shapes, the source of each axis, and for each layer of the student the index of the teacher's layer.

    Raises ValueError if these do not fit together.
    """

    teacher: ModelShape
    student: ModelShape
    layers: tuple[int, ...]
    axes: Mapping[str, Source]

    @classmethod
    def of(cls, teacher: ModelShape, student: ModelShape) -> Lineage:
        """Return the lineage of a student that differs from its teacher only in the residual width, if at all."""
        return cls(teacher, student, tuple(range(teacher.num_hidden_layers)),
                   {axis: "projection" if axis == RESIDUAL else "identity" for axis in AXES})

    def __post_init__(self) -> None:
        if self.axes.keys() != set(AXES):
            raise ValueError(f"lineage: axes {sorted(self.axes.keys() ^ set(AXES))} are unknown or missing; "
                             f"known: {', '.join(AXES)}")
        for axis, source in self.axes.items():
            sizes = getattr(self.teacher, axis), getattr(self.student, axis)
            if source not in get_args(Source):
                raise ValueError(f"lineage: {axis} = {source!r}; known: {', '.join(get_args(Source))}")
            if source == "identity" and sizes[0] != sizes[1]:
                raise ValueError(f"lineage: {axis} is the identity, but {sizes[0]} in the teacher and {sizes[1]} in "
                                 "the student")
        if len(self.layers) != self.student.num_hidden_layers or \
                not set(self.layers) <= set(range(self.teacher.num_hidden_layers)):
            raise ValueError(f"lineage: layers {self.layers} of a teacher with {self.teacher.num_hidden_layers} do not "
                             f"make a student of {self.student.num_hidden_layers}")

    def is_copied(self, role: Role) -> bool:
        """Whether weights of this role start as the teacher's, because none of their axes is projected.

        They stay so while projections are trained. Once weights are trained, these are, too (train/phases.py).
        """
        return all(self.axes[axis] == "identity" for axis in role.axes)

    def is_composed(self, role: Role) -> bool:
        """Whether the weights of this role are matrices composed through a projection.

        The gains of norms are trained directly: a gain is not a vector in the residual stream, so no linear map fits.
        """
        return role.is_matrix and not self.is_copied(role)

    def source_of(self, weight: Weight) -> str:
        """Return the name of the teacher's weight that a weight of the student comes from."""
        return weight.role.weight.format(i=None if weight.layer is None else self.layers[weight.layer])

    def sources(self) -> str:
        """Return, as JSON for the provenance of a student, what the two shapes do not show."""
        return json.dumps({**self.axes, "layers": self.layers})

    def metadata(self, holds: Holds) -> dict[str, str]:
        """Return the safetensors metadata of a file of trained tensors."""
        return {METADATA_KEY: json.dumps({"holds": holds, **asdict(self)})}


def read_metadata(metadata: Mapping[str, str] | None, where: Path) -> tuple[Lineage, Holds]:
    """Read what `Lineage.metadata` wrote into the file `where`. Raises UserError if it is missing or invalid."""
    try:
        table: dict[str, Any] = json.loads((metadata or {})[METADATA_KEY])
        if table["holds"] not in get_args(Holds):
            raise ValueError(f"holds = {table['holds']!r}; known: {', '.join(get_args(Holds))}")
        return Lineage(ModelShape.from_dict(table["teacher"]), ModelShape.from_dict(table["student"]),
                       tuple(table["layers"]), table["axes"]), table["holds"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where}: its metadata does not describe a student ({error}); another version of lrc-edge "
                        "wrote it: delete it, then run lrc-edge build or train again") from error


def compose(weight: Weight, teacher: torch.Tensor, maps: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Compose a weight of the student: apply each map P to its axis of the teacher's weight W.

    P is (teacher's size, student's size). On the input axis the result is W P, on the output axis P^T W (Low-Rank
    Clone, arXiv 2505.12781, section 3). Axes without a map are copied. The result has the operands' type; callers
    choose the precision. Raises ValueError for a map of an unknown axis.
    """
    if unknown := maps.keys() - set(AXES):
        raise ValueError(f"compose: axes {sorted(unknown)} are unknown; known: {', '.join(AXES)}")
    outputs, *inputs = weight.role.axes
    composed = teacher
    for axis in inputs:
        composed = composed @ maps[axis] if axis in maps else composed
    return maps[outputs].T @ composed if outputs in maps else composed
