"""plan.json's table: what was planned for, every shape with its price and its expected loss, the trials, the choice."""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any, cast

from lrc_edge import __version__
from lrc_edge.pipeline.plan_trials import Trial
from lrc_edge.report.plan_schema import BudgetRow, PlanTable, PriceRow, TimingsRow
from lrc_edge.shape import ModelShape
from lrc_edge.targets.timing.price import Device, Limits, Offer, Price


@dataclass(frozen=True)
class Choice:
    """What a plan chose among. expected: nats per token that the model of the losses expects of each shape: with
    trials, its loss in 4 bits; without, what its cuts cost above the teacher's loss. tokens: of a trial."""

    device: Device
    offers: list[Offer]
    limits: Limits
    expected: dict[ModelShape, float]
    trials: list[Trial]  # the best first
    chosen: Offer
    search: str
    tokens: int


def plan_table(teacher_name: str, teacher: ModelShape, choice: Choice, key: str, command: str) -> PlanTable:
    """Return the table. key: the digest of the plan's inputs. command: builds the chosen student."""
    device, profile, trials = choice.device, choice.device.profile, {trial.shape: trial for trial in choice.trials}
    losses = {shape: trial.loss for shape, trial in trials.items()} or choice.expected
    fronts = {cost: pareto_front({offer.shape: (getattr(offer.price, cost), losses[offer.shape])
                                  for offer in choice.offers if offer.shape in losses})
              for cost in (field.name for field in fields(Price))}
    return {"lrc_edge": __version__, "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), "key": key,
            "teacher": {"name": teacher_name, "shape": teacher.as_dict(), "n_params": teacher.n_params,
                        "price": _price(device.price(teacher))},
            "device": profile.name, "target": profile.name_or_path, "description": profile.description,
            "runtime": profile.runtime_of(device.format), "bandwidth_gb_s": profile.bandwidth_gb_s.value,
            "format": device.format, "context": device.context, "timings": _timings(device),
            "budget": BudgetRow(**{cost: getattr(choice.limits, cost) for cost in fronts}),  # type: ignore[typeddict-item]
            "search": {"effort": choice.search, "tokens": choice.tokens}, "chosen": choice.chosen.shape.as_dict(),
            "shapes": [{"shape": offer.shape.as_dict(), "n_params": offer.shape.n_params, "price": _price(offer.price),
                        "within": not choice.limits.excess(offer.price), "expected": choice.expected[offer.shape],
                        "trial": None if (trial := trials.get(offer.shape)) is None else
                        {"start_kl": trial.start_kl, "loss": trial.loss},
                        "front": [cost for cost, shapes in fronts.items() if offer.shape in shapes]}
                       for offer in choice.offers], "command": command}


def _price(price: Price) -> PriceRow:
    return cast(PriceRow, asdict(price))


def _timings(device: Device) -> TimingsRow | None:
    found, model = device.timings, device.model
    if found is None or model is None:
        return None
    return {"machine": found.machine, "library": found.library, "threads": found.threads,
            "n_shapes": len({timing.shape for timing in found.timings}), "n_timings": model.n_timings,
            "worst": model.worst}


def pareto_front(points: Mapping[ModelShape, tuple[Any, Any]]) -> set[ModelShape]:
    """Return the shapes whose point (cost, loss) no other one dominates: at least as good in both, and better in one.

    A point with an unknown or infinite coordinate is not on the front.
    """
    known = {shape: point for shape, point in points.items()
             if all(x is not None and math.isfinite(x) for x in point)}
    return {shape for shape, (cost, loss) in known.items()
            if not any(other != (cost, loss) and other[0] <= cost and other[1] <= loss for other in known.values())}
