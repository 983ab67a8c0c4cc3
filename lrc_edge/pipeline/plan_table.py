"""plan.json's table: what was planned for, every shape within the budget with its price, the trials and the choice."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime
from typing import Any, cast

from lrc_edge import __version__
from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.report.plan_schema import BudgetRow, PlanTable, PriceRow, SearchRow, ShapeRow, TimingsRow, TrialRow
from lrc_edge.shape import ModelShape
from lrc_edge.targets.timing.price import Budget, Device, Offer, Price


def plan_table(teacher: DenseCheckpoint, device: Device, budget: Budget, search: SearchRow, found: Sequence[Offer],
               tried: Mapping[ModelShape, TrialRow], chosen: Offer, command: str) -> PlanTable:
    """Return the table. tried: their fronts are filled in here. command: builds the chosen student."""
    profile = device.profile
    fronts = {cost: pareto_front({offer.shape: (getattr(offer.price, cost), tried[offer.shape]["loss"])
                                  for offer in found if offer.shape in tried})
              for cost in (field.name for field in fields(Price))}
    for shape, trial in tried.items():
        trial["front"] = [cost for cost, shapes in fronts.items() if shape in shapes]
    return {"lrc_edge": __version__, "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "teacher": {"name": teacher.name, "shape": teacher.shape.as_dict(), "n_params": teacher.shape.n_params,
                        "price": _price(device.price(teacher.shape))},
            "device": profile.name, "target": profile.name_or_path, "description": profile.description,
            "runtime": profile.runtime_of(device.format), "bandwidth_gb_s": profile.bandwidth_gb_s.value,
            "format": device.format, "context": device.context,
            "speed": "measured" if device.is_measured else "estimated", "timings": _timings(device),
            "budget": cast(BudgetRow, asdict(budget)), "search": search, "chosen": chosen.shape.as_dict(),
            "shapes": [_row(offer, tried.get(offer.shape)) for offer in found], "command": command}


def _row(offer: Offer, trial: TrialRow | None) -> ShapeRow:
    return {"shape": offer.shape.as_dict(), "n_params": offer.shape.n_params, "price": _price(offer.price),
            "trial": trial}


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
