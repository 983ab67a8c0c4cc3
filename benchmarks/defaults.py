"""Do the default settings of training improve every student? A grid of teachers, shapes and budgets.

    python benchmarks/defaults.py --teacher DIR --text stories.jsonl --out OUT

Each cell of the grid sets only the student's sizes and the budget. It reports the held-out loss before and after
training, and whether the run ended with an error. --teacher can be repeated. Finished cells are stored in
OUT/cells.jsonl and not repeated. Exit status 1: a run ended with an error, or with a higher loss than at its start.
"""
from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.corpus.sources import Fields, documents
from lrc_edge.errors import UserError
from lrc_edge.recipe import load_recipe
from lrc_edge.shape import ModelShape
from lrc_edge.train.data.tokenize import prepare
from lrc_edge.train.device import choose_device
from lrc_edge.train.loop.stage import SUMMARY_FILE, Plan, train
from lrc_edge.train.start.layers import Layers
from lrc_edge.train.start.stage import make_start

BUDGETS = (20_480, 102_400, 409_600, 2_048_000)
SHARES = (0.25, 0.5, 0.75)  # of the teacher's width


def students_of(teacher: ModelShape) -> dict[str, ModelShape]:
    """Return students of several widths, and one that is smaller along every axis but its query heads."""
    def part(size: int, share: float, unit: int = 8) -> int:
        return max(unit, round(size * share / unit) * unit)

    widths = [part(teacher.hidden_size, share) for share in SHARES]
    every_axis = replace(teacher, hidden_size=part(teacher.hidden_size, 3 / 4),
                         num_hidden_layers=part(teacher.num_hidden_layers, 3 / 4, 1),
                         intermediate_size=part(teacher.intermediate_size, 2 / 3),
                         num_key_value_heads=part(teacher.num_key_value_heads, 1 / 2, 1))
    sizes = (f"{every_axis.hidden_size} wide, {every_axis.num_hidden_layers} layers, {every_axis.intermediate_size} "
             f"neurons, {every_axis.num_key_value_heads} key/value heads")
    return {f"{width} wide": teacher.with_hidden_size(width) for width in widths} | {sizes: every_axis}


def run(teacher: DenseCheckpoint, name: str, student: ModelShape, tokens: int, data: Path, folder: Path
        ) -> dict[str, Any]:
    """Train with default settings. Return the steps, rate and losses of the run, or the error that stopped it."""
    recipe = load_recipe(None, (), train={"tokens": tokens})
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start = make_start(Layers.of(teacher, choose_device("auto")), student, recipe.train, data, folder)
    cell: dict[str, Any] = {"teacher": teacher.path.name, "student": name, "tokens": tokens}
    try:
        train(teacher, recipe, start, data, folder, lambda row: None)
    except UserError as error:
        return cell | {"steps": Plan.of(recipe, start, data).schedule.steps, "stopped": str(error)}
    summary = json.loads((folder / SUMMARY_FILE).read_text())
    return cell | {"steps": summary["steps"], "rate": summary["phases"]["dense"]["learning_rate"], "stopped": "",
                   "start": summary["first_held_out_loss"], "end": summary["student_held_out_loss"],
                   "teacher_loss": summary["teacher_held_out_loss"]}


def cells(out: Path) -> list[dict[str, Any]]:
    file = out / "cells.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def is_bad(cell: dict[str, Any]) -> bool:
    return bool(cell["stopped"]) or cell["end"] > cell["start"]


def table(found: list[dict[str, Any]]) -> str:
    """Return a row for each teacher and student: the loss before the first step and after each budget."""
    budgets = sorted({cell["tokens"] for cell in found})
    rows = ["| teacher, its loss | student | start | " + " | ".join(f"{tokens:,} tokens" for tokens in budgets) + " |",
            "|---|---|---|" + "---|" * len(budgets)]
    for name, student in dict.fromkeys((cell["teacher"], cell["student"]) for cell in found):
        mine = {cell["tokens"]: cell for cell in found if (cell["teacher"], cell["student"]) == (name, student)}
        ran = next((cell for cell in mine.values() if not cell["stopped"]), None)
        texts = []
        for tokens in budgets:
            cell = mine.get(tokens)
            texts.append("" if cell is None else "stopped" if cell["stopped"] else
                         f"{cell['end']:.3f} ({cell['steps']} steps, rate {cell['rate']:.2g})"
                         + " WORSE" * (cell["end"] > cell["start"]))
        loss, start = (f"{ran['teacher_loss']:.3f}", f"{ran['start']:.3f}") if ran else ("", "")
        rows.append(f"| {name}, {loss} | {student} | {start} | " + " | ".join(texts) + " |")
    return "\n".join(rows) + "\n"


def prepared(teacher: DenseCheckpoint, text: Path, folder: Path) -> Path:
    if not (folder / "held_out.npz").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        prepare([(str(text), documents([str(text)], Fields()))], teacher.tokenizer(), folder, held_out_share=0.03,
                max_tokens=None, seq_len=min(2048, teacher.shape.max_position_embeddings), progress=lambda n: None)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, action="append", required=True, help="Hugging Face folder; repeatable")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)), help="comma-separated training tokens")
    parser.add_argument("--out", type=Path, default=Path("defaults-out"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for path in args.teacher:
        teacher = DenseCheckpoint.open(path)
        data = prepared(teacher, args.text, args.out / f"data-{path.name}")
        for tokens in map(int, args.budgets.split(",")):
            for name, student in students_of(teacher.shape).items():
                key = (path.name, name, tokens)
                if any((c["teacher"], c["student"], c["tokens"]) == key for c in cells(args.out)):
                    continue
                cell = run(teacher, name, student, tokens, data, args.out / "run")
                with (args.out / "cells.jsonl").open("a") as file:
                    file.write(json.dumps(cell) + "\n")
                print(cell, flush=True)
    found = cells(args.out)
    (args.out / "table.md").write_text(table(found))
    print(table(found))
    sys.exit(any(map(is_bad, found)))


if __name__ == "__main__":
    main()
