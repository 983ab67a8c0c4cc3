"""`lrc-edge plan`: from a budget to a recipe that builds; mistakes in one line."""
from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import run
from rich.console import Console
from tiny_models import TEXT, make_tiny

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError
from lrc_edge.machine import architecture
from lrc_edge.pipeline.planner import EFFORTS, LEAST_TOKENS, MOST_TOKENS, _for_trials, device_of
from lrc_edge.recipe import load_recipe
from lrc_edge.shape import ModelShape
from lrc_edge.student import student_of
from lrc_edge.targets.profile import load_profile
from lrc_edge.targets.timing.anchors import anchors_of
from lrc_edge.targets.timing.cost import Timing
from lrc_edge.targets.timing.measured import Measured
from lrc_edge.targets.timing.price import Budget, Device

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


def test_a_budget_becomes_a_recipe(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    teacher = DenseCheckpoint.open(inputs[0]).shape
    device = Device(load_profile(DEVICE), "gguf:q4_0", 256, None)
    limit = 0.7 * device.price(teacher).file_bytes
    options = ("--file-size", limit / 1e6, "--search", "none", "--set", "train.tokens=4000000")
    status, printed, errors = plan(inputs, tmp_path / "plan", *options)
    assert status == 0, errors
    table = json.loads((tmp_path / "plan" / "plan.json").read_text())
    tried = [row for row in table["shapes"] if row["trial"]]
    best = min(tried, key=lambda row: row["trial"]["loss"])
    assert 3 < len(tried) < len(table["shapes"]) and table["chosen"] == best["shape"]
    assert table["speed"] == "estimated" and "speeds are estimated from its bandwidth" in printed
    chosen = ModelShape.from_dict(table["chosen"])
    assert not Budget(file_bytes=limit).excess(device.price(chosen))
    recipe = load_recipe(tmp_path / "plan" / "recipe.toml")
    assert student_of(recipe, teacher, "t")[0] == chosen and recipe.train.tokens == 4_000_000
    before = (tmp_path / "plan" / "trials.jsonl").read_text()
    assert plan(inputs, tmp_path / "plan", *options)[0] == 0
    assert (tmp_path / "plan" / "trials.jsonl").read_text() == before, "finished trials are not repeated"


def test_trials_train_for_a_hundredth_of_the_budget() -> None:
    """But not for so long that a search takes days, nor so short that it shows nothing."""
    tokens = [_for_trials(load_recipe(None, [f"train.tokens={n}"]), EFFORTS["short"]).train.tokens
              for n in (0, 8_000_000, 10**10)]
    assert tokens == [LEAST_TOKENS, 80_000, MOST_TOKENS]


def test_timings_from_the_device_give_its_speed(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    teacher = DenseCheckpoint.open(inputs[0]).shape
    timings = [Timing(shape, "gguf:q4_0", n, 5e9 / shape.n_params / n**0.1, 1e9 / shape.n_params / n**0.1)
               for shape in anchors_of(teacher) for n in (128, 1152)]
    found = Measured("aarch64, 4 processors, Cortex-A76", "llama-cpp-python 0.3.36", 4, "gguf:q4_0", tuple(timings))
    found.save(tmp_path / "timings.json")
    console = Console(file=io.StringIO(), width=200)
    device = device_of(load_profile(DEVICE), teacher, 256, tmp_path / "timings.json", console)
    assert device.model == found.model() and device.is_measured and device.price(teacher).first_token_s is not None
    assert "12 timings on aarch64, 4 processors, Cortex-A76" in console.file.getvalue()  # type: ignore[attr-defined]
    others = tuple(replace(timing, format="gguf:q8_0") for timing in timings)
    replace(found, format="gguf:q8_0", timings=others).save(tmp_path / "other.json")
    with pytest.raises(UserError, match=r"other.json: timings of gguf:q8_0, the plan is for gguf:q4_0; .* --format gg"):
        device_of(load_profile(DEVICE), teacher, 256, tmp_path / "other.json", console)
    assert device_of(load_profile(DEVICE), teacher, 256, tmp_path / "other.json", console, "gguf:q8_0").is_measured


@pytest.mark.parametrize(("options", "message"), [
    ((), "plan: no budget; give --tokens-per-second"),
    (("--file-size", 100), "the teacher itself is within this budget"),
    (("--file-size", 0.01), "no student of this teacher reaches --file-size 0.01 (10.0 kB) on raspberry-pi-5"),
    (("--file-size", 0.01, "--format", "onnx:q4"), "256 tokens of context in onnx:q4: the nearest is"),
    (("--file-size", 0.1, "--format", "onnx:q8"), "--format onnx:q8: raspberry-pi-5 runs gguf:q4_0, gguf:q8_0, onnx"),
    (("--time-to-first-token", 1), "--time-to-first-token: gguf:q4_0 was not timed on raspberry-pi-5"),
    (("--memory", 0), "--memory 0: need a number above 0"),
    (("--file-size", 0.3, "--search", "long"), "--search long: need one of none, short, full"),
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
    assert not device_of(browser, DenseCheckpoint.open(inputs[0]).shape, 256, None, console, "gguf:q8_0").is_measured
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
