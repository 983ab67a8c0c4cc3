"""The name of the method that trained a student, for its provenance and model card: what ran, and nothing else."""
from __future__ import annotations

from lrc_edge.recipe import Train

LRC = "Low-Rank Clone (arXiv 2505.12781)"
DENSE = "dense distillation"

# train.init -> where the student starts.
STARTS = {
    "gaussian": "random projections",
    "selection": "selected channels (RED, arXiv 2605.29327)",
    "pca": "principal components (arXiv 2401.15024)",
}
FULL_WIDTH = "the teacher's own channels, refitted"  # what `pca` is for a student as wide as its teacher
# train.clone_terms -> the clone loss.
CLONE_TERMS = {
    "absolute": "clone terms",
    "relative": "relative clone terms",
    "per_token": "relative clone terms per token",
}
# The paper's values of the settings that are part of the method. It uses two clone weights.
PUBLISHED_INIT, PUBLISHED_TERMS = "gaussian", "absolute"
PUBLISHED_KL = (1.28, 40.0)  # weight, temperature
PUBLISHED_ALPHAS = (0.2, 0.5)


def method_of(train: Train, dense_from: int, steps: int, is_narrower: bool = True) -> str:
    """Return the method of a run whose dense phase began at step `dense_from` of `steps` (`steps`: there was none).

    is_narrower: whether the student's residual stream is narrower than the teacher's.
    """
    if dense_from == steps:
        return _listed(LRC, _changes(train))
    terms = [_clone_terms(train.clone_terms, train.dense_alpha, " (arXiv 2505.12781)"), *_without(train)]
    if dense_from == 0:
        start = STARTS[train.init] if is_narrower or train.init != "pca" else FULL_WIDTH
        return _listed(f"{DENSE} from {start}", terms)
    return (f"{_listed(LRC, _changes(train))}, for {dense_from} steps, then "
            f"{_listed(f'{DENSE} (arXiv 2609.02006)', terms)}, for {steps - dense_from}")


def _listed(method: str, parts: list[str]) -> str:
    return f"{method}, with {', '.join(parts)}" if parts else method


def _changes(train: Train) -> list[str]:
    """Return phrases for the settings of the clone phase that differ from the paper's."""
    found = [f"a start from {STARTS[train.init]}"] if train.init != PUBLISHED_INIT else []
    if train.clone_terms != PUBLISHED_TERMS or not train.alpha:
        found.append(_clone_terms(train.clone_terms, train.alpha, ""))
    if train.alpha and train.alpha not in PUBLISHED_ALPHAS:
        found.append(f"clone weight {train.alpha:g}")
    if train.kl_weight and (train.kl_weight, train.kl_temperature) != PUBLISHED_KL:
        found.append(f"KL weight {train.kl_weight:g} at temperature {train.kl_temperature:g}")
    if train.lm_weight not in (0.0, 1.0):
        found.append(f"LM weight {train.lm_weight:g}")
    return found + _without(train)


def _clone_terms(kind: str, weight: float, source: str) -> str:
    return f"{CLONE_TERMS[kind]}{source}" if weight else "no clone terms"


def _without(train: Train) -> list[str]:
    return ["no KL"] * (not train.kl_weight) + ["no LM loss"] * (not train.lm_weight)
