"""Predict whether a model fits a device before it is built: memory, context, and an upper bound on speed."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lrc_edge.errors import UserError
from lrc_edge.families import EMBEDDING, weights_of
from lrc_edge.figures import human_bytes
from lrc_edge.shape import ModelShape
from lrc_edge.targets.memory import Memory, kv_bytes_per_token, memory_of, weight_bytes
from lrc_edge.targets.profile import Profile

Verdict = Literal["fits", "tight", "does not fit"]
MARGIN = 1.1  # predictions were within a tenth of what was measured
CONTEXT_STEP = 256


@dataclass(frozen=True)
class FormatFit:
    """One format, in the first of the profile's runtimes that reads it."""

    format: str
    runtime: str
    memory: Memory
    verdict: Verdict
    longest_context: int  # in steps of 256 tokens, at most the model's own; 0: not even one step
    decode_bound: float  # tokens/s at the end of the context: bandwidth over the bytes that a token reads


@dataclass(frozen=True)
class Fit:
    shape: ModelShape
    profile: Profile
    context: int
    formats: tuple[FormatFit, ...]  # in the profile's order

    @property
    def take(self) -> FormatFit | None:
        """The format to use: the recommended one if it fits, else the first that fits, else the first that is tight."""
        by_choice = sorted(self.formats, key=lambda row: row.format != self.profile.recommended)
        return next((row for verdict in ("fits", "tight") for row in by_choice if row.verdict == verdict), None)

    @property
    def warning(self) -> str | None:
        """One line if no format fits well, else None."""
        best = self.take or min(self.formats, key=lambda row: row.memory.needed)
        if best.verdict == "fits":
            return None
        longest = f"{best.longest_context:,} tokens would" if best.longest_context else "no context would"
        return (f"{self.profile.name}: {'barely fits' if self.take else 'does not fit'} at {self.context:,} tokens: "
                f"{best.format} in {best.runtime} takes {human_bytes(best.memory.peak)} of "
                f"{human_bytes(self.profile.usable_bytes)}; {longest} fit; a smaller student.hidden_size or a shorter "
                "context takes less")


def check_fit(shape: ModelShape, profile: Profile, context: int | None = None) -> Fit:
    """Predict every format of the profile for a model of this shape. `context`: by default the profile's.

    Raises UserError on a context that the model does not have.
    """
    longest = shape.max_position_embeddings
    if context is None:
        context = min(profile.context, longest)
    if not 1 <= context <= longest:
        raise UserError(f"--context {context}: the model has positions for 1 to {longest:,} tokens; give one of them")
    return Fit(shape, profile, context, tuple(_fit(shape, profile, name, context) for name in profile.format_names))


def _fit(shape: ModelShape, profile: Profile, format_: str, context: int) -> FormatFit:
    runtime = profile.runtime_of(format_)
    memory = memory_of(shape, format_, runtime, context, profile.features)
    read = bytes_read_per_token(shape, format_, context)
    return FormatFit(format_, runtime, memory, judge(memory, profile), _longest_context(shape, profile, format_),
                     profile.bandwidth_gb_s.value * 1e9 / read)


def judge(memory: Memory, profile: Profile) -> Verdict:
    """`tight`: within the prediction's error of the limit, or only if weights that are not read again are evicted."""
    if memory.peak * MARGIN <= profile.usable_bytes:
        return "fits"
    return "tight" if memory.needed <= profile.usable_bytes else "does not fit"


def bytes_read_per_token(shape: ModelShape, format_: str, context: int) -> int:
    """Return the bytes of all matrices, except an untied embedding (one row is read), and of the cache."""
    weights = sum(weight_bytes(weight, format_) for weight in weights_of(shape)
                  if weight.role is not EMBEDDING or shape.tied)
    return weights + context * kv_bytes_per_token(shape, format_)


def _longest_context(shape: ModelShape, profile: Profile, format_: str) -> int:
    """Find the longest context that fits by bisection, since memory grows with the context."""
    def fits(steps: int) -> bool:
        context = min(steps * CONTEXT_STEP, shape.max_position_embeddings)
        memory = memory_of(shape, format_, profile.runtime_of(format_), context, profile.features)
        return judge(memory, profile) != "does not fit"

    low, high = 0, -(-shape.max_position_embeddings // CONTEXT_STEP)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return min(low * CONTEXT_STEP, shape.max_position_embeddings)
