"""Fewer layers: which of the teacher's stay.

Greedy: the layer goes without which the KL from the teacher is lowest, once the last matrix of the layer before it has
been refitted to the stream after it. The first layer always stays. All layers are tried again after each removal: to
try again only those that were best before gave 2.842 in place of 2.816 nats for 8 of 12 layers (docs/LOG.md).
"""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from lrc_edge.families import EMBEDDING, family_of
from lrc_edge.train.start.layers import Layers, recorded
from lrc_edge.train.start.losses import LOGIT_TOKENS
from lrc_edge.train.start.refit import LeastSquares
from lrc_edge.train.start.statistics import Statistics
from lrc_edge.train.start.streams import Streams

SCORING_TOKENS = 4096


def greedy(model: Layers, statistics: Statistics, n_kept: int, rows_BL: torch.Tensor, folder: Path,
           progress: Callable[[str], None]) -> tuple[int, ...]:
    """Return the layers that stay, of `n_kept`. Uses the first SCORING_TOKENS of the rows."""
    n_layers = model.shape.num_hidden_layers
    gone = removals(model, n_layers - n_kept, rows_BL, folder, progress)
    return tuple(layer for layer in range(n_layers) if layer not in gone)


def removals(model: Layers, n: int, rows_BL: torch.Tensor, folder: Path, progress: Callable[[str], None]) -> list[int]:
    """Return the first n layers to leave out, in their order."""
    gone: list[int] = []
    if not n:
        return gone
    search = Search(model, rows_BL[:max(1, SCORING_TOKENS // rows_BL.shape[1])], folder)
    while len(gone) < n:
        found = {}
        for layer in search.kept[1:]:
            progress(f"choosing layer {len(gone) + 1} of {n} to leave out: trying layer {layer}")
            found[layer] = search.kl_without(layer)
        gone.append(min(found, key=found.__getitem__))
        search.leave_out(gone[-1])
    return gone


class SharedGreedy:
    """`greedy` for several students of one teacher, on the same rows: what one of them found serves the others.

    most: layers that any of them leaves out.
    """

    def __init__(self, most: int):
        self.most = most
        self.gone: list[int] = []

    def __call__(self, model: Layers, statistics: Statistics, n_kept: int, rows_BL: torch.Tensor, folder: Path,
                 progress: Callable[[str], None]) -> tuple[int, ...]:
        n_layers = model.shape.num_hidden_layers
        if n_layers - n_kept > len(self.gone):
            self.gone = removals(model, max(self.most, n_layers - n_kept), rows_BL, folder, progress)
        return tuple(layer for layer in range(n_layers) if layer not in self.gone[:n_layers - n_kept])


class Search:
    """The teacher without some of its layers, and the residual streams of the scoring rows.

    Streams: `teacher-i` before the teacher's layer i (i = the number of layers: at the end), `own-i` before layer i of
    the present model.
    """

    def __init__(self, model: Layers, rows_BL: torch.Tensor, folder: Path):
        self.model = model
        self.n_layers = model.shape.num_hidden_layers
        self.kept = list(range(self.n_layers))
        self.last_matrix = family_of(model.shape.family).matrices[-1]
        self.refitted: dict[int, torch.Tensor] = {}  # layer -> its last matrix
        self.masks = model.masks(rows_BL)
        self.streams = Streams(folder, rows_BL.shape, model.device)
        table_VD = model.outside(EMBEDDING)
        for part in self.streams.parts():
            for name in ("teacher-0", "own-0"):
                self.streams.put(name, part, table_VD[rows_BL[part].to(model.device)])
        for layer in self.kept:
            self._run(layer, f"own-{layer}", f"teacher-{layer + 1}", f"own-{layer + 1}")

    def kl_without(self, layer: int) -> float:
        """Return the KL from the teacher, in nats per token, of the present model without this layer."""
        before, following = self._neighbours(layer)
        self._run(before, f"own-{before}", "tried", last_matrix=self._refit(before, following))
        for other in self.kept:
            if other > layer:
                self._run(other, "tried", "tried")
        head = self.model.head()
        kl = 0.0
        for part in self.streams.parts():
            streams = (self.streams.get(name, part).flatten(0, 1).split(LOGIT_TOKENS)
                       for name in (f"teacher-{self.n_layers}", "tried"))
            for teacher, tried in zip(*streams, strict=True):
                log_p, log_q = (F.log_softmax(head(stream), -1) for stream in (teacher, tried))
                kl += F.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
        return kl / self.streams.n_tokens

    def leave_out(self, layer: int) -> None:
        """Remove a layer from the present model."""
        before, following = self._neighbours(layer)
        self.refitted[before] = self._refit(before, following)
        self.kept.remove(layer)
        later = [other for other in self.kept if other >= before]
        for other, entered in zip(later, [*later[1:], self.n_layers], strict=True):
            self._run(other, f"own-{other}", f"own-{entered}")

    def _neighbours(self, layer: int) -> tuple[int, int]:
        """Return the kept layers before and after this one; the number of layers if it is the last."""
        i = self.kept.index(layer)
        return self.kept[i - 1], [*self.kept, self.n_layers][i + 1]

    def _refit(self, layer: int, following: int) -> torch.Tensor:
        """Return the last matrix of a layer, fitted to the teacher's stream before the layer `following`."""
        squares = LeastSquares()
        with recorded(self._load(layer), inputs=[self.last_matrix.module]) as record:
            for part in self.streams.parts():
                reached = self.model.run(self.streams.get(f"own-{layer}", part), self.masks[layer])
                squares.add(record.inputs[self.last_matrix.module],
                            self.streams.get(f"teacher-{following}", part) - reached)
            matrix: torch.Tensor = self.model.layer.get_submodule(self.last_matrix.module).weight  # type: ignore[assignment]
            return matrix + squares.change()

    def _load(self, layer: int, last_matrix: torch.Tensor | None = None) -> nn.Module:
        module = self.model.load(layer)
        matrix = self.refitted.get(layer) if last_matrix is None else last_matrix
        if matrix is not None:
            module.get_submodule(self.last_matrix.module).weight.copy_(matrix)  # type: ignore[operator]
        return module

    def _run(self, layer: int, entered: str, *left: str, last_matrix: torch.Tensor | None = None) -> None:
        """Run a layer of the present model on the stream `entered`; store the result under the names `left`."""
        self._load(layer, last_matrix)
        for part in self.streams.parts():
            stream = self.model.run(self.streams.get(entered, part), self.masks[layer])
            for name in left:
                self.streams.put(name, part, stream)
