"""A whole build of a tiny teacher: every stage, real runtimes, the report; then resume, rebuild and failure."""
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from tiny_models import TEXT, make_tiny

COMMON = ["--set", "student.hidden_size=32", "--set", "train.tokens=24576", "--set", "train.seq_len=128",
          "--set", "train.batch_tokens=1024", "--set", "train.checkpoint_every=4", "--set", "train.eval_every=8",
          "--set", "parity.positions=512", "--set", "parity.row_len=64", "--set", "parity.generate_tokens=8",
          # Random weights are no trained student: 4 bits move its flat distributions little, but not by a known amount.
          "--formats", "gguf:f32,gguf:q8_0,gguf:q4_0,onnx:fp32,onnx:fp16,onnx:q8,onnx:q4"]


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "lrc_edge.cli", *map(str, args)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "text.txt").write_text(TEXT[:300_000])
    return make_tiny(folder / "teacher", layers=1), folder / "text.txt"


@pytest.fixture(scope="module")
def built(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    teacher, text = inputs
    out = tmp_path_factory.mktemp("built") / "out"
    result = subprocess.run(command("build", teacher, "--out", out, "--data", text, *COMMON), capture_output=True,
                            text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return out


def report_of(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def test_the_build_leaves_what_it_promises(built: Path) -> None:
    report = report_of(built)
    assert {"teacher", "student", "artifacts", "gates"} <= report.keys()
    assert [a["encoding"] for a in report["artifacts"]] == ["f32", "q8_0", "q4_0", "fp32", "fp16", "q8", "q4"]
    for artifact in report["artifacts"]:
        assert (built / artifact["path"]).exists() and artifact["bits_per_weight"] > 4
        assert artifact["parity"]["prefill"]["positions"] >= 512 <= artifact["parity"]["decode"]["positions"]
        assert {"path", "format", "encoding", "bytes", "bits_per_weight", "sha256"} <= artifact.keys()
    for gate in report["gates"]:
        assert gate["passed"] and {"name", "artifact", "metric", "value", "limit"} <= gate.keys()
    names = {gate["name"] for gate in report["gates"]}
    assert names == {"identity vs teacher", "folded vs clone", "prefill vs student", "decode vs student",
                     "prefill at 512 tokens", "decode at 512 tokens", "smoke generation", "smoke generation, genai",
                     "token ids", "chat template", "chat template, BOS", "stop tokens", "chat template, genai",
                     "chat template, genai, BOS", "stop tokens, genai"}
    assert min(row["n_strings"] for row in report["tokenizer"]) >= 1000
    assert report["student"]["n_params"] < report["teacher"]["n_params"]
    assert (built / "report.html").read_text().startswith("<!doctype html>")
    assert (built / "gguf" / "Modelfile").exists() and (built / "onnx" / "genai_config.json").exists()
    assert not (built / ".partial").exists()


def test_training_lowers_the_held_out_loss(built: Path) -> None:
    curve = [row for row in report_of(built)["student"]["training"]["curve"] if "held_out_loss" in row]
    assert curve[0]["step"] == 0 and curve[-1]["step"] == 24
    assert curve[-1]["held_out_loss"] < curve[0]["held_out_loss"]


def test_building_again_does_nothing_and_says_so(built: Path, inputs: tuple[Path, Path]) -> None:
    before = {f: f.stat().st_mtime_ns for f in built.rglob("*") if f.name != "build.json"}
    result = run("build", inputs[0], "--out", built, "--data", inputs[1], *COMMON)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("unchanged, nothing to do") == 11
    assert before == {f: f.stat().st_mtime_ns for f in before}


def test_a_changed_input_reruns_its_stage_and_those_behind_it(built: Path, inputs: tuple[Path, Path],
                                                              tmp_path: Path) -> None:
    out = Path(shutil.copytree(built, tmp_path / "out"))
    result = run("build", inputs[0], "--out", out, "--data", inputs[1], *COMMON, "--set", "parity.near_tie=0.02")
    lines = dict(line.split(None, 1) for line in result.stdout.splitlines() if len(line.split(None, 1)) == 2)
    for stage in ("data", "train", "gguf", "onnx"):
        assert lines[stage] == "unchanged, nothing to do", result.stdout
    assert "gates passed" in lines["check"]


def test_a_tampered_artifact_is_made_again(built: Path, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    out = Path(shutil.copytree(built, tmp_path / "out"))
    next((out / "gguf").glob("*Q8_0.gguf")).write_bytes(b"GGUF")
    result = run("build", inputs[0], "--out", out, "--data", inputs[1], *COMMON)
    assert result.returncode == 0 and "q8_0 0." in result.stdout, result.stdout
    assert next((out / "gguf").glob("*Q8_0.gguf")).stat().st_size > 1000


def test_a_missed_gate_is_status_1_and_the_artifact_stays(built: Path, inputs: tuple[Path, Path],
                                                          tmp_path: Path) -> None:
    out = Path(shutil.copytree(built, tmp_path / "out"))
    result = run("build", inputs[0], "--out", out, "--data", inputs[1], *COMMON, "--set", "gates.gguf_q8_0_kl=0")
    assert result.returncode == 1 and "FAILED" in result.stdout
    failed = [gate for gate in report_of(out)["gates"] if not gate["passed"]]
    assert failed and all("Q8_0" in gate["artifact"] for gate in failed)
    assert (out / failed[0]["artifact"]).exists()


def test_check_sees_a_file_that_no_longer_says_what_the_student_says(built: Path, tmp_path: Path) -> None:
    """Noise in the weights of a finished GGUF: it loads, it talks, and the proof fails it."""
    out = Path(shutil.copytree(built, tmp_path / "out"))
    assert run("check", out).returncode == 0
    file = next((out / "gguf").glob("*F32.gguf"))
    data = bytearray(file.read_bytes())
    for i in range(len(data) - 8002, len(data), 4):  # the high bytes of some float32 weights
        data[i] ^= 0x08
    file.write_bytes(data)
    result = run("check", out)
    assert result.returncode == 1, result.stdout
    assert any(not g["passed"] and "F32" in g["artifact"] for g in report_of(out)["gates"])
    file.unlink()
    result = run("check", out)
    assert result.returncode == 2 and "missing" in result.stderr


def test_report_and_inspect_read_a_build(built: Path) -> None:
    (built / "report.html").unlink()
    result = run("report", built)
    assert result.returncode == 0 and "gates passed" in result.stdout and (built / "report.html").exists()
    for path in (built, built / "student", next((built / "gguf").glob("*Q8_0.gguf")), built / "onnx/onnx/model.onnx"):
        result = run("inspect", path)
        assert result.returncode == 0 and result.stdout, result.stderr


def test_chat_answers_and_ends(built: Path) -> None:
    result = subprocess.run(command("chat", built, "--encoding", "q8_0", "--max-tokens", "5", "--temperature", "0"),
                            input="Hello\n", capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "Q8_0" in result.stdout


def test_stages_alone_make_the_same_student(built: Path, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = COMMON[:-2]
    assert run("train", inputs[0], "--out", out, "--data", inputs[1], *settings).returncode == 0
    assert not (out / "student").exists()
    result = run("fold", out)
    assert result.returncode == 0, result.stderr
    weights = [(folder / "student" / "model.safetensors").read_bytes() for folder in (out, built)]
    assert weights[0] == weights[1]
    exported = run("export", out / "student", "--out", tmp_path / "exported", "--formats", "gguf:f16",
                   "--set", "parity.positions=128", "--set", "parity.row_len=64")
    assert exported.returncode == 0, exported.stdout + exported.stderr
    assert report_of(tmp_path / "exported")["teacher"] is None
    files = [f.name for f in (tmp_path / "exported" / "gguf").glob("*.gguf")]
    assert len(files) == 1 and files[0].startswith("teacher-Edge-32-"), "the name that the fold gave it"


def test_onnx_q4_is_made_with_the_importance_matrix(built: Path, tmp_path: Path) -> None:
    made, lines = [], []
    for tokens in (0, 2048, 2048, 1024):
        result = run("export", built / "student", "--out", tmp_path / "out", "--formats", "onnx:fp32,onnx:q4",
                     "--set", f"export.calibration_tokens={tokens}", "--set", "parity.positions=64",
                     "--set", "parity.row_len=64", "--set", "parity.generate_tokens=2")
        assert result.returncode == 0, result.stdout + result.stderr
        lines.append(dict(line.split(None, 1) for line in result.stdout.splitlines() if len(line.split(None, 1)) == 2))
        made.append([artifact["sha256"] for artifact in report_of(tmp_path / "out")["artifacts"]])
    assert "imatrix" not in lines[0] and "2,048 tokens" in lines[1]["imatrix"] and "1,024" in lines[3]["imatrix"]
    assert lines[2]["imatrix"] == lines[2]["onnx"] == "unchanged, nothing to do"
    (fp32, plain), (fp32_1, weighted), again, (fp32_3, other) = made
    assert fp32 == fp32_1 == fp32_3 and again == [fp32, weighted]
    assert len({plain, weighted, other}) == 3


def test_a_killed_training_continues(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = command("train", inputs[0], "--out", out, "--data", inputs[1], *COMMON[:-2], "--set", "train.tokens=61440")
    process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(1200):
        if list(out.glob("train/checkpoints/step-*")):
            break
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "train" / "training.json").exists(), "killed too late to show anything"
    result = subprocess.run(args, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    steps = [json.loads(line)["step"] for line in (out / "train" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 60
    assert not (out / "train" / "checkpoints").exists()


def test_the_teacher_is_measured_on_the_same_text(built: Path) -> None:
    report = report_of(built)
    student = report["artifacts"][0]["parity"]["prefill"]
    assert report["teacher"]["proof_perplexity"] > 1
    assert report["teacher"]["proof_perplexity"] != student["ppl"] - student["delta_ppl"]
    assert [output["who"] for output in report["samples"][0]["outputs"]][:2] == ["teacher", "student"]
