"""plan.json as types: a teacher, a device, a budget, every shape with its price, the trials and the choice.

Times per token are in milliseconds, to the first token in seconds, sizes in bytes, losses in nats per token.
"""
from __future__ import annotations

from typing import Any, TypedDict


class PriceRow(TypedDict):
    """What a shape costs with the planned context (targets.timing.price.Price). None: not known."""

    token_ms: float
    first_token_s: float | None
    memory_bytes: float
    file_bytes: float


class BudgetRow(TypedDict):
    """The most that a student may cost (targets.timing.price.Limits). None: any."""

    token_ms: float | None
    first_token_s: float | None
    memory_bytes: float | None
    file_bytes: float | None


class TrialRow(TypedDict):
    """What a tried shape reached. None: not a number, as after a training run that diverged."""

    start_kl: float | None  # from the teacher, before training
    loss: float | None  # in 4 bits, after the tokens of SearchRow


class ShapeRow(TypedDict):
    """A shape that no other with the same limits exceeds in every size. trial: None if it was not tried."""

    shape: dict[str, Any]  # shape.ModelShape
    n_params: int
    price: PriceRow
    within: bool  # the budget; a full search also tries larger shapes
    expected: float  # loss that a model of the trials expects; without trials, above the teacher's loss
    trial: TrialRow | None
    # The costs by which no other shape is at least as good in cost and loss and better in one of them. Tried shapes
    # are compared by the losses of their trials; without trials, all by what is expected.
    front: list[str]


class TeacherRow(TypedDict):
    name: str
    shape: dict[str, Any]
    n_params: int
    price: PriceRow  # in the planned format, as if the teacher were the student


class TimingsRow(TypedDict):
    """The timings to which the model of the speed is fitted."""

    machine: str
    library: str
    threads: int
    n_shapes: int
    n_timings: int
    worst: float  # largest relative error of the model on the timings


class SearchRow(TypedDict):
    effort: str
    tokens: int  # on which each trial trains; 0: no trials


class PlanTable(TypedDict):
    """plan.json."""

    lrc_edge: str  # version
    created: str  # UTC, ISO 8601
    key: str  # digest of the inputs
    teacher: TeacherRow
    device: str  # name of the profile
    target: str  # the same as given to --target: a name or a file
    description: str  # of the device
    runtime: str
    bandwidth_gb_s: float  # of the device, from its profile
    format: str
    context: int  # tokens
    timings: TimingsRow | None  # None: speeds are estimated
    budget: BudgetRow
    search: SearchRow
    chosen: dict[str, Any]  # shape.ModelShape, one of the shapes
    shapes: list[ShapeRow]
    command: str  # that builds the chosen student
