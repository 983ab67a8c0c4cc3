"""Compare the tokenizer in a GGUF file with a checkpoint's, as llama.cpp would read it.

The ids that llama.cpp produces are compared in the runtime. This audit names the cause: a token, a merge, a score.
"""
from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from gguf import TokenType
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError
from lrc_edge.export.audit.template import audit_template
from lrc_edge.export.gguf.vocabulary import Vocabulary, merge_scores, read_vocabulary
from lrc_edge.finding import Finding, Severity, differs, shown
from lrc_edge.gguf_header import GgufHeader

_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
                 "jina-v5-nano")
# llama.cpp's names of the same splitting rule. Source: llm_tokenizer_bpe and llama_vocab::impl::load in
# src/llama-vocab.cpp.
SAME_PRE: dict[str, tuple[str, ...]] = {
    "llama-bpe": _LLAMA3_NAMES,
    "smaug-bpe": ("smaug-bpe", "dbrx"),
    "qwen2": ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open"),
    "smollm": ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
    "gpt-2": ("gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de", "a.x-4.0", "mellum",
              "modern-bert", "exaone4", "mpt", "olmo", "jais", "trillion", "granite-docling"),
}
_ADD_BOS_BY_DEFAULT = (*_LLAMA3_NAMES, "tekken", "chameleon")
# The ids that llama.cpp takes where a file names none, and the texts that end a generation in any file; ibidem.
_DEFAULT_IDS = {"llama": {"bos": 1, "eos": 2}, "gpt2": {"bos": 11, "eos": 11}}
ENDS_BY_TEXT = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
                "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
                "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>")
_FEW = 0.01  # share of scores that may be equal
_FOUND_IN_TEXT = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)


def audit_vocabulary(header: GgufHeader, checkpoint: DenseCheckpoint) -> list[Finding]:
    """Compare tokens, their types, merges, scores, splitting rule, special tokens and chat template.

    A tokenizer that lrc-edge cannot write to GGUF is compared as far as possible, with a note.
    """
    return list(_Vocabularies(header, checkpoint).findings())


class _Vocabularies:
    def __init__(self, header: GgufHeader, checkpoint: DenseCheckpoint):
        self.metadata, self.checkpoint = header.metadata, checkpoint
        self.tokenizer = checkpoint.tokenizer()
        self.known = set(self.tokenizer.get_vocab().values())  # the other ids are padding
        self.problem: UserError | None = None
        try:
            self.expected = read_vocabulary(checkpoint)
        except UserError as error:
            self.problem, self.expected = error, _partial(checkpoint, self.tokenizer)
        self.tokens = _strings(self._key("tokens"))

    def _key(self, name: str) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{name}")

    def findings(self) -> Iterator[Finding]:
        kind, expected = self._key("model"), self.expected.model
        if self.problem is not None:
            yield Finding("tokenizer", f"tokenizer: only in part comparable without a runtime ({self.problem})", "note")
        if kind != expected:
            yield differs("tokenizer model", kind, expected)
        yield from self._tokens()
        if kind == expected:
            yield from self._types()
            yield from self._scores() if kind == "llama" else self._merges()
        yield from self._special_tokens()
        yield from audit_template(self.metadata.get("tokenizer.chat_template"), self.tokenizer)

    def _tokens(self) -> Iterator[Finding]:
        expected = self.expected.tokens
        if len(self.tokens) != len(expected):
            yield differs("number of tokens", len(self.tokens), len(expected))
        wrong = [i for i in sorted(self.known) if i < min(len(self.tokens), len(expected))
                 and self.tokens[i].replace("▁", " ") != expected[i].replace("▁", " ")]
        if wrong:
            yield differs("tokens", self.tokens[wrong[0]], expected[wrong[0]], f"token {wrong[0]}{_more(len(wrong))}")

    def _types(self) -> Iterator[Finding]:
        """Compare token types. They matter only if they decide whether a token is matched before the text is split."""
        if not self.expected.types:
            return
        found = self._key("token_type")
        found = found if isinstance(found, list) else []
        found = [*found, *[int(TokenType.NORMAL)] * (len(self.expected.types) - len(found))]
        wrong: list[int] = []
        other: list[int] = []
        for i in sorted(self.known & set(range(len(self.expected.types)))):
            if (kind := self.expected.types[i]) != found[i]:
                same_use = kind in _FOUND_IN_TEXT and found[i] in _FOUND_IN_TEXT
                ends = self.expected.tokens[i] in ENDS_BY_TEXT  # whose type llama.cpp corrects
                (other if same_use or ends else wrong).append(i)
        severity: Severity
        for ids, severity in ((wrong, "fault"), (other, "note")):
            if ids:
                i = ids[0]
                yield differs("token types", _type_name(found[i]), _type_name(self.expected.types[i]),
                              f"token {i}, {shown(self.expected.tokens[i])}{_more(len(ids))}", severity)

    def _merges(self) -> Iterator[Finding]:
        found, expected = self._key("merges"), self.expected.merges or []
        if not isinstance(found, list):
            yield differs("merges", found, f"{len(expected):,} merges")
        elif found != expected:
            first = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b),
                         min(len(found), len(expected)))
            there, here = (table[first] if first < len(table) else None for table in (found, expected))
            yield differs("merges", there, here,
                          f"merge {first}; the file has {len(found):,}, the model {len(expected):,}")
        yield from self._pre()

    def _pre(self) -> Iterator[Finding]:
        found, expected = self._key("pre"), self.expected.pre
        if not expected or found in SAME_PRE.get(expected, (expected,)):
            return
        if {found, expected} <= {*SAME_PRE["llama-bpe"], *SAME_PRE["smaug-bpe"]}:
            yield differs("pre-tokenizer", found, expected, "differs for words that no merges make", "note")
        else:
            yield differs("pre-tokenizer", found, expected)

    def _scores(self) -> Iterator[Finding]:
        """Compare the order of scores, which is all that matters: llama.cpp merges the pair with the highest score."""
        expected, found = self.expected.scores or [], self._key("scores")
        if not isinstance(found, list) or len(found) < len(expected):
            yield differs("token scores", found and f"{len(found):,} scores", f"{len(expected):,} scores")
            return
        last = min(expected, default=0.0)  # of tokens that no merge makes
        order = sorted((i for i in range(len(expected)) if expected[i] > last), key=lambda i: -expected[i])
        pairs = list(pairwise(order))
        equal = [pair for pair in pairs if found[pair[0]] == found[pair[1]]]
        wrong = [pair for pair in pairs if not found[pair[0]] >= found[pair[1]]]
        if len(equal) > _FEW * len(pairs):
            wrong = [*wrong, *equal]
        if wrong:
            first, second = wrong[0]
            yield Finding("token scores", f"token scores: token {first} has {found[first]:g}, token {second} "
                          f"{found[second]:g}, but is merged after it; {len(wrong):,} of {len(pairs):,} neighbours are "
                          "out of order")
        elif equal:
            yield differs("token scores", f"{len(equal)} equal pairs", "none", severity="note")
        prefix = self._key("add_space_prefix")
        if self.problem is None and (True if prefix is None else prefix) != self.expected.add_space_prefix:
            yield differs("space before the text", prefix, self.expected.add_space_prefix)

    def _special_tokens(self) -> Iterator[Finding]:
        kind, ids = str(self._key("model")), self.expected.special_ids
        adds_bos = kind == "llama" or self._key("pre") in _ADD_BOS_BY_DEFAULT
        for name, default, expected in (("add_bos", adds_bos, self.expected.add_bos),
                                        ("add_eos", False, self.expected.add_eos)):
            found = self._key(f"{name}_token")
            effective = default if found is None else found
            if effective is not expected:
                why = "" if found is not None else f"left out, llama.cpp takes {default} for this tokenizer"
                yield differs(f"{name}_token", effective, expected, why)
        bos = self._special_id("bos", kind)
        if bos != ids.get("bos") and (self.expected.add_bos or self._declared("bos") is not None):
            used = self.expected.add_bos or self._key("bos_token_id") is not None
            yield differs("BOS token", self._text(bos), self._text(ids.get("bos")),
                          severity="fault" if used else "note")
        yield from self._ends(kind)
        for name, key in (("unk", "unknown_token_id"), ("pad", "padding_token_id")):
            found = self._key(key)
            if found is not None and name in ids and found != ids[name]:
                yield differs(f"{name} token", self._text(found), self._text(ids[name]), severity="note")

    def _ends(self, kind: str) -> Iterator[Finding]:
        """Compare EOS and every other token that ends a text or a turn."""
        ids = self.expected.special_ids
        ends = declared_ends(self.checkpoint, self.tokenizer)
        ends |= {ids[name] for name in ("eos", "eot", "eom") if name in ids}
        eos = self._special_id("eos", kind)
        stops = {eos, self._key("eot_token_id"), self._key("eom_token_id")}
        stops |= {i for i, token in enumerate(self.tokens) if token in ENDS_BY_TEXT}
        if eos not in ends:
            yield differs("EOS token", self._text(eos), self._text(ids.get("eos")))
        elif eos != ids.get("eos"):
            yield differs("EOS token", self._text(eos), self._text(ids.get("eos")),
                          "both end a text of this model", "note" if ids.get("eos") in stops else "fault")
        for name in ("eot", "eom"):
            found = self._key(f"{name}_token_id")
            if found is not None and found not in ends and self._text(found) not in ENDS_BY_TEXT:
                yield differs(f"{name.upper()} token", self._text(found), self._text(ids.get(name)))
        missed = sorted(i for i in ends - stops - {ids.get("eos")} if i in self.known)
        if missed:
            yield Finding("end tokens", f"end tokens: llama.cpp would not stop at {self._text(missed[0])}, which "
                          f"generation_config.json or config.json names{_more(len(missed))}", "note")

    def _special_id(self, name: str, kind: str) -> Any:
        found = self._key(f"{name}_token_id")
        return _DEFAULT_IDS.get(kind, {}).get(name) if found is None else found

    def _declared(self, name: str) -> Any:
        token = getattr(self.tokenizer, f"{name}_token_id", None)
        return self.checkpoint.config.get(f"{name}_token_id") if token is None else token

    def _text(self, token: Any) -> str | None:
        """"</s>" of an id."""
        if not isinstance(token, int):
            return None if token is None else repr(token)
        return self.tokens[token] if 0 <= token < len(self.tokens) else f"id {token}"


def declared_ends(checkpoint: DenseCheckpoint, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return every id that generation_config.json, config.json or the tokenizer names as the end of a text."""
    file = checkpoint.path / "generation_config.json"
    try:
        generation = json.loads(file.read_text()) if file.exists() else {}
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); get an intact copy or delete it") from error
    generation = generation if isinstance(generation, dict) else {}
    found: set[int] = set()
    for value in (generation.get("eos_token_id"), checkpoint.config.get("eos_token_id"), tokenizer.eos_token_id):
        found |= {item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int)}
    return found


def _partial(checkpoint: DenseCheckpoint, tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """Return the comparable part of a tokenizer that read_vocabulary refuses: no types, no splitting rule."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str())["model"] if backend is not None else {"type": "none"}
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(checkpoint.shape.vocab_size)]
    ids = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk", "pad")}
    encoded = tokenizer.encode("a")
    add_bos, add_eos = encoded[:1] == [ids["bos"]], encoded[-1:] == [ids["eos"]]
    kind = {True: "llama", False: "gpt2"}[bool(model.get("byte_fallback"))] if model["type"] == "BPE" else model["type"]
    merges = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model.get("merges", [])]
    return Vocabulary(
        kind, "", tokens, [], merge_scores(tokens, merges) if kind == "llama" else None,
        [" ".join(pair) for pair in merges] if kind == "gpt2" else None,
        {name: token for name, token in ids.items() if token is not None}, add_bos, add_eos, True, None)


def _strings(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []


def _more(n: int) -> str:
    return f", and {n - 1:,} more" if n > 1 else ""


def _type_name(kind: int) -> str:
    try:
        return TokenType(kind).name.lower()
    except ValueError:
        return f"type {kind}"
