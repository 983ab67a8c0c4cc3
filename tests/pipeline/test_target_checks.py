"""`--target` on this machine's own runtimes: an export checked without PyTorch, and everything that must be noticed."""
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import command_line
import pytest
from rich.console import Console
from tiny_models import TEXT

from lrc_edge.artifact import smallest_gguf
from lrc_edge.errors import UserError
from lrc_edge.exit_status import ExitStatus
from lrc_edge.machine import architecture
from lrc_edge.parity import CHANGES
from lrc_edge.pipeline import device_checks
from lrc_edge.pipeline.device_checks import TEACHER_FILE, BuildFacts, kept_results
from lrc_edge.stored_reference import REFERENCE_FILE, StoredReference
from lrc_edge.targets import speed
from lrc_edge.targets.devices.device_check import check_artifact
from lrc_edge.targets.energy import EnergyCounter
from lrc_edge.targets.profile import load_profile
from lrc_edge.targets.runtimes.table import runtimes_of
from lrc_edge.targets.runtimes.worker import Command

FIGURE = 'value = {}\nsource = "this machine"\ndate = 2026-11-21\n'
PROFILE = f"""
description = "This machine"
architecture = "{architecture()}"
features = []
context = 256
runtimes = ["llama.cpp", "onnxruntime"]
recommended = "gguf:q8_0"
formats = [{{name = "gguf:q8_0", why = "small"}}, {{name = "onnx:q8", why = "small"}}]
[cores]
{FIGURE.format(2)}
[ram_gb]
{FIGURE.format(8)}
[usable_gb]
{FIGURE.format(4)}
[bandwidth_gb_s]
{FIGURE.format(20)}
"""
# As `lrc-edge`, where some modules are not installed.
WITHOUT = ("import sys; sys.modules.update(dict.fromkeys(sys.argv.pop(1).split(',')));"
           "from lrc_edge.cli import main; main()")


def run(*args: object, without: str = "torch,transformers") -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-P", "-c", WITHOUT, without, *map(str, args)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("device") / "here.toml"
    file.write_text(PROFILE)
    return file


@pytest.fixture(scope="module")
def exported(tiny_llama: Path, device: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the formats and the check that the target asks for."""
    out = tmp_path_factory.mktemp("exported") / "out"
    done = command_line.run("export", tiny_llama, "--out", out, "--target", device, "--set", "parity.positions=256",
                            "--set", "parity.row_len=64")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All" in done.stdout and "gates passed" in done.stdout
    return out


@pytest.fixture
def out(exported: Path, tmp_path: Path) -> Path:
    """A copy to break, of what a machine without PyTorch needs."""
    for name in ("gguf", "onnx", "check"):
        shutil.copytree(exported / name, tmp_path / "out" / name)
    for name in ("build.json", "report.json", "report.html"):
        shutil.copy(exported / name, tmp_path / "out")
    return tmp_path / "out"


def rows_of(out: Path) -> dict[str, dict[str, Any]]:
    [result] = json.loads((out / "report.json").read_text())["targets"]
    return {row["runtime"]: row for row in result["rows"]}


def test_an_export_makes_what_the_target_runs_and_checks_it(exported: Path) -> None:
    report = json.loads((exported / "report.json").read_text())
    assert [(a["format"], a["encoding"]) for a in report["artifacts"]] == [("gguf", "q8_0"), ("onnx", "q8")]
    rows = rows_of(exported)
    assert {name: row["state"] for name, row in rows.items()} == {"llama.cpp": "passed", "onnxruntime": "passed"}
    for row in rows.values():
        assert row["positions"] >= 256 and 0 < row["kl_mean"] < 5e-3 and row["top1"] > 0.95
        assert row["context"]["prompt"] == 248 and row["context"]["made"] <= 9
        assert 20e6 < row["memory"]["peak_bytes"] < 400e6
        assert [rates["depth"] for rates in row["speed"]] == [0, 319]
        assert all(rates["prefill"] > 0 and rates["decode"] > 0 for rates in row["speed"])
    assert rows["llama.cpp"]["token_mismatches"] == 0 < 1000 < rows["llama.cpp"]["n_texts"]
    page = (exported / "report.html").read_text()
    assert "This machine" in page and "onnxruntime" in page


def test_a_check_needs_no_pytorch(out: Path, device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor anything else that only a build has. Files where it is started from are not taken for modules."""
    (tmp_path / "numpy.py").write_text("raise RuntimeError")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    done = run("check", out, "--target", device, without="torch,transformers,tokenizers,safetensors,gguf,onnx,"
                                                         "huggingface_hub,datasets,pyarrow,packaging")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("pass ") == 2
    gates = json.loads((out / "report.json").read_text())["gates"]
    assert len([gate for gate in gates if gate.get("target") == "here"]) == len({
        json.dumps(gate, sort_keys=True) for gate in gates if gate.get("target") == "here"}), "old ones replaced"


@pytest.mark.parametrize("readable", [True, False])
def test_energy_is_measured_or_unavailable(readable: bool, out: Path, device: Path, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """With a counter that advances by 3 J per token of an answer, and with one that cannot be read."""
    folder = tmp_path / "powercap" / "intel-rapl:0"
    folder.mkdir(parents=True)
    for name, content in (("name", "package-0"), ("max_energy_range_uj", "1000"), ("energy_uj", "1" * readable)):
        (folder / name).write_text(content)
    found = EnergyCounter.find
    monkeypatch.setattr(device_checks.EnergyCounter, "find", lambda: found(folder.parent))
    joules = {n_tokens: 3.0 * n_tokens for n_tokens in speed.ANSWERS.values()}
    monkeypatch.setattr(speed, "_joules", lambda worker, ids, n_tokens, energy: joules[n_tokens])
    console = Console(file=StringIO(), width=200)
    assert device_checks.check_targets(out, [str(device)], console) == ExitStatus.PASSED
    speeds = [rates for row in rows_of(out).values() for rates in row["speed"]]
    assert [rates["joules"] for rates in speeds] == [3.0 if readable else None] * len(speeds)
    printed, page = console.file.getvalue(), (out / "report.html").read_text()  # type: ignore[attr-defined]
    energy, note = ("energy 3 J/token", "energy is that of the whole processor, other work included") if readable else (
        "energy unavailable", f"energy is unavailable: the counter {folder / 'energy_uj'} cannot be read")
    for text in (printed, page):
        assert text.count(energy) == len(speeds) == 4 and text.count(note) == 1


def test_a_missing_runtime_is_not_checked_and_not_passed(out: Path, device: Path) -> None:
    done = run("check", out, "--target", device, without="torch,transformers,llama_cpp")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "not checked" in done.stdout and f"lrc-edge targets setup {device}" in done.stdout
    rows = rows_of(out)
    assert rows["llama.cpp"]["state"] == "not checked" and rows["onnxruntime"]["state"] == "passed"
    assert "NOT CHECKED: here" in (out / "report.html").read_text()


def test_a_changed_file_fails(out: Path, device: Path) -> None:
    [file] = (out / "gguf").glob("*.gguf")
    data = bytearray(file.read_bytes())
    data[-20_000:] = bytes(20_000)
    file.write_bytes(data)
    done = run("check", out, "--target", device, without="torch,transformers,onnxruntime")
    assert done.returncode == 1, "what failed counts before what was not checked: " + done.stdout + done.stderr
    assert "SHA-256 differs" in done.stdout and "SHA-256 differs" in (out / "report.html").read_text()
    rows = rows_of(out)
    assert rows["llama.cpp"]["state"] == "failed" and rows["onnxruntime"]["state"] == "not checked"
    page = (out / "report.html").read_text()
    assert "FAILED" in page and "NOT CHECKED" in page


@pytest.mark.parametrize("name", ["gguf/*.gguf", "onnx/onnx/*.onnx", "onnx/onnx/*.onnx_data"])
def test_a_truncated_file_fails_with_the_runtimes_words(name: str, out: Path, device: Path) -> None:
    [file] = out.glob(name)
    file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])
    done = run("check", out, "--target", device)
    assert done.returncode == 1, done.stdout + done.stderr
    row = rows_of(out)["llama.cpp" if name.startswith("gguf") else "onnxruntime"]
    assert row["state"] == "failed" and file.name.removesuffix("_data") in row["why"]
    assert "Traceback" not in done.stdout + done.stderr


def test_wrong_ids_fail(out: Path, device: Path) -> None:
    """Of the text: token ids. Of the rows: another text's distributions."""
    file = out / REFERENCE_FILE
    reference = StoredReference.load(file)
    replace(reference, text_ids=((5, 5), *reference.text_ids[1:])).save(file)
    done = run("check", out, "--target", device)
    assert done.returncode == 1 and "mismatches 1" in done.stdout, done.stdout
    replace(reference, ids=(reference.ids + 1) % 500).save(file)
    done = run("check", out, "--target", device)
    assert done.returncode == 1 and "kl_mean" in done.stdout, done.stdout


def test_a_device_with_too_little_memory_fails(out: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(PROFILE.replace("[usable_gb]\nvalue = 4", "[usable_gb]\nvalue = 0.01"))
    done = run("check", out, "--target", tmp_path / "tiny.toml")
    assert done.returncode == 1 and "peak memory" in done.stdout and "predicted memory" in done.stdout, done.stdout


def test_a_build_is_timed_beside_its_teacher(tiny_llama: Path, device: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT[:200_000])
    small = tmp_path / "small.toml"
    small.write_text(PROFILE.replace("[usable_gb]\nvalue = 4", "[usable_gb]\nvalue = 0.01"))
    command = ["build", tiny_llama, "--data", tmp_path / "text.txt", "--out", tmp_path / "out", "--target", device,
               "--set", "student.hidden_size=32", "--set", "train.tokens=2048", "--set", "train.seq_len=64",
               "--set", "train.batch_tokens=512", "--set", "parity.positions=128", "--set", "parity.row_len=64",
               "--set", "data.held_out_share=0.2"]
    done = command_line.run(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stdout
    for row in rows_of(tmp_path / "out").values():
        assert all(rates["decode_of_teacher"] > 0 < rates["prefill_of_teacher"] for rates in row["speed"])
    teacher = tmp_path / "out" / TEACHER_FILE
    assert teacher.exists() and smallest_gguf(tmp_path / "out") != teacher
    again = command_line.run(*command)
    assert "teacher  unchanged" in again.stdout and again.returncode == 0
    # Another target, for which it is too large: said before training, and found by the check.
    other = command_line.run(*(small if part == device else part for part in command))
    assert other.returncode == 1 and other.stdout.index("warning: small: does not fit") < other.stdout.index("train ")


def test_mistakes_are_one_line(out: Path, device: Path, tmp_path: Path) -> None:
    done = run("check", tmp_path / "nowhere", "--target", device)
    assert done.returncode == 2 and "no build here" in done.stderr and done.stderr.count("\n") == 1
    (other := tmp_path / "other.toml").write_text(PROFILE.replace("q8_0", "q4_0").replace("onnx:q8", "onnx:q4"))
    done = run("check", out, "--target", other)
    assert done.returncode == 2 and f"--target {other}" in done.stderr and done.stderr.count("\n") == 1
    (out / REFERENCE_FILE).write_bytes(b"PK")
    done = run("check", out, "--target", device)
    assert done.returncode == 2 and "damaged" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(("name", "content"), [
    ("build.json", '{"stages": {}, "hashes": {}, "job": {}}'),
    ("build.json", '{"stages": {"gguf": {"result": [{"path": 1}]}}, "hashes": {}, "job": {"recipe": {}}}'),
    ("report.json", '{"gates": ['), ("report.json", "[]")])
def test_a_damaged_file_is_one_line_before_anything_runs(name: str, content: str, out: Path, device: Path) -> None:
    (out / name).write_text(content)
    done = run("check", out, "--target", device)
    assert done.returncode == 2 and f"{name}: damaged" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert done.stdout == ""


def test_two_targets_at_once(out: Path, device: Path, tmp_path: Path) -> None:
    """Given twice is once; of one name is a mistake; what cannot run is told before the first runs."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "here.toml").write_text(PROFILE.replace("This machine", "Another"))
    done = run("check", out, "--target", device, "--target", tmp_path / "other" / "here.toml")
    assert done.returncode == 2 and "both are called here" in done.stderr and done.stdout == ""
    (tmp_path / "four.toml").write_text(PROFILE.replace("q8_0", "q4_0").replace("onnx:q8", "onnx:q4"))
    done = run("check", out, "--target", device, "--target", tmp_path / "four.toml")
    assert done.returncode == 2 and "no artifact for four, which runs" in done.stderr and done.stdout == ""
    (tmp_path / "short.toml").write_text(PROFILE.replace("context = 256", "context = 16").replace(
        "formats = [", 'formats = [{name = "onnx:q4", why = "absent"}, '))
    done = run("check", out, "--target", device, "--target", device, "--target", tmp_path / "short.toml",
               without="torch,transformers,llama_cpp")
    assert done.returncode == 3 and "not in this build: onnx:q4" in done.stdout, done.stdout + done.stderr
    here, short = json.loads((out / "report.json").read_text())["targets"]
    assert (here["target"], short["target"]) == ("here", "short") and len(here["rows"]) == 2
    [row] = [row for row in short["rows"] if row["runtime"] == "onnxruntime"]
    assert row["state"] == "passed" and row["n_ctx"] == 64, "the reference's rows have 64 tokens"
    assert "not in this build: onnx:q4" in (out / "report.html").read_text()


def test_results_are_kept_while_they_are_of_these_files(out: Path) -> None:
    artifacts = json.loads((out / "report.json").read_text())["artifacts"]
    file = out / "check" / "here.json"
    result = json.loads(file.read_text())
    assert [kept["target"] for kept in kept_results(out, artifacts)] == ["here"]
    assert kept_results(out, [{**artifacts[0], "sha256": "0"}, *artifacts[1:]]) == []
    for gate in (gate for row in result["rows"] for gate in row["gates"] if gate["metric"] == CHANGES):
        gate["passed"] = False
    file.write_text(json.dumps(result))
    assert kept_results(out, artifacts) == [], "what was checked was another file"
    file.write_text("[]")
    with pytest.raises(UserError, match=r"here\.json: damaged"):
        kept_results(out, artifacts)


# A runtime that writes on where its context is full, as one does that forgets the beginning; and one that dies there.
FAULTY = """
import os, sys
from lrc_edge.targets.runtimes.python_worker import PythonWorker, answer_requests

class Faulty(PythonWorker):
    def generate(self, ids, n_tokens, stop):
        return os.abort() if sys.argv[1] == "dies" else {"ids": [5] * (n_tokens * (sys.argv[1] == "writes on"))}

answer_requests(Faulty("llama.cpp"))
"""


@pytest.mark.parametrize(("fault", "failed"), [
    ("writes on", {"end of context"}), ("writes nothing", {"end of context"}), ("dies", {"device run"})])
def test_a_runtime_that_fails_at_the_end_of_its_context(fault: str, failed: set[str], out: Path, device: Path) -> None:
    facts, profile = BuildFacts.read(out), load_profile(str(device))
    command = Command((sys.executable, "-c", FAULTY, fault))
    faulty = replace(runtimes_of(profile)[0], start=lambda _: nullcontext(command))
    row = check_artifact(facts.artifacts_for(profile)[0], faulty, profile, facts.check_input, lambda _: None)
    assert row["state"] == "failed" and row["kl_mean"] < 5e-3
    assert {gate["name"] for gate in row["gates"] if not gate["passed"]} == failed


def is_worker(pid: str) -> bool:
    """Whether the child is what it was started for; at first it is a copy of its parent."""
    try:
        return "python_worker" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_no_worker_outlives_a_check_that_is_ended(sent: signal.Signals, out: Path, device: Path) -> None:
    check = subprocess.Popen([sys.executable, "-m", "lrc_edge", "check", str(out), "--target", str(device)],
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                             # A background job of a shell ignores it.
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    children = Path(f"/proc/{check.pid}/task/{check.pid}/children")
    deadline = time.monotonic() + 60
    while not (workers := [pid for pid in children.read_text().split() if is_worker(pid)]):
        assert time.monotonic() < deadline and check.poll() is None
        time.sleep(0.02)
    time.sleep(0.1)  # it is importing numpy, and the check waits for it to open the file
    os.kill(int(workers[0]), signal.SIGSTOP)  # it would not notice that nobody asks it any more
    check.send_signal(sent)
    assert check.wait(30) == 128 + sent
    assert not Path(f"/proc/{workers[0]}").exists()
