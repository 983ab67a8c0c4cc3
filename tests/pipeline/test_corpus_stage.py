"""The data stage of a build: the cache between builds, the teacher as a source, what a killed build continues."""
from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from rich.console import Console
from tiny_models import TEXT, make_tiny

from lrc_edge.errors import UserError
from lrc_edge.pipeline import preflight
from lrc_edge.pipeline.commands import build
from lrc_edge.pipeline.plan import Plan
from lrc_edge.pipeline.stage import Build, run_stages
from lrc_edge.pipeline.stages import stages
from lrc_edge.recipe import Recipe, load_recipe
from lrc_edge.train.data import stage as corpus_stage
from lrc_edge.train.data.tokenize import PackedRows, read_summary
from lrc_edge.workspace import Workspace


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\n".join(TEXT[:60_000].split("\n\n")))
    return file


def recipe_of(*sources: Path | str, **data: Any) -> Recipe:
    return load_recipe(None, ["train.seq_len=64", "student.hidden_size=32", f"train.tokens={data.pop('tokens', 0)}"],
                       data={"sources": [str(source) for source in sources], "held_out_share": 0.2, **data})


def build_data(out: Path, teacher: Path, recipe: Recipe) -> str:
    """Run the stage; what it printed."""
    console = Console(file=io.StringIO(), width=200)
    run_stages(stages("data", "data"), Build(Plan.of_build(str(teacher), recipe), out, console))
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def tokenizer_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    real = corpus_stage.prepare

    def counted(*args: Any, **kwargs: Any) -> int:
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(corpus_stage, "prepare", counted)
    return calls


def test_a_cached_corpus_is_tokenized_once(tiny_llama: Path, text: Path, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    calls = tokenizer_calls(monkeypatch)
    recipe = recipe_of(text, cache=str(tmp_path / "cache"))
    first = build_data(tmp_path / "a", tiny_llama, recipe)
    assert first.split("(")[0] == build_data(tmp_path / "b", tiny_llama, recipe).split("(")[0] and len(calls) == 1
    files = {out: sorted((tmp_path / out / "data").iterdir()) for out in "ab"}
    assert [f.name for f in files["a"]] == ["data.json", "held_out.npz", "starts-00000.npy", "tokens-00000.npy"]
    assert [f.stat().st_ino for f in files["a"]] == [f.stat().st_ino for f in files["b"]]
    assert "unchanged" in build_data(tmp_path / "b", tiny_llama, recipe_of(text)), "where tokens are kept is no input"
    # The same tokenizer in another teacher is the same corpus; another tokenizer, text or share is another.
    other = make_tiny(tmp_path / "other", hidden_size=96)
    build_data(tmp_path / "c", other, recipe)
    assert len(calls) == 1
    build_data(tmp_path / "d", make_tiny(tmp_path / "smollm", tokenizer="smollm"), recipe)
    assert len(calls) == 2
    build_data(tmp_path / "e", tiny_llama, recipe_of(text, cache=str(tmp_path / "cache"), messages_field=""))
    assert len(calls) == 3
    moved = Path(shutil.copy(text, tmp_path / "copy.txt"))
    build_data(tmp_path / "f", tiny_llama, recipe_of(moved, cache=str(tmp_path / "cache")))
    assert len(calls) == 4


def test_changed_filters_and_learned_tokens_are_named_and_tokenized_again(tiny_llama: Path, tmp_path: Path) -> None:
    file, out, console = tmp_path / "rows.jsonl", tmp_path / "out", []
    turns = [{"role": "user", "content": "How are you today, my friend?"}, {"role": "assistant", "content": "Fine."}]
    file.write_text("".join(json.dumps({"text": TEXT[i * 200:i * 200 + 200], "score": i % 4}) + "\n" for i in range(80))
                    + "".join(json.dumps({"messages": [*turns, {"role": "user", "content": f"{i}?"}, turns[1]]}) + "\n"
                              for i in range(20)))
    for settings in ({}, {"filters": ["score >= 2"]}, {"filters": ["score >= 2"], "conversation_loss": "all"}):
        console.append(build_data(out, tiny_llama, recipe_of(file, **settings)))
        assert "unchanged" in build_data(out, tiny_llama, recipe_of(file, **settings))
        tally, = read_summary(out / "data")
        assert tally.filtered_records == (40 if settings else 0)
        assert (out / "data" / "loss-00000.npy").exists() == ("conversation_loss" not in settings)
    assert "runs again: data.filters was [], is ['score >= 2']" in console[1] and "filtered records: 40" in console[1]
    assert "runs again: data.conversation_loss was answers, is all" in console[2]


def test_a_misspelt_filter_is_refused_before_reading_if_a_schema_shows_it(tiny_llama: Path, tmp_path: Path) -> None:
    texts = [TEXT[i:i + 200] for i in range(0, 16_000, 200)]
    table = pyarrow.table({"text": texts, "score": [i % 4 for i in range(80)]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    for name, reads in (("rows.parquet", False), ("rows.jsonl", True)):
        out = tmp_path / name.replace(".", "-")
        with pytest.raises(UserError, match=r"no record has a field 'scoer' .*; fields found: text, score; correct"):
            build_data(out, tiny_llama, recipe_of(tmp_path / name, filters=["scoer >= 2"]))
        assert bool(list((out / "data.unfinished").glob("tokens-*"))) == reads
    both = recipe_of(tmp_path / "rows.parquet", tmp_path / "rows.jsonl", filters=["score >= 1", "score <= 2"])
    assert "filtered records: 80" in build_data(tmp_path / "out", tiny_llama, both)


def test_a_cached_corpus_must_fill_a_row(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "short.jsonl").write_text("".join(json.dumps({"text": f"Text {i}."}) + "\n" for i in range(40)))
    recipe = recipe_of(tmp_path / "short.jsonl", cache=str(tmp_path / "cache"))
    build_data(tmp_path / "a", tiny_llama, recipe)
    longer = load_recipe(None, ["train.seq_len=512"], data=recipe.as_dict()["data"])
    with pytest.raises(UserError, match=r"need at least train.seq_len = 512"):
        build_data(tmp_path / "b", tiny_llama, longer)


def test_a_build_stopped_in_its_data_continues(tiny_llama: Path, text: Path, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_stage, "prepare", lambda *args, real=corpus_stage.prepare, **kwargs: real(
        *args, **kwargs, shard_tokens=4000))
    build_data(tmp_path / "whole", tiny_llama, recipe_of(text))
    broken = tmp_path / "out" / "data.unfinished"
    real, seen = corpus_stage.source_documents, []

    def breaks(*args: Any) -> Any:
        for i, document in enumerate(real(*args)):
            if i == 14 and not seen:
                raise KeyboardInterrupt
            yield document

    monkeypatch.setattr(corpus_stage, "source_documents", breaks)
    monkeypatch.setattr("lrc_edge.train.data.tokenize.BATCH_DOCUMENTS", 2)
    with pytest.raises(KeyboardInterrupt):
        build_data(tmp_path / "out", tiny_llama, recipe_of(text))
    assert (broken / "tokens-00000.npy").exists() and not (tmp_path / "out" / "data").exists()
    seen.append(1)
    build_data(tmp_path / "out", tiny_llama, recipe_of(text))
    assert not broken.exists()
    streams = [[i for row in PackedRows(tmp_path / name / "data", 64) for i in row["input_ids"].tolist()]
               for name in ("whole", "out")]
    assert streams[0] == streams[1]


def test_a_build_killed_before_its_corpus_was_noted_makes_it_once(tiny_llama: Path, text: Path, tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    calls, out = tokenizer_calls(monkeypatch), tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Workspace, "record", killed)
        build_data(out, tiny_llama, recipe_of(text))
    assert (out / "data" / "data.json").exists() and len(calls) == 1
    build_data(out, tiny_llama, recipe_of(text))
    assert len(calls) == 1 and [file.name for file in out.iterdir() if file.name.startswith("data")] == ["data"]
    # Once it is noted, a file that is no longer what it was is made again.
    (out / "data" / "tokens-00000.npy").write_bytes(b"")
    build_data(out, tiny_llama, recipe_of(text))
    assert len(calls) == 2
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Workspace, "record", killed)
        build_data(out, tiny_llama, recipe_of(text, text_field="other"))
    build_data(out, tiny_llama, recipe_of(text))
    assert len(calls) == 4, "what was finished for other inputs is not taken"


def test_a_mistake_behind_the_teachers_own_text_keeps_it(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text("no json\n")
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"broken\.jsonl"):
        build(str(tiny_llama), out, recipe_of("self", tmp_path / "broken.jsonl", weights=[1, 1], tokens=10**6),
              Console(quiet=True), only_train=True)
    assert (out / "data.unfinished" / "self.jsonl").stat().st_size > 0
    with pytest.raises(UserError, match=r"broken\.jsonl"):
        build(str(tiny_llama), tmp_path / "nothing", recipe_of(tmp_path / "broken.jsonl"), Console(quiet=True))
    assert not (tmp_path / "nothing").exists()


def test_the_teacher_as_a_source_among_others(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    recipe = recipe_of("self", text, weights=[1, 1], tokens=6000)
    line = build_data(tmp_path / "out", tiny_llama, recipe)
    own, given = read_summary(tmp_path / "out" / "data")
    total = own.tokens + given.tokens
    assert own.source == "self" and total >= 6000 and f"self {own.tokens / total:.1%}" in line
    samples = [json.loads(line)["text"] for line in (tmp_path / "out" / "data" / "self.jsonl").read_text().splitlines()]
    assert len(samples) % 16 == 0 and len(samples) >= own.documents + own.held_out_documents
    assert "unchanged" in build_data(tmp_path / "out", tiny_llama, recipe)


def test_what_preflight_says_of_sources(tiny_llama: Path, tmp_path: Path) -> None:
    def check(recipe: Recipe) -> None:
        preflight.check(Plan.of_build(str(tiny_llama), recipe, writes=False), tmp_path)

    for source in ("self", "org/name", "HuggingFaceFW/fineweb-edu:sample-10BT", "org/name:v1.0:train"):
        check(recipe_of(source, tokens=100))
    for source in ("missing.parquet", "./self", "~/nothing", "/nowhere"):
        with pytest.raises(UserError, match="no such file or folder; give a "):
            check(recipe_of(source))
    with pytest.raises(UserError, match="or --data self"):
        check(recipe_of())
