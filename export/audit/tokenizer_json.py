"""Compare the tokenizer next to an ONNX file, as its runtimes read it (tokenizer.json alone), with the checkpoint's."""
from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lrc_edge.errors import one_line, quiet_panics
from lrc_edge.finding import Finding, differs

# Parts of tokenizer.json whose structure may differ without effect: decided by the ids of PROBES.
_STEPS = {"normalizer": "normalizer", "pre_tokenizer": "pre-tokenizer", "post_processor": "post-processor",
          "decoder": "decoder", "truncation": "truncation", "padding": "padding"}
PROBES = ("Hello, world! It's 3.14159.", "  two  spaces\n\n\tand tabs ", "naïve café — 世界 🙂",
          "don't WON'T I'LL 12345678", "x" * 40, "def f(a, b):\n    return a + b\n", "", " ",
          "é e\u0301 ﬁ", "<s> </s> <|im_start|>user<|im_end|>")


def audit_tokenizer_json(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """Compare tokens, merges, added tokens and steps of folder/tokenizer.json with the model's tokenizer."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        yield Finding("missing file", f"missing file: {file.name} is not in {folder}")
        return
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        yield Finding("tokenizer", "tokenizer: the model's has no fast form; compared in a runtime only", "note")
        return
    try:
        with quiet_panics():
            found = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except BaseException as error:  # the library panics on some files: that is not an Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        yield Finding("tokenizer", f"tokenizer: {file.name} does not load ({one_line(error)})")
        return
    yield from _compare(json.loads(found.to_str()), json.loads(backend.to_str()), lambda: _same_ids(found, backend))


def _compare(found: dict[str, Any], expected: dict[str, Any], same_ids: Any) -> Iterator[Finding]:
    model, wanted = found["model"], expected["model"]
    if model["type"] != wanted["type"]:
        yield differs("tokenizer model", model["type"], wanted["type"])
        return
    yield from _compare_tokens(model.get("vocab"), wanted.get("vocab"))
    yield from _compare_merges(model.get("merges"), wanted.get("merges"))
    for key in sorted((wanted.keys() | model.keys()) - {"type", "vocab", "merges"}):
        if (model.get(key) or None) != (wanted.get(key) or None):
            yield differs(f"tokenizer {key}", model.get(key), wanted.get(key))
    yield from _compare_added(found["added_tokens"], expected["added_tokens"])
    for key, name in _STEPS.items():
        if found.get(key) != expected.get(key):
            severe = key in ("decoder", "truncation", "padding") or not same_ids()
            yield differs(name, json.dumps(found.get(key)), json.dumps(expected.get(key)),
                          "" if severe else "gives the same ids for the texts tried", "fault" if severe else "note")


def _compare_tokens(found: Any, expected: Any) -> Iterator[Finding]:
    """Compare tables of token -> id; a Unigram model has a list of (token, score)."""
    if not isinstance(expected, dict) or not isinstance(found, dict):
        if found != expected:
            yield Finding("tokens", "tokens: the vocabulary differs from the model's")
        return
    wrong = sorted((expected[token], token) for token in expected if found.get(token) != expected[token])
    added = sorted((i, token) for token, i in found.items() if token not in expected)
    if wrong:
        i, token = wrong[0]
        at = next((other for other, place in found.items() if place == i), None)
        yield differs("tokens", at, token, f"token {i}; {len(wrong):,} of {len(expected):,} differ")
    elif added:
        yield differs("tokens", added[0][1], None, f"token {added[0][0]}; {len(added):,} are not the model's")


def _compare_merges(found: Any, expected: Any) -> Iterator[Finding]:
    if found == expected or (not found and not expected):
        return
    found, expected = found or [], expected or []
    first = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b),
                 min(len(found), len(expected)))
    there, here = (" ".join(table[first]) if first < len(table) else None for table in (found, expected))
    yield differs("merges", there, here, f"merge {first}; the file has {len(found):,}, the model {len(expected):,}")


def _compare_added(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> Iterator[Finding]:
    """Compare the tokens that are matched before the text is split; `special` hides them from the output."""
    added, wanted = ({token["id"]: token for token in table} for table in (found, expected))
    wrong = [i for i in sorted(added.keys() | wanted.keys()) if added.get(i) != wanted.get(i)]
    if wrong:
        i = wrong[0]
        there, here = added.get(i, {}), wanted.get(i, {})
        keys = [key for key in here | there if here.get(key) != there.get(key)] if here and there else ["content"]
        yield differs("added tokens", there.get(keys[0]), here.get(keys[0]),
                      f"{keys[0]} of token {i}" + (f", and {len(wrong) - 1:,} more" if len(wrong) > 1 else ""))


def _same_ids(found: Any, expected: Any) -> bool:
    return all(found.encode(text).ids == expected.encode(text).ids for text in PROBES)
