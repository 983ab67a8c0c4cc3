"""Parity: compare one model's logits with another's on the same tokens, and apply gates to the metrics.

The metrics compare distributions, not only the largest difference: a correct float32 runtime may differ from PyTorch by
3e-4 in some logit at a KL divergence of 2e-9. Shapes: N positions, V vocabulary.
"""
from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import numpy as np

from lrc_edge.formats import judged_as
from lrc_edge.recipe import Gates

AS_TRAINED = "as trained"  # names comparisons with the student that was trained on the grid
CHANGES = "changes"  # the metric of whether a file is what the build wrote
CHUNK_ELEMENTS = 2**17  # logits in float64 at once: 1 MiB stays in the cache (64 MiB took nine times the CPU time)


@dataclass(frozen=True)
class Metrics:
    """The differences between a model and its reference. KL in nats; perplexities where a next token exists."""

    positions: int
    kl_mean: float  # KL(reference || model)
    kl_p99: float
    kl_max: float
    top1: float  # share of equal argmax, near-ties left out
    near_ties: int  # positions whose two best reference logits are closer than the margin
    nmse: float  # squared error of the logits / their variance, both summed over all positions
    max_abs: float
    ppl: float
    delta_ppl: float  # ppl - the reference's
    delta_ppl_se: float  # its standard error

    def as_dict(self) -> dict[str, Any]:
        # JSON has no NaN: null, which passes no gate.
        return {key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in asdict(self).items()}


class Divergences:
    """KL, top-1 agreement and cross entropy of a model and its reference, collected sequence by sequence."""

    def __init__(self, near_tie: float):
        self.near_tie = near_tie
        self._kl: list[np.ndarray] = []
        self._agree: list[np.ndarray] = []
        self._nll: list[np.ndarray] = []  # (2, n): reference, model
        self._near_ties = 0

    def _collect(self, kl_N: np.ndarray, margin_N: np.ndarray, equal_N: np.ndarray, nll_2M: np.ndarray) -> None:
        """margin_N: difference of the reference's two best logits. equal_N: whether the argmax is equal."""
        clear = margin_N >= self.near_tie
        self._kl.append(kl_N)
        self._near_ties += int((~clear).sum())
        self._agree.append(equal_N[clear])
        self._nll.append(nll_2M)

    def _shared_figures(self) -> dict[str, Any]:
        kl, agree = np.concatenate(self._kl), np.concatenate(self._agree)
        ppl_reference, ppl = self._perplexities()
        return {"positions": len(kl), "near_ties": self._near_ties, "kl_mean": float(kl.mean()),
                "kl_p99": float(np.quantile(kl, 0.99)), "kl_max": float(kl.max()),
                "top1": float(agree.mean()) if len(agree) else math.nan, "delta_ppl": float(ppl - ppl_reference)}

    def _perplexities(self) -> np.ndarray:
        """(2,): reference, model."""
        with np.errstate(over="ignore"):  # infinite for a damaged file, which passes no gate
            found: np.ndarray = np.exp(np.concatenate(self._nll, axis=1).mean(1))
        return found


class Comparison(Divergences):
    """Collects a model's logits sequence by sequence, then computes Metrics."""

    def __init__(self, near_tie: float):
        super().__init__(near_tie)
        self._squares = [0.0, 0.0]  # error, signal
        self._max_abs = 0.0

    def update(self, reference_NV: np.ndarray, model_NV: np.ndarray, next_ids_N: np.ndarray) -> None:
        """Add the logits of one sequence. `next_ids_N`: the tokens that follow, or -1 where none does.

        Raises ValueError if the shapes differ, because then the two models do not match.
        """
        if reference_NV.shape != model_NV.shape or len(next_ids_N) != len(reference_NV):
            raise ValueError(f"parity: logits {model_NV.shape} against {reference_NV.shape}, {len(next_ids_N)} labels")
        step = max(1, CHUNK_ELEMENTS // reference_NV.shape[1])
        for i in range(0, len(reference_NV), step):
            self._update(reference_NV[i:i + step].astype(np.float64), model_NV[i:i + step].astype(np.float64),
                         next_ids_N[i:i + step])

    def _update(self, ref: np.ndarray, got: np.ndarray, next_ids: np.ndarray) -> None:
        error = got - ref
        self._squares[0] += float((error**2).sum())
        self._squares[1] += float(((ref - ref.mean(-1, keepdims=True)) ** 2).sum())
        self._max_abs = float(np.maximum(self._max_abs, np.abs(error).max()))
        log_p, log_q = _log_softmax(ref), _log_softmax(got)
        # Rounding can leave a tiny negative sum; NaN must stay NaN.
        kl = np.maximum((np.exp(log_p) * (log_p - log_q)).sum(-1), 0.0)
        best, known = np.partition(ref, -2, axis=-1), np.flatnonzero(next_ids >= 0)
        self._collect(kl, best[:, -1] - best[:, -2], ref.argmax(-1) == got.argmax(-1),
                      -np.stack([log_p[known, next_ids[known]], log_q[known, next_ids[known]]]))

    def metrics(self) -> Metrics:
        nll, (ppl_reference, ppl) = np.concatenate(self._nll, axis=1), self._perplexities()
        # Error propagation through exp of the two means, which are correlated: the tokens are the same.
        gradient = np.array([-ppl_reference, ppl])
        variance = gradient @ (np.cov(nll) / nll.shape[1]) @ gradient if nll.shape[1] > 1 else np.nan
        return Metrics(
            **self._shared_figures(), ppl=float(ppl), max_abs=self._max_abs,
            nmse=self._squares[0] / self._squares[1] if self._squares[1] else math.nan,
            delta_ppl_se=math.sqrt(max(0.0, variance)) if math.isfinite(variance) else math.nan)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def compare(reference_NV: np.ndarray, model_NV: np.ndarray, ids_N: np.ndarray, near_tie: float = 0.01) -> Metrics:
    """Return the metrics of one sequence. `ids_N`: the tokens that both models read."""
    comparison = Comparison(near_tie)
    comparison.update(reference_NV, model_NV, next_ids(ids_N))
    return comparison.metrics()


def next_ids(ids_N: np.ndarray) -> np.ndarray:
    """Return the labels of a sequence: each position's next token, -1 at the end."""
    return np.append(ids_N[1:], -1)


@dataclass(frozen=True)
class Gate:
    """A metric with its limit. A value that is not a number never passes."""

    name: str
    artifact: str
    metric: str
    value: float | None
    limit: float
    relation: Literal["<=", ">=", "=="]
    why: str = ""  # why it has no value, or what the value means: for people

    def judged(self, value: float | None) -> Gate:
        return replace(self, value=value)

    def because(self, why: str) -> Gate:
        return replace(self, why=why)

    @property
    def passed(self) -> bool:
        if self.value is None:
            return False
        return {"<=": self.value <= self.limit, ">=": self.value >= self.limit, "==": self.value == self.limit
                }[self.relation]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def _table(metrics: Metrics | None) -> dict[str, Any]:
    """Return the metrics by name; all None, which passes no gate, for a model that did not answer."""
    return dict.fromkeys(field.name for field in fields(Metrics)) if metrics is None else metrics.as_dict()


def gates_of_copy(name: str, artifact: str, metrics: Metrics, limits: Gates, rounding: float) -> list[Gate]:
    """Return the gates of a model that must equal its original. rounding: PyTorch's own, of the original's logits."""
    table = _table(metrics)
    return [Gate(name, artifact, "max_abs", table["max_abs"], limits.max_abs_rounding * rounding, "<="),
            Gate(name, artifact, "top1", table["top1"], limits.copy_top1, ">=")]


def gates_of_grid(artifact: str, identical_blocks: float, metrics: Metrics | None, limits: Gates, why: str = ""
                  ) -> list[Gate]:
    """Return the gates of a file after QAT: it must have the trained weights and compute their outputs."""
    return [Gate(AS_TRAINED, artifact, "identical_blocks", identical_blocks, limits.identical_blocks, ">="),
            Gate(AS_TRAINED, artifact, "kl_mean", _table(metrics)["kl_mean"], limits.on_grid_kl, "<=", why)]


def gates_of_artifact(artifact: str, kind: str, mode: str, metrics: Metrics | None, limits: Gates,
                      rounding: float | None, why: str = "") -> list[Gate]:
    """Return the gates of a file, compared with the student.

    kind: its format's name ("gguf:q8_0"). mode: "prefill" or "decode". rounding: PyTorch's own.
    """
    table = _table(metrics)
    bounds: dict[str, tuple[Literal["<=", ">="], float]] = {
        "kl_mean": ("<=", _kl_limit(kind, limits)), "top1": (">=", limits.gguf_f32_top1),
        "max_abs": ("<=", limits.max_abs_rounding * (rounding or 0.0))}
    return [Gate(f"{mode} vs student", artifact, metric, table[metric], limit, relation, why)
            for metric in ("kl_mean", *judged_as(kind).also_judged) for relation, limit in [bounds[metric]]]


def gates_of_length(artifact: str, kind: str, name: str, metrics: Metrics | None, limits: Gates, why: str = ""
                    ) -> list[Gate]:
    """Return the gate for positions of a long sequence: their mean KL has the same limit as for short ones."""
    return [Gate(name, artifact, "kl_mean", _table(metrics)["kl_mean"], _kl_limit(kind, limits), "<=", why)]


def _kl_limit(kind: str, limits: Gates) -> float:
    limit: float = getattr(limits, judged_as(kind).kl_gate)
    return limit


def gates_of_device(artifact: str, kind: str, figures: dict[str, Any], limits: Gates) -> list[Gate]:
    """Return the gates of a file in a device's runtime. `figures`: of DeviceComparison.

    A device rounds its KV cache to 16 bits (1.4e-7 nats on the demo's student), so the KL limit is at least F16's.
    """
    row = judged_as(kind)
    kl, top1 = max(getattr(limits, row.device_kl_gate), limits.gguf_f16_kl), getattr(limits, row.top1_gate)
    return [Gate("on device vs student", artifact, "kl_mean", figures["kl_mean"], kl, "<="),
            Gate("on device vs student", artifact, "top1", figures["top1"], top1, ">=")]
