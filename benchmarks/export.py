"""Time and memory of writing GGUF and ONNX, compared with the tools that do the same, in one run on one student.

    python benchmarks/export.py --work WORK                    the shape of LRC-1.5B: 10 GB of disk, about 10 GB of RAM
    python benchmarks/export.py --work WORK --shape tiny --repeats 1 --rows "cp,lrc-edge GGUF F16"

The student has random weights (random_student.py). Each measurement runs in its own process and includes its imports.
Rounds over all rows are repeated, and the median is shown. Before each measurement the student's files are read once,
the output is deleted, a scratch file as large as the student is written and deleted, and everything is synced. So
inputs come from the page cache, memory for outputs has been touched, and no measurement pays for data that the one
before left to write. Peak memory is the resident set of the largest process, mapped files included. A ratio compares
with the baseline, or with the sum of two tools if both are needed. llama.cpp's converter comes from the source
distribution of llama-cpp-python, which pip downloads to --work.
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).parent
SDIST = "llama-cpp-python==0.3.36"
PYTHON = sys.executable


@dataclass(frozen=True)
class Job:
    """Paths and settings that the commands use."""

    student: Path
    outputs: Path  # each row writes into its own folder in it
    converter: Path  # convert_hf_to_gguf.py
    threads: int


@dataclass(frozen=True)
class Row:
    """One tool's work. needs: the row whose output it reads. peers: the rows that it is compared with."""

    command: Callable[[Job, Path], list[str]]
    peers: tuple[str, ...] = ()
    needs: str | None = None


@dataclass(frozen=True)
class Measurement:
    seconds: float
    cpu_seconds: float  # of all threads, and of the kernel for them
    synced_seconds: float  # until the output is on the disk
    peak_bytes: int
    output_bytes: int
    load: float  # the system's load average when it began


def converter(kind: str) -> Row:
    return Row(lambda job, out: [PYTHON, str(job.converter), str(job.student), "--outtype", kind, "--outfile",
                                 str(out / "model.gguf")])


def llama_quantize(ftype: str) -> Row:
    code = ("import ctypes, sys, llama_cpp as l; p = l.llama_model_quantize_default_params(); "
            f"p.ftype = l.LLAMA_FTYPE_MOSTLY_{ftype}; p.nthread = int(sys.argv[3]); "
            "sys.exit(l.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(p)))")
    return Row(lambda job, out: [PYTHON, "-c", code, str(job.outputs / CONVERTER_F16 / "model.gguf"),
                                 str(out / "model.gguf"), str(job.threads)], needs=CONVERTER_F16)


def our_export(student: Path, out: Path, format: str, encoding: str, options: str = "") -> list[str]:
    """Return the command that writes out/<format>. options: more Python arguments of export_gguf or export_onnx."""
    code = ("import sys; from pathlib import Path; from lrc_edge.checkpoint import DenseCheckpoint; "
            f"from lrc_edge.export.{format}.to_{format} import export_{format}; "
            f"export_{format}(DenseCheckpoint.open(sys.argv[1]), Path(sys.argv[2]), ['{encoding}'], {options})")
    return [PYTHON, "-c", code, str(student), str(out / format)]


def ours(format: str, encoding: str, *peers: str) -> Row:
    return Row(lambda job, out: our_export(job.student, out, format, encoding), peers)


def genai_builder(student: Path, out: Path) -> list[str]:
    return [PYTHON, "-m", "onnxruntime_genai.models.builder", "-i", str(student), "-o", str(out), "-p", "int4",
            "-e", "cpu", "-c", str(out / "cache"), "--extra_options", "int4_block_size=32", "int4_accuracy_level=4"]


CONVERTER_F16 = "llama.cpp convert F16"
BUILDER = "genai builder int4"
ROWS = {
    "cp": Row(lambda job, out: ["cp", "-r", str(job.student), str(out)]),
    CONVERTER_F16: converter("f16"),
    "lrc-edge GGUF F16": ours("gguf", "f16", CONVERTER_F16),
    "llama.cpp convert BF16": converter("bf16"),
    "lrc-edge GGUF BF16": ours("gguf", "bf16", "llama.cpp convert BF16"),
    "llama.cpp quantize Q8_0": llama_quantize("Q8_0"),
    "lrc-edge GGUF Q8_0": ours("gguf", "q8_0", CONVERTER_F16, "llama.cpp quantize Q8_0"),
    "llama.cpp quantize Q4_0": llama_quantize("Q4_0"),
    "lrc-edge GGUF Q4_0": ours("gguf", "q4_0", CONVERTER_F16, "llama.cpp quantize Q4_0"),
    "llama.cpp quantize Q4_K_M": llama_quantize("Q4_K_M"),
    BUILDER: Row(lambda job, out: genai_builder(job.student, out)),
    "lrc-edge ONNX fp32": ours("onnx", "fp32"),
    "lrc-edge ONNX q8": ours("onnx", "q8"),
    "lrc-edge ONNX q4": ours("onnx", "q4", BUILDER),
}


def measure(job: Job, name: str) -> Measurement:
    out = job.outputs / name
    reset(job, out)
    load, before, started = os.getloadavg()[0], os.times(), time.perf_counter()
    log = job.outputs / "log.txt"
    with log.open("wb") as file:
        process = subprocess.Popen(ROWS[name].command(job, out), stdout=file, stderr=file,
                                   env={**os.environ, "OMP_NUM_THREADS": str(job.threads), "HF_HUB_OFFLINE": "1"})
        _, status, usage = os.wait4(process.pid, 0)
    seconds, after = time.perf_counter() - started, os.times()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{name}: status {process.returncode}\n{log.read_text(errors='replace')[-3000:]}")
    os.sync()
    return Measurement(
        seconds=seconds, cpu_seconds=(after.children_user + after.children_system) - (before.children_user
                                                                                     + before.children_system),
        synced_seconds=time.perf_counter() - started, peak_bytes=1024 * usage.ru_maxrss,
        output_bytes=sum(path.stat().st_size for path in out.rglob("*") if path.is_file()), load=load)


def reset(job: Job, out: Path) -> None:
    """Restore the state that every measurement starts from (see the module docstring)."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    scratch = job.outputs / "scratch"
    with scratch.open("wb") as target:
        for path in sorted(job.student.iterdir()):
            with path.open("rb") as source:
                shutil.copyfileobj(source, target, 1 << 24)
    scratch.unlink()
    os.sync()


def make_student(work: Path, shape: str) -> Path:
    """Run in a separate process, because a child inherits its parent's peak memory."""
    code = ("import sys; from pathlib import Path; from random_student import make_student; "
            "print(make_student(Path(sys.argv[1]), sys.argv[2]))")
    done = subprocess.run([PYTHON, "-c", code, str(work), shape], cwd=HERE, check=True, stdout=subprocess.PIPE)
    return Path(done.stdout.decode().strip().splitlines()[-1])


def get_converter(work: Path) -> Path:
    name = SDIST.replace("-", "_").replace("==", "-")
    root = f"{name}/vendor/llama.cpp"
    script = work / root / "convert_hf_to_gguf.py"
    if not script.exists():
        subprocess.run([PYTHON, "-m", "pip", "download", "--quiet", "--no-binary", "llama-cpp-python", "--no-deps",
                        "--dest", str(work), SDIST], check=True)
        with tarfile.open(work / f"{name}.tar.gz") as archive:
            wanted = (root + "/convert_hf_to_gguf.py", root + "/conversion/", root + "/gguf-py/")
            archive.extractall(work, [m for m in archive.getmembers() if m.name.startswith(wanted)], filter="data")
    return script


def medians(found: list[Measurement]) -> Measurement:
    columns = [asdict(one) for one in found]
    return Measurement(**{key: statistics.median(column[key] for column in columns) for key in columns[0]})


def render(results: dict[str, Measurement]) -> str:
    lines = ["| | wall | CPU | until synced | peak memory | output | time to peer | memory to peer |",
             "|---|---|---|---|---|---|---|---|"]
    for name, one in results.items():
        cells = [f"{one.seconds:.1f} s", f"{one.cpu_seconds:.1f} s", f"{one.synced_seconds:.1f} s",
                 f"{one.peak_bytes / 1e9:.2f} GB", f"{one.output_bytes / 1e9:.2f} GB"]
        peers = [results[peer] for peer in ROWS[name].peers if peer in results]
        if peers and len(peers) == len(ROWS[name].peers):
            cells += [f"{one.seconds / sum(peer.seconds for peer in peers):.2f}",
                      f"{one.peak_bytes / max(peer.peak_bytes for peer in peers):.2f}"]
        lines.append("| " + " | ".join([name, *cells, *[""] * (7 - len(cells))]) + " |")
    return "\n".join(lines)


def summary(args: argparse.Namespace, found: dict[str, list[Measurement]]) -> str:
    loads = [one.load for row in found.values() for one in row]
    repeats = min(len(row) for row in found.values())
    return (f"{args.shape}, {args.threads} threads, medians of {repeats}; load average {min(loads):.1f} to "
            f"{max(loads):.1f} at the starts\n\n{render({name: medians(row) for name, row in found.items()})}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for student, outputs, results and converter")
    parser.add_argument("--shape", default="lrc-1.5b", help="lrc-1.5b or tiny")
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated; default: all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: the machine's processors")
    parser.add_argument("--converter", type=Path, help="convert_hf_to_gguf.py; default: the source distribution's")
    args = parser.parse_args()
    names = [name.strip() for name in args.rows.split(",")]
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"unknown rows {unknown}; known: {list(ROWS)}")
    names = [name for name in ROWS if name in names or any(ROWS[other].needs == name for other in names)]
    args.work.mkdir(parents=True, exist_ok=True)
    converts = any(name.startswith("llama.cpp convert") for name in names)
    script = args.converter or (get_converter(args.work) if converts else Path())
    work = args.work.resolve()
    job = Job(make_student(work, args.shape), work / "outputs", script.resolve(), args.threads)
    found: dict[str, list[Measurement]] = {name: [] for name in names}
    for round_number in range(args.repeats):
        for name in names:
            found[name].append(measure(job, name))
            print(f"round {round_number + 1} {name}: {found[name][-1].seconds:.2f} s", file=sys.stderr, flush=True)
            if not any(ROWS[other].needs == name for other in names):
                shutil.rmtree(job.outputs / name)
        text = summary(args, found)  # after every round: an interrupted run has something to show
        (args.work / "export.md").write_text(text)
        (args.work / "export.json").write_text(json.dumps(
            {name: [asdict(one) for one in row] for name, row in found.items()}, indent=1) + "\n")
    shutil.rmtree(job.outputs)
    print(text)


if __name__ == "__main__":
    main()
