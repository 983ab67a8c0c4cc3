"""A build whose student is smaller along every axis: from the command to proved Q4_0 and q4 files that chat."""
from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import run
from test_end_to_end import report_of
from tiny_models import TEXT, make_tiny
from transformers import AutoConfig

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError
from lrc_edge.families import FAMILIES
from lrc_edge.pipeline import preflight
from lrc_edge.pipeline.plan import Plan
from lrc_edge.recipe import load_recipe
from lrc_edge.student import sizes_that_work, student_of

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 2,
         "num_key_value_heads": 1, "vocab_size": 400}
COMMON = ["--set", "train.tokens=8192", "--set", "train.seq_len=128", "--set", "train.batch_tokens=1024",
          "--set", "parity.positions=512", "--set", "parity.row_len=64", "--set", "parity.generate_tokens=8",
          "--set", "parity.long_rows=[]", "--formats", "gguf:q4_0,onnx:q4"]

TRAINED_ON_THE_GRID = ["--set", "quantize.tokens=2048", "--set", "quantize.teacher=teacher"]


def sizes(**changed: int) -> list[str]:
    return [part for name, size in (SIZES | changed).items() for part in ("--set", f"student.{name}={size}")]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "text.txt").write_text(TEXT[:300_000])
    return make_tiny(folder / "teacher", layers=3, head_dim=32), folder / "text.txt"


def test_a_student_smaller_along_every_axis(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("build", inputs[0], "--out", out, "--data", inputs[1], *COMMON, *sizes(), *TRAINED_ON_THE_GRID)
    assert result.returncode == 0, result.stdout + result.stderr
    config = json.loads((out / "student" / "config.json").read_text())
    assert {name: config[name] for name in SIZES} == SIZES and config["head_dim"] == 32
    report = report_of(out)
    assert {gate["artifact"] for gate in report["gates"] if gate["name"].startswith("smoke generation")} == \
        {artifact["path"] for artifact in report["artifacts"]}
    assert {"chat template", "stop tokens", "token ids", "as trained"} <= {gate["name"] for gate in report["gates"]}
    assert all(gate["passed"] for gate in report["gates"])
    assert report["student"]["name"] == "teacher-Edge-32-L2-F64-H2-K1-V400"
    kept = report["student"]["training"]["start"]["layers"]
    assert len(kept) == 2 and kept[0] == 0
    assert f"layers of the teacher <b>{kept[0]}, {kept[1]}</b>" in (out / "report.html").read_text()
    vocabulary_is_told(out, result.stdout)
    chat = [sys.executable, "-m", "lrc_edge", "chat", out, "--max-tokens", "5"]
    answered = subprocess.run(chat, input="Hello\n", capture_output=True, text=True, timeout=300)
    assert answered.returncode == 0 and answered.stdout.strip(), answered.stderr
    checked = run("check", out)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert report_of(out)["teacher"]["full_vocabulary"] == report["teacher"]["full_vocabulary"]


def vocabulary_is_told(out: Path, printed: str) -> None:
    report = report_of(out)
    assert "400 of 512 tokens kept" in printed
    assert {row["n_mismatches"] for row in report["tokenizer"]} == {0}
    teacher, student = report["teacher"], report["student"]
    assert (teacher["shape"]["vocab_size"], student["shape"]["vocab_size"]) == (512, 400)
    assert teacher["proof_perplexity"] is None, "its text has other tokens"
    assert 0 < teacher["full_vocabulary"]["bits_per_byte"] != teacher["held_out"]["bits_per_byte"] > 0
    assert student["provenance"]["teacher_vocab_size"] == "512" and student["provenance"]["student_vocab_size"] == "400"
    stages = json.loads((out / "build.json").read_text())["stages"]
    original, trimmed = stages["weights"]["inputs"], stages["train"]["inputs"]["teacher"]
    assert "model.safetensors" in original and student["provenance"]["teacher_sha256"] != trimmed
    assert json.loads(student["provenance"]["lineage"])["vocab_size"] == "selection"
    assert stages["vocabulary"]["inputs"]["teacher"] == student["provenance"]["teacher_sha256"]
    card = (out / "student" / "README.md").read_text()
    assert "Its vocabulary is 400 of the teacher's 512 tokens." in card and "| vocabulary | 512 | 400 |" in card


@pytest.mark.parametrize(("changed", "message"), [
    ({"num_hidden_layers": 4}, "student.num_hidden_layers = 4: the teacher teacher has 3; need a smaller student"),
    ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads = 3: the teacher teacher has 2; need"),
    ({"num_attention_heads": 3, "num_key_value_heads": 2}, "student.num_attention_heads = 3: each of the 2 key/value "
                                                           "heads must serve as many query heads; need 2 or 4"),
    ({"intermediate_size": 70}, "student.intermediate_size = 70: gguf:q4_0 needs rows of a multiple of 32 (nearest: 64 "
                                "or 96)"),
    ({"hidden_size": 40}, "student.hidden_size = 40: gguf:q4_0 needs rows of a multiple of 32 (nearest: 32 or 64)"),
    ({"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96, "num_attention_heads": 4,
      "num_key_value_heads": 2, "vocab_size": 512},
     "the teacher teacher has these sizes, such as hidden_size = 64; need a smaller student: lower one of student.h")])
def test_sizes_that_do_not_work_are_refused_with_the_nearest_that_do(changed: dict[str, int], message: str,
                                                                     inputs: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = load_recipe(None, [setting for setting in sizes(**changed) if setting != "--set"],
                         data={"sources": [str(inputs[1])]}, export={"formats": ["gguf:q4_0", "onnx:q4"]})
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        preflight.check(Plan.of_build(str(inputs[0]), recipe), tmp_path)
    assert "\n" not in str(caught.value)


def test_groups_merge_evenly_and_heads_with_q_k_norms_are_only_dropped(tmp_path: Path) -> None:
    llama = DenseCheckpoint.open(make_tiny(tmp_path / "llama", hidden_size=96, heads=12, kv_heads=6)).shape
    with pytest.raises(UserError, match="num_key_value_heads = 4: the teacher's 6 are merged in equal groups; need 3"):
        student_of(load_recipe(None, ["student.num_key_value_heads=4"]), llama, "t")
    qwen3 = DenseCheckpoint.open(make_tiny(tmp_path / "qwen3", family="qwen3", heads=12, kv_heads=6)).shape
    with pytest.raises(UserError, match="q/k norms of qwen3 forbid merging heads, so each of the 4 key/value heads "
                                        "keeps at most its own 2 query heads; need 8"):
        student_of(load_recipe(None, ["student.num_key_value_heads=4"]), qwen3, "t")
    shape, name = student_of(load_recipe(None, ["student.num_key_value_heads=4", "student.num_attention_heads=8"]),
                             qwen3, "t")
    assert (shape.num_attention_heads, shape.num_key_value_heads, name) == (8, 4, "t-Edge-64-H8-K4")


def test_widths_that_transformers_refuses_are_refused_before(tmp_path: Path) -> None:
    """SmolLM2-135M has 9 query heads: half its 576 is no multiple of 256 or 64 that 9 divides."""
    shape = replace(DenseCheckpoint.open(make_tiny(tmp_path / "t")).shape, hidden_size=576, num_attention_heads=9,
                    num_key_value_heads=3)
    assert student_of(load_recipe(None, ()), shape, "t")[0].hidden_size == 288
    with pytest.raises(UserError, match="hidden_size = 320: transformers' llama needs a multiple of the 9 query heads; "
                                        "need 288 or 576"):
        student_of(load_recipe(None, ["student.hidden_size=320"]), shape, "t")
    others = [replace(shape, family=family) for family in ("qwen2", "qwen3", "mistral")]
    assert [student_of(load_recipe(None, ()), other, "t")[0].hidden_size for other in others] == [256] * 3


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_what_the_record_of_a_family_allows(family: str) -> None:
    sizes = dict(hidden_size=40, num_attention_heads=3, num_key_value_heads=1, head_dim=16, vocab_size=64,
                 intermediate_size=64, num_hidden_layers=1)
    try:
        AutoConfig.for_model(family, **sizes)
    except Exception as error:
        assert FAMILIES[family].width_divides_by_heads and "not a multiple of the number of attention" in str(error)


def test_suggested_sizes_work_in_every_way(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """9 query heads must divide the width, and the blocks of the formats its rows: 288 does both, 320 does not."""
    teacher = replace(DenseCheckpoint.open(inputs[0]).shape, hidden_size=576, num_attention_heads=9,
                      num_key_value_heads=3, head_dim=64)
    student = replace(teacher, hidden_size=297)
    assert sizes_that_work("hidden_size", student, teacher, 32) == [288, 576]
    assert sizes_that_work("num_attention_heads", replace(student, hidden_size=288), teacher, 32) == [3, 6, 9]
    with pytest.raises(UserError, match=r"need 3040$"):
        student_of(load_recipe(None, ["student.hidden_size=3050"]), replace(
            teacher, hidden_size=3072, num_attention_heads=20, num_key_value_heads=4), "t")


def test_a_name_that_is_too_long_for_files_is_refused_before_training(inputs: tuple[Path, Path], tmp_path: Path
                                                                      ) -> None:
    recipe = load_recipe(None, [f"student.name={'x' * 130}", "student.hidden_size=32"],
                         data={"sources": [str(inputs[1])]})
    with pytest.raises(UserError, match=r"student.name = x+\.\.\.: it has 130 characters.*at most 120"):
        preflight.check(Plan.of_build(str(inputs[0]), recipe), tmp_path)


def test_a_student_that_is_much_smaller_is_warned_about_unless_it_has_hops(inputs: tuple[Path, Path]) -> None:
    def warnings(*settings: str) -> list[str]:
        return preflight.capacity_warning(Plan.of_build(str(inputs[0]), load_recipe(None, settings)))

    assert warnings("student.intermediate_size=64") == []
    [line] = warnings("student.num_hidden_layers=1", "student.hidden_size=32")
    assert "times fewer parameters than its teacher; above about 3 times, try student.hops" in line
    assert warnings("student.num_hidden_layers=1", "student.hidden_size=32", "student.hops=num_hidden_layers=2") == []
