"""A frozen teacher and its student (the same transformers class), run layer by layer on the same tokens.

Each layer of the student runs next to the teacher's layer that it comes from, and to those that were left out after it.

The phase (train/phases.py) decides what the optimizer trains and how the student's matrices follow from that.
Call `compose_` after each change of the trained tensors, and `pull_back_` after the backward passes of a step.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lrc_edge.block_map import BlockMap
from lrc_edge.families import Role, Weight, family_of, parts_of, weights_of
from lrc_edge.lineage import Lineage
from lrc_edge.train import losses
from lrc_edge.train.losses import ACTIVATION_TERMS, Losses, Objective
from lrc_edge.train.masks import attention_masks, positions_of
from lrc_edge.train.phases import CLONE, Phase, key


class Tap:
    """Forward hooks that keep the last outputs of some modules of a layer.

    The outputs of linears include the bias, but not q/k norm, RoPE or activation. Set `keeps` before a forward pass
    whose outputs will be taken.
    """

    def __init__(self, layer: nn.Module, modules: Iterable[str]):
        self.outputs: dict[str, torch.Tensor] = {}
        self.keeps = False
        for name in modules:
            layer.get_submodule(name).register_forward_hook(self._keeper(name))

    def _keeper(self, name: str) -> Any:
        def keep(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            if self.keeps:
                self.outputs[name] = output
        return keep

    def take(self) -> dict[str, torch.Tensor]:
        """Return the outputs by module, and keep none of the next forward pass."""
        self.keeps = False
        # Copied and cleared: what a compiled graph leaves in an object of this module becomes an output of the graph.
        outputs = dict(self.outputs)
        self.outputs.clear()
        return outputs


class LayerPair(nn.Module):
    """A layer of the student, the teacher's layer that it comes from, and those that were left out after that.

    The teacher's activations live for this layer's forward pass only. The outputs of all linears (`roles`) are
    compared. The student's are in its own coordinates, so the teacher's go through their block maps first, or, if they
    are in the residual stream, through their projections. The last linear of the student's layer also stands for the
    layers that were left out.
    """

    def __init__(self, teacher: Sequence[nn.Module], student: nn.Module, roles: tuple[Role, ...],
                 sizes: tuple[int, int], maps: dict[str, BlockMap], recompute: bool):
        """`sizes`: shape of a projection, (teacher's width, student's width). `maps`: by axis."""
        super().__init__()
        self.teacher, self.student, self.recompute = teacher[0], student, recompute
        self.left_out = nn.ModuleList(teacher[1:])
        self.projections = nn.ParameterDict(
            {key(role.module): nn.Parameter(torch.zeros(sizes)) for role in roles if role.writes_stream})
        self.maps = {role.module: maps[role.axes[0]] for role in roles if role.axes[0] in maps}
        self.last = [role.module for role in roles if role.writes_stream][-1]
        modules = [role.module for role in roles]
        self.teacher_tap, self.student_tap = Tap(self.teacher, modules), Tap(student, modules)

    def compile_(self) -> None:
        """Apply torch.compile: as one graph, or as two if the student is recomputed: a graph cannot rerun its hooks."""
        if self.recompute:
            for layer in (self.teacher, *self.left_out):
                layer.compile()
            self._student = torch.compile(self._student)  # type: ignore[method-assign]
        else:
            self.compile()

    def forward(self, teacher_stream: torch.Tensor | None, student_stream: torch.Tensor, objective: Objective,
                masks: Sequence[torch.Tensor | None], rope: tuple[torch.Tensor, torch.Tensor]
                ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Return the two residual streams after this layer, and the terms of ACTIVATION_TERMS, summed over the linears.

        If `teacher_stream` is None, only the student runs. `masks`: of the teacher's layers; the student's is the
        first.
        """
        targets: dict[str, torch.Tensor] = {}
        mask = masks[0]
        if teacher_stream is not None:
            self.teacher_tap.keeps = objective.compares_activations
            with torch.no_grad():
                teacher_stream = own = self.teacher(teacher_stream, attention_mask=mask, position_embeddings=rope)
                targets = self.teacher_tap.take()
                for layer, its_mask in zip(self.left_out, masks[1:], strict=True):
                    teacher_stream = layer(teacher_stream, attention_mask=its_mask, position_embeddings=rope)
                if targets and len(self.left_out):
                    targets[self.last] = targets[self.last] + (teacher_stream - own)
        if self.recompute and torch.is_grad_enabled():
            student_stream, terms = checkpoint(self._student, student_stream, targets, objective.clone_terms, mask,
                                               rope, use_reentrant=False, preserve_rng_state=False)
        else:
            student_stream, terms = self._student(student_stream, targets, objective.clone_terms, mask, rope)
        return teacher_stream, student_stream, terms

    def _student(self, stream: torch.Tensor, targets: dict[str, torch.Tensor], clone_terms: str,
                 mask: torch.Tensor | None, rope: tuple[torch.Tensor, torch.Tensor]
                 ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the student's layer. In its terms, the seven linears have equal weight (the paper, section 3.2)."""
        # Without targets nothing is kept: a recomputed layer ends after its last saved tensor, before `take`.
        self.student_tap.keeps = bool(targets)
        stream = self.student(stream, attention_mask=mask, position_embeddings=rope)
        outputs = self.student_tap.take()
        terms = stream.new_zeros(len(ACTIVATION_TERMS), dtype=torch.float32)
        for name, target in targets.items():
            if key(name) in self.projections:
                target = target @ self.projections[key(name)].to(target.dtype)
            elif name in self.maps:
                target = self.maps[name].apply(target)
            terms = terms + torch.stack([of_activations(outputs[name], target, clone_terms)
                                         for of_activations in ACTIVATION_TERMS.values()])
        return stream, terms


class Clone(nn.Module):
    """A frozen teacher, its student of another shape, and the tensors that are trained to make the student."""

    teacher: PreTrainedModel
    student: PreTrainedModel
    phase: Phase

    def __init__(self, teacher: PreTrainedModel, lineage: Lineage, compute_dtype: torch.dtype = torch.float32,
                 recompute: bool = False, phase: Phase = CLONE):
        """`compute_dtype`: float32, or bfloat16 for autocast forward passes and compositions on float32 masters.

        `recompute`: the student's layers keep nothing for the backward pass but their inputs (gradient checkpointing).
        All tensors that the `phase` trains are to be set by `initialize`.
        """
        super().__init__()
        self.lineage, self.compute_dtype = lineage, compute_dtype
        self._token_losses: losses.TokenLosses = losses.token_losses
        teacher.requires_grad_(False)
        student = _new_student(teacher, lineage)
        # No dropout, whatever the teacher was trained with: then a step draws no random numbers at all.
        teacher.eval(), student.eval()
        # Both models stay complete for those who read them, but this module owns their layers as pairs: a layer that
        # could be reached by two paths could not be sharded as one unit.
        object.__setattr__(self, "teacher", teacher)
        object.__setattr__(self, "student", student)
        self.teacher_parts, self.student_parts = parts_of(teacher), parts_of(student)
        roles = family_of(lineage.student.family).matrices
        sizes = lineage.teacher.hidden_size, lineage.student.hidden_size
        self.pairs = nn.ModuleList(
            LayerPair([self.teacher_parts.layers[t] for t in lineage.teacher_layers(layer)], of_student, roles, sizes,
                      {axis: maps[layer].to(teacher.device) for axis, maps in lineage.maps.items()}, recompute)
            for layer, of_student in enumerate(self.student_parts.layers))
        self.ends = nn.ModuleList([end for parts in (self.teacher_parts, self.student_parts)
                                   for end in (parts.embedding, parts.rope, parts.norm, parts.head)])
        self.weights = list(weights_of(lineage.student))
        self.unread = nn.ParameterDict()  # trained tensors of the phase that no forward pass reads
        self.mapped = nn.ParameterDict()  # in the clone phase: matrices of the teacher after their block maps
        self.bind()
        for weight in self.weights:
            if weight.role.is_inner:
                mapped = lineage.mapped(weight, self.teacher_of(weight).data)
                self.student_weights[weight.name].data.copy_(mapped)
        self._begin(phase, None)

    def start(self, phase: Phase) -> None:
        """Go on in another phase, with the same student."""
        self._begin(phase, self.phase)

    def _begin(self, phase: Phase, previous: Phase | None) -> None:
        phase.begin(self, previous)
        self.phase = phase
        for weight in self.weights:
            if weight.role.is_inner:
                self.student_weights[weight.name].requires_grad_(phase.trains_inner)

    def compile_(self) -> None:
        """Apply torch.compile to every layer and to the losses at the LM head."""
        for pair in self.layer_pairs():
            pair.compile_()
        self._token_losses = torch.compile(losses.token_losses)

    def bind(self) -> None:
        """Look up the parameters by name. Call it again after FSDP2 has replaced them by shards."""
        self.teacher_weights = dict(self.teacher.named_parameters())
        self.student_weights = dict(self.student.named_parameters())

    def layer_pairs(self) -> list[LayerPair]:
        return [pair for pair in self.pairs if isinstance(pair, LayerPair)]

    def teacher_of(self, weight: Weight) -> nn.Parameter:
        """Return the teacher's weight that a weight of the student comes from."""
        return self.teacher_weights[self.lineage.source_of(weight)]

    def composed(self) -> Iterator[tuple[Weight, nn.Parameter]]:
        """Yield the student's matrices, with their parameters in the model."""
        for weight in self.weights:
            if weight.role.is_matrix:
                yield weight, self.student_weights[weight.name]

    def writer(self, weight: Weight) -> nn.Parameter:
        """Return P of a linear that writes into the residual stream. The quantized phase has no P."""
        assert weight.layer is not None
        pair: Any = self.pairs[weight.layer]
        return pair.projections[key(weight.role.module)]  # type: ignore[no-any-return]

    def writers(self) -> dict[str, nn.Parameter]:
        """Return P of all linears that write into the residual stream, by the weight's name."""
        return {weight.name: self.writer(weight) for weight in self.weights if weight.role.writes_stream}

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return what the optimizer trains, by resulting weight: the tensors of the phase, and vectors."""
        return {weight.name: self.phase.master(self, weight) if weight.role.is_matrix
                else self.student_weights[weight.name]
                for weight in self.weights if self.phase.trains_inner or not weight.role.is_inner}

    def initialize(self, values: dict[str, torch.Tensor]) -> None:
        """Set all trainable tensors, by name, and compose the student. `values` must have exactly these names."""
        trainable = self.trainable()
        if values.keys() != trainable.keys():
            raise ValueError(f"clone: names differ: {sorted(values.keys() ^ trainable.keys())[:3]}")
        for name, value in values.items():
            trainable[name].data.copy_(value)
        self.compose_()

    def compose_(self) -> None:
        """Write every composed weight into the student. Call it whenever a trained tensor has changed."""
        self.phase.compose_(self, self.compute_dtype)

    def pull_back_(self) -> None:
        """Map the gradients of the composed weights to the trained tensors. Call it before clipping."""
        self.phase.pull_back_(self, self.compute_dtype)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None,
                documents: torch.Tensor | None = None, *, objective: Objective | None = None,
                n_labels: torch.Tensor | None = None, share: float = 1.0) -> Losses:
        """Return the losses of sequences of ids, (B, L).

        `labels`: the id that each position should predict, -100 for none; default: the next ids. `documents`: each
        position's document within the sequence; attention then stays within documents and positions restart in each.
        For a step of several batches, pass the step's number of labels as `n_labels` and this batch's share of it as
        `share`, so that the losses of the batches add up to that of the step.
        """
        objective = objective or Objective()
        if labels is None:
            labels = nn.functional.pad(input_ids[:, 1:], (0, 1), value=losses.NO_LABEL)
        teacher, student = self.teacher_parts, self.student_parts
        teacher_stream: torch.Tensor | None = None
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16):
            if objective.needs_teacher:
                teacher_stream = teacher.embedding(input_ids)
            student_stream = student.embedding(input_ids).float()
            rope = student.rope(student_stream.to(self.compute_dtype), positions_of(input_ids, documents))
            terms = student_stream.new_zeros(len(ACTIVATION_TERMS), dtype=torch.float32)
            masks = attention_masks(self.teacher.config, input_ids, documents)
            for layer, pair in enumerate(self.pairs):
                its_masks = [masks[t] for t in self.lineage.teacher_layers(layer)]
                teacher_stream, student_stream, found = pair(teacher_stream, student_stream, objective, its_masks, rope)
                terms = terms + found * share
            hidden = student.norm(student_stream).flatten(0, 1)
            target = target_head = None
            if objective.compares_logits and teacher_stream is not None:
                target, target_head = teacher.norm(teacher_stream).flatten(0, 1), teacher.head.weight
            token_loss, token_terms = losses.head_losses(hidden, student.head.weight, target, target_head,
                                                         labels.flatten(), objective, n_labels, self._token_losses)
        return Losses.of(token_loss, token_terms, terms, objective)


def config_of(teacher: PretrainedConfig, lineage: Lineage) -> PretrainedConfig:
    """Return the student's config: the teacher's with another shape."""
    config = type(teacher).from_dict(teacher.to_dict())
    for name, value in lineage.student.as_config().items():
        setattr(config, name, value)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in lineage.layers]
    return config


def _new_student(teacher: PreTrainedModel, lineage: Lineage) -> PreTrainedModel:
    """Make a model of the student's shape with the teacher's other settings, in float32 on the teacher's device."""
    config = config_of(teacher.config, lineage)
    config._attn_implementation = teacher.config._attn_implementation = "sdpa"
    with teacher.device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-any-return]
