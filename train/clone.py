"""Clone: teacher and student run layer by layer, side by side, on the same tokens.

The student is transformers' own model of a smaller hidden_size. Its weights are not trained: `compose_` writes
W = f(teacher's W, P) into them, the backward pass leaves gradients on them, and `pull_back_` hands those to the
projections P, which are what the optimizer sees. So a weight is composed once per optimizer step, however many
micro-batches it has. Norms have no projection; the student trains its own.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lrc_edge.roles import EMBEDDING, HEAD, Weight, compose, weights_of
from lrc_edge.shape import ModelShape
from lrc_edge.train import losses, lowrank

# Modules of a layer whose outputs are cloned. The first five are in the teacher's coordinates; the last two write into
# the residual stream, so the teacher's output goes through the projection first.
SAME_COORDINATES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
RESIDUAL_WRITERS = ("self_attn.o_proj", "mlp.down_proj")


class Tap:
    """Keeps the last outputs of a layer's linears: after the bias, before q/k norm, RoPE and activation."""

    def __init__(self, layer: nn.Module):
        self.outputs: dict[str, torch.Tensor] = {}
        for name in SAME_COORDINATES + RESIDUAL_WRITERS:
            layer.get_submodule(name).register_forward_hook(self._keeper(name))

    def _keeper(self, name: str) -> Any:
        def keep(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            self.outputs[name] = output
        return keep

    def take(self) -> dict[str, torch.Tensor]:
        outputs, self.outputs = self.outputs, {}
        return outputs


@dataclass
class Losses:
    """The three parts of the loss, unweighted, as 0-d tensors."""

    lm: torch.Tensor
    kl: torch.Tensor
    clone: torch.Tensor


class Clone(nn.Module):
    """A frozen teacher, its narrower student, and the projections between them."""

    def __init__(self, teacher: PreTrainedModel, teacher_shape: ModelShape, hidden_size: int,
                 compute_dtype: torch.dtype = torch.float32):
        """`compute_dtype`: float32, or bfloat16 for autocast forward passes and compositions on float32 masters."""
        super().__init__()
        self.shape = teacher_shape.with_hidden_size(hidden_size)
        self.teacher_width = teacher_shape.hidden_size
        self.compute_dtype = compute_dtype
        self.teacher = teacher.requires_grad_(False).eval()
        config = type(teacher.config).from_dict(teacher.config.to_dict())
        config.hidden_size, config.head_dim = hidden_size, teacher_shape.head_dim
        config._attn_implementation = "sdpa"
        self.student = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        self.teacher_weights = dict(teacher.named_parameters())
        self.student_weights = dict(self.student.named_parameters())
        self.weights = list(weights_of(self.shape))
        self.projections = nn.ParameterDict()
        for weight in self.weights:
            mine = self.student_weights[weight.name]
            if weight.role.kind == "copy":
                mine.data.copy_(self.teacher_weights[weight.name].data)
                mine.requires_grad_(False)
            elif weight.role.kind != "norm":
                self.projections[_key(weight.name)] = nn.Parameter(torch.zeros(self.teacher_width, hidden_size))
        self._teacher_taps = [Tap(layer) for layer in self.teacher.model.layers]
        self._student_taps = [Tap(layer) for layer in self.student.model.layers]

    def projection(self, name: str) -> torch.Tensor:
        """P (teacher width x student width) of the weight with this Hugging Face name."""
        return self.projections[_key(name)]

    def trainable(self) -> dict[str, nn.Parameter]:
        """What the optimizer trains, by the name of the weight that it makes: projections and norms."""
        return {weight.name: self.student_weights[weight.name] if weight.role.kind == "norm"
                else self.projections[_key(weight.name)]
                for weight in self.weights if weight.role.kind != "copy"}

    def initialize(self, values: dict[str, torch.Tensor]) -> None:
        """Set every trainable tensor, by name; no more and no fewer. Composes the student."""
        trainable = self.trainable()
        if values.keys() != trainable.keys():
            raise ValueError(f"clone: names differ: {sorted(values.keys() ^ trainable.keys())[:3]}")
        for name, value in values.items():
            trainable[name].data.copy_(value)
        self.compose_()

    def _projected(self) -> Iterator[tuple[Weight, torch.Tensor, nn.Parameter]]:
        for weight in self.weights:
            if weight.role.kind in ("project_in", "project_out"):
                yield weight, self.teacher_weights[weight.name], self.student_weights[weight.name]

    @torch.no_grad()
    def compose_(self) -> None:
        """Write every composed weight into the student. Call it whenever projections have changed."""
        for weight, theirs, mine in self._projected():
            p = self.projection(weight.name)
            mine.copy_(compose(weight.role, theirs.to(self.compute_dtype), p.to(self.compute_dtype)))

    @torch.no_grad()
    def pull_back_(self) -> None:
        """Add the composed weights' gradients to the projections' and clear them. Call it before clipping."""
        for weight, theirs, mine in self._projected():
            if mine.grad is None:
                continue
            grad = lowrank.pull_back(weight.role, theirs.to(self.compute_dtype), mine.grad.to(self.compute_dtype))
            grad = grad.float()
            p = self.projection(weight.name)
            p.grad = grad if p.grad is None else p.grad.add_(grad)
            mine.grad = None

    def forward(self, input_ids: torch.Tensor, temperature: float = 1.0) -> Losses:
        """Losses of one batch of rows, (B, L) ids; the labels are the ids, one ahead."""
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16):
            with torch.no_grad():
                theirs = self.teacher.model.embed_tokens(input_ids)
            mine = self.student.model.embed_tokens(input_ids)
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
            rope = self.student.model.rotary_emb(mine, positions)
            clone = mine.new_zeros((), dtype=torch.float32)
            for i in range(self.shape.num_hidden_layers):
                mask = _causal_mask(self.student.config, i, input_ids)
                with torch.no_grad():
                    theirs = self.teacher.model.layers[i](theirs, attention_mask=mask, position_embeddings=rope)
                mine = self.student.model.layers[i](mine, attention_mask=mask, position_embeddings=rope)
                clone = clone + self._clone_terms(i)
            with torch.no_grad():
                theirs = self.teacher.model.norm(theirs)
            labels = nn.functional.pad(input_ids[:, 1:], (0, 1), value=-100)
            lm, kl = losses.head_losses(self.student.model.norm(mine).flatten(0, 1), self._head(self.student_weights),
                                        theirs.flatten(0, 1), self._head(self.teacher_weights), labels.flatten(),
                                        temperature)
        return Losses(lm, kl, clone)

    def _head(self, weights: dict[str, nn.Parameter]) -> torch.Tensor:
        return weights[EMBEDDING.weight if self.shape.tied else HEAD.weight]

    def _clone_terms(self, i: int) -> torch.Tensor:
        """The seven terms of layer i (section 3.2 of the paper), each an MSE of equal weight."""
        theirs, mine = self._teacher_taps[i].take(), self._student_taps[i].take()
        total = sum(losses.mse(mine[name], theirs[name]) for name in SAME_COORDINATES)
        for name in RESIDUAL_WRITERS:
            p = self.projection(f"model.layers.{i}.{name}.weight")
            total = total + losses.mse(mine[name], theirs[name] @ p.to(theirs[name].dtype))
        return torch.as_tensor(total)


def _key(name: str) -> str:
    return name.replace(".", "|")  # a module's attribute may hold no dot


def _causal_mask(config: Any, layer: int, input_ids: torch.Tensor) -> torch.Tensor | None:
    """None lets SDPA take its causal path; a layer with a sliding window shorter than the row needs the mask."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    length = input_ids.shape[1]
    if window is None or window >= length or (kinds and kinds[layer] != "sliding_attention"):
        return None
    offset = torch.arange(length, device=input_ids.device)
    behind = offset[:, None] - offset[None, :]
    return ((behind >= 0) & (behind < window))[None, None]
