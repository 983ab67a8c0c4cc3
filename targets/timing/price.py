"""What a shape costs on a device, what a budget allows, and the largest shapes within it. Needs no PyTorch."""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from lrc_edge.errors import UserError
from lrc_edge.figures import human_bytes
from lrc_edge.formats import format_of
from lrc_edge.recipe import Budget
from lrc_edge.shape import ModelShape
from lrc_edge.student import sizes_that_work
from lrc_edge.targets.fit import MARGIN, bytes_read_per_token
from lrc_edge.targets.memory import bytes_by_group, memory_of
from lrc_edge.targets.profile import Profile
from lrc_edge.targets.timing.cost import CostModel
from lrc_edge.targets.timing.measured import Measured

SMALLEST = 1 / 4  # of the teacher's width, layers and neurons: below that a student keeps too little to start from
UNITS = (256, 128, 64, 32)  # widths and neurons are multiples of one of them, the larger the model the larger
METADATA_PER_TOKEN = 64  # bytes of a GGUF for each token of its vocabulary: 32 to 61 with merges
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
class Limits:
    """The most that a student may cost; None: any. Predicted times and memory count with a margin, so that a student
    whose prediction was too low still keeps its limits."""

    token_ms: float | None = None
    first_token_s: float | None = None
    memory_bytes: float | None = None
    file_bytes: float | None = None
    time_margin: float = 1.0
    memory_margin: float = 1.0

    @classmethod
    def of(cls, budget: Budget, device: Device) -> Limits:
        """Raises UserError for a budget without limits, or with one that this device's prices do not have."""
        if not any((budget.tokens_per_second, budget.time_to_first_token, budget.memory, budget.file_size)):
            raise UserError("plan: no budget; give --tokens-per-second, --time-to-first-token, --memory or --file-size")
        if budget.time_to_first_token and not device.is_measured:
            raise UserError(f"--time-to-first-token: {device.format} was not timed on {device.profile.name}, and its "
                            "profile has no figure for it; run `lrc-edge plan TEACHER --time-anchors` there, and give "
                            "its file as --timings")
        return cls(1000 / budget.tokens_per_second if budget.tokens_per_second else None,
                   budget.time_to_first_token or None, budget.memory * 1e6 or None, budget.file_size * 1e6 or None,
                   1 + device.model.worst if device.model else 1.0, MARGIN)

    def counted(self, price: Price) -> dict[str, float | None]:
        """Return the price with the margins, by name."""
        margins = {"token_ms": self.time_margin, "first_token_s": self.time_margin, "memory_bytes": self.memory_margin,
                   "file_bytes": 1.0}
        return {name: None if cost is None else cost * margins[name] for name, cost in asdict(price).items()}

    def excess(self, price: Price) -> dict[str, float]:
        """Return, for each limit that the price exceeds, how many times."""
        found = {}
        for name, cost in self.counted(price).items():
            limit = getattr(self, name)
            if limit is not None and cost is not None and cost > limit:
                found[name] = cost / limit
        return found

    def scaled(self, share: float) -> Limits:
        """Return this share of the limits of time; without any, of memory and of the file."""
        names = [name for name in ("token_ms", "first_token_s") if getattr(self, name) is not None] \
            or [name for name in ("memory_bytes", "file_bytes") if getattr(self, name) is not None]
        return replace(self, **{name: share * getattr(self, name) for name in names})


@dataclass(frozen=True)
class Device:
    """Where a student will run. model: fitted to the timings; None: the profile's bandwidth bounds the speed."""

    profile: Profile
    format: str
    context: int
    model: CostModel | None
    timings: Measured | None = None

    @property
    def is_measured(self) -> bool:
        return self.model is not None

    def price(self, shape: ModelShape) -> Price:
        memory = memory_of(shape, self.format, self.profile.runtime_of(self.format), self.context,
                           self.profile.features).peak
        file_bytes = sum(bytes_by_group(shape, self.format).values()) + METADATA_PER_TOKEN * shape.vocab_size
        if self.model is None:
            read = bytes_read_per_token(shape, self.format, self.context)
            return Price(1000 * read / (self.profile.bandwidth_gb_s.value * 1e9), None, memory, file_bytes)
        return Price(self.model.decode_ms(shape, self.context),
                     self.model.first_token_ms(shape, self.context) / 1000, memory, file_bytes)


@dataclass(frozen=True)
class Offer:
    """A shape and its price."""

    shape: ModelShape
    price: Price


def offers(teacher: ModelShape, device: Device, limits: Limits) -> list[Offer]:
    """Return the shapes within the budget that no other shape within it exceeds in every size.

    Every size helps, so only these can be the best. Raises UserError if there is none, with the nearest budget that
    has one.
    """
    found = [Offer(shape, price) for shapes in grid(teacher, device.format)
             if (largest := _deepest(shapes, device, limits)) for shape, price in [largest]]
    if not found:
        raise _impossible(teacher, device, limits)
    sizes = [(offer.shape.hidden_size, offer.shape.num_hidden_layers, offer.shape.intermediate_size,
              offer.shape.num_attention_heads, offer.shape.num_key_value_heads) for offer in found]
    return [offer for offer, mine in zip(found, sizes, strict=True)
            if not any(other != mine and all(a >= b for a, b in zip(other, mine, strict=True)) for other in sizes)]


def _deepest(shapes: list[ModelShape], device: Device, limits: Limits) -> tuple[ModelShape, Price] | None:
    """Return the deepest of shapes that differ in their layers alone. Every layer costs the same."""
    one, two = (device.price(shapes[0].resized({"num_hidden_layers": n})) for n in (1, 2))
    fits = None
    for shape in shapes:
        price = _of_layers(one, two, shape.num_hidden_layers)
        if limits.excess(price):
            break
        fits = shape, price
    return fits


def _of_layers(one: Price, two: Price, n: int) -> Price:
    """Return the price of n layers from those of one and of two."""
    costs: dict[str, Any] = {name: a if a is None else a + (n - 1) * (getattr(two, name) - a)
                             for name, a in asdict(one).items()}
    return Price(**costs)


def grid(teacher: ModelShape, format_: str) -> Iterator[list[ModelShape]]:
    """Yield all students that a plan considers: lists of shapes that differ only in their layers, ascending."""
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


def _impossible(teacher: ModelShape, device: Device, limits: Limits) -> UserError:
    """Return the error that names the limit that is exceeded most, and the least that a student can cost."""
    prices = [device.price(shapes[0]) for shapes in grid(teacher, device.format)]
    price = min(prices, key=lambda price: max(limits.excess(price).values()))
    excess = limits.excess(price)
    name = max(excess, key=excess.__getitem__)
    wanted, least = _worded(name, getattr(limits, name)), _worded(name, limits.counted(price)[name] or 0.0)
    return UserError(f"no student of this teacher reaches {wanted} on {device.profile.name} with {device.context:,} "
                     f"tokens of context in {device.format}: the nearest is {least}; ask for that, a shorter "
                     "--context, or start from a smaller teacher")


def _worded(name: str, value: float) -> str:
    megabytes = f"{math.ceil(value / 1e4) / 100:.10g} ({human_bytes(value)})"
    return {"token_ms": f"--tokens-per-second {1000 / value:.3g}", "memory_bytes": f"--memory {megabytes}",
            "first_token_s": f"--time-to-first-token {value:.3g}", "file_bytes": f"--file-size {megabytes}"}[name]
