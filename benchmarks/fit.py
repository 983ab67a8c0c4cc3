"""Memory predicted by `lrc-edge targets fit`, compared with the measured peak resident set of each runtime.

    python benchmarks/fit.py --work WORK                                   2 GB of disk, 2 GB of RAM, minutes
    python benchmarks/fit.py --work WORK --shapes small-weights --rows "gguf:q4_0 in llama.cpp"

The students have random weights (random_student.py); each needs its memory for something else. Each measurement runs in
its own worker process, as in `lrc-edge check --target`: it loads the file, reads a prompt that fills the context except
for the last tokens, generates those, and reports its VmHWM. --work keeps the students.
"""
from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path

from random_student import SHAPES, make_student

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.export.gguf.to_gguf import export_gguf
from lrc_edge.export.onnx.to_onnx import export_onnx
from lrc_edge.shape import ModelShape
from lrc_edge.targets.memory import memory_of
from lrc_edge.targets.runtimes.worker import Command, Worker

N_WRITTEN = 8
CONTEXTS = {"cache": 4096, "small-weights": 1024, "small-vocabulary": 256}  # 2048 for the others
ROWS = tuple(f"{format_} in {runtime}" for format_, runtimes in (
    ("gguf:f16", ("llama.cpp",)), ("gguf:q8_0", ("llama.cpp",)), ("gguf:q4_0", ("llama.cpp",)),
    ("onnx:q4", ("onnxruntime", "onnxruntime-genai")), ("onnx:q8", ("onnxruntime-genai",))) for runtime in runtimes)


def machine_features() -> set[str]:
    """Return this machine's processor features, by their names in profiles."""
    text = Path("/proc/cpuinfo").read_text()
    flags = {word for line in text.splitlines() if line.startswith(("flags", "Features")) for word in line.split()}
    if platform.machine() == "aarch64":
        return {"neon"} | {name for flag, name in (("asimddp", "dotprod"), ("i8mm", "i8mm")) if flag in flags}
    return {"avx2"} & flags


def files_of(student: Path, work: Path, formats: set[str]) -> dict[str, Path]:
    """Write every format; return format -> file."""
    checkpoint, found = DenseCheckpoint.open(student), {}
    for kind, export in (("gguf", export_gguf), ("onnx", export_onnx)):
        encodings = sorted(format_.split(":")[1] for format_ in formats if format_.startswith(kind))
        if encodings:
            for artifact in export(checkpoint, work / "files" / student.name / kind, encodings):
                found[f"{kind}:{artifact.encoding}"] = work / "files" / student.name / artifact.path
    return found


def measured_peak(runtime: str, file: Path, context: int, threads: int) -> int:
    prompt = [3 + i % 200 for i in range(context - N_WRITTEN)]
    argv = (sys.executable, "-m", "lrc_edge.targets.runtimes.python_worker", runtime)
    with Worker(Command(argv, {"OMP_NUM_THREADS": str(threads)})) as worker:
        worker.ask("open", path=str(file), n_ctx=context, threads=threads)
        worker.ask("generate", ids=prompt, n_tokens=N_WRITTEN, stop=[])
        return int(worker.ask("memory")["peak_bytes"])


def compare(work: Path, name: str, rows: list[str], threads: int) -> list[dict[str, object]]:
    student = make_student(work / "students", name)
    shape = ModelShape.from_config(json.loads((student / "config.json").read_text()), name)
    found: list[dict[str, object]] = []
    files = files_of(student, work, {row.split()[0] for row in rows})
    context = CONTEXTS.get(name, 2048)
    for row in rows:
        format_, runtime = row.split(" in ")
        predicted = memory_of(shape, format_, runtime, context, machine_features()).peak
        measured = measured_peak(runtime, files[format_], context, threads)
        found.append({"shape": name, "format": format_, "runtime": runtime, "context": context,
                      "predicted": predicted, "measured": measured})
        print(f"| {name} | {context:,} | {format_} | {runtime} | {predicted / 1e6:,.0f} MB | "
              f"{measured / 1e6:,.0f} MB | {predicted / measured - 1:+.1%} |", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for students, files and results")
    parser.add_argument("--shapes", default="weights,cache,vocabulary", help="comma-separated, of random_student.py")
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated; default: all")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    shapes, rows = args.shapes.split(","), args.rows.split(",")
    for given, known, what in ((shapes, SHAPES, "shapes"), (rows, ROWS, "rows")):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"unknown {what} {unknown}; known: {list(known)}")
    print("| shape | context | format | runtime | predicted | measured | error |\n|---|---|---|---|---|---|---|")
    found = [row for name in shapes for row in compare(args.work.resolve(), name, rows, args.threads)]
    (args.work / "fit.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
