"""What a shape costs on a device, what a budget allows, and the largest shapes within it. Needs no PyTorch."""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import product
from typing import Any

from lrc_edge.errors import UserError
from lrc_edge.figures import human_bytes
from lrc_edge.formats import format_of
from lrc_edge.shape import ModelShape
from lrc_edge.student import sizes_that_work
from lrc_edge.targets.fit import bytes_read_per_token
from lrc_edge.targets.memory import bytes_by_group, memory_of
from lrc_edge.targets.profile import Profile
from lrc_edge.targets.timing.cost import CostModel

SMALLEST = 1 / 4  # of the teacher's width, layers and neurons: below that a student keeps too little to start from
UNITS = (256, 128, 64, 32)  # widths and neurons are multiples of one of them, the larger the model the larger
STEPS = 12  # sizes that are tried between the smallest and the teacher's


@dataclass(frozen=True)
class Price:
    """What a shape costs with the planned context. first_token_s: after a prompt that fills the context; None if it is
    not known, as for a device that was not timed."""

    token_ms: float
    first_token_s: float | None
    memory_bytes: float
    file_bytes: float


@dataclass(frozen=True)
class Budget:
    """The most that a student may cost; None: any."""

    token_ms: float | None = None
    first_token_s: float | None = None
    memory_bytes: float | None = None
    file_bytes: float | None = None

    def excess(self, price: Price) -> dict[str, float]:
        """Return, for each limit that the price exceeds, how many times."""
        found = {}
        for field in fields(self):
            limit, cost = getattr(self, field.name), getattr(price, field.name)
            if limit is not None and cost > limit:
                found[field.name] = cost / limit
        return found

    def share(self, price: Price) -> float:
        """Return the largest share of a limit that the price uses; 0 without limits."""
        return max((getattr(price, field.name) / limit for field in fields(self)
                    if (limit := getattr(self, field.name)) is not None), default=0.0)


@dataclass(frozen=True)
class Device:
    """Where a student will run. model: fitted to timings; None: the profile's bandwidth bounds the speed."""

    profile: Profile
    format: str
    context: int
    model: CostModel | None

    @property
    def is_measured(self) -> bool:
        return self.model is not None

    def price(self, shape: ModelShape) -> Price:
        memory = memory_of(shape, self.format, self.profile.runtime_of(self.format), self.context,
                           self.profile.features).peak
        file_bytes = sum(bytes_by_group(shape, self.format).values())
        if self.model is None:
            read = bytes_read_per_token(shape, self.format, self.context)
            return Price(1000 * read / (self.profile.bandwidth_gb_s.value * 1e9), None, memory, file_bytes)
        return Price(self.model.decode_ms(shape, self.context),
                     self.model.first_token_ms(shape, self.context) / 1000, memory, file_bytes)


def check_budget(budget: Budget, device: Device) -> None:
    """Raise UserError for a limit that this device's prices do not have."""
    if budget.first_token_s is not None and not device.is_measured:
        raise UserError(f"--time-to-first-token: {device.format} was not timed on {device.profile.name}, and its "
                        "profile has no figure for it; run `lrc-edge plan TEACHER --time-anchors` there, and give its "
                        "file as --timings")


@dataclass(frozen=True)
class Offer:
    """A shape and its price."""

    shape: ModelShape
    price: Price


def offers(teacher: ModelShape, device: Device, budget: Budget) -> list[Offer]:
    """Return the shapes within the budget that no other shape within it exceeds in every size.

    Every size helps, so only these can be the best. Raises UserError if there is none, with the nearest budget that
    has one.
    """
    found = [Offer(shape, price) for shapes in _depths(teacher, device.format)
             if (largest := _deepest(shapes, device, budget)) for shape, price in [largest]]
    if not found:
        raise _impossible(teacher, device, budget)
    sizes = [(offer.shape.hidden_size, offer.shape.num_hidden_layers, offer.shape.intermediate_size,
              offer.shape.num_attention_heads, offer.shape.num_key_value_heads) for offer in found]
    return [offer for offer, mine in zip(found, sizes, strict=True)
            if not any(other != mine and all(a >= b for a, b in zip(other, mine, strict=True)) for other in sizes)]


def _deepest(shapes: list[ModelShape], device: Device, budget: Budget) -> tuple[ModelShape, Price] | None:
    """Return the deepest of shapes that differ in their layers alone. Every layer costs the same."""
    one, two = (device.price(shapes[0].resized({"num_hidden_layers": n})) for n in (1, 2))
    fits = None
    for shape in shapes:
        price = _of_layers(one, two, shape.num_hidden_layers)
        if budget.excess(price):
            break
        fits = shape, price
    return fits


def _of_layers(one: Price, two: Price, n: int) -> Price:
    """Return the price of n layers from those of one and of two."""
    costs: dict[str, Any] = {name: a if a is None else a + (n - 1) * (getattr(two, name) - a)
                             for name, a in asdict(one).items()}
    return Price(**costs)


def _depths(teacher: ModelShape, format_: str) -> Iterator[list[ModelShape]]:
    """Yield all students of the grid: lists that differ only in their layers, ascending."""
    block = format_of(format_).block
    units = {field: next(unit for unit in UNITS if unit * STEPS <= getattr(teacher, field) or unit == UNITS[-1])
             for field in ("hidden_size", "intermediate_size")}
    groups = [n for n in range(1, teacher.num_key_value_heads + 1) if teacher.num_key_value_heads % n == 0]
    depths = range(max(1, math.ceil(SMALLEST * teacher.num_hidden_layers)), teacher.num_hidden_layers + 1)
    for n_groups in groups:
        merged = teacher.resized({"num_key_value_heads": n_groups})
        heads = [n for n in sizes_that_work("num_attention_heads", merged, teacher, 1)
                 if n >= SMALLEST * teacher.num_attention_heads]
        for n_heads in _spread(heads):
            shape = merged.resized({"num_attention_heads": n_heads})
            widths, neurons = (_spread([n for n in sizes_that_work(field, shape, teacher, math.lcm(block, unit))
                                        if n >= SMALLEST * getattr(teacher, field)]) for field, unit in units.items())
            for width, n_neurons in product(widths, neurons):
                yield [shape.resized({"hidden_size": width, "intermediate_size": n_neurons, "num_hidden_layers": n})
                       for n in depths]


def _spread(sizes: list[int]) -> list[int]:
    """Return at most STEPS of these sizes, the largest among them."""
    step = math.ceil(len(sizes) / STEPS)
    return sizes[::-1][::step][::-1] if sizes else []


def _impossible(teacher: ModelShape, device: Device, budget: Budget) -> UserError:
    """Return the error that names the limit that is exceeded most, and the least that a student can cost."""
    prices = [device.price(shapes[0]) for shapes in _depths(teacher, device.format)]
    price = min(prices, key=lambda price: max(budget.excess(price).values()))
    excess = budget.excess(price)
    name = max(excess, key=excess.__getitem__)
    wanted, least = (_worded(name, value) for value in (getattr(budget, name), getattr(price, name)))
    return UserError(f"no student of this teacher reaches {wanted} on {device.profile.name} with {device.context:,} "
                     f"tokens of context in {device.format}: the nearest is {least}; ask for that, a shorter "
                     "--context, or start from a smaller teacher")


def _worded(name: str, value: float) -> str:
    megabytes = f"{math.ceil(value / 1e4) / 100:.10g} ({human_bytes(value)})"
    return {"token_ms": f"--tokens-per-second {1000 / value:.3g}", "memory_bytes": f"--memory {megabytes}",
            "first_token_s": f"--time-to-first-token {value:.3g}", "file_bytes": f"--file-size {megabytes}"}[name]
