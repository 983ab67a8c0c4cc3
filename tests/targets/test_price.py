"""Prices, budgets, and the shapes that a budget allows."""
from __future__ import annotations

import re
from dataclasses import replace

import pytest

from lrc_edge.errors import UserError
from lrc_edge.recipe import Budget
from lrc_edge.shape import ModelShape
from lrc_edge.targets.memory import bytes_by_group, memory_of
from lrc_edge.targets.profile import load_profile
from lrc_edge.targets.timing.cost import CostModel
from lrc_edge.targets.timing.price import METADATA_PER_TOKEN, Device, Limits, Price, offers

TEACHER = ModelShape("llama", 32_000, 1024, 4096, 16, 16, 4, 64, 4096, True)
PROFILE = load_profile("raspberry-pi-5")
MODEL = CostModel("gguf:q4_0", (6e-8, 7e-8, 2e-7, 4e-8, 0.01, 0.1), (7e-9, 7e-8, 0.0, 0.004, 0.05), 14, 0.05)
ESTIMATED, MEASURED = (Device(PROFILE, "gguf:q4_0", 2048, model) for model in (None, MODEL))
SIZES = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def test_a_price_is_made_of_the_models_parts() -> None:
    price = MEASURED.price(TEACHER)
    assert price.token_ms == MODEL.decode_ms(TEACHER, 2048)
    assert price.first_token_s == MODEL.first_token_ms(TEACHER, 2048) / 1000
    assert price.file_bytes == sum(bytes_by_group(TEACHER, "gguf:q4_0").values()) + METADATA_PER_TOKEN * 32_000
    assert price.memory_bytes == memory_of(TEACHER, "gguf:q4_0", "llama.cpp", 2048, PROFILE.features).peak
    assert ESTIMATED.price(TEACHER).first_token_s is None


def test_without_timings_the_bandwidth_bounds_the_speed() -> None:
    """17 GB/s, and a file that is read for every token."""
    least = sum(bytes_by_group(TEACHER, "gguf:q4_0").values()) / 17e9 * 1000
    assert least < ESTIMATED.price(TEACHER).token_ms < 2 * least


@pytest.mark.parametrize("device", [ESTIMATED, MEASURED])
@pytest.mark.parametrize("limits", [
    Limits(token_ms=4.0), Limits(memory_bytes=200e6), Limits(file_bytes=60e6), Limits(token_ms=5.0, file_bytes=80e6)])
def test_offers_are_the_largest_shapes_within_the_budget(device: Device, limits: Limits) -> None:
    found = offers(TEACHER, device, limits)
    assert len(found) > 5
    for offer in found:
        exact = device.price(offer.shape)
        assert not limits.excess(exact) and offer.price.token_ms == pytest.approx(exact.token_ms)
        assert offer.price.memory_bytes == pytest.approx(exact.memory_bytes)
        if offer.shape.num_hidden_layers < TEACHER.num_hidden_layers:
            deeper = replace(offer.shape, num_hidden_layers=offer.shape.num_hidden_layers + 1)
            assert limits.excess(device.price(deeper))
        assert offer.shape.hidden_size % 64 == offer.shape.intermediate_size % 256 == 0
        assert not any(other is not offer and all(getattr(other.shape, size) >= getattr(offer.shape, size)
                                                  for size in SIZES) for other in found)


def test_without_limits_the_teacher_itself_is_offered() -> None:
    assert [offer.shape for offer in offers(TEACHER, MEASURED, Limits())] == [TEACHER]


@pytest.mark.parametrize(("limits", "message"), [
    (Limits(token_ms=0.01), r"reaches --tokens-per-second 1e\+05 on raspberry-pi-5 with 2,048 tokens .* in gguf:q4_0: "
                            r"the nearest is --tokens-per-second \d+"),
    (Limits(memory_bytes=5e6), r"reaches --memory 5 \(5.*MB\) .* the nearest is --memory \d+"),
    (Limits(token_ms=1e3, file_bytes=1e6), r"reaches --file-size 1 .* the nearest is --file-size \d+")])
def test_an_impossible_budget_names_the_nearest_possible_one(limits: Limits, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        offers(TEACHER, MEASURED, limits)
    value = float(re.findall(r"nearest is --\S+ ([\d.e+]+)", str(caught.value))[0])
    field = next(name for name in ("memory_bytes", "file_bytes") if getattr(limits, name) is not None) \
        if limits.file_bytes or limits.memory_bytes else "token_ms"
    nearest = Limits(**{field: 1000 / value * 1.01 if field == "token_ms" else value * 1e6})
    assert offers(TEACHER, MEASURED, nearest)


def test_the_time_to_the_first_token_needs_timings() -> None:
    budget = Budget(time_to_first_token=1.0)
    assert Limits.of(budget, MEASURED).first_token_s == 1.0
    with pytest.raises(UserError, match=r"first-token: gguf:q4_0 was not timed on raspberry-pi-5.*--time-anchors"):
        Limits.of(budget, ESTIMATED)


def test_a_predicted_student_keeps_its_budget_though_predictions_err() -> None:
    """A student within the limits may be as much slower or larger than predicted as predictions were wrong."""
    limits = Limits.of(Budget(tokens_per_second=100, memory=300, file_size=60), MEASURED)
    assert (limits.token_ms, limits.memory_bytes, limits.file_bytes) == (10, 300e6, 60e6)
    assert not limits.excess(Price(10 / 1.05, None, 300e6 / 1.1, 60e6))
    assert limits.excess(Price(10, None, 300e6, 60e6)) == {"token_ms": 1.05, "memory_bytes": 1.1}
    assert Limits.of(Budget(tokens_per_second=100), ESTIMATED).time_margin == 1


def test_a_bin_scales_the_time_or_else_the_size() -> None:
    assert Limits(token_ms=10, memory_bytes=1e6).scaled(0.8) == Limits(token_ms=8, memory_bytes=1e6)
    assert Limits(memory_bytes=1e6).scaled(0.8) == Limits(memory_bytes=0.8e6)
