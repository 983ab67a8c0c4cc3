"""`lrc-edge plan`: from a budget to a recipe that builds; mistakes in one line."""
from __future__ import annotations

import io
import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from command_line import run
from rich.console import Console
from tiny_models import TEXT, make_tiny

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError
from lrc_edge.machine import architecture
from lrc_edge.pipeline import plan_trials, planner
from lrc_edge.pipeline.budget_check import check_budget
from lrc_edge.pipeline.device_checks import BuildFacts
from lrc_edge.pipeline.plan_table import pareto_front
from lrc_edge.pipeline.plan_trials import EFFORTS, LEAST_TOKENS, MOST_TOKENS
from lrc_edge.pipeline.planner import device_of
from lrc_edge.recipe import Budget, load_recipe
from lrc_edge.report.devices import budget_text, failures
from lrc_edge.report.plan_page import chosen_row, render_plan
from lrc_edge.shape import ModelShape
from lrc_edge.student import student_of
from lrc_edge.targets.profile import load_profile
from lrc_edge.targets.timing.anchors import anchors_of
from lrc_edge.targets.timing.cost import Timing
from lrc_edge.targets.timing.measured import Measured
from lrc_edge.targets.timing.price import Device, Limits

DEVICE = "raspberry-pi-5"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "text.txt").write_text(TEXT[:300_000])
    return make_tiny(folder / "teacher", hidden_size=128, intermediate_size=256, layers=3, heads=4, kv_heads=2,
                     head_dim=32), folder / "text.txt"


def plan(inputs: tuple[Path, Path], out: Path, *options: object) -> tuple[int, str, str]:
    done = run("plan", inputs[0], "--data", inputs[1], "--target", DEVICE, "--out", out, "--set", "train.seq_len=64",
               "--context", 256, *options)
    return done.returncode, done.stdout, done.stderr


def file_limit(teacher: Path) -> float:
    """MB of a file that a student has, but not the teacher."""
    shape = DenseCheckpoint.open(teacher).shape
    return 0.7 * Device(load_profile(DEVICE), "gguf:q4_0", 256, None).price(shape).file_bytes / 1e6


@pytest.fixture
def short_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_trials, "LEAST_TOKENS", 5_120)
    monkeypatch.setitem(plan_trials.EFFORTS, "full", replace(EFFORTS["full"], rounds=1, per_round=2))


def plan_here(inputs: tuple[Path, Path], out: Path, **budget: object) -> str:
    """Plan in this process; return what is printed."""
    recipe = load_recipe(None, ["train.seq_len=64"], data={"sources": [str(inputs[1])]}, budget={
        "context": 256, **budget}, export={"targets": [DEVICE]})
    console = Console(file=io.StringIO(), width=200)
    planner.plan(str(inputs[0]), recipe, out, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.usefixtures("short_trials")
def test_a_budget_becomes_a_recipe_by_trials(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    teacher, limit = DenseCheckpoint.open(inputs[0]).shape, file_limit(inputs[0])
    printed = plan_here(inputs, tmp_path / "plan", file_size=limit)
    assert re.search(r"at most 9 shapes, 5,120 tokens each: about \d", printed)
    table = json.loads((tmp_path / "plan" / "plan.json").read_text())
    tried = [row for row in table["shapes"] if row["trial"]]
    best = min(tried, key=lambda row: row["trial"]["loss"])
    assert 3 < len(tried) < len(table["shapes"]) and table["chosen"] == best["shape"]
    assert "speeds are estimated from its bandwidth" in printed
    chosen = ModelShape.from_dict(table["chosen"])
    device = Device(load_profile(DEVICE), "gguf:q4_0", 256, None)
    assert chosen_row(table)["price"] == pytest.approx(asdict(device.price(chosen)))
    assert not Limits(file_bytes=limit * 1e6).excess(device.price(chosen))
    assert table["teacher"]["price"]["file_bytes"] == device.price(teacher).file_bytes and table["timings"] is None
    html = (tmp_path / "plan" / "plan.html").read_text(encoding="utf-8")
    assert html == render_plan(table), "the page is made from plan.json alone"
    assert f"Plan: {tmp_path / 'plan' / 'plan.html'}" in printed and table["command"] in printed
    assert all(f"{row['trial']['loss']:.3f}" in html for row in tried)
    recipe = load_recipe(tmp_path / "plan" / "recipe.toml")
    assert student_of(recipe, teacher, "t")[0] == chosen and recipe.train.tokens == 0
    assert recipe.budget == Budget(file_size=limit, context=256)
    before = (tmp_path / "plan" / "trials.jsonl").read_text()
    assert "is of the same inputs, nothing to do" in plan_here(inputs, tmp_path / "plan", file_size=limit)
    (tmp_path / "plan" / "plan.json").unlink()  # as after a kill
    plan_here(inputs, tmp_path / "plan", file_size=limit)
    assert (tmp_path / "plan" / "trials.jsonl").read_text() == before, "finished trials are not repeated"
    assert json.loads((tmp_path / "plan" / "plan.json").read_text()) | {"created": table["created"]} == table


def test_without_trials_no_text_is_needed(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """The least expected loss is chosen, by what cuts cost elsewhere."""
    done = run("plan", inputs[0], "--target", DEVICE, "--file-size", file_limit(inputs[0]), "--search", "none",
               "--out", tmp_path / "plan")
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert not any(row["trial"] for row in table["shapes"])
    assert table["chosen"] == min(table["shapes"], key=lambda row: row["expected"])["shape"]


@pytest.mark.usefixtures("short_trials")
def test_a_full_search_compares_bins_and_chooses_within_the_budget(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """A larger student than the budget allows is tried, to show what a larger budget would give, and never chosen."""
    limit = file_limit(inputs[0])
    plan_here(inputs, tmp_path / "plan", file_size=limit, search="full")
    table = json.loads((tmp_path / "plan" / "plan.json").read_text())
    tried = [row for row in table["shapes"] if row["trial"]]
    assert {row["within"] for row in tried} == {True, False}
    best = min((row for row in tried if row["within"]), key=lambda row: row["trial"]["loss"])
    assert table["chosen"] == best["shape"] and best["price"]["file_bytes"] <= limit * 1e6
    assert any(row["price"]["file_bytes"] < 0.8 * limit * 1e6 for row in tried)


def test_the_front_has_what_no_other_dominates() -> None:
    shapes = [ModelShape("llama", 512, 64 * n, 256, 2, 4, 2, 32, 256, True) for n in range(1, 9)]
    points: list[tuple[float | None, float]] = [
        (1.0, 5.0), (2.0, 4.0), (2.0, 4.5), (3.0, 4.0), (4.0, 3.0), (4.0, 3.0), (0.5, math.nan), (None, 1.0)]
    on = pareto_front(dict(zip(shapes, points, strict=True)))
    # The second is as cheap as the third and better, as good as the fourth and cheaper. Equal points are both on it.
    assert on == {shapes[i] for i in (0, 1, 4, 5)}
    assert pareto_front({}) == set()


def test_trials_train_for_a_hundredth_of_the_budget() -> None:
    """But not for so long that a search takes days, nor so short that it shows nothing."""
    tokens = [EFFORTS["short"].of(load_recipe(None, [f"train.tokens={n}"])).train.tokens
              for n in (0, 8_000_000, 10**10)]
    assert tokens == [LEAST_TOKENS, 80_000, MOST_TOKENS]


def test_timings_from_the_device_give_its_speed(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    teacher = DenseCheckpoint.open(inputs[0]).shape
    timings = [Timing(shape, "gguf:q4_0", n, 5e9 / shape.n_params / n**0.1, 1e9 / shape.n_params / n**0.1)
               for shape in anchors_of(teacher) for n in (128, 1152)]
    found = Measured("aarch64, 4 processors, Cortex-A76", "llama-cpp-python 0.3.36", 4, "gguf:q4_0", tuple(timings))
    found.save(tmp_path / "timings.json")
    budget = Budget(context=256, timings=str(tmp_path / "timings.json"))
    console = Console(file=io.StringIO(), width=200)
    device = device_of(load_profile(DEVICE), teacher, budget, console)
    assert device.model == found.model() and device.timings == found
    assert device.is_measured and device.price(teacher).first_token_s is not None
    assert "12 timings on aarch64, 4 processors, Cortex-A76" in console.file.getvalue()  # type: ignore[attr-defined]
    others = tuple(replace(timing, format="gguf:q8_0") for timing in timings)
    replace(found, format="gguf:q8_0", timings=others).save(tmp_path / "other.json")
    other = replace(budget, timings=str(tmp_path / "other.json"))
    with pytest.raises(UserError, match=r"other.json: timings of gguf:q8_0, the plan is for gguf:q4_0; .* --format gg"):
        device_of(load_profile(DEVICE), teacher, other, console)
    assert device_of(load_profile(DEVICE), teacher, replace(other, format="gguf:q8_0"), console).is_measured


@pytest.mark.parametrize(("options", "message"), [
    ((), "plan: no budget; give --tokens-per-second"),
    (("--file-size", 100), "the teacher itself is within this budget"),
    (("--file-size", 0.01), "no student of this teacher reaches --file-size 0.01 (10.0 kB) on raspberry-pi-5"),
    (("--file-size", 0.01, "--format", "onnx:q4"), "256 tokens of context in onnx:q4: the nearest is"),
    (("--file-size", 0.1, "--format", "onnx:q8"), "--format onnx:q8: raspberry-pi-5 runs gguf:q4_0, gguf:q8_0, onnx"),
    (("--time-to-first-token", 1), "--time-to-first-token: gguf:q4_0 was not timed on raspberry-pi-5"),
    (("--memory", "inf"), "budget.memory = inf: need at least 0 and less than inf"),
    (("--file-size", 0.3, "--set", "student.hidden_size=64"), "student.hidden_size = 64 is set, but a plan"),
    (("--file-size", 0.3, "--target", "laptop-x86"), "budget: need one device"),
    (("--file-size", 0.3, "--search", "long"), "search = 'long': need one of none, short, full"),
    (("--file-size", 0.3, "--timings", "nowhere.json"), "nowhere.json: not a file of timings")])
def test_mistakes_are_one_line_and_leave_nothing(options: tuple[object, ...], message: str, inputs: tuple[Path, Path],
                                                 tmp_path: Path) -> None:
    status, _, errors = plan(inputs, tmp_path / "plan", *options)
    assert status == 2 and errors.count("\n") == 1 and message in errors, errors
    assert not (tmp_path / "plan").exists()


def test_no_text_is_said_before_anything_is_written(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    for data, message in (((), "no data: the student learns from text"),
                          (("--data", tmp_path / "empty.txt"), "no text in it")):
        done = run("plan", inputs[0], "--target", DEVICE, "--file-size", 0.1, "--out", tmp_path / "plan", *data)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert not (tmp_path / "plan").exists()


def test_what_cannot_be_timed_here_is_said(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    browser = load_profile("browser-phone")
    console = Console(file=io.StringIO(), width=200)
    budget = Budget(context=256, format="gguf:q8_0")
    assert not device_of(browser, DenseCheckpoint.open(inputs[0]).shape, budget, console).is_measured
    assert "wllama of browser-phone is not timed on this machine" in console.file.getvalue()  # type: ignore[attr-defined]
    for format_, message in ((browser.recommended, "timed are llama.cpp, onnxruntime-genai, onnxruntime on the device"),
                             ("onnx:q4", "--format onnx:q4: browser-phone runs gguf:q4_0, gguf:q8_0; give one")):
        done = run("plan", inputs[0] / "config.json", "--time-anchors", "--target", "browser-phone", "--format",
                   format_, "--out", tmp_path / "out")
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.targets
@pytest.mark.parametrize("format_", ["gguf:q4_0", "onnx:q4"])
def test_anchors_are_timed_once_for_a_machine(format_: str, inputs: tuple[Path, Path], tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRC_EDGE_CACHE", str(tmp_path / "cache"))
    device = tmp_path / "here.toml"
    laptop = (Path(__file__).parents[2] / "targets" / "profiles" / "laptop-x86.toml").read_text()
    device.write_text(laptop.replace('"x86_64"', f'"{architecture()}"'))
    for out in ("first", "again"):
        done = run("plan", inputs[0] / "config.json", "--time-anchors", "--target", device, "--format", format_,
                   "--context", 256, "--out", tmp_path / out)
        assert done.returncode == 0, done.stderr
    first, again = ((tmp_path / out / "timings.json").read_text() for out in ("first", "again"))
    assert first == again
    assert Measured.load(tmp_path / "first" / "timings.json").model().n_timings == 6


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A profile of this machine with one runtime."""
    figure = 'value = {}\nsource = "this machine"\ndate = 2026-11-22\n'
    (tmp_path / "here.toml").write_text("\n".join([
        'description = "This machine"', f'architecture = "{architecture()}"', "features = []", "context = 256",
        'runtimes = ["llama.cpp"]', 'recommended = "gguf:q8_0"', 'formats = [{name = "gguf:q8_0", why = "small"}]',
        *(f"[{name}]\n{figure.format(value)}" for name, value in (
            ("cores", 2), ("ram_gb", 8), ("usable_gb", 4), ("bandwidth_gb_s", 20)))]))
    return tmp_path / "here.toml"


def build(inputs: tuple[Path, Path], here: Path, out: Path, *options: object) -> tuple[int, str, str]:
    done = run("build", inputs[0], "--data", inputs[1], "--target", here, "--out", out, "--search", "none", *options,
               *(part for setting in ("train.tokens=2048", "train.seq_len=64", "parity.positions=256",
                                      "parity.row_len=64", "train.batch_tokens=512") for part in ("--set", setting)))
    return done.returncode, done.stdout, done.stderr


def test_a_build_with_a_budget_plans_first_and_measures_what_was_asked(inputs: tuple[Path, Path], here: Path,
                                                                       tmp_path: Path) -> None:
    """A limit that the file exceeds, though it was predicted to keep it, is a failed gate."""
    out, budget = tmp_path / "out", ("--file-size", 0.4, "--tokens-per-second", 1)
    status, printed, errors = build(inputs, here, out, *budget)
    assert status == 0, printed + errors
    plan, report = json.loads((out / "plan" / "plan.json").read_text()), json.loads((out / "report.json").read_text())
    assert report["student"]["n_params"] == ModelShape.from_dict(plan["chosen"]).n_params
    [target] = report["targets"]
    rows = {row["limit"]: row for row in target["budget"]}
    assert rows.keys() == {"tokens_per_second", "file_size"}
    assert rows["file_size"]["asked"] == 0.4 and rows["file_size"]["measured"] == report["artifacts"][0]["bytes"] / 1e6
    assert rows["file_size"]["predicted"] == chosen_row(plan)["price"]["file_bytes"] / 1e6
    assert rows["tokens_per_second"]["measured"] > 1 and rows["tokens_per_second"]["predicted"] > 1
    assert sum(gate["name"] == "budget" for gate in report["gates"]) == 2
    assert "budget: \u2264 0.4 MB on disk: predicted" in printed and "kept" in (out / "report.html").read_text()
    assert "unchanged, nothing to do" in build(inputs, here, out, *budget)[1], "the same sizes are planned again"

    facts, [row] = BuildFacts.read(out), target["rows"]
    assert facts.predicted and facts.predicted["price"] == chosen_row(plan)["price"] and row["state"] == "passed"
    [found] = check_budget(Budget(file_size=0.1), facts.predicted, list(facts.artifacts), load_profile(str(here)),
                           facts.check_input, [row], lambda text: None)
    assert row["state"] == "failed" and re.search(r"budget: MB on disk 0\.\d+, need <= 0\.1", failures(row)[-1])
    assert "EXCEEDED" in budget_text(found)


def test_sizes_that_exceed_a_budget_are_refused_before_training(inputs: tuple[Path, Path], here: Path, tmp_path: Path
                                                                ) -> None:
    status, _, errors = build(inputs, here, tmp_path / "out", "--file-size", 0.1, "--set", "student.hidden_size=96")
    assert status == 2 and "times over the limit of its file on here" in errors and errors.count("\n") == 1, errors
    assert not (tmp_path / "out").exists()
    status, _, errors = build(inputs, here, tmp_path / "out", "--file-size", 0.001)
    assert status == 2 and "the nearest is --file-size" in errors and not (tmp_path / "out").exists(), errors
