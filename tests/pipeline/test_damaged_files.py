"""Damaged files next to the weights give one line and no traceback, whatever they contain."""
from __future__ import annotations

import copy
import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_example import example_report
from rich.console import Console

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError
from lrc_edge.inspect.command import print_description
from lrc_edge.report.report_file import write_report

SEED = 20261122
N_MUTATIONS = 100
ODD = [None, True, -1, 0, 1.5, 10**30, 1e308, float("nan"), float("inf"), "", "x", "\ud800", "\x1b[2J\n\u202e",
       "a" * 5000, [], [1], ["x"], [[[]]], {}, {"x": 1}, [None], [{"id": "x"}]]


@pytest.fixture(scope="session")
def whole(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with weights in two shards and every other file that is read; and a finished build."""
    folder = tmp_path_factory.mktemp("whole")
    path = Path(shutil.copytree(tiny_llama, folder / "checkpoint"))
    DenseCheckpoint.open(tiny_llama).model().save_pretrained(folder / "sharded", max_shard_size="200KB")
    (path / "model.safetensors").unlink()
    for file in (folder / "sharded").glob("model*"):
        shutil.copy(file, path)
    tables = {"special_tokens_map.json": {"eos_token": "<|eot_id|>", "bos_token": {"content": "<|begin_of_text|>"}},
              "added_tokens.json": {"<|eot_id|>": 4},
              "generation_config.json": {"eos_token_id": [4, 1], "temperature": 0.7, "top_k": 20, "do_sample": True},
              "lrc_edge.json": {"name": "Tiny-LRC-64", "teacher": "org/teacher", "training_tokens": "1"}}
    for name, table in tables.items():
        (path / name).write_text(json.dumps(table))
    (path / "README.md").write_text("---\nlicense: mit\nlanguage: [en, de]\nbase_model: org/x\ntags: [a]\n---\n# x\n")
    (folder / "build").mkdir()
    (folder / "build/build.json").write_text(json.dumps({"stages": {"data": {}}, "job": {"teacher": "org/x"}}))
    write_report(example_report(), folder / "build")
    shutil.rmtree(folder / "sharded")
    return folder


def inspect(path: Path) -> str:
    """What a pipe would get."""
    file = io.StringIO()
    print_description(path, Console(file=file))
    return file.getvalue()


def inspected(path: Path) -> str:
    """Return the description, or the error line that is printed instead."""
    try:
        return inspect(path)
    except UserError as error:
        return str(error)


def load(path: Path) -> None:
    """Do what every command does with a model first."""
    if path.name == "build":
        return
    checkpoint = DenseCheckpoint.open(path)
    checkpoint.stop_ids(checkpoint.tokenizer())
    checkpoint.check_config()


def errors(path: Path) -> list[str]:
    """Return the error line of each step that refuses the folder. Only UserError is caught."""
    found = []
    steps: tuple[Callable[[Path], object], ...] = (inspect, load)
    for step in steps:
        try:
            step(path)
        except UserError as error:
            assert len(str(error)) < 1000 and str(error).isprintable(), str(error)
            found.append(str(error))
    return found


def mutate(data: bytes, is_json: bool, rng: random.Random) -> bytes:
    """Cut, flip, overwrite or repeat bytes; in JSON, half of the time change a value or remove a key."""
    kind = rng.randrange(8 if is_json else 4)
    at = rng.randrange(len(data))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:]
    if kind == 2:
        return data[:at] + rng.randbytes(4) + data[at + 4:]
    if kind == 3:
        return data[:at] + data[at // 2:]
    table = json.loads(data)
    if kind == 4:
        return json.dumps(rng.choice(ODD)).encode()
    holder, key = rng.choice(list(places(table)))
    if kind == 5 and isinstance(holder, dict):
        del holder[key]
    else:
        holder[key] = copy.deepcopy(rng.choice(ODD))
    return json.dumps(table).encode()


def places(table: Any, depth: int = 0) -> Any:
    """Return every (container, key) in a table; of long lists and tables only some."""
    entries = list(table.items() if isinstance(table, dict) else enumerate(table) if isinstance(table, list) else ())
    for key, value in entries[:40]:
        yield table, key
        if depth < 6:
            yield from places(value, depth + 1)


def test_mutated_files_are_one_line(whole: Path, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    print(f"seed {SEED}")
    files = sorted(file for file in whole.rglob("*") if file.suffix in (".json", ".jinja", ".md"))
    n_refused = 0
    for n in range(N_MUTATIONS):
        original = files[n % len(files)]
        path = Path(shutil.copytree(original.parent, tmp_path / original.parent.name))
        damaged = mutate(original.read_bytes(), original.suffix == ".json", rng)
        (path / original.name).write_bytes(damaged)
        try:
            n_refused += errors(path) != []
        except Exception as error:
            raise AssertionError(f"mutation {n}, {original.name}: {damaged[:2000]!r}") from error
        shutil.rmtree(path)
    assert N_MUTATIONS / 4 < n_refused < N_MUTATIONS


@pytest.fixture
def checkpoint(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole / "checkpoint", tmp_path / "checkpoint"))


def test_the_whole_checkpoint_and_build_are_fine(whole: Path) -> None:
    assert errors(whole / "checkpoint") == errors(whole / "build") == []
    found = DenseCheckpoint.open(whole / "checkpoint")
    assert found.card == {"license": "mit", "language": ["en", "de"], "base_model": "org/x", "tags": ["a"]}
    assert found.generation["top_k"] == 20 and found.name == "Tiny-LRC-64"


TABLES = ["config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
          "added_tokens.json", "tokenizer.json", "model.safetensors.index.json", "lrc_edge.json"]


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("content", [
    b"", b"{", b"[1]", b"5", b"{} {}", b'{"a": "\xff\xfe"}', b"[" * 100_000, b'{"a":' * 100_000, b'{"a": "\\ud800"}',
    b'{"a": ' + b"9" * 5000 + b"}", b"\xef\xbb\xbf{}"], ids=lambda content: repr(content[:12]))
def test_no_table(name: str, content: bytes, checkpoint: Path) -> None:
    (checkpoint / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load(checkpoint)
    where = "the tokenizer does not load" if name == "tokenizer.json" else name
    assert where in str(caught.value) and str(caught.value).isprintable()
    assert f"/{name}: " in inspected(checkpoint)


@pytest.mark.parametrize("name, field, value, wanted", [
    ("generation_config.json", "temperature", "hot", "need a number"),
    ("generation_config.json", "top_k", 1.5, "need an integer"),
    ("generation_config.json", "top_k", 2**31, "need an integer"),
    ("generation_config.json", "top_p", True, "need a number"),
    ("generation_config.json", "do_sample", "yes", "need true or false"),
    ("generation_config.json", "bos_token_id", "x", "need a token id"),
    ("config.json", "rope_parameters", [1], "need a table"),
    ("config.json", "rope_parameters", {"rope_theta": "x"}, "rope_theta = 'x', need a positive number"),
    ("config.json", "rope_parameters", {"rope_theta": float("inf")}, "rope_theta = inf, need a positive number"),
    ("config.json", "rope_parameters", {"rope_theta": 1e4, "rope_type": [1]}, "rope_type = [1], need text"),
    ("config.json", "rope_scaling", {"type": "yarn", "factor": 0}, "factor = 0, need a positive number"),
    ("config.json", "rope_scaling", {"original_max_position_embeddings": 8192.0}, "need a positive integer"),
    ("config.json", "rms_norm_eps", "x", "need a positive number"),
    ("config.json", "rms_norm_eps", float("nan"), "need a positive number"),
    ("config.json", "head_dim", 1e9, "need a positive integer"),
    ("config.json", "head_dim", 10**9, "has shape"),
    ("config.json", "head_dim", 10**12, "need at most 2,147,483,647"),
    ("config.json", "num_hidden_layers", 10**9, "need at most 10,000"),
    ("config.json", "model_type", ["llama"], "is not supported"),
    ("config.json", "attention_dropout", "x", "refuses it"),
    ("tokenizer_config.json", "model_max_length", "x", "need a positive number"),
    ("tokenizer_config.json", "model_max_length", float("inf"), "need a positive number"),
    ("lrc_edge.json", "name", 5, "need text"), ("lrc_edge.json", "name", "a" * 200, "need 1 to 120 characters"),
    ("model.safetensors.index.json", "weight_map", {"a": 5}, "weight_map must name a file for each tensor"),
    ("model.safetensors.index.json", "weight_map", {"a": ""}, "which is missing"),
    ("model.safetensors.index.json", "weight_map", {"a": "\0"}, "which is missing"),
    ("model.safetensors.index.json", "weight_map", {"a": "b" * 300}, "which is missing"),
    ("model.safetensors.index.json", "metadata", None, 'transformers needs a table there; write "metadata": {}'),
])
def test_odd_values(name: str, field: str, value: Any, wanted: str, checkpoint: Path) -> None:
    table = json.loads((checkpoint / name).read_text())
    (checkpoint / name).write_text(json.dumps({**table, field: value}))
    with pytest.raises(UserError) as caught:
        load(checkpoint)
    assert name in str(caught.value) and wanted in str(caught.value) and str(caught.value).isprintable()
    assert wanted in inspected(checkpoint) or wanted == "refuses it"


def test_a_subword_prefix_that_merges_have_not(checkpoint: Path) -> None:
    """The tokenizers library aborts the process if removing the prefix splits a character."""
    file = checkpoint / "tokenizer.json"
    table = json.loads(file.read_text())
    table["model"]["continuing_subword_prefix"] = "o"
    file.write_text(json.dumps(table))
    with pytest.raises(UserError, match="continuing_subword_prefix = 'o', which not every merge has; fix the file"):
        load(checkpoint)


def test_no_limit_on_the_length_of_a_text(checkpoint: Path) -> None:
    """transformers writes it as int(1e30)."""
    file = checkpoint / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": int(1e30)}))
    assert errors(checkpoint) == []


@pytest.mark.parametrize("template, message", [
    (b"{% for x %}", "is not Jinja (line 1: "), (b"ok\n{{ x | nothing_of_this_name }}", "is not Jinja (line 2: "),
    (b"\xff\xfe", "the tokenizer does not load")])
def test_a_chat_template_that_is_none(template: bytes, message: str, checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").write_bytes(template)
    with pytest.raises(UserError) as caught:
        load(checkpoint)
    assert message in str(caught.value) and f"cannot use it: {caught.value}" in inspect(checkpoint)


def test_a_chat_template_may_refuse_a_conversation(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").write_text("{{ raise_exception('system first') }}")
    assert errors(checkpoint) == []


@pytest.mark.parametrize("card", [
    b"---\n: [broken\n---\n", b"---\n[1]\n---\n", b"---\na: 2026-99-99\n---\n", b"\xff\xfe",
    b"---\nlicense: {a: {b: c}}\n---\n", b"---\n" + b"[" * 5000 + b"\n---\n"])
def test_a_card_that_states_nothing(card: bytes, checkpoint: Path) -> None:
    (checkpoint / "README.md").write_bytes(card)
    assert errors(checkpoint) == [] and DenseCheckpoint.open(checkpoint).card == {}
