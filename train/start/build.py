"""Build the start of a student: choose what stays of each axis, then go through the layers and refit their writers.

Three passes: statistics of the teacher's activations; the choice of layers, if some go (depth.py); and, layer by layer,
the student next to the teacher. One decoder layer of the teacher is in memory at a time, and residual streams are in
files; the student's weights are in memory, in float32. Shapes: B rows, L positions, D teacher width, S student width.
"""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lrc_edge.block_map import BlockMap
from lrc_edge.families import EMBEDDING, FINAL_NORM, Role, Weight, family_of, weights_of
from lrc_edge.lineage import Holds, Lineage, compose
from lrc_edge.shape import ModelShape
from lrc_edge.student import can_be_read
from lrc_edge.train.clone import Clone, config_of
from lrc_edge.train.phases import CLONE, DENSE, Phase
from lrc_edge.train.start import depth, heads, neurons
from lrc_edge.train.start.layers import Layers, recorded
from lrc_edge.train.start.losses import losses, losses_of
from lrc_edge.train.start.refit import LeastSquares
from lrc_edge.train.start.statistics import LayerStatistics, Statistics, at_unit_rms, statistics_of
from lrc_edge.train.start.streams import Streams
from lrc_edge.train.start.width import Width, principal_components

Progress = Callable[[str], None]
REFITTED = ("num_hidden_layers", "intermediate_size", "num_attention_heads")  # axes whose cuts a refit follows


@dataclass(frozen=True)
class Choices:
    """How a start chooses; other values than these serve comparisons (benchmarks/axes.py)."""

    width: Callable[[Statistics, Lineage, int], Width] = principal_components
    layers: Callable[..., tuple[int, ...]] = depth.greedy
    neurons: Callable[[LayerStatistics, torch.Tensor], torch.Tensor] = neurons.strongest
    heads: Callable[..., dict[str, BlockMap]] = heads.head_maps
    refits: bool = True
    refits_all: bool = False  # also after cuts of heads and of the width
    seed: int = 0


@dataclass
class Start:
    """The values of a student before training.

    tensors: what the first phase trains, by weight. writers: P of the matrices that write the stream, if those are not
    among the tensors. loss and kl: of the student on the calibration rows, in nats per token; kl is from the teacher.
    """

    lineage: Lineage
    holds: Holds
    tensors: dict[str, torch.Tensor]
    writers: dict[str, torch.Tensor]
    loss: float
    kl: float

    def clone(self, teacher: PreTrainedModel, dtype: torch.dtype = torch.float32, recompute: bool = False) -> Clone:
        """Return a clone that has these values."""
        clone = Clone(teacher, self.lineage, dtype, recompute, first_phase(self.holds)).to(teacher.device)
        self.load_into(clone)
        return clone

    def model(self, teacher: Layers) -> Layers:
        """Return the student, if its weights are held, by layers."""
        return Layers(config_of(teacher.config, self.lineage), self.lineage.student,
                      lambda weight: self.tensors[weight.name], teacher.device)

    def then(self, cut: Start, teacher: Layers, rows_BL: torch.Tensor, folder: Path) -> Start:
        """Return `cut`, the start of a student of this start's student, as a start of a student of the teacher."""
        writers = {weight.name: self.writers[cut.lineage.source_of(weight)] @ cut.writers[weight.name]
                   for weight in weights_of(cut.lineage.student) if weight.role.writes_stream}
        start = Start(self.lineage.then(cut.lineage), cut.holds, cut.tensors, writers, cut.loss, cut.kl)
        start.loss, start.kl = losses_of(teacher, start.model(teacher), rows_BL, folder)
        return start

    def load_into(self, clone: Clone) -> None:
        for name, p in clone.writers().items() if self.writers else ():
            p.data.copy_(self.writers[name])
        clone.initialize(self.tensors)


def first_phase(holds: Holds) -> Phase:
    """Return the phase that trains these tensors."""
    return DENSE if holds == DENSE.holds else CLONE


@torch.no_grad()
def build_start(teacher: Layers, student: ModelShape, rows_BL: torch.Tensor, folder: Path, holds: Holds,
                choices: Choices | None = None, progress: Progress = lambda text: None) -> Start:
    """Return the start of a student of this shape. rows_BL: ids of calibration text. folder: for temporary files.

    Layers, neurons and query heads are cut first, and what remains is refitted. Then key/value heads and width are cut
    without a refit, after which the student would start lower, but end equal or worse (docs/LOG.md).
    """
    choices = choices or Choices()
    shape = cut_first(teacher.shape, student)
    if holds == "projections" or not choices.refits or choices.refits_all or shape in (teacher.shape, student):
        return _cut(teacher, student, rows_BL, folder, holds, choices, progress)
    first = _cut(teacher, shape, rows_BL, folder, holds, choices, progress)
    second = _cut(first.model(teacher), student, rows_BL, folder, holds, choices, progress)
    return first.then(second, teacher, rows_BL, folder)


def cut_first(teacher: ModelShape, student: ModelShape) -> ModelShape:
    """Return the teacher with those sizes of the student whose cuts are refitted. Query heads are not among them if
    they do not divide among the teacher's groups, if whole groups are dropped with theirs, or if transformers refuses
    the teacher's width with so few."""
    shape = teacher.resized({field: getattr(student, field) for field in REFITTED})
    drops_groups = family_of(teacher.family).normalizes_heads and \
        student.num_key_value_heads < teacher.num_key_value_heads
    if shape.num_attention_heads % teacher.num_key_value_heads or drops_groups or not can_be_read(shape):
        return shape.resized({"num_attention_heads": teacher.num_attention_heads})
    return shape


def _cut(teacher: Layers, student: ModelShape, rows_BL: torch.Tensor, folder: Path, holds: Holds, choices: Choices,
         progress: Progress) -> Start:
    streams = Streams(folder, rows_BL.shape, teacher.device)
    statistics = statistics_of(teacher, rows_BL, streams, progress)
    layers = choices.layers(teacher, statistics, student.num_hidden_layers, rows_BL, folder, progress)
    lineage = Lineage(teacher.shape, student, layers, _maps(teacher, student, layers, statistics, choices))
    width = choices.width(statistics, lineage, choices.seed)
    refits = width.is_linear and choices.refits and (choices.refits_all or student == cut_first(teacher.shape, student))
    return Assembly(teacher, lineage, width, holds, streams, refits).run(rows_BL, progress)


def _maps(teacher: Layers, student: ModelShape, layers: tuple[int, ...], statistics: Statistics, choices: Choices
          ) -> dict[str, list[BlockMap]]:
    """Return the block maps of the axes that change, by axis and layer."""
    shape, family = teacher.shape, family_of(teacher.shape.family)
    found: dict[str, list[BlockMap]] = defaultdict(list)
    for layer in layers:
        of_layer = statistics.layers[layer]
        o_proj, down = (teacher.read(Weight.of(family.role(name), layer, shape))
                        for name in ("attn_output", "ffn_down"))
        maps = choices.heads(of_layer, o_proj, shape, student)
        if student.intermediate_size < shape.intermediate_size:
            importance_F = choices.neurons(of_layer, down)
            maps |= {"intermediate_size": neurons.selection(importance_F, student.intermediate_size)}
        for axis, block_map in maps.items():
            found[axis].append(block_map)
    return found


class Assembly:
    """The last pass: the student's weights, layer by layer, while both streams go through the calibration text."""

    def __init__(self, teacher: Layers, lineage: Lineage, width: Width, holds: Holds, streams: Streams, refits: bool):
        self.teacher, self.lineage, self.width, self.holds = teacher, lineage, width, holds
        self.streams, self.refits = streams, refits
        self.family = family_of(lineage.student.family)
        self.values: dict[str, torch.Tensor] = {}  # of the student's weights
        self.projections: dict[str, torch.Tensor] = {}
        self.student = Layers(config_of(teacher.config, lineage), lineage.student,
                              lambda weight: self.values[weight.name], teacher.device)

    def run(self, rows_BL: torch.Tensor, progress: Progress) -> Start:
        weights = list(weights_of(self.lineage.student))
        self._set(weights[0], {})
        tables = self.teacher.outside(EMBEDDING), self.student.outside(EMBEDDING)
        for part in self.streams.parts():
            ids = rows_BL[part].to(self.teacher.device)
            for name, table in zip(("teacher", "student"), tables, strict=True):
                self.streams.put(name, part, table[ids])
        del tables
        masks = self.teacher.masks(rows_BL)
        for layer in range(self.lineage.student.num_hidden_layers):
            progress(f"layer {layer + 1} of {self.lineage.student.num_hidden_layers}")
            self._layer(layer, [w for w in weights if w.layer == layer], masks)
        rms = self._rms_of_final_norm()
        for weight in weights[1:]:
            if weight.layer is None:
                self._set(weight, {FINAL_NORM.module: rms})
        return self._start(*losses(self.teacher, self.student, rows_BL, self.streams))

    def _start(self, loss: float, kl: float) -> Start:
        writers = {w.name: self.projections[w.name] for w in weights_of(self.lineage.student) if w.role.writes_stream}
        if self.holds == "weights":
            return Start(self.lineage, self.holds, self.values, writers, loss, kl)
        tensors = {w.name: self.projections[w.name] if w.role.is_matrix else self.values[w.name]
                   for w in weights_of(self.lineage.student) if not w.role.is_inner}
        return Start(self.lineage, self.holds, tensors, {}, loss, kl)

    def _base(self, weight: Weight) -> torch.Tensor:
        """Return the teacher's weight after its block maps."""
        layer = None if weight.layer is None else self.lineage.layers[weight.layer]
        return self.lineage.mapped(weight, self.teacher.read(Weight.of(weight.role, layer, self.lineage.teacher)))

    def _gain(self, role: Role, layer: int | None) -> torch.Tensor:
        """Return the gain of a norm of the teacher."""
        return self.teacher.read(Weight.of(role, layer, self.lineage.teacher))

    def _set(self, weight: Weight, rms: dict[str, torch.Tensor]) -> None:
        """Set a weight of the student. rms: of the inputs of norms, by module."""
        role, layer = weight.role, None if weight.layer is None else self.lineage.layers[weight.layer]
        if role.is_norm:
            self.values[weight.name] = self.width.gain(role, self._gain(role, layer), rms[role.module])
            return
        value = self._base(weight)
        if role.is_matrix:
            norm = self._norm_before(role)
            gain_D = self._gain(norm, layer if norm is not FINAL_NORM else None) if norm else None
            projection = self.width.projection(gain_D)
            if role.writes_stream or self.holds == "projections":
                self.projections[weight.name] = projection
            value = compose(role, value, projection)
        self.values[weight.name] = value.contiguous()

    def _norm_before(self, role: Role) -> Role | None:
        """Return the norm whose output a matrix reads, if there is one."""
        return {FINAL_NORM.name: FINAL_NORM, **{r.name: r for r in self.family.roles}}.get(role.norm)

    def _layer(self, layer: int, weights: list[Weight], masks: list[torch.Tensor | None]) -> None:
        rms = self._run_teacher(layer, masks)
        for weight in weights:
            self._set(weight, rms)
        mask = masks[self.lineage.layers[layer]]
        for weight in weights if self.refits else ():
            if weight.role.writes_stream:
                self._refit(weight, mask)
        self.student.load(layer)
        for part in self.streams.parts():
            self.streams.put("student", part, self.student.run(self.streams.get("student", part), mask))

    def _run_teacher(self, layer: int, masks: list[torch.Tensor | None]) -> dict[str, torch.Tensor]:
        """Run the teacher's layers that this one stands for. Return the RMS that the student's norms would read, by
        module. Puts the streams that the writers should reach under their roles' names."""
        writers = [role for role in self.family.roles if role.writes_stream]
        norms = [role.module for role in self.family.roles if role.is_norm]
        rms = {name: torch.zeros((), device=self.teacher.device) for name in norms}
        own, *left_out = self.lineage.teacher_layers(layer)
        with recorded(self.teacher.load(own), inputs=norms) as record:
            for part in self.streams.parts():
                after = self.teacher.run(self.streams.get("teacher", part), masks[own])
                self.streams.put("teacher", part, after)
                for name in norms if self.width.is_linear else ():
                    rms[name] += self._rms(record.inputs[name])
                for writer in writers if self.refits else ():
                    if norm := self.family.norm_after(writer):
                        self.streams.put(writer.name, part, self.width.stream(record.inputs[norm.module]))
        for other in left_out:
            self.teacher.load(other)
            for part in self.streams.parts():
                self.streams.put("teacher", part, self.teacher.run(self.streams.get("teacher", part), masks[other]))
        for part in self.streams.parts() if self.refits else ():
            self.streams.put(writers[-1].name, part, self.width.stream(self.streams.get("teacher", part)))
        return {name: total.cpu() / self.streams.n_tokens for name, total in rms.items()}

    def _rms(self, stream: torch.Tensor) -> torch.Tensor:
        """Return the sum over positions of the student's RMS where the teacher's stream has unit RMS."""
        return self.width.stream(at_unit_rms(stream)).square().mean(-1).sqrt().sum()

    def _refit(self, weight: Weight, mask: torch.Tensor | None) -> None:
        """Fit a matrix that writes the stream, or its projection, to the teacher's stream after it."""
        assert weight.layer is not None
        after, squares = self.family.norm_after(weight.role), LeastSquares()
        base = self._base(weight).to(self.teacher.device) if self.holds == "projections" else None
        module = self.student.load(weight.layer)
        with recorded(module, inputs=[role.module for role in (weight.role, after) if role]) as record:
            for part in self.streams.parts():
                stream = self.student.run(self.streams.get("student", part), mask)
                reached = record.inputs[after.module] if after else stream
                x = record.inputs[weight.role.module]
                squares.add(x if base is None else x @ base.T, self.streams.get(weight.role.name, part) - reached)
        change = squares.change().cpu()
        if base is None:
            self.values[weight.name] = self.values[weight.name] + change
        else:
            self.projections[weight.name] = self.projections[weight.name] + change.T
            self.values[weight.name] = compose(weight.role, base.cpu(), self.projections[weight.name])

    def _rms_of_final_norm(self) -> torch.Tensor:
        if not self.width.is_linear:
            return torch.ones(())
        total = sum(self._rms(self.streams.get("teacher", part)) for part in self.streams.parts())
        return torch.as_tensor(total).cpu() / self.streams.n_tokens
