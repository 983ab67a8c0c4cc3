"""The command line as users run it: separate processes, their output, exit status and files."""
from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import run
from rich.console import Console
from safetensors.torch import load_file, save_file

from lrc_edge.console import Task
from lrc_edge.errors import UserError
from lrc_edge.pipeline import preflight
from lrc_edge.pipeline.plan import Plan
from lrc_edge.recipe import load_recipe

COMMANDS = ("build", "train", "fold", "export", "check", "verify", "report", "chat", "serve", "inspect", "recipe",
            "targets", "plan")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": f"Story {i}: once upon a time there was a cat. " * 8}) + "\n"
                            for i in range(120)))
    return file


def refused(result: subprocess.CompletedProcess[str], out: Path, *parts: str) -> None:
    """Check for one line on stderr, nothing else, status 2 and no output directory."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("lrc-edge: "), result.stderr
    for part in parts:
        assert part in result.stderr
    assert not out.exists()


def test_help_imports_nothing_heavy() -> None:
    code = ("import sys; from lrc_edge import cli; sys.argv = ['lrc-edge', '--help']\n"
            "try: cli.main()\nexcept SystemExit: pass\n"
            "heavy = {'torch', 'transformers', 'numpy', 'onnx', 'llama_cpp', 'gguf'} & set(sys.modules)\n"
            "sys.exit(f'imported {heavy}' if heavy else 0)")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for command in COMMANDS:
        assert command in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    result = run(command, "--help")
    assert result.returncode == 0 and len(result.stdout.splitlines()) > 5
    assert f" lrc-edge {command} " in result.stdout, "help shows no example"


def test_recipe_prints_toml_that_it_reads(tmp_path: Path) -> None:
    first = run("recipe", "--set", "train.tokens=123")
    (tmp_path / "r.toml").write_text(first.stdout)
    assert "tokens = 123" in first.stdout
    assert run("recipe", "--recipe", tmp_path / "r.toml").stdout == first.stdout


def test_mistakes_in_the_teacher(llama_copy: Path, text: Path, tmp_path: Path) -> None:
    """Each kind of mistake once, through the command line; tests/test_checkpoint.py has every case."""
    out = tmp_path / "out"
    refused(run("build", tmp_path / "nowhere", "--out", out, "--data", text), out, "nowhere", "not a directory")
    weights = llama_copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    refused(run("build", llama_copy, "--out", out, "--data", text), out, "truncated or corrupt")
    weights.rename(llama_copy / "pytorch_model.bin")
    refused(run("export", llama_copy, "--out", out), out, "pickled")
    weights.write_bytes(whole)
    (llama_copy / "tokenizer.json").rename(llama_copy / "moved")
    refused(run("build", llama_copy, "--out", out, "--data", text), out, "no tokenizer")


def test_mistakes_in_the_request(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build = ("build", tiny_llama, "--out", out)
    refused(run(*build), out, "no data", "--data")
    refused(run(*build, "--data", tmp_path / "missing.txt"), out, "missing.txt", "no such file")
    refused(run(*build, "--data", text, "--set", "student.hiden_size=32"), out, "did you mean student.hidden_size")
    refused(run(*build, "--data", text, "--set", "student.hidden_size=64"), out, "64", "smaller")
    refused(run(*build, "--data", text, "--set", "student.hidden_size=48"), out, "multiple of 32", "gguf:f16")
    refused(run(*build, "--data", text, "--formats", "gguf:q4_k"), out, "did you mean gguf:q4_k_")
    refused(run(*build, "--data", text, "--set", "student.name=../x"), out, "student.name")
    refused(run("check", tmp_path / "nothing"), out, "no build.json")
    refused(run("inspect", tmp_path / "nothing"), out, "nothing")


def test_data_that_is_empty_or_too_short_leaves_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "empty.txt").write_text("")
    refused(run("build", tiny_llama, "--out", out, "--data", tmp_path / "empty.txt"), out, "no text")
    (tmp_path / "short.txt").write_text("Hello.")
    refused(run("build", tiny_llama, "--out", out, "--data", tmp_path / "short.txt"), out, "give more")


def test_nan_weights_leave_nothing(llama_copy: Path, text: Path, tmp_path: Path) -> None:
    tensors = load_file(llama_copy / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, llama_copy / "model.safetensors")
    refused(run("export", llama_copy, "--out", tmp_path / "out"), tmp_path / "out", "model.norm.weight", "NaN")
    refused(run("build", llama_copy, "--out", tmp_path / "out", "--data", text), tmp_path / "out", "NaN")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_output(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(run("export", tiny_llama, "--out", tmp_path / "locked" / "out"), tmp_path / "locked" / "out",
            "cannot write there")


def test_output_below_a_file(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(run("export", tiny_llama, "--out", tmp_path / "file" / "out"), tmp_path / "file" / "out",
            "cannot write there")


def test_disk_too_small_is_said_before_the_start(tiny_llama: Path, text: Path, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(None, ["student.hidden_size=32"], data={"sources": [str(text)]})
    preflight.check(Plan.of_build(str(tiny_llama), recipe), tmp_path / "out")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"needs about .* MB, 1.* kB are free"):
        preflight.check(Plan.of_build(str(tiny_llama), recipe), tmp_path / "out")
    with pytest.raises(UserError, match="free some space"):
        preflight.check(Plan.of_export(str(tiny_llama), recipe), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_build_has_written_need_not_be_free_again(tiny_llama: Path, text: Path, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(None, ["student.hidden_size=32"], data={"sources": [str(text)]})
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    checkpoint = tmp_path / "out" / "train" / "checkpoints" / "step-00000001" / "state.safetensors"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(bytes(10**5))
    with pytest.raises(UserError, match=r"needs about .* MB, 1.00 MB are free"):
        preflight.check(Plan.of_build(str(tiny_llama), recipe), tmp_path / "out")
    checkpoint.write_bytes(bytes(10**7))
    preflight.check(Plan.of_build(str(tiny_llama), recipe), tmp_path / "out")


def test_time_left_is_told_by_what_this_run_did(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=120)
    task = Task(console, "train", 1000)
    for now[0], done in ((10, 900), (20, 910)):
        task.update("step", done)
    assert console.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "    train   90%  step", "    train   91%  eta 1:30  step"]


def test_width_that_leaves_some_formats(tmp_path: Path, tiny_llama: Path, text: Path) -> None:
    recipe = load_recipe(None, ["student.hidden_size=32"], data={"sources": [str(text)]},
                         export={"formats": "gguf:q4_k_m"})
    with pytest.raises(UserError, match=r"gguf:q4_k_m needs rows of a multiple of 256.*one of:.*gguf:q8_0") as caught:
        preflight.check(Plan.of_build(str(tiny_llama), recipe), tmp_path / "out")
    assert "gguf:q6_k," not in str(caught.value)
