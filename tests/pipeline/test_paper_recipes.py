"""The recipes of the Low-Rank Clone paper (arXiv 2505.12781): every key is the paper's, or differs for a stated reason.

"code" is the reference implementation, CURRENTF/LowRankClone at 7b458b2; its README trains LRC-1.5B.
"""
from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest
import torch
import yaml
from families import FAMILIES
from rich.console import Console
from tiny_models import TEXT, make_tiny
from torch.nn import functional as F

from lrc_edge.pipeline.commands import build
from lrc_edge.recipe import Recipe, load_recipe
from lrc_edge.report.report_file import read_report
from lrc_edge.shape import ModelShape
from lrc_edge.train import lowrank
from lrc_edge.train.loop.schedule import Schedule
from lrc_edge.train.loop.trainer import Trainer
from lrc_edge.train.losses import Objective, head_losses

RECIPES = ("lrc-1.5b", "lrc-1.7b", "lrc-4b")
EDUCATIONAL, HERMES = "HuggingFaceTB/smollm-corpus:fineweb-edu-dedup", "teknium/OpenHermes-2.5"


class Published(NamedTuple):
    source: str
    values: tuple[Any, Any, Any]  # of RECIPES


def same(source: str, value: Any) -> Published:
    return Published(source, (value, value, value))


PAPER = {
    "student.hidden_size": Published("the paper's models; code: --target_hidden_size 1536", (1536, 1200, 2048)),
    "student.vocab_size": same("section 3: embedding and LM head keep the teacher's vocabulary", 0),
    **{f"student.{size}": same("section 3: only the width is compressed", 0) for size in (
        "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")},
    "student.hops": same("one student of each teacher", ()),
    "student.name": Published("the paper's models", ("LRC-1.5B", "LRC-1.7B", "LRC-4B")),
    "data.sources": Published(
        "training data; code: process_v5_1, process_v5_1_20b, process_v5_0 of data/generate_general_data_parallel.py",
        ((EDUCATIONAL, HERMES), (EDUCATIONAL, HERMES),
         (EDUCATIONAL, "mlfoundations/dclm-baseline-1.0-parquet", "HuggingFaceTB/smollm-corpus:cosmopedia-v2",
          HERMES))),
    "data.weights": Published("code: limit_tokens of the same functions, in billions", (
        (10.0, 1.0), (20.0, 1.0), (18.0, 2.0, 1.0, 1.0))),
    "data.filters": Published("code: min_edu_score=4, compared with metadata.int_score, in v5.1 and v5.1.20b", (
        ("metadata.int_score >= 4",), ("metadata.int_score >= 4",), ())),
    "data.text_field": same("code: sample[\"text\"]", "text"),
    "data.messages_field": same("code: d[\"conversations\"] in data/get_any_data.py", "conversations"),
    "data.conversation_loss": same("code: labels = input_ids in data/get_any_tokenize_func.py", "all"),
    "data.isolate_documents": same("code: chunks of a concatenated stream, without a mask", False),
    "train.tokens": Published("training settings", (10 * 10**9, 20 * 10**9, 18 * 10**9)),
    "train.seq_len": same("training settings; code: --data-max-len 2048", 2048),
    "train.batch_tokens": Published("training settings; code: --batch-size 3 on 8 GPUs", (49_152, 32_768, 32_768)),
    "train.learning_rate": Published("training settings; code: --learning-rate 1e-4", (1e-4, 6.7e-5, 1e-4)),
    "train.warmup_share": same("training settings; code: --warmup-ratio 0.005", 0.005),
    "train.max_grad_norm": same("code: --max_grad_norm 1.0", 1.0),
    "train.init": same("appendix; code: reinit_weight, normal with mean 0 and std 0.02", "gaussian"),
    "train.dense_share": same("section 3: only projections and norms are trained", 0.0),
    "train.alpha": Published("training settings; code: --aux_loss_scale_factor 0.2", (0.2, 0.5, 0.5)),
    "train.clone_terms": same("section 3.2; code: nn.MSELoss", "absolute"),
    "train.kl_temperature": same("training settings; code: --kl_temperature 40", 40.0),
    "train.kl_weight": same("code: F.kl_div with reduction batchmean: seq_len / temperature^2 here", 1.28),
    "train.lm_weight": same("section 3.2: no factor", 1.0),
    "train.precision": same("code: bf16=True", "bf16"),
    "train.teacher_precision": same("code: bf16=True", "auto"),
    "quantize.tokens": same("the paper quantizes after training only", 0),
}

NO_DENSE_PHASE = "there is no dense phase"
NO_QUANTIZED_PHASE = "there is no quantization-aware training"
RUN = "changes how a run proceeds, not what it computes"
DIFFERS = {
    "data.held_out_share": "the paper holds nothing out; one document in ten thousand is needed for verification",
    "data.cache": RUN,
    "train.micro_batch": RUN, "train.device": RUN, "train.compile": RUN, "train.gradient_checkpointing": RUN,
    "train.workers": RUN, "train.eval_every": RUN, "train.checkpoint_every": RUN, "train.keep_checkpoints": RUN,
    "train.log_every": RUN,
    "train.seed": "the order of the data and random numbers are not those of the reference, whatever the seed",
    "train.on_bad_batch": "the reference has no guard; ours acts on bad batches only, and reports them",
    "train.spike_factor": "the reference has no guard; ours acts on bad batches only, and reports them",
    "train.hop_share": "the paper has no hops",
    "train.dense_learning_rate": NO_DENSE_PHASE, "train.dense_warmup_share": NO_DENSE_PHASE,
    "train.dense_alpha": NO_DENSE_PHASE,
    "quantize.teacher": NO_QUANTIZED_PHASE, "quantize.alpha": NO_QUANTIZED_PHASE,
    "quantize.batch_tokens": NO_QUANTIZED_PHASE, "quantize.learning_rate": NO_QUANTIZED_PHASE,
}
# (recipe, key) -> its value, and why it is not the paper's.
DIFFERS_IN = {("lrc-1.7b", "student.hidden_size"): (
    1280, "neither 32 nor 256 divides 1200, so that no block of llama.cpp's formats fits its rows")}


def keys_of(recipe: Recipe) -> dict[str, Any]:
    table = recipe.as_dict()
    return {f"{section}.{key}": value for section in ("student", "data", "train", "quantize")
            for key, value in table[section].items()}


@pytest.mark.parametrize("name", RECIPES)
def test_every_key_is_the_papers_or_differs_for_a_reason(name: str) -> None:
    assert PAPER.keys().isdisjoint(DIFFERS), "one list or the other"
    found = keys_of(load_recipe(name))
    assert found.keys() == PAPER.keys() | DIFFERS.keys(), "a new setting belongs in one of the lists"
    assert all(DIFFERS.values()) and found["student.hidden_size"] % 256 == 0, "every format can store the student"
    for key, published in PAPER.items():
        expected = published.values[RECIPES.index(name)]
        value, reason = DIFFERS_IN.get((name, key), (expected, "the paper's"))
        assert found[key] == value and reason, f"{key}: {published.source}"
    assert all(value != PAPER[key].values[RECIPES.index(of)] for (of, key), (value, _) in DIFFERS_IN.items())


@pytest.mark.parametrize("name", RECIPES)
def test_an_edge_recipe_has_the_shape_and_budget_of_the_papers_and_the_defaults_otherwise(name: str) -> None:
    paper, ours, default = (keys_of(load_recipe(one)) for one in (name, name.replace("lrc", "edge"), None))
    alike = ("student.hidden_size", "data.sources", "data.weights", "data.filters", "data.messages_field",
             "data.held_out_share", "train.tokens", "train.seq_len", "train.batch_tokens")
    assert all(ours[key] == paper[key] for key in alike)
    assert ours["student.name"] == paper["student.name"].replace("LRC", "Edge")
    assert ours["quantize.tokens"] == 100_000_000
    changed = {key for key, value in ours.items() if value != default[key]}
    assert changed <= {*alike, "student.name", "quantize.tokens", "train.dense_warmup_share", "train.micro_batch",
                       "train.gradient_checkpointing", "train.eval_every", "train.checkpoint_every"}


# -- what no key states ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_the_kl_is_the_references_sum_over_a_sequence_without_the_factor_of_the_temperature(name: str) -> None:
    train = load_recipe(name).train
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, train.seq_len, 16, generator=generator) for _ in range(2))
    heads = [torch.randn(40, 16, generator=generator) for _ in range(2)]
    objective = Objective.of(train, "clone")
    labels = torch.zeros(2 * train.seq_len, dtype=torch.long)
    _, (_, kl) = head_losses(student.flatten(0, 1), heads[0], teacher.flatten(0, 1), heads[1], labels, objective)
    log_q, log_p = (F.log_softmax(h @ head.T / train.kl_temperature, -1)
                    for h, head in zip((student, teacher), heads, strict=True))
    expected = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    assert objective.kl * kl.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(("name", "steps"), [("lrc-1.5b", 203_451), ("lrc-1.7b", 610_352), ("lrc-4b", 549_316)])
def test_the_rate_rises_for_half_a_percent_of_the_steps_and_falls_linearly_to_0(name: str, steps: int) -> None:
    """The reference's falls from the end of the warm-up, ours from the first step: half a percent of the peak apart."""
    recipe = load_recipe(name)
    shape = ModelShape("llama", 512, recipe.student.hidden_size, 96, 2, 4, 2, 24, 131_072, tied=True)
    schedule, peak = Schedule.of(recipe.train, shape, 0), recipe.train.learning_rate
    assert schedule.steps == schedule.dense_from == steps
    assert schedule.tokens == pytest.approx(recipe.train.tokens, rel=1e-4)
    warmup = -(-steps * 5 // 1000)
    assert schedule.clone_warmup == warmup
    for step in (0, warmup // 2, warmup, steps // 2, steps - 1):
        expected = peak * min(step / warmup, (steps - step) / (steps - warmup))
        assert schedule.learning_rate(step) == pytest.approx(expected, abs=0.0055 * peak)


def test_the_optimizer_is_adam_as_transformers_sets_it() -> None:
    """TrainingArguments' own values, which the reference leaves: eps 1e-8, no weight decay."""
    clone = SimpleNamespace(trainable=lambda: {"p": torch.nn.Parameter(torch.zeros(2))})
    settings = Trainer._new_optimizer(cast(Any, SimpleNamespace(clone=clone))).defaults
    assert (settings["betas"], settings["eps"], settings["weight_decay"]) == ((0.9, 0.999), 1e-8, 0.0)
    assert not settings["amsgrad"] and lowrank.GAUSSIAN_STD == 0.02


# -- a run of each -----------------------------------------------------------------------------------------------------

TEACHERS = {"lrc-1.5b": "llama-tied", "lrc-1.7b": "qwen2-tied", "lrc-4b": "qwen2-untied"}
SMALL = ["student.hidden_size=32", "train.tokens=8192", "train.seq_len=64", "train.batch_tokens=1024",
         "train.device=cpu", "data.held_out_share=0.2", "export.formats=gguf:f16", "export.calibration_tokens=0",
         "parity.positions=64", "parity.row_len=64", "parity.long_rows=[]", "parity.generate_tokens=2",
         "parity.kv_cache_positions=16"]


def local_sources(folder: Path, n: int) -> list[str]:
    """Return `n` files for the recipe's sources: scored texts, texts, and conversations in OpenHermes' form."""
    texts = [{"text": TEXT[i:i + 250], "metadata": {"int_score": 3 + i // 250 % 2}} for i in range(0, 7_500, 250)]
    chats = [{"conversations": [{"from": "human", "value": f"What is {i}?"}, {"from": "gpt", "value": f"It is {i}."}]}
             for i in range(60)]
    files = []
    for i, rows in enumerate([*[texts] * (n - 1), chats]):
        files.append(folder / f"{i}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(file) for file in files]


@pytest.mark.parametrize("name", RECIPES)
def test_a_build_says_low_rank_clone_and_nothing_else(name: str, tmp_path: Path) -> None:
    """Every stage of a build of the recipe, whose shape, budget and sources alone are others."""
    teacher, out = make_tiny(tmp_path / "teacher", **FAMILIES[TEACHERS[name]]), tmp_path / "out"
    sources = local_sources(tmp_path, len(load_recipe(name).data.sources))
    recipe = load_recipe(name, SMALL, data={"sources": sources})
    build(str(teacher), out, recipe, Console(quiet=True))
    failed = {gate["name"] for gate in read_report(out)["gates"] if not gate["passed"]}
    assert failed <= {"smoke generation"}, "after so few steps, a text may end with its first token"
    provenance = json.loads((out / "student" / "lrc_edge.json").read_text())
    assert provenance["method"] == "Low-Rank Clone (arXiv 2505.12781)"
    card = (out / "student" / "README.md").read_text()
    assert "Training: Low-Rank Clone (arXiv 2505.12781).\n" in card and "initialization: gaussian" in card
    assert "low-rank-clone" in yaml.safe_load(card.split("---\n")[1])["tags"]
    data, training = (json.loads((out / file).read_text()) for file in ("data/data.json", "train/training.json"))
    assert training["precision"] == "bf16" and training["dense_from_step"] == training["steps"] == 8
    assert [bool(source["filtered_records"]) for source in data["sources"]] == \
        [bool(recipe.data.filters), *[False] * (len(sources) - 1)]
    assert not list((out / "data").glob("loss-*")) and data["sources"][-1]["documents"] > 0


def test_a_build_of_ours_says_what_it_is(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = load_recipe("edge-1.5b", [*SMALL, "quantize.tokens=0"], data={"sources": local_sources(tmp_path, 2)})
    build(str(tiny_llama), tmp_path / "out", recipe, Console(quiet=True))
    card = (tmp_path / "out" / "student" / "README.md").read_text()
    assert ("Training: dense distillation from principal components (arXiv 2401.15024), with relative clone "
            "terms (arXiv 2505.12781).\n") in card
    assert "low-rank-clone" not in card
