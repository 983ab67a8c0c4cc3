"""Clone: teacher and student run layer by layer, side by side, on the same tokens.

The student is transformers' own model of a smaller hidden_size. In the clone phase its matrices are not trained:
`compose_` writes W = f(teacher's W, P) into them, the backward pass leaves gradients on them, and `pull_back_` hands
those to the projections P, which are what the optimizer sees. So a weight is composed once per optimizer step, however
many batches it has. Norms have no projection; the student trains its own. `start_dense_phase` ends this: from there
on the matrices themselves are trained, as a folded student's would be (Train What You Deploy, arXiv 2609.02006).
`start_quantized_phase` then composes them again, from latent weights rounded to the grid of the file that ships, and
hands their gradients straight through the rounding (Bengio et al., arXiv 1308.3432).
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel

from lrc_edge.roles import Weight, compose, weights_of
from lrc_edge.shape import ModelShape
from lrc_edge.train import losses, lowrank
from lrc_edge.train.grids import on_grid
from lrc_edge.train.losses import Objective
from lrc_edge.train.masks import attention_mask, positions_of

# Modules of a layer whose outputs are cloned. The first five are in the teacher's coordinates; the last two write into
# the residual stream, so the teacher's output goes through the projection first.
SAME_COORDINATES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
RESIDUAL_WRITERS = ("self_attn.o_proj", "mlp.down_proj")


class Tap:
    """Keeps the last outputs of a layer's linears: after the bias, before q/k norm, RoPE and activation."""

    def __init__(self, layer: nn.Module):
        self.outputs: dict[str, torch.Tensor] = {}
        self.keeps = True
        for name in SAME_COORDINATES + RESIDUAL_WRITERS:
            layer.get_submodule(name).register_forward_hook(self._keeper(name))

    def _keeper(self, name: str) -> Any:
        def keep(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            if self.keeps:
                self.outputs[name] = output
        return keep

    def take(self) -> dict[str, torch.Tensor]:
        outputs, self.outputs = self.outputs, {}
        return outputs


@dataclass
class Losses:
    """`total` is weighted and has gradients; its parts are unweighted, detached 0-d tensors."""

    total: torch.Tensor
    lm: torch.Tensor
    kl: torch.Tensor
    clone: torch.Tensor


class LayerPair(nn.Module):
    """A teacher's layer and its student's: the teacher's activations live as long as this layer's forward pass."""

    def __init__(self, teacher: nn.Module, student: nn.Module, teacher_width: int, student_width: int,
                 recompute: bool):
        super().__init__()
        self.teacher, self.student, self.recompute = teacher, student, recompute
        self.projections = nn.ParameterDict(
            {_key(name): nn.Parameter(torch.zeros(teacher_width, student_width)) for name in RESIDUAL_WRITERS})
        self._theirs, self._mine = Tap(teacher), Tap(student)

    def compile_(self) -> None:
        """torch.compile, as one graph, or as two where the student's is run again: a graph cannot replay its taps."""
        if self.recompute:
            self.teacher.compile()
            self._student = torch.compile(self._student)  # type: ignore[method-assign]
        else:
            self.compile()

    def forward(self, theirs: torch.Tensor | None, mine: torch.Tensor, objective: Objective,
                mask: torch.Tensor | None, rope: tuple[torch.Tensor, torch.Tensor]
                ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """The two residual streams behind this layer, and the sum of its clone terms. `theirs` None: student alone."""
        targets: dict[str, torch.Tensor] = {}
        if theirs is not None:
            with torch.no_grad():
                theirs = self.teacher(theirs, attention_mask=mask, position_embeddings=rope)
            outputs = self._theirs.take()
            targets = outputs if objective.alpha else {}
        if self.recompute and torch.is_grad_enabled():
            mine, terms = checkpoint(self._student, mine, targets, objective.relative, mask, rope,
                                     use_reentrant=False, preserve_rng_state=False)
        else:
            mine, terms = self._student(mine, targets, objective.relative, mask, rope)
        return theirs, mine, terms

    def _student(self, stream: torch.Tensor, targets: dict[str, torch.Tensor], relative: bool,
                 mask: torch.Tensor | None, rope: tuple[torch.Tensor, torch.Tensor]
                 ) -> tuple[torch.Tensor, torch.Tensor]:
        """The student's layer, and its seven terms (section 3.2 of the paper), each of equal weight."""
        stream = self.student(stream, attention_mask=mask, position_embeddings=rope)
        mine = self._mine.take()
        terms = stream.new_zeros((), dtype=torch.float32)
        for name, target in targets.items():
            if _key(name) in self.projections:
                target = target @ self.projections[_key(name)].to(target.dtype)
            terms = terms + losses.clone_term(mine[name], target, relative)
        return stream, terms


class Clone(nn.Module):
    """A frozen teacher, its narrower student, and the projections between them."""

    teacher: PreTrainedModel
    student: PreTrainedModel

    def __init__(self, teacher: PreTrainedModel, teacher_shape: ModelShape, hidden_size: int,
                 compute_dtype: torch.dtype = torch.float32, recompute: bool = False):
        """`compute_dtype`: float32, or bfloat16 for autocast forward passes and compositions on float32 masters.

        `recompute`: the student's layers keep nothing for the backward pass but their inputs (gradient checkpointing).
        """
        super().__init__()
        self.shape = teacher_shape.with_hidden_size(hidden_size)
        self.teacher_width = teacher_shape.hidden_size
        self.compute_dtype = compute_dtype
        self.is_dense = False
        self._token_losses: losses.TokenLosses = losses.token_losses
        teacher.requires_grad_(False)
        config = type(teacher.config).from_dict(teacher.config.to_dict())
        config.hidden_size, config.head_dim = hidden_size, teacher_shape.head_dim
        config._attn_implementation = teacher.config._attn_implementation = "sdpa"
        with teacher.device:
            student = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        # No dropout, whatever the teacher was trained with: then a step draws no random numbers at all.
        teacher.eval(), student.eval()
        # Both models stay whole for those who read them, but this module owns their layers as pairs: a layer that
        # could be reached by two paths could not be sharded as one unit.
        object.__setattr__(self, "teacher", teacher)
        object.__setattr__(self, "student", student)
        self.pairs = nn.ModuleList(
            LayerPair(theirs, mine, self.teacher_width, hidden_size, recompute)
            for theirs, mine in zip(teacher.model.layers, student.model.layers, strict=True))
        self.ends = nn.ModuleList([end for m in (teacher, student)
                                   for end in (m.model.embed_tokens, m.model.rotary_emb, m.model.norm, m.lm_head)])
        self.weights = list(weights_of(self.shape))
        # These P only make weights: no forward pass reads them.
        self.projections = nn.ParameterDict(
            {_key(weight.name): nn.Parameter(torch.zeros(self.teacher_width, hidden_size)) for weight in self.weights
             if weight.role.kind == "project_in"})
        self.latents = nn.ParameterDict()  # of the quantized phase: what the matrices were before rounding
        self.bind()
        for weight in self.weights:
            if weight.role.kind == "copy":
                self.student_weights[weight.name].data.copy_(self.teacher_weights[weight.name].data)
                self.student_weights[weight.name].requires_grad_(False)

    def compile_(self) -> None:
        """torch.compile of every layer and of the losses at the head."""
        for pair in self._pairs():
            pair.compile_()
        self._token_losses = torch.compile(losses.token_losses)

    @contextmanager
    def untapped(self) -> Iterator[PreTrainedModel]:
        """The teacher, to be run as a whole: its layers keep no outputs meanwhile."""
        taps = [pair._theirs for pair in self._pairs()]
        for tap in taps:
            tap.keeps = False
        try:
            yield self.teacher
        finally:
            for tap in taps:
                tap.keeps = True

    def bind(self) -> None:
        """Find the parameters by name. Call it again when they were replaced by shards."""
        self.teacher_weights = dict(self.teacher.named_parameters())
        self.student_weights = dict(self.student.named_parameters())

    def projection(self, name: str) -> nn.Parameter:
        """P (teacher width x student width) of the weight with this Hugging Face name."""
        if _key(name) in self.projections:
            return self.projections[_key(name)]
        _, _, layer, module = name.removesuffix(".weight").split(".", 3)
        return self._pairs()[int(layer)].projections[_key(module)]

    def _pairs(self) -> list[LayerPair]:
        return [pair for pair in self.pairs if isinstance(pair, LayerPair)]

    def trainable(self) -> dict[str, nn.Parameter]:
        """What the optimizer trains, by the name of the weight that it makes: projections, weights or latent weights,
        and norms."""
        return {weight.name: self._trained(weight) for weight in self.weights if weight.role.kind != "copy"}

    def _trained(self, weight: Weight) -> nn.Parameter:
        if _key(weight.name) in self.latents:
            return self.latents[_key(weight.name)]
        is_whole = self.is_dense or weight.role.kind == "norm"
        return self.student_weights[weight.name] if is_whole else self.projection(weight.name)

    def writer_projections(self) -> dict[str, nn.Parameter]:
        """The P that the clone terms of the dense phase still compare through, by the weight's name; none where the
        teacher is as wide as the student."""
        return {weight.name: self.projection(weight.name) for weight in self.weights
                if weight.role.kind == "project_out" and not self.latents}

    def initialize(self, values: dict[str, torch.Tensor]) -> None:
        """Set every trainable tensor, by name; no more and no fewer. Composes the student."""
        trainable = self.trainable()
        if values.keys() != trainable.keys():
            raise ValueError(f"clone: names differ: {sorted(values.keys() ^ trainable.keys())[:3]}")
        for name, value in values.items():
            trainable[name].data.copy_(value)
        self.compose_()

    def start_dense_phase(self) -> None:
        """From now on the student's matrices are trained themselves; of the projections, those that clone terms compare
        through stay as they are."""
        self.compose_(torch.float32)  # masters: the first dense weights must not be rounded to the compute type
        self.is_dense = True
        self.projections.clear()
        for p in self.writer_projections().values():
            p.requires_grad_(False)
            p.grad = None

    def start_quantized_phase(self) -> None:
        """From now on the student's matrices are latent weights rounded to the Q4_0 file's grid; these are trained.

        Their teacher is the unquantized student, of the same width, or there are no clone terms: nothing is compared
        through a projection.
        """
        for weight, mine in self._composed():
            self.latents[_key(weight.name)] = nn.Parameter(mine.detach().clone())
        for pair in self._pairs():
            pair.projections.clear()
        self.compose_()

    def _composed(self) -> Iterator[tuple[Weight, nn.Parameter]]:
        """The student's matrices: none of them is trained itself, but in the dense phase."""
        for weight in self.weights:
            if weight.role.kind in ("project_in", "project_out"):
                yield weight, self.student_weights[weight.name]

    @torch.no_grad()
    def compose_(self, dtype: torch.dtype | None = None) -> None:
        """Write every composed weight into the student. Call it whenever what is trained has changed."""
        if self.is_dense and not self.latents:
            return
        dtype = dtype or self.compute_dtype
        for weight, mine in self._composed():
            trained = self._trained(weight)
            if self.latents:
                # Blocks lie within a row, and shards hold whole rows.
                lowrank.local(mine).copy_(on_grid(weight, lowrank.local(trained)))
            else:
                theirs = self.teacher_weights[weight.name]
                composed = compose(weight.role, theirs.to(dtype), trained.to(dtype))
                mine.copy_(lowrank.placed_as(composed, mine))

    @torch.no_grad()
    def pull_back_(self) -> None:
        """Add the composed weights' gradients to what they are made of, and clear them. Call it before clipping."""
        if self.is_dense and not self.latents:
            return
        for weight, mine in self._composed():
            if mine.grad is None:
                continue
            trained, grad = self._trained(weight), mine.grad
            if not self.latents:
                theirs = self.teacher_weights[weight.name].to(self.compute_dtype)
                grad = lowrank.pull_back(weight.role, theirs, grad.to(self.compute_dtype))
                grad = lowrank.placed_as(grad, trained).float()
            trained.grad = grad if trained.grad is None else trained.grad.add_(grad)
            mine.grad = None

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None,
                documents: torch.Tensor | None = None, *, objective: Objective | None = None,
                n_labels: torch.Tensor | None = None, share: float = 1.0) -> Losses:
        """Losses of rows of ids, (B, L).

        `labels`: the id that each position should predict, -100 for none; default: the ids, one ahead. `documents`:
        each position's document within the row; attention then stays within documents and positions restart in each.
        A step of several batches gives its count of labels as `n_labels` and this batch's share of it, so that the
        batches' losses add up to the step's.
        """
        objective = objective or Objective()
        if labels is None:
            labels = nn.functional.pad(input_ids[:, 1:], (0, 1), value=losses.NO_LABEL)
        theirs: torch.Tensor | None = None
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16):
            if objective.needs_teacher:
                theirs = self.teacher.model.embed_tokens(input_ids)
            mine = self.student.model.embed_tokens(input_ids).float()
            rope = self.student.model.rotary_emb(mine.to(self.compute_dtype), positions_of(input_ids, documents))
            clone = mine.new_zeros((), dtype=torch.float32)
            for i, pair in enumerate(self.pairs):
                mask = attention_mask(self.student.config, i, input_ids, documents)
                theirs, mine, terms = pair(theirs, mine, objective, mask, rope)
                clone = clone + terms * share
            hidden = self.student.model.norm(mine).flatten(0, 1)
            target = target_head = None
            if objective.kl and theirs is not None:
                target, target_head = self.teacher.model.norm(theirs).flatten(0, 1), self.teacher.lm_head.weight
            token_loss, lm, kl = losses.head_losses(hidden, self.student.lm_head.weight, target, target_head,
                                                    labels.flatten(), objective, n_labels, self._token_losses)
        return Losses(token_loss + objective.alpha * clone, lm, kl, clone.detach())


def _key(name: str) -> str:
    return name.replace(".", "|")  # a module's attribute may hold no dot

