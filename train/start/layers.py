"""Run a model layer by layer, with the weights of one decoder layer in memory at a time.

Shapes: B rows, L positions, D width, V vocabulary.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.families import EMBEDDING, FINAL_NORM, HEAD, Role, Weight, family_of, parts_of
from lrc_edge.shape import ModelShape
from lrc_edge.train.masks import attention_masks


class Layers:
    """A model of which one decoder layer is in memory, in float32 on `device`. `read` returns a weight's values."""

    def __init__(self, config: PretrainedConfig, shape: ModelShape, read: Callable[[Weight], torch.Tensor],
                 device: torch.device):
        self.config, self.shape, self.read, self.device = config, shape, read, device
        config._attn_implementation = "sdpa"
        with torch.device("meta"):
            parts = parts_of(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
        self.layer = parts.layers[0].to_empty(device=device).eval().requires_grad_(False)
        self.rope = type(parts.rope)(config).to(device)
        self.norm = parts.norm.to_empty(device=device).requires_grad_(False)

    @classmethod
    def of(cls, model: DenseCheckpoint, device: torch.device) -> Layers:
        return cls(model.check_config(), model.shape, lambda weight: model.tensor(weight.name).float(), device)

    def load(self, layer: int) -> nn.Module:
        """Load the weights of a layer in place of the last one's, and return its module."""
        roles = family_of(self.shape.family).roles
        self.layer.load_state_dict({f"{role.module}.{role.weight.rpartition('.')[2]}":
                                    self.read(Weight.of(role, layer, self.shape)) for role in roles})
        return self.layer

    def run(self, stream_BLD: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Return the residual stream after the loaded layer."""
        rope = self.rope(stream_BLD, torch.arange(stream_BLD.shape[1], device=self.device)[None])
        return self.layer(stream_BLD, attention_mask=mask, position_embeddings=rope)  # type: ignore[no-any-return]

    def masks(self, rows_BL: torch.Tensor) -> list[torch.Tensor | None]:
        """Return each layer's attention mask for rows of this length."""
        return attention_masks(self.config, rows_BL[:1].to(self.device), None)

    def outside(self, role: Role) -> torch.Tensor:
        """Return a weight that is not in the layers; for a tied head, the embedding."""
        role = EMBEDDING if role is HEAD and self.shape.tied else role
        return self.read(Weight.of(role, None, self.shape)).to(self.device)

    def head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the function from a stream (..., D) to logits (..., V)."""
        self.norm.load_state_dict({"weight": self.outside(FINAL_NORM)})
        matrix_VD = self.outside(HEAD)
        return lambda stream: self.norm(stream) @ matrix_VD.T


@dataclass
class Record:
    """Inputs and outputs of submodules in the last forward pass, by the submodule's name."""

    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)


@contextmanager
def recorded(layer: nn.Module, inputs: Iterable[str] = (), outputs: Iterable[str] = ()) -> Iterator[Record]:
    """Record the inputs and outputs of these submodules in every forward pass of the block."""
    record = Record()

    def keep_input(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda module, args: record.inputs.__setitem__(name, args[0])

    def keep_output(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        return lambda module, args, output: record.outputs.__setitem__(name, output)

    handles = [*(layer.get_submodule(name).register_forward_pre_hook(keep_input(name)) for name in inputs),
               *(layer.get_submodule(name).register_forward_hook(keep_output(name)) for name in outputs)]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
