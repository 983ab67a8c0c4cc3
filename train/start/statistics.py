"""Statistics of a model's activations on some text, from one pass. Their size does not depend on the number of rows.

Shapes: B rows, L positions, N tokens, D width, F neurons, Q query heads, G key/value heads, H = head_dim, P = H / 2
pairs of coordinates that RoPE rotates together: p and p + P.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lrc_edge.families import EMBEDDING, family_of
from lrc_edge.train.start.layers import Layers, Record, recorded
from lrc_edge.train.start.streams import Streams


@dataclass
class LayerStatistics:
    """Means over tokens, in float32 on the CPU. Queries and keys: after their linears, before q/k norm and RoPE."""

    neurons_F: torch.Tensor  # of squares of the input of the FFN's last linear
    neurons_abs_F: torch.Tensor  # of absolute values
    queries_QP: torch.Tensor  # of squared magnitudes of each pair
    keys_PGG: torch.Tensor  # complex64: of k_g conj(k_h)
    values_VV: torch.Tensor  # of v v^T, V = G H
    heads_QHH: torch.Tensor  # of a a^T, a the output of a head's attention
    likeness: torch.Tensor  # 0-d: of the cosine between the streams before and after the layer


@dataclass
class Statistics:
    """Of the residual stream where norms read it, at unit RMS and averaged over these places; and of each layer."""

    stream_DD: torch.Tensor  # mean of h h^T
    stream_abs_D: torch.Tensor  # mean of |h|
    layers: list[LayerStatistics]


@torch.no_grad()
def statistics_of(model: Layers, rows_BL: torch.Tensor, streams: Streams, progress: Callable[[str], None]
                  ) -> Statistics:
    """Return the statistics on rows of ids. `streams`: where the residual stream of all rows is kept."""
    width, n_tokens = model.shape.hidden_size, rows_BL.numel()
    stream_DD = torch.zeros(width, width, device=model.device)
    stream_abs_D = torch.zeros(width, device=model.device)
    places = 2 * model.shape.num_hidden_layers + 1

    def add_stream(stream: torch.Tensor) -> None:
        h_ND = at_unit_rms(stream).flatten(0, 1)
        stream_DD.addmm_(h_ND.T, h_ND, alpha=1 / (n_tokens * places))
        stream_abs_D.add_(h_ND.abs().sum(0), alpha=1 / (n_tokens * places))

    embedding_VD = model.outside(EMBEDDING)
    for part in streams.parts():
        streams.put("teacher", part, embedding_VD[rows_BL[part].to(model.device)])
    del embedding_VD
    masks, layers = model.masks(rows_BL), []
    for layer in range(model.shape.num_hidden_layers):
        progress(f"activations of layer {layer + 1} of {model.shape.num_hidden_layers}")
        layers.append(_of_layer(model, layer, masks[layer], streams, n_tokens, add_stream))
    for part in streams.parts():
        add_stream(streams.get("teacher", part))
    return Statistics(stream_DD.cpu(), stream_abs_D.cpu(), layers)


def at_unit_rms(stream: torch.Tensor) -> torch.Tensor:
    """Scale every position to unit RMS, so that all depths count alike. A position of zeros (padding) stays."""
    return stream / stream.square().mean(-1, keepdim=True).sqrt().clamp(min=torch.finfo(stream.dtype).tiny)


def _of_layer(model: Layers, layer: int, mask: torch.Tensor | None, streams: Streams, n_tokens: int,
              add_stream: Callable[[torch.Tensor], None]) -> LayerStatistics:
    shape, family = model.shape, family_of(model.shape.family)
    norms = [role.module for role in family.roles if role.is_norm]
    q, k, v, o, down = (family.role(name).module for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_down"))
    sums: list[torch.Tensor] = []
    module = model.load(layer)
    with recorded(module, inputs=(*norms, o, down), outputs=(q, k, v)) as record:
        for part in streams.parts():
            before = streams.get("teacher", part)
            after = model.run(before, mask)
            streams.put("teacher", part, after)
            for norm in norms:
                add_stream(record.inputs[norm])
            likeness = torch.cosine_similarity(before, after, dim=-1).sum()
            found = [*_sums(record, (q, k, v, o, down), shape.num_attention_heads, shape.num_key_value_heads), likeness]
            sums = found if not sums else [total.add_(more) for total, more in zip(sums, found, strict=True)]
    return LayerStatistics(*(total.div_(n_tokens).cpu() for total in sums))


def _sums(record: Record, modules: tuple[str, str, str, str, str], n_heads: int, n_groups: int) -> list[torch.Tensor]:
    """Return the fields of LayerStatistics but the last, as sums over the tokens of a batch."""
    q, k, v, o, down = modules
    x_NF = record.inputs[down].flatten(0, 1)
    q_NQP = in_pairs(record.outputs[q].flatten(0, 1).unflatten(-1, (n_heads, -1)))
    k_NGP = in_pairs(record.outputs[k].flatten(0, 1).unflatten(-1, (n_groups, -1)))
    v_NV = record.outputs[v].flatten(0, 1)
    a_QNH = record.inputs[o].flatten(0, 1).unflatten(-1, (n_heads, -1)).movedim(1, 0)
    k_PGN = k_NGP.permute(2, 1, 0)
    return [x_NF.square().sum(0), x_NF.abs().sum(0), q_NQP.abs().square().sum(0), k_PGN @ k_PGN.mH, v_NV.T @ v_NV,
            a_QNH.mT @ a_QNH]


def in_pairs(x: torch.Tensor) -> torch.Tensor:
    """(..., H) -> (..., P) complex: RoPE multiplies each by e^(i angle)."""
    real, imaginary = x.unflatten(-1, (2, -1)).unbind(-2)
    return torch.complex(real, imaginary)
