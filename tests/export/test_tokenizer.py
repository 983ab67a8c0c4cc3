"""GGUF vocabularies: llama.cpp's ids equal Hugging Face's on the awkward corpus; what cannot be carried is refused."""
from __future__ import annotations

import json
import re
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType
from tiny_models import SPECIAL, every_split, make_tiny
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError
from lrc_edge.export.gguf import vocabulary as tokenizer_module
from lrc_edge.export.gguf.to_gguf import export_gguf
from lrc_edge.export.gguf.vocabulary import check_tokenizer, read_vocabulary
from lrc_edge.targets.proof.token_parity import TokenParity, compare_token_ids
from lrc_edge.targets.proof.tokenizer_strings import awkward_strings
from lrc_edge.targets.runtimes.llamacpp import LlamaCpp

KINDS = {"llama3": "llama-bpe", "qwen2": "qwen2", "smollm": "smollm", "gpt2": "gpt-2", "spm": "default"}
SPACE = "▁"


def parity(path: Path, out: Path) -> TokenParity:
    checkpoint = DenseCheckpoint.open(path)
    [artifact] = export_gguf(checkpoint, out / "gguf", ["f16"])
    with LlamaCpp(out / artifact.path, n_ctx=64, threads=1) as runtime:
        return compare_token_ids(checkpoint.tokenizer(),
                                 lambda texts: [runtime.tokenize(text) for text in texts])


def with_boundless_merges(path: Path, kind: str) -> Path:
    """Give the checkpoint's tokenizer merges that were learned on the corpus itself, without splitting it.

    Such merges run across every boundary that a pre-tokenizer draws, so each difference in splitting shows in the ids.
    """
    file = path / "tokenizer.json"
    table = json.loads(file.read_text())
    corpus, special = awkward_strings(SPECIAL[kind]), list(SPECIAL[kind])
    tokenizer = Tokenizer(models.BPE(**{key: table["model"][key] for key in (
        "ignore_merges", "byte_fallback", "unk_token", "fuse_unk")}))
    if kind == "spm":
        corpus = [SPACE + text.replace(" ", SPACE) for text in corpus]
        special += [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = [] if kind == "spm" else pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=4000, min_frequency=2, max_token_length=12, special_tokens=special, initial_alphabet=alphabet,
        show_progress=False))
    table["model"] = json.loads(tokenizer.to_str())["model"]
    if kind == "spm":
        table["model"]["merges"] = every_split(table["model"])
    file.write_text(json.dumps(table))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_hugging_faces(kind: str, tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "model", tokenizer=kind)
    assert read_vocabulary(DenseCheckpoint.open(path)).pre == KINDS[kind]
    found = parity(path, tmp_path)
    assert found.n_strings >= 1000 and not found.n_mismatches, found.examples


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_hugging_faces_where_every_split_shows(kind: str, tmp_path: Path) -> None:
    path = with_boundless_merges(make_tiny(tmp_path / "model", tokenizer=kind, vocab_size=4000), kind)
    found = parity(path, tmp_path)
    assert found.n_mismatches == 0, found.examples
    assert (found.n_normalized > 0) == (kind == "qwen2")  # NFC


@pytest.mark.parametrize("kind, wrong", [("llama3", "qwen2"), ("qwen2", "llama-bpe"), ("smollm", "gpt-2"),
                                         ("gpt2", "smollm"), ("gpt2", "qwen2"), ("llama3", "gpt-2")])
def test_the_corpus_catches_a_wrong_pre_tokenizer(kind: str, wrong: str, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    path = with_boundless_merges(make_tiny(tmp_path / "model", tokenizer=kind, vocab_size=4000), kind)
    monkeypatch.setattr(tokenizer_module, "_pre_tokenizer_name", lambda *_: wrong)
    found = parity(path, tmp_path)
    assert found.n_mismatches > 50 and len(found.examples) == 10
    assert found.examples[0].as_dict()["expected"] != found.examples[0].as_dict()["got"]


def test_llama3_pattern_without_ignore_merges(llama_copy: Path, tmp_path: Path) -> None:
    edit_json(llama_copy / "tokenizer.json", lambda table: table["model"].update(ignore_merges=False))
    assert read_vocabulary(DenseCheckpoint.open(llama_copy)).pre == "smaug-bpe"
    assert parity(llama_copy, tmp_path).n_mismatches == 0


def test_sentencepiece_without_the_space_in_front(tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "model", tokenizer="spm")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    edit_json(path / "tokenizer.json", lambda table: table.update(normalizer=replace))
    assert not read_vocabulary(DenseCheckpoint.open(path)).add_space_prefix
    assert parity(path, tmp_path).n_mismatches == 0


def test_awkward_strings() -> None:
    strings = awkward_strings(["<s>", "<|im_end|>"])
    assert strings == awkward_strings(["<s>", "<|im_end|>"]) and len(set(strings)) == len(strings) >= 1000
    joined = "".join(strings)
    for needed in ("\u3000", "\r\n", "\u200d", "\x07", "\x9f", "\U0001f1e9", "\u05d0", "\u0e01", "\u0915", "\uac00",
                   "\ue000", "\U0010fffd", "e\u0301", "'LL"):
        assert needed in joined or needed.lower() in joined.lower(), ascii(needed)
    assert "" in strings and "a <|im_end|> b" in strings and "\x00" not in joined
    assert any(unicodedata.normalize("NFC", text) != text for text in strings)
    assert all(text.encode() for text in strings if text)  # no lone surrogates


def test_vocabulary_of_a_llama3(tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "model", vocab_size=515)
    vocabulary = read_vocabulary(DenseCheckpoint.open(path))
    assert len(vocabulary.tokens) == len(vocabulary.types) == 515
    assert vocabulary.tokens[:2] == SPECIAL["llama3"][:2]
    assert vocabulary.tokens[-3:] == ["[PAD512]", "[PAD513]", "[PAD514]"]
    assert vocabulary.types[0] == TokenType.CONTROL and vocabulary.types[-1] == TokenType.UNUSED
    assert vocabulary.types[10] == TokenType.NORMAL and vocabulary.scores is None
    assert vocabulary.merges and all(line.count(" ") == 1 for line in vocabulary.merges)
    assert vocabulary.special_ids == {"bos": 0, "eos": 4, "eot": 4}
    assert (vocabulary.add_bos, vocabulary.add_eos) == (True, False)


def test_vocabulary_of_sentencepiece(tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "model", tokenizer="spm", vocab_size=514)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    edit_json(path / "tokenizer.json", lambda table: table["added_tokens"].extend([
        {"id": 512, "content": f"<a{SPACE}b>", "special": False, **plain},
        {"id": 513, "content": "<a b>", "special": True, **plain}]))
    vocabulary = read_vocabulary(DenseCheckpoint.open(path))
    assert vocabulary.model == "llama" and vocabulary.merges is None and vocabulary.add_space_prefix
    assert [vocabulary.types[i] for i in (0, 1, 3, 512, 513)] == [
        TokenType.UNKNOWN, TokenType.CONTROL, TokenType.BYTE, TokenType.USER_DEFINED, TokenType.CONTROL]
    merges = json.loads((path / "tokenizer.json").read_text())["model"]["merges"]
    assert vocabulary.scores is not None
    scores = dict(zip(vocabulary.tokens, vocabulary.scores, strict=True))
    assert scores["".join(merges[0])] == 0 > scores["".join(merges[1])] > scores["".join(merges[-1])]
    assert parity(path, tmp_path).n_mismatches == 0


def test_an_eos_that_encoding_adds(llama_copy: Path, tmp_path: Path) -> None:
    def edit(table: dict[str, Any]) -> None:
        processor = table["post_processor"]
        processor["single"].append({"SpecialToken": {"id": "<|end_of_text|>", "type_id": 0}})
        processor["special_tokens"]["<|end_of_text|>"] = {
            "id": "<|end_of_text|>", "ids": [1], "tokens": ["<|end_of_text|>"]}

    edit_json(llama_copy / "tokenizer.json", edit)
    vocabulary = read_vocabulary(DenseCheckpoint.open(llama_copy))
    assert vocabulary.add_eos and vocabulary.special_ids["eos"] == 1 and vocabulary.special_ids["eot"] == 4
    assert parity(llama_copy, tmp_path).n_mismatches == 0


def test_named_chat_templates(llama_copy: Path) -> None:
    (llama_copy / "chat_template.jinja").unlink()
    edit_json(llama_copy / "tokenizer_config.json", lambda table: table.update(chat_template=[
        {"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]))
    assert read_vocabulary(DenseCheckpoint.open(llama_copy)).chat_template == [
        {"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]


def edit_json(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    table = json.loads(file.read_text())
    edit(table)
    file.write_text(json.dumps(table))


def _split_at_spaces(table: dict[str, Any]) -> None:
    table["pre_tokenizer"] = {"type": "WhitespaceSplit"}


def _other_pattern(table: dict[str, Any]) -> None:
    table["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{L}+|\p{N}|\s+"


def _prefix_space(table: dict[str, Any]) -> None:
    table["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True


def _lower_case(table: dict[str, Any]) -> None:
    table["normalizer"] = {"type": "Lowercase"}


def _strip(table: dict[str, Any]) -> None:
    table["added_tokens"][2]["lstrip"] = True


def _two_before(table: dict[str, Any]) -> None:
    table["post_processor"]["single"].insert(0, {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}})


def _unigram(table: dict[str, Any]) -> None:
    table["model"] = {"type": "Unigram", "unk_id": 0, "byte_fallback": False,
                      "vocab": [[token, -1.0] for token in table["model"]["vocab"]]}


@pytest.mark.parametrize("edit, message", [
    (_split_at_spaces, 'splits text with {"type": "WhitespaceSplit"} (ignore_merges = True)'),
    (_other_pattern, r"\\p{L}+|\\p{N}|\\s+"), (_prefix_space, '"add_prefix_space": true'),
    (_lower_case, 'normalizes text with {"type": "Lowercase"}'), (_strip, "lstrip = true on '<|start_header_id|>'"),
    (_two_before, "GGUF can add one BOS before"), (_unigram, "is of type Unigram; GGUF output needs BPE"),
])
def test_tokenizers_that_gguf_cannot_carry(edit: Callable[[dict[str, Any]], None], message: str,
                                           llama_copy: Path) -> None:
    edit_json(llama_copy / "tokenizer.json", edit)
    # transformers 4 writes the added tokens here as well, and believes this copy.
    edit_json(llama_copy / "tokenizer_config.json", lambda table: table.pop("added_tokens_decoder", None))
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        check_tokenizer(DenseCheckpoint.open(llama_copy))
    assert "\n" not in str(caught.value) and str(llama_copy) in str(caught.value)


def test_ignore_merges_without_a_counterpart(tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "model", tokenizer="qwen2")
    edit_json(path / "tokenizer.json", lambda table: table["model"].update(ignore_merges=True))
    with pytest.raises(UserError, match=r"knows no llama.cpp pre-tokenizer; known: llama-bpe, smaug-bpe, qwen2"):
        check_tokenizer(DenseCheckpoint.open(path))


def test_more_tokens_than_rows(tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "model", vocab_size=400)
    larger = make_tiny(tmp_path / "larger", vocab_size=512)
    shutil.copy(larger / "tokenizer.json", path)
    with pytest.raises(UserError, match="ids up to 511, the model's embedding 400 rows"):
        check_tokenizer(DenseCheckpoint.open(path))


def test_a_model_without_an_end_token(llama_copy: Path) -> None:
    edit_json(llama_copy / "tokenizer_config.json", lambda table: table.pop("eos_token"))
    edit_json(llama_copy / "config.json", lambda table: table.update(eos_token_id=None))
    (llama_copy / "generation_config.json").unlink()
    with pytest.raises(UserError, match="names no eos_token"):
        check_tokenizer(DenseCheckpoint.open(llama_copy))


def test_a_bos_that_is_not_named_is_not_left_to_llama_cpp(tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "model", tokenizer="qwen2")  # no BOS; llama.cpp's default would be token 11
    vocabulary = read_vocabulary(DenseCheckpoint.open(path))
    assert vocabulary.special_ids == {"bos": 2, "eos": 2, "eot": 2, "pad": 0} and not vocabulary.add_bos


@pytest.mark.parametrize("edit, message", [
    (lambda table: table.update(normalizer=None, pre_tokenizer={
        "type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}),
     "puts one space before"),
    (lambda table: table["added_tokens"][0].update(normalized=True), "normalized = true on '<unk>'"),
    (lambda table: table["model"]["vocab"].update({"no byte": table["model"]["vocab"].pop("<0x7F>")}),
     "lacks 1 of 256 byte tokens (<0x7F>)"),
])
def test_sentencepiece_that_gguf_cannot_carry(edit: Callable[[dict[str, Any]], None], message: str,
                                              tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "model", tokenizer="spm")
    edit_json(path / "tokenizer.json", edit)
    edit_json(path / "tokenizer_config.json", lambda table: table.pop("added_tokens_decoder", None))
    with pytest.raises(UserError, match=re.escape(message)):
        check_tokenizer(DenseCheckpoint.open(path))
