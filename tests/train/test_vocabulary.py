"""A smaller vocabulary: which tokens go, a tokenizer that stays consistent, logits at the kept ids, what is refused."""
from __future__ import annotations

import io
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny_models import TEXT, every_split, make_tiny
from tokenizers import Tokenizer, models, processors
from transformers import AutoModelForCausalLM

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.corpus.held_out import HeldOut
from lrc_edge.errors import UserError
from lrc_edge.pipeline import preflight
from lrc_edge.pipeline.plan import Plan
from lrc_edge.pipeline.stage import Build, run_stages
from lrc_edge.pipeline.stages import stages
from lrc_edge.recipe import load_recipe
from lrc_edge.targets.proof.tokenizer_strings import awkward_strings
from lrc_edge.train.data.stage import count_occurrences, tokenize_corpus
from lrc_edge.train.trimmed_teacher import tokenizer_table, write_trimmed
from lrc_edge.train.vocabulary import Vocabulary

# kind -> the arguments of make_tiny. "every split": several merges make a token, as in llama-3's tokenizer.json.
TEACHERS: dict[str, dict[str, Any]] = {
    "whole words": dict(tokenizer="llama3"),  # ignore_merges
    "merges only": dict(tokenizer="llama3", tied=False),
    "every split": dict(tokenizer="llama3", dtype=torch.bfloat16),
    "qwen2": dict(family="qwen2", tokenizer="qwen2", tied=False, vocab_size=540),  # NFC, 28 rows of padding
    "smollm": dict(tokenizer="smollm"),
}


def edit_json(file: Path, change: Any) -> None:
    table = json.loads(file.read_text()) if file.exists() else {}
    change(table)
    file.write_text(json.dumps(table))


@pytest.fixture(scope="module", params=TEACHERS)
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DenseCheckpoint:
    path = make_tiny(tmp_path_factory.mktemp("teachers") / "teacher", **TEACHERS[request.param])

    def change(table: dict[str, Any]) -> None:
        if request.param == "every split":
            table["model"]["merges"] = every_split(table["model"])
        table["model"]["ignore_merges"] = request.param in ("whole words", "every split")

    edit_json(path / "tokenizer.json", change)
    return DenseCheckpoint.open(path)


@pytest.fixture
def llama(llama_copy: Path) -> DenseCheckpoint:
    return DenseCheckpoint.open(llama_copy)


def counts_of(teacher: DenseCheckpoint, text: str = TEXT[:100_000]) -> np.ndarray:
    return np.bincount(teacher.tokenizer()(text, verbose=False)["input_ids"], minlength=teacher.shape.vocab_size)


def trimmed_to(size: int, teacher: DenseCheckpoint, folder: Path) -> tuple[DenseCheckpoint, list[int]]:
    kept = Vocabulary.of(teacher).choose(size, counts_of(teacher))
    return write_trimmed(teacher, kept, folder), kept


def any_size(vocabulary: Vocabulary, chance: random.Random) -> int:
    return chance.randint(len(vocabulary.must_stay), vocabulary.n_rows)


# -- which tokens go ---------------------------------------------------------------------------------------------------


def slowly_chosen(vocabulary: Vocabulary, model: dict[str, Any], size: int, counts: np.ndarray) -> list[int]:
    """The definition: look for the rarest leaf again each time; the tokenizers library cuts it into its pieces."""
    kept, n = set(range(vocabulary.n_rows)), counts.astype(int).tolist()
    first = {made: rank for rank, (_, _, made) in reversed([*enumerate(vocabulary.merges)])}
    padding = sorted(kept - vocabulary.texts.keys() - vocabulary.must_stay, reverse=True)
    kept -= set(padding[:vocabulary.n_rows - size])
    while len(kept) > size:
        merges = [merge for merge in vocabulary.merges if merge[2] in kept]
        parts = {part for left, right, _ in merges for part in (left, right)}
        leaf = min(kept - parts - vocabulary.must_stay, key=lambda i: (n[i], -first.get(i, len(vocabulary.merges)), -i))
        kept.remove(leaf)
        left = {text: i for text, i in model["vocab"].items() if i in kept}
        pairs = [tuple(pair) for pair in model["merges"] if "".join(pair) in left]
        for piece in Tokenizer(models.BPE(left, pairs)).encode(vocabulary.texts[leaf]).ids:
            n[piece] += n[leaf]
    return sorted(kept)


def test_the_rarest_leaf_goes_first(teacher: DenseCheckpoint, chance: random.Random) -> None:
    vocabulary, model = Vocabulary.of(teacher), tokenizer_table(teacher.path)["model"]
    for counts in (counts_of(teacher), np.zeros(vocabulary.n_rows, int),
                   np.array([chance.choice((0, 1, 1, 2, 50)) for _ in range(vocabulary.n_rows)])):
        size = any_size(vocabulary, chance)
        assert vocabulary.choose(size, counts) == slowly_chosen(vocabulary, model, size, counts), size


def test_what_goes_leaves_its_occurrences_to_its_parts(tmp_path: Path) -> None:
    """QXZJ, a whole word without a merge, leaves its own to ZJ, which was a leaf before; QXV leaves its own to QX."""
    path = make_tiny(tmp_path / "teacher")

    def change(table: dict[str, Any]) -> None:
        table["model"]["vocab"] |= {"QX": 512, "QXV": 513, "VK": 514, "ZJ": 515, "QXZJ": 516}
        table["model"]["merges"] += [["Q", "X"], ["QX", "V"], ["V", "K"], ["Z", "J"]]

    edit_json(path / "tokenizer.json", change)
    teacher = DenseCheckpoint.open(make_tiny(tmp_path / "large", vocab_size=518))
    (teacher.path / "tokenizer.json").write_bytes((path / "tokenizer.json").read_bytes())
    counts = np.full(518, 1000)
    counts[[512, 513, 514, 515, 516]] = 2, 2, 3, 2, 2
    order, kept = [], set(range(518))
    for size in reversed(range(512, 518)):
        after = set(Vocabulary.of(teacher).choose(size, counts))
        order += kept - after
        kept = after
    assert order == [517, 516, 513, 514, 515, 512], "padding, QXZJ (2), QXV (2), VK (3), ZJ (2 + 2), QX (2 + 2 + 2)"


def test_later_merges_go_first_among_equals(llama: DenseCheckpoint) -> None:
    vocabulary = Vocabulary.of(llama)
    kept = vocabulary.choose(500, np.zeros(vocabulary.n_rows, int))
    last = [made for _, _, made in vocabulary.merges]
    leaves = [token for token in last if not any(token in (left, right) for left, right, _ in vocabulary.merges)]
    assert set(leaves[-5:]).isdisjoint(kept) and len(kept) == 500


def test_what_always_stays(llama: DenseCheckpoint, tmp_path: Path) -> None:
    rare = [token for token in range(500, 512)]
    edit_json(llama.path / "generation_config.json", lambda table: table.update(
        suppress_tokens=rare[:2], bad_words_ids=[[rare[2], rare[3]]], forced_decoder_ids=[[1, rare[4]], [2, None]],
        sequence_bias=[[[rare[5]], -1.0]], forced_eos_token_id=rare[6], pad_token_id=-1, max_length=20))
    edit_json(llama.path / "config.json", lambda table: table.update(unk_token_id=rare[7]))
    template = "{%- for m in messages %}class {{ m['role'] }} object method: {{ m['content'] }}{% endfor %}"
    (llama.path / "chat_template.jinja").write_text(template)
    llama = DenseCheckpoint.open(llama.path)
    tokenizer = llama.tokenizer()
    vocabulary = Vocabulary.of(llama)
    smallest = len(vocabulary.must_stay)
    trimmed, kept = trimmed_to(smallest, llama, tmp_path / "trimmed")
    assert set(kept) == vocabulary.must_stay and {*rare[:8], *tokenizer.all_special_ids} <= set(kept)
    after = trimmed.tokenizer()

    def texts(ids: Any, of: Any) -> Any:
        return [texts(i, of) for i in ids] if isinstance(ids, list) else ids and of.convert_ids_to_tokens(ids)

    for field in ("suppress_tokens", "bad_words_ids", "forced_eos_token_id", "eos_token_id", "bos_token_id"):
        assert texts(trimmed.generation[field], after) == texts(llama.generation[field], tokenizer), field
    assert trimmed.generation["forced_decoder_ids"][0][0] == 1
    assert texts(trimmed.generation["forced_decoder_ids"][0][1], after) == texts(rare[4], tokenizer)
    assert trimmed.generation["forced_decoder_ids"][1] == [2, None]
    assert trimmed.generation["sequence_bias"][0][1] == -1.0
    assert texts(trimmed.generation["sequence_bias"][0][0], after) == texts([rare[5]], tokenizer)
    assert trimmed.generation["pad_token_id"] == -1 and trimmed.generation["max_length"] == 20
    assert texts(trimmed.config["unk_token_id"], after) == texts(rare[7], tokenizer)
    messages = [{"role": "user", "content": "a"}]
    for chat in (messages, [{"role": "system", "content": "a"}, *messages]):
        written = [t.convert_ids_to_tokens(t(t.apply_chat_template(chat, tokenize=False))["input_ids"])
                   for t in (tokenizer, after)]
        assert written[0] == written[1]
    assert {chr(i) for i in range(ord("!"), ord("~"))} <= after.get_vocab().keys()


def test_padding_goes_before_tokens_unless_a_field_names_it(tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "teacher", family="qwen2", tokenizer="qwen2", vocab_size=540)
    edit_json(path / "config.json", lambda table: table.update(pad_token_id=539))
    teacher = DenseCheckpoint.open(path)
    trimmed, kept = trimmed_to(520, teacher, tmp_path / "trimmed")
    assert kept == [*range(519), 539] and trimmed.config["pad_token_id"] == 519
    assert trimmed_to(510, teacher, tmp_path / "smaller")[1][-1] == 539


# -- the tokenizer -----------------------------------------------------------------------------------------------------


def test_a_trimmed_tokenizer_is_consistent(teacher: DenseCheckpoint, tmp_path: Path, chance: random.Random) -> None:
    vocabulary, before = Vocabulary.of(teacher), teacher.tokenizer()
    texts = [*awkward_strings(list(before.get_added_vocab())), *(TEXT[i:i + 400] for i in range(0, 80_000, 400))]
    old_ids = before(texts, verbose=False)["input_ids"]
    spelled = [before.decode(ids, clean_up_tokenization_spaces=False) for ids in old_ids]
    for size in (any_size(vocabulary, chance), len(vocabulary.must_stay)):
        trimmed, kept = trimmed_to(size, teacher, tmp_path / str(size))
        new = {old: i for i, old in enumerate(kept)}
        model, tokenizer = tokenizer_table(trimmed.path)["model"], trimmed.tokenizer()
        assert len(kept) == size and trimmed.shape == replace(teacher.shape, vocab_size=size)
        assert all({left, right, left + right} <= model["vocab"].keys() for left, right in model["merges"])
        all_merges = tokenizer_table(teacher.path)["model"]["merges"]
        assert model["merges"] == [pair for pair in all_merges if "".join(pair) in model["vocab"]]
        assert tokenizer.get_added_vocab() == {text: new[i] for text, i in before.get_added_vocab().items()}
        assert {text: new[before.convert_tokens_to_ids(text)] for text in before.all_special_tokens} == {
            text: tokenizer.convert_tokens_to_ids(text) for text in before.all_special_tokens}
        n_same = 0
        for text, ids, same_text in zip(texts, old_ids, spelled, strict=True):
            found = tokenizer.encode(text, verbose=False)
            assert tokenizer.decode(found, clean_up_tokenization_spaces=False) == same_text
            if set(ids) <= new.keys():
                assert found == [new[i] for i in ids], text
                n_same += 1
        assert n_same > 100, "nothing was compared"


def test_the_other_files(llama: DenseCheckpoint, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt", "tokenizer.model", "NOTICE"):
        (llama.path / name).write_text(name)
    (llama.path / "README.md").write_text("---\nlicense: mit\n---\nA card.\n")
    added = {str(i): {"content": text, "special": True} for text, i in llama.tokenizer().get_added_vocab().items()}
    edit_json(llama.path / "tokenizer_config.json", lambda table: table.update(
        added_tokens_decoder=added, model_max_length=99))
    edit_json(llama.path / "added_tokens.json", lambda table: table.update({"<|eot_id|>": 4}))
    # Ids that do not begin with 0 show that the tables are renumbered.
    edit_json(llama.path / "tokenizer.json", lambda table: table["model"]["vocab"].update(
        {text: 511 - i for text, i in table["model"]["vocab"].items()}))
    edit_json(llama.path / "tokenizer.json", _mirror_added)
    for name in ("config.json", "generation_config.json"):
        edit_json(llama.path / name, lambda table: table.update({
            key: 511 - value for key, value in table.items() if key.endswith("_token_id") and isinstance(value, int)}))
    edit_json(llama.path / "tokenizer_config.json", lambda table: table.update(
        added_tokens_decoder={str(511 - int(i)): token for i, token in table["added_tokens_decoder"].items()}))
    edit_json(llama.path / "added_tokens.json", lambda table: table.update({"<|eot_id|>": 507}))
    teacher = DenseCheckpoint.open(llama.path)
    trimmed, kept = trimmed_to(450, teacher, tmp_path / "trimmed")
    ids = trimmed.tokenizer().get_added_vocab()
    assert sorted(ids.values()) == [445, 446, 447, 448, 449] and trimmed.bos() == ids["<|begin_of_text|>"]
    table = json.loads((trimmed.path / "tokenizer_config.json").read_text())
    assert {token["content"]: int(i) for i, token in table["added_tokens_decoder"].items()} == ids
    assert table["model_max_length"] == 99 and table["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert json.loads((trimmed.path / "added_tokens.json").read_text()) == {"<|eot_id|>": ids["<|eot_id|>"]}
    assert trimmed.config["eos_token_id"] == ids["<|eot_id|>"]
    assert trimmed.card == {"license": "mit"} and (trimmed.path / "NOTICE").read_text() == "NOTICE"
    assert not any((trimmed.path / name).exists() for name in ("vocab.json", "merges.txt", "tokenizer.model"))
    assert trimmed.name == teacher.name and len(kept) == 450


def _mirror_added(table: dict[str, Any]) -> None:
    for token in table["added_tokens"]:
        token["id"] = 511 - token["id"]
    for token in table["post_processor"]["special_tokens"].values():
        token["ids"] = [511 - i for i in token["ids"]]


def test_ids_in_the_steps_of_a_tokenizer(tmp_path: Path, llama: DenseCheckpoint) -> None:
    tokenizer = Tokenizer.from_file(str(llama.path / "tokenizer.json"))
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False), processors.RobertaProcessing(("Ġthe", tokenizer.token_to_id("Ġthe")),
                                                                               ("<|eot_id|>", 4))])
    tokenizer.enable_padding(pad_id=509, pad_token=tokenizer.id_to_token(509))
    tokenizer.save(str(llama.path / "tokenizer.json"))
    trimmed, kept = trimmed_to(len(Vocabulary.of(llama).must_stay), llama, tmp_path / "trimmed")
    table = tokenizer_table(trimmed.path)
    assert table["padding"]["pad_id"] == kept.index(509)
    assert table["post_processor"]["processors"][1]["sep"] == ["Ġthe", kept.index(tokenizer.token_to_id("Ġthe"))]
    after = trimmed.tokenizer()
    assert after.convert_ids_to_tokens(after("a")["input_ids"]) == ["<|eot_id|>", "a", "Ġthe"]


@pytest.mark.parametrize("kind", ["whole words", "every split", "qwen2"])
def test_runtimes_read_the_same_ids(kind: str, tmp_path: Path) -> None:
    from lrc_edge.export.gguf.to_gguf import export_gguf
    from lrc_edge.export.onnx.to_onnx import export_onnx
    from lrc_edge.targets.proof.token_parity import compare_token_ids, corpus_of, normalize
    from lrc_edge.targets.runtimes.llamacpp import LlamaCpp
    from lrc_edge.targets.runtimes.ort_genai import OrtGenai

    path = make_tiny(tmp_path / "teacher", **{**TEACHERS[kind], "layers": 1})
    if kind == "every split":
        edit_json(path / "tokenizer.json", lambda t: t["model"].update(merges=every_split(t["model"])))
    trimmed, _ = trimmed_to(400, DenseCheckpoint.open(path), tmp_path / "trimmed")
    [artifact] = export_gguf(trimmed, tmp_path / "gguf", ["f16"])
    export_onnx(trimmed, tmp_path / "onnx", ["fp32"])
    tokenizer = trimmed.tokenizer()
    # onnxruntime-genai leaves out Qwen's NFC normalization, whatever the vocabulary.
    strings = [text for text in corpus_of(tokenizer) if normalize(tokenizer, text) == text]
    with LlamaCpp(tmp_path / artifact.path, n_ctx=64, threads=1) as runtime:
        found = compare_token_ids(tokenizer, lambda texts: [runtime.tokenize(text) for text in texts])
        assert found.n_strings >= 1000 and not found.n_mismatches, found.examples
    genai = OrtGenai(tmp_path / "onnx")
    found = compare_token_ids(tokenizer, lambda texts: [genai.tokenize(text) for text in texts], strings)
    assert not found.n_mismatches, found.examples


# -- the model ---------------------------------------------------------------------------------------------------------


def test_logits_are_the_teachers_at_the_kept_ids(teacher: DenseCheckpoint, tmp_path: Path) -> None:
    trimmed, kept = trimmed_to(400, teacher, tmp_path / "trimmed")
    assert trimmed.types == teacher.types
    ids = torch.randint(0, 400, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(teacher.path, dtype=torch.float32)(torch.tensor(kept)[ids]).logits
        after = AutoModelForCausalLM.from_pretrained(trimmed.path, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(after, before[..., kept])
    renormalized = before.softmax(-1)[..., kept] / before.softmax(-1)[..., kept].sum(-1, keepdim=True)
    torch.testing.assert_close(after.softmax(-1), renormalized)


def test_held_out_text_in_both_vocabularies(teacher: DenseCheckpoint, tmp_path: Path) -> None:
    trimmed, _ = trimmed_to(400, teacher, tmp_path / "trimmed")
    documents = [TEXT[i:i + 500] for i in range(0, 20_000, 500)]
    small, full = (HeldOut.from_texts(documents, model.tokenizer()) for model in (trimmed, teacher))
    again = small.retokenized(trimmed.tokenizer(), teacher.tokenizer())
    assert again.ids.tolist() == full.ids.tolist() and len(small.ids) > len(full.ids)
    assert again.n_bytes == small.n_bytes == full.n_bytes


# -- what is counted ---------------------------------------------------------------------------------------------------


def test_counts_are_those_of_the_training_tokens(tiny_llama: Path, tmp_path: Path) -> None:
    plain = [{"text": TEXT[i:i + 300], "score": i // 300 % 3} for i in range(0, 90_000, 300)]
    chats = [{"messages": [{"role": "user", "content": TEXT[i:i + 50]}, {"role": "assistant", "content": "Yes."}],
              "score": 2} for i in range(0, 5_000, 50)]
    for name, rows in (("plain.jsonl", plain), ("chats.jsonl", chats)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = load_recipe(None, ["train.seq_len=64", "train.tokens=20000"], data={
        "sources": [str(tmp_path / "plain.jsonl"), str(tmp_path / "chats.jsonl")], "weights": [3.0, 1.0],
        "filters": ["score >= 1"], "held_out_share": 0.2})
    teacher = DenseCheckpoint.open(tiny_llama)
    tokenize_corpus(teacher, recipe, tmp_path / "data", "key", lambda *_: None)
    expected = np.bincount(np.load(tmp_path / "data" / "tokens-00000.npy"), minlength=512)
    counts = count_occurrences(teacher, recipe, 20_000, lambda *_: None)
    assert counts.tolist() == expected.tolist() and 20_000 <= counts.sum() < 40_000


# -- what is refused ---------------------------------------------------------------------------------------------------


def refused(teacher: Path, tmp_path: Path, *words: str, size: int = 400, **data: Any) -> None:
    """In one line, before anything is written."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT[:20_000])
    recipe = load_recipe(None, [f"student.vocab_size={size}", "student.hidden_size=32"],
                         data={"sources": [str(text)], **data})
    with pytest.raises(UserError, match=".*".join(map(re.escape, words))) as error:
        preflight.check(Plan.of_build(str(teacher), recipe, writes=False), tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_other_tokenizers_are_named(tmp_path: Path, llama_copy: Path) -> None:
    refused(make_tiny(tmp_path / "spm", tokenizer="spm"), tmp_path, "SentencePiece's (BPE with byte_fallback)")
    file, vocab = llama_copy / "tokenizer.json", {"a": 0, "<unk>": 1}
    original = json.loads(file.read_text())
    for model in (models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0, False), models.WordPiece(vocab, unk_token="<unk>"),
                  models.WordLevel(vocab, unk_token="<unk>")):
        table = json.loads(Tokenizer(model).to_str())
        file.write_text(json.dumps(original | {"model": table["model"]}))
        refused(llama_copy, tmp_path, f"is of type {table['model']['type']}", "student.vocab_size=0")
    file.write_text(json.dumps(original | {"model": original["model"] | {"end_of_word_suffix": "</w>"}}))
    refused(llama_copy, tmp_path, "BPE with end_of_word_suffix = '</w>'")
    file.rename(llama_copy / "tokenizer.model")
    with pytest.raises(UserError, match=r"SentencePiece's \(tokenizer.model\); student.vocab_size needs"):
        Vocabulary.of(DenseCheckpoint.open(llama_copy))


def test_sizes_that_cannot_be(tiny_llama: Path, tmp_path: Path) -> None:
    vocabulary = Vocabulary.of(DenseCheckpoint.open(tiny_llama))
    smallest = len(vocabulary.must_stay)
    refused(tiny_llama, tmp_path, f"= {smallest - 1}: {smallest} tokens must stay", f"need at least {smallest}",
            size=smallest - 1)
    assert set(vocabulary.choose(smallest, np.ones(512, int))) == vocabulary.must_stay
    refused(tiny_llama, tmp_path, "student.vocab_size = 513", "has 512; need a smaller", size=513)
    with pytest.raises(UserError, match=r"recipe: student.vocab_size.*`self`"):
        load_recipe(None, ["student.vocab_size=400", "train.tokens=1000"], data={"sources": ["self"]})


def test_damaged_tokenizers(llama_copy: Path, tmp_path: Path) -> None:
    file = llama_copy / "tokenizer.json"
    original = file.read_text()
    edit_json(file, lambda table: table["model"]["vocab"].pop(table["model"]["merges"][-1][0]))
    refused(llama_copy, tmp_path, "does not load", "copy the model's tokenizer files")
    file.write_text(original)
    edit_json(file, lambda table: table["model"]["vocab"].update({"".join(table["model"]["merges"][-1]): 400}))
    teacher = DenseCheckpoint.open(llama_copy)
    with pytest.raises(UserError, match=r"needs token|would have id"):  # two tokens have one id: the library keeps one
        write_trimmed(teacher, Vocabulary.of(teacher).choose(450, np.zeros(512, int)), tmp_path / "trimmed")
    file.write_text(original)
    edit_json(file, _with_a_gap)
    teacher = DenseCheckpoint.open(llama_copy)
    with pytest.raises(UserError, match="would have id"):
        write_trimmed(teacher, Vocabulary.of(teacher).choose(450, np.zeros(512, int)), tmp_path / "again")


def _with_a_gap(table: dict[str, Any]) -> None:
    """The library gives an added token the id that follows the number of tokens, which here is a token's."""
    left, right = table["model"]["merges"].pop(-20)
    del table["model"]["vocab"][left + right]
    table["added_tokens"].append({**table["added_tokens"][0], "id": 511, "content": "<|added|>"})


def test_tables_with_unexpected_values(llama: DenseCheckpoint, tmp_path: Path) -> None:
    """Fields of ids with values that are none are kept as they are."""
    odd: dict[str, Any] = {"suppress_tokens": "all", "sequence_bias": {"a": 1}, "bad_words_ids": None,
                           "forced_decoder_ids": [3, None, []], "begin_suppress_tokens": [True, 1.5, 10**6]}
    edit_json(llama.path / "generation_config.json", lambda table: table.update(odd))
    trimmed, _ = trimmed_to(400, DenseCheckpoint.open(llama.path), tmp_path / "trimmed")
    assert trimmed.generation.items() >= odd.items()


# -- the stage ---------------------------------------------------------------------------------------------------------


def build_of(teacher: Path, out: Path, *settings: str, leads: bool = True) -> Build:
    text = out.parent / "text.txt"
    if not text.exists():
        text.write_text(TEXT[:60_000])
    recipe = load_recipe(None, ["student.hidden_size=32", "train.seq_len=64", *settings],
                         data={"sources": [str(text)], "held_out_share": 0.2})
    return Build(Plan.of_build(str(teacher), recipe, writes=False), out, Console(file=io.StringIO(), width=200), leads)


def test_stages_read_the_trimmed_teacher(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build = build_of(tiny_llama, out, "student.vocab_size=400")
    run_stages(stages(last="data"), build)
    printed = build.console.file.getvalue()  # type: ignore[attr-defined]
    assert "vocabulary  400 of 512 tokens kept: " in printed
    assert build.teacher.path == out / "vocabulary" and build.teacher.name == "tiny-llama"
    assert build.teacher.shape.vocab_size == build.plan.student.vocab_size == 400
    assert np.load(out / "data" / "tokens-00000.npy").max() < 400
    other_rank = build_of(tiny_llama, out, "student.vocab_size=400", leads=False)
    assert other_rank.teacher.shape.vocab_size == 400
    again = build_of(tiny_llama, out, "student.vocab_size=400")
    run_stages(stages(last="data"), again)
    assert again.ran == []
    whole = build_of(tiny_llama, out, "student.vocab_size=0")
    run_stages(stages(last="data"), whole)
    assert whole.teacher.shape.vocab_size == 512 and not (out / "vocabulary").exists() and whole.ran == ["data"]


def test_an_error_leaves_no_part_of_it(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    run_stages(stages(last="vocabulary"), build_of(tiny_llama, out, "student.vocab_size=400"))
    before = {file: file.read_bytes() for file in (out / "vocabulary").iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lrc_edge.train.trimmed_teacher.copy_tokenizer", full)
    with pytest.raises(OSError):
        run_stages(stages(last="vocabulary"), build_of(tiny_llama, out, "student.vocab_size=390"))
    assert not (out / ".partial").exists()
    assert before == {file: file.read_bytes() for file in (out / "vocabulary").iterdir()}, "not the new size's"
    monkeypatch.undo()
    run_stages(stages(last="vocabulary"), build := build_of(tiny_llama, out, "student.vocab_size=390"))
    assert build.teacher.shape.vocab_size == 390


def test_the_disk_must_hold_it(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = build_of(tiny_llama, tmp_path / "out", "student.vocab_size=400").plan
    teacher = plan.source.checkpoint
    needed = preflight._build_bytes(plan)
    monkeypatch.setattr(preflight, "_stored_bytes", lambda model, shape: 0)
    stored = 4 * (teacher.shape.n_params - 112 * teacher.shape.hidden_size)  # tied, float32
    assert needed - preflight._build_bytes(plan) == stored
