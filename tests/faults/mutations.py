"""Damaged inputs through the commands: status 0 to 3, at most one line on stderr, no traceback, no signal."""
from __future__ import annotations

import os
import random
import re
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from faults.bench import Bench
from faults.mutate import damage
from faults.runs import Ended, lrc_edge, run

MEMORY = 6 * 2**30  # bytes above what the process has: a file of 200 kB needs no more
CPU_SECONDS = 120
LIMIT = 600.0  # seconds of wall time: machines are shared
SMALL_PROOF = ["--set", "parity.positions=64", "--set", "parity.row_len=64", "--set", "parity.generate_tokens=2",
               "--set", "export.calibration_tokens=0"]


@dataclass(frozen=True)
class Input:
    """A folder that is copied, the file in it that is damaged, and what then runs; weights: how often."""

    weight: float
    folder: str  # below the bench
    pattern: str  # of the files, one of which is damaged
    commands: tuple[tuple[float, Callable[[Bench, Path, Path], Callable[[], None]]], ...]


def command(*words: str) -> Callable[[Bench, Path, Path], Callable[[], None]]:
    """A command line in which {file} is the damaged file and {folder} the copy that it is in."""
    def action(bench: Bench, folder: Path, file: Path) -> Callable[[], None]:
        places = {"file": file, "folder": folder, "teacher": bench.teacher, "text": bench.text, "device": bench.device,
                  "new": folder.parent / "new"}
        return lrc_edge(*(word.format(**places) for word in words))

    return action


def read_text(bench: Bench, folder: Path, file: Path) -> Callable[[], None]:
    """All documents of a data source, as the first stage of a build reads them."""
    def action() -> None:
        from lrc_edge.corpus.sources import Fields, documents

        _as_a_command(lambda: sum(1 for _ in documents([str(file)], Fields())))

    return action


def read_importance(bench: Bench, folder: Path, file: Path) -> Callable[[], None]:
    def action() -> None:
        from lrc_edge.checkpoint import DenseCheckpoint
        from lrc_edge.export.quantize.imatrix_file import read_imatrix

        _as_a_command(lambda: read_imatrix(file, DenseCheckpoint.open(bench.built / "student")))

    return action


def _as_a_command(work: Callable[[], object]) -> None:
    from lrc_edge import cli

    cli.app = work  # what main() calls, with its handling of errors
    cli.main()


INSPECT = command("inspect", "{file}")
INSPECT_ALL = command("inspect", "--tensors", "{folder}")
FIT = command("targets", "fit", "{folder}", "--target", "android-low")
EXPORT = command("export", "{folder}", "--out", "{new}", "--formats", "gguf:q8_0,onnx:q4", "--data", "{text}",
                 *SMALL_PROOF)
CHECK, REPORT = command("check", "{folder}"), command("report", "{folder}")
CHECK_DEVICE = command("check", "{folder}", "--target", "{device}")
VERIFY = command("verify", "{folder}/student", "{file}", "--out", "{new}", "--data", "{text}", *SMALL_PROOF)
OF_A_FILE = ((0.6, INSPECT), (0.34, command("inspect", "--tensors", "{file}")), (0.04, VERIFY), (0.02, CHECK))
OF_A_MODEL = ((0.7, INSPECT_ALL), (0.25, FIT), (0.05, EXPORT))
OF_A_BUILD = ((0.4, command("inspect", "{folder}")), (0.3, REPORT), (0.2, FIT), (0.05, command("fold", "{folder}")),
              (0.03, CHECK_DEVICE), (0.02, CHECK))
EXPORT_TEXT = command("export", "{teacher}", "--out", "{new}", "--formats", "gguf:q8_0", "--data", "{file}",
                      *SMALL_PROOF)
INPUTS = (
    Input(3, "inputs/teacher", "*.json", OF_A_MODEL),
    Input(2, "built/student", "*.json", OF_A_MODEL),
    Input(1, "inputs/teacher", "*.safetensors", OF_A_MODEL),
    Input(0.5, "built/student", "*.[mj][di]*", OF_A_MODEL),  # model card, chat template
    Input(0.7, "inputs/sharded", "*.index.json", OF_A_MODEL),
    Input(2, "built", "gguf/*.gguf", OF_A_FILE),
    Input(2, "built", "onnx/onnx/*", OF_A_FILE),
    Input(0.3, "built", "onnx/*.json", ((0.9, command("inspect", "{folder}/onnx")), (0.1, CHECK))),
    Input(1, "built", "imatrix/*", ((0.3, INSPECT), (0.7, read_importance))),
    Input(2, "inputs", "recipe.toml", ((0.5, command("recipe", "--recipe", "{file}")), (0.5, command(
        "targets", "fit", "{teacher}", "--target", "android-low", "--recipe", "{file}")))),
    Input(2, "inputs", "this-machine.toml", ((0.5, command("targets", "show", "{file}")), (0.5, command(
        "targets", "fit", "{teacher}", "--target", "{file}")))),
    Input(1.5, "inputs", "text.*", ((0.97, read_text), (0.03, EXPORT_TEXT))),
    Input(2, "built", "build.json", OF_A_BUILD),
    Input(2, "built", "report.json", OF_A_BUILD),
    Input(0.7, "built", "check/*.json", OF_A_BUILD),
    Input(1, "built", "check/reference.npz", ((0.5, command("inspect", "{folder}")), (0.5, CHECK_DEVICE))),
)


def prepare(bench: Bench) -> None:
    """Inputs that the build did not need: text in other forms, a checkpoint in shards."""
    def action() -> None:
        import json

        import pyarrow
        import pyarrow.parquet
        from transformers import AutoModelForCausalLM

        rows = [json.loads(line) for line in bench.text.read_text().splitlines()]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), bench.text.with_suffix(".parquet"))
        talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes."}]
        (bench.folder / "inputs" / "text.chat.jsonl").write_text(f"{json.dumps({'messages': talk})}\n" * 40)
        bench.text.with_suffix(".txt").write_text("\n\n".join(row["text"] for row in rows))
        sharded = bench.folder / "inputs" / "sharded"
        shutil.copytree(bench.teacher, sharded)
        (sharded / "model.safetensors").unlink()
        AutoModelForCausalLM.from_pretrained(bench.teacher).save_pretrained(sharded, max_shard_size="150KB")

    ended = run(action)
    if ended.status:
        raise RuntimeError(f"the inputs could not be made: {ended.told()}")


def case(bench: Bench, rng: random.Random, folder: Path) -> tuple[str, list[str]]:
    """(what was done, what went wrong)."""
    given = rng.choices(INPUTS, [one.weight for one in INPUTS])[0]
    original = bench.folder / given.folder
    name = rng.choice(sorted(str(f.relative_to(original)) for f in original.glob(given.pattern) if f.is_file()))
    copy = folder / original.name
    shutil.copytree(original, copy, copy_function=os.link)
    how = damage(rng, copy / name)
    weights, actions = zip(*given.commands, strict=True)
    which = rng.choices(range(len(actions)), weights)[0]
    action = actions[which](bench, copy, copy / name)
    ended = run(lambda: _limited(action), seconds=LIMIT)
    what = f"{given.folder}/{name}, {how}, command {which}"
    return what, [f"{what}: {problem}" for problem in judged(ended)]


def _limited(action: Callable[[], None]) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    action()


def judged(ended: Ended) -> list[str]:
    lines = [line for line in ended.err.splitlines() if line.strip()]
    problems = [f"still running: {orphan}" for orphan in ended.orphans]
    if any(line.startswith("Traceback") for line in lines):
        problems.append(f"traceback: {signature(ended.err)}")
    elif ended.status < 0:
        problems.append(f"signal {-ended.status}: {' | '.join(lines[-2:])[-300:]}")
    elif ended.status not in (0, 1, 2, 3):
        problems.append(ended.told())
    elif len(lines) > 1:
        problems.append(f"{len(lines)} lines on stderr: {' | '.join(lines)[:300]}")
    elif ended.status == 2 and not lines:
        problems.append("status 2 without a word")
    return problems


def signature(traceback: str) -> str:
    """The error and the last line of ours that it passed: what one fault has in common."""
    lines = traceback.strip().splitlines()
    own = [line.strip() for line in lines if re.search(r'File ".*/(lrc_edge|train|export|targets)/\w+\.py"', line)
           and "site-packages" not in line and "/deps/" not in line]
    place = re.sub(r'File ".*/(\w+/\w+\.py)", line (\d+), in (\w+)', r"\1:\2 \3", own[-1]) if own else "?"
    return f"{lines[-1][:200]} at {place}"
