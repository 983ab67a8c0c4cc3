"""Small runs of the speed benchmarks, whose printed figures are checked."""
from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT
from tiny_models import TEXT
from transformers import Qwen2Config

from lrc_edge.machine import architecture
from lrc_edge.recipe import load_recipe
from lrc_edge.shape import ModelShape
from lrc_edge.targets import speed
from lrc_edge.targets.timing.anchors import anchors_of
from lrc_edge.train.phases import CLONE, DENSE, Phase

BENCHMARKS = ROOT / "benchmarks"


def run(script: str, work: Path, *arguments: str) -> str:
    done = subprocess.run([sys.executable, str(BENCHMARKS / script), "--work", str(work), "--shape", "tiny",
                           "--repeats", "1", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_pyproject_declares_what_the_scripts_import() -> None:
    project = tomllib.loads((BENCHMARKS.parent / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[<>=\[]", line)[0].replace("-", "_")
                for line in project["dependencies"] + project["optional-dependencies"]["bench"]}
    declared |= {"lrc_edge", "llama_cpp", "tokenizers"}  # ours; llama-cpp-python's name; a part of transformers
    declared |= {script.stem for script in BENCHMARKS.glob("*.py")} | sys.stdlib_module_names
    for script in BENCHMARKS.glob("*.py"):
        for node in ast.walk(ast.parse(script.read_text())):
            names = ([alias.name for alias in node.names] if isinstance(node, ast.Import)
                     else [node.module or ""] if isinstance(node, ast.ImportFrom) else [])
            assert {name.split(".")[0] for name in names} <= declared, script.name
    assert "onnx_ir" in declared  # what onnxruntime-genai's builder imports, and its package does not require


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


def test_export_measures_time_memory_and_bytes(work: Path) -> None:
    printed = run("export.py", work, "--rows", "cp,lrc-edge GGUF BF16")
    found = json.loads((work / "export.json").read_text())
    assert list(found) == ["cp", "lrc-edge GGUF BF16"] and (work / "export.md").read_text().strip() == printed.strip()
    copied, written = found["cp"][0], found["lrc-edge GGUF BF16"][0]
    assert copied["output_bytes"] == sum(file.stat().st_size for file in (work / "tiny").iterdir())
    assert 0.9 < written["output_bytes"] / (work / "tiny/model-00001.safetensors").stat().st_size < 1.2
    assert 0 < copied["seconds"] < written["seconds"] <= written["synced_seconds"]
    assert copied["peak_bytes"] < 64e6 < written["peak_bytes"]  # torch alone is more
    assert not (work / "outputs").exists()


def test_the_peer_of_the_onnx_files_runs(tmp_path: Path) -> None:
    pytest.importorskip("onnx_ir", reason="needs the extra `bench`")
    run("export.py", tmp_path, "--rows", "genai builder int4")
    [built] = json.loads((tmp_path / "export.json").read_text())["genai builder int4"]
    assert built["output_bytes"] > 100_000


def test_peak_and_time_are_the_measured_process_s(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("export_benchmark", BENCHMARKS / "export.py")
    assert spec is not None and spec.loader is not None
    export: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = export  # where dataclasses look their module up
    spec.loader.exec_module(export)
    (tmp_path / "student").mkdir()
    (tmp_path / "outputs").mkdir()
    child = "x = bytearray(600_000_000); import time; time.sleep(.2)"
    hog = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    export.ROWS["hog"] = export.Row(lambda job, out: [sys.executable, "-c", hog])
    found = export.measure(export.Job(tmp_path / "student", tmp_path / "outputs", tmp_path, 1), "hog")
    assert 600e6 < found.peak_bytes < 680e6  # a child's, and not this process's
    assert found.seconds > 0.2


def test_initializations_train(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT[:20_000])
    done = subprocess.run([sys.executable, str(BENCHMARKS / "initialization.py"), str(tiny_llama),
                           str(tmp_path / "text.txt"), "--hidden-size", "32", "--steps", "3", "--batch", "2",
                           "--row-len", "32"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"\| (\w+) \| ([\d.]+) [\d.]+ \|.*\| ([\d.]+) [\d.]+ \| \d+ s \|", done.stdout)
    assert [row[0] for row in rows] == ["gaussian", "selection", "components", "pca"]
    assert all(float(first) != float(last) for _, first, last in rows), done.stdout


def test_sample_efficiency_gives_every_method_as_many_tries_and_repeats_none(tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    command = [sys.executable, str(BENCHMARKS / "sample_efficiency.py"), "--teacher", str(tiny_llama),
               "--text", str(text), "--held-out", str(text), "--hidden-size", "32", "--tokens", "512",
               "--tune-tokens", "256", "--batch-tokens", "128", "--seq-len", "64", "--seeds", "2",
               "--data-tokens", "20000", "--long", "1", "--compile", "off", "--methods", "2,5",
               "--out", str(tmp_path / "out")]
    first, again = (subprocess.run(command, capture_output=True, text=True) for _ in range(2))
    assert first.returncode == again.returncode == 0, first.stderr
    runs = [json.loads(line) for line in (tmp_path / "out" / "runs.jsonl").read_text().splitlines()]
    tries = [run["method"] for run in runs if run["judged"] == "pick"]
    assert {name: tries.count(name) for name in tries} == {"TinyBERT-like": 6, "LRC as published": 6}
    finals = [(run["method"], run["seed"], run["tokens"]) for run in runs if run["judged"] == "eval"]
    assert len(set(finals)) == len(finals) == 2 * 2 + 1 and max(tokens for *_, tokens in finals) == 5120
    assert all(len(run["curve"]) == 5 for run in runs if run["judged"] == "eval")
    table = (tmp_path / "out" / "table.md").read_text()
    assert again.stdout.strip() == table.strip() and "The leaders with more tokens" in table
    rows = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| ")]
    assert rows[:3] == ["| method", "| TinyBERT-like", "| LRC as published"]


def test_axes_compares_starts_and_repeats_none(tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    command = [sys.executable, str(BENCHMARKS / "axes.py"), "--teacher", str(tiny_llama), "--text", str(text),
               "--held-out", str(text), "--tokens", "256", "--batch-tokens", "128", "--seq-len", "64", "--seeds", "1",
               "--data-tokens", "20000", "--compile", "off", "--cuts", "key/value heads",
               "--out", str(tmp_path / "out")]
    first, again = (subprocess.run(command, capture_output=True, text=True) for _ in range(2))
    assert first.returncode == again.returncode == 0, first.stderr
    runs = [json.loads(line) for line in (tmp_path / "out" / "runs.jsonl").read_text().splitlines()]
    assert [(run["start"], run["judged"]) for run in runs] == [
        (start, judged) for start in ("refitted", "not refitted", "plain") for judged in ["pick"] * 4 + ["eval"]]
    ours, _, plain = (run["before"] for run in runs if run["judged"] == "eval")
    assert ours != plain and "| key/value heads | plain |" in again.stdout
    unknown = subprocess.run([*command, "--cuts", "experts"], capture_output=True, text=True)
    assert unknown.returncode == 1 and "--cuts: experts; known: width, layers" in unknown.stderr


def test_defaults_reports_each_cell_and_fails_if_one_is_worse(tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    command = [sys.executable, str(BENCHMARKS / "defaults.py"), "--teacher", str(tiny_llama), "--text", str(text),
               "--budgets", "20480", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    cells = [json.loads(line) for line in (tmp_path / "out" / "cells.jsonl").read_text().splitlines()]
    assert len(cells) == 4 and all(0 < cell["end"] < cell["start"] for cell in cells), done.stderr
    assert done.returncode == 0 and "WORSE" not in done.stdout and f"| {tiny_llama.name}, " in done.stdout
    cells[0]["end"] = cells[0]["start"] + 1
    (tmp_path / "out" / "cells.jsonl").write_text("".join(json.dumps(cell) + "\n" for cell in cells))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "WORSE" in done.stdout


def test_timing_compares_predictions_with_shapes_that_were_not_fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                                      ) -> None:
    """One round of three anchors and two others. A teacher's config.json is enough."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    timing: Any = importlib.import_module("timing")
    (tmp_path / "config.json").write_text(json.dumps(dict(
        model_type="llama", vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=384, tie_word_embeddings=True)))
    monkeypatch.setattr(speed, "ROUNDS", 1)
    target = f"laptop-{'x86' if architecture() == 'x86_64' else 'arm64'}"
    monkeypatch.setattr(timing, "anchors_of", lambda teacher: anchors_of(teacher)[:3])
    out = tmp_path / "out"
    arguments = ["timing.py", "--teacher", str(tmp_path / "config.json"), "--target", target, "--shapes", "2", "--out",
                 str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    timing.main()
    text, runs = (out / "table.md").read_text(), timing.Runs.load_from(out / "runs.json")
    assert [(row.shape, row.n_prompt) for row in runs.timings] == [
        (shape, n) for shape in runs.shapes for n in (128, 319)]
    assert len(set(runs.shapes)) == 5 and runs.n_anchors == 3 and all(40e6 < peak < 90e6 for peak in runs.peaks)
    assert text.count("| anchor |") == 3 and text.count("| other |") == 2
    # Other timings of the other shapes change their errors, and nothing that is predicted.
    slow = [replace(row, decode=row.decode / 2) if row.shape in runs.shapes[3:] else row for row in runs.timings]
    replace(runs, timings=tuple(slow)).save(out / "runs.json")
    monkeypatch.setattr(sys, "argv", [*arguments, "--render"])
    timing.main()
    first, again = ([re.sub(r"[\d.,]+ / ([\d.,]+) \(.*?%\)", r"\1", line) for line in table.splitlines()
                     if "other |" in line] for table in (text, (out / "table.md").read_text()))
    assert first == again and text != (out / "table.md").read_text()


def test_the_other_shapes_are_spread_over_all_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    timing: Any = importlib.import_module("timing")
    teacher = ModelShape("llama", 128_256, 2048, 8192, 16, 32, 8, 64, 131_072, True)
    others = timing.others_of(teacher, "gguf:q4_0", 8)
    assert len(set(others)) == 8 and not set(others) & set(anchors_of(teacher)) and others[:6] == timing.others_of(
        teacher, "gguf:q4_0", 6)
    for axis in timing.AXES:
        shares = [getattr(shape, axis) / getattr(teacher, axis) for shape in others]
        assert min(shares) <= 0.5 and max(shares) >= 0.85, axis


def test_throughput_names_every_error_as_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    throughput: Any = importlib.import_module("train_throughput")
    sent: list[str] = []

    def failing(error: Exception) -> Any:
        def build(*args: Any) -> None:
            raise error
        return build, False

    for error in (torch.OutOfMemoryError("Tried to allocate 2 GiB."), RuntimeError("no\nsuch kernel")):
        monkeypatch.setitem(throughput.ROWS, "plain", failing(error))
        throughput.measure("plain", argparse.Namespace(shape="tiny"), argparse.Namespace(send=sent.append))
    assert sent == ["out of memory: Tried to allocate 2 GiB.", "RuntimeError: no such kernel"]


def test_throughput_of_the_default_method() -> None:
    done = subprocess.run([sys.executable, str(BENCHMARKS / "train_throughput.py"), "--shape", "tiny", "--rows",
                           "plain,dense phase", "--warmup", "0", "--steps", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\| plain \| [\d,]+ \| 1.00 \| \d+% \|", done.stdout), done.stdout
    assert re.search(r"\| dense phase \| [\d,]+ \| 0\.\d\d \| \d+% \|", done.stdout), done.stdout


@pytest.mark.parametrize("phase", [CLONE, DENSE])
def test_simulated_memory_is_the_calculated_sum(phase: Phase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    memory: Any = importlib.import_module("train_memory")
    teacher = Qwen2Config(hidden_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                          intermediate_size=512, vocab_size=1000, tie_word_embeddings=True)
    lineage = memory.lineage_of(teacher, 128)
    found = [memory.simulate(teacher, lineage, load_recipe(None, ["train.seq_len=512", "train.micro_batch=2", setting]
                                                           ).train, phase)
             for setting in ("train.gradient_checkpointing=false", "train.gradient_checkpointing=true")]
    for between, peak in found:
        assert between == pytest.approx(memory.bytes_between_steps(lineage, phase), rel=0.01)
        assert peak > between + 4 * lineage.student.n_params  # gradients
    assert found[1][1] < 0.9 * found[0][1]


def test_a_tool_that_fails_is_no_measurement(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(BENCHMARKS / "export.py"), "--work", str(tmp_path), "--shape", "tiny",
                           "--rows", "llama.cpp convert F16", "--converter", str(tmp_path / "absent.py")],
                          capture_output=True, text=True)
    assert done.returncode and "llama.cpp convert F16: status 2" in done.stderr and "absent.py" in done.stderr
    assert not (tmp_path / "export.json").exists()


def test_decode_compares_runtimes(work: Path) -> None:
    rows = ["llama.cpp Q4_0", "lrc-edge ONNX q4 in onnxruntime", "lrc-edge ONNX q4 in genai"]
    printed = run("decode.py", work, "--rows", ",".join(rows), "--threads", "1", "--prompt", "24", "--tokens", "4")
    found = json.loads((work / "decode.json").read_text())
    assert [(one["threads"], one["row"]) for one in found] == [(1, row) for row in rows]
    assert all(speed > 0 for one in found for speed in one["tokens_per_second"][0].values())
    assert f"| {rows[0]} | " in printed and "| 1.00 |" in printed


FAKE_EXPORT = """
import subprocess, sys, time
child = "x = bytearray(300_000_000); import time; time.sleep(3)"
print("  weights   42%  eta 0:01  5 MB/s  model.norm.weight")
print("  weights  tiny: all finite  (0.5 s)", flush=True)
busy = time.process_time()
while time.process_time() < busy + 0.5: pass
subprocess.run([sys.executable, "-c", child])
print("  imatrix  importance of inputs on 16,384 tokens  (458.1 s)", flush=True)
sys.exit(1)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_real_size_measures_every_process_of_the_command(tmp_path: Path) -> None:
    """Measures a stand-in for lrc-edge whose child process uses the memory. A second run replaces the first."""
    command = tmp_path / "lrc-edge"
    command.write_text(f"#!{sys.executable}\n{FAKE_EXPORT}")
    command.chmod(0o755)
    results = tmp_path / "results"
    for _ in range(2):
        done = subprocess.run([sys.executable, str(BENCHMARKS / "real_size.py"), "--work", str(tmp_path), "--shape",
                               "tiny", "--lrc-edge", str(command), "--label", "before", "--results", str(results)],
                              capture_output=True, text=True)
        assert done.returncode == 1, done.stderr
    [found] = [json.loads(line) for line in (results / "runs.jsonl").read_text().splitlines()]
    assert [(stage["name"], stage["seconds"]) for stage in found["stages"]] == [("weights", 0.5), ("imatrix", 458.1)]
    assert found["status"] == 1 and 0.5 <= found["user"] + found["system"] < found["wall"]
    for peak in (found["peak_bytes"], found["largest_process_bytes"], found["stages"][1]["peak_bytes"]):
        assert 300e6 < peak < 400e6
    assert found["stages"][0]["peak_bytes"] < 100e6 and 300e6 < found["peak_anonymous_bytes"] <= found["peak_bytes"]
    assert found["float32_bytes"] == 4 * 426_624
    table = (results / "table.md").read_text()
    assert done.stdout.strip() == table.strip() and "| imatrix | 458.1 s, 0.3" in table
