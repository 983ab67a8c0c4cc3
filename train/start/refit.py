"""Least squares for the matrices that write the residual stream.

All error of a cut is put into the matrices that write the stream. They are then fitted again, one after another, on the
student's own activations, so that its stream follows the teacher's: W = argmin |Y - X W^T|^2 + lambda |W - W_0|^2.
N tokens, I inputs, S outputs.
"""
from __future__ import annotations

import torch

RIDGE = 0.1  # lambda, in units of the mean of the diagonal of X^T X (docs/LOG.md)


class LeastSquares:
    """A ridge regression whose memory does not depend on the number of tokens."""

    def __init__(self) -> None:
        self.gram_II: torch.Tensor | None = None
        self.cross_IS: torch.Tensor | None = None

    def add(self, x: torch.Tensor, missing: torch.Tensor) -> None:
        """Add tokens: x (..., I), and missing = Y - X W_0^T (..., S)."""
        x_NI, missing_NS = x.flatten(0, -2), missing.flatten(0, -2)
        if self.gram_II is None or self.cross_IS is None:
            self.gram_II, self.cross_IS = x_NI.T @ x_NI, x_NI.T @ missing_NS
        else:
            self.gram_II.addmm_(x_NI.T, x_NI)
            self.cross_IS.addmm_(x_NI.T, missing_NS)

    def change(self) -> torch.Tensor:
        """Return W - W_0, (S, I)."""
        assert self.gram_II is not None and self.cross_IS is not None
        strength = self.gram_II.diagonal().mean() * RIDGE
        # Inputs that were always 0 leave a gram of zeros: then nothing is to be fitted.
        self.gram_II.diagonal().add_(strength.clamp(min=torch.finfo(torch.float32).tiny))
        return torch.cholesky_solve(self.cross_IS, torch.linalg.cholesky(self.gram_II)).T
