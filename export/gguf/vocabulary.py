"""Convert a Hugging Face tokenizer to a GGUF vocabulary.

llama.cpp knows a tokenizer's splitting rule only by name (tokenizer.ggml.pre). The name is chosen here from the
structure of the loaded tokenizer. Verification then compares the ids in the runtime.
"""
from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from gguf import TokenType
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.config_file import ids_of
from lrc_edge.errors import UserError

_LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
           r"|\s*[\r\n]+|\s+(?!\S)|\s+")
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_BYTES, _BYTES_AND_GPT2_WORDS = ("ByteLevel", False), ("ByteLevel", True)

# Steps of the pre-tokenizer, and whether whole words skip the merges -> llama.cpp's name of that rule.
# Source: llm_tokenizer_bpe and llama_vocab::impl::load in llama.cpp's src/llama-vocab.cpp.
PRE_TOKENIZERS: dict[tuple[tuple[tuple[Any, ...], ...], bool], str] = {
    ((("Split", _LLAMA3), _BYTES), True): "llama-bpe",
    ((("Split", _LLAMA3), _BYTES), False): "smaug-bpe",  # llama-bpe's pattern, always through the merges
    ((("Split", _QWEN2), _BYTES), False): "qwen2",
    ((("Digits", True), _BYTES_AND_GPT2_WORDS), False): "smollm",
    ((_BYTES_AND_GPT2_WORDS,), False): "gpt-2",
}
# Texts of tokens that end a turn, the most telling first. llama.cpp looks for the same ones, in hash order.
_END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<end_of_utterance>", "<EOT>")
_END_OF_MESSAGE = ("<|eom_id|>",)
# Texts of tokens at which llama.cpp always ends a generation: those that it has known the longest
# (special_eog_ids in src/llama-vocab.cpp), because other programs hold older versions of it.
_KNOWN_ENDS = frozenset((*_END_OF_TURN, *_END_OF_MESSAGE, "<|endoftext|>", "<|end_of_text|>"))
_SPACE = "▁"  # SentencePiece's mark of a space
_BYTE_TOKENS = {f"<0x{byte:02X}>" for byte in range(256)}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as GGUF stores it; field names follow its tokenizer.ggml.* keys."""

    model: str  # "gpt2": byte-level BPE; "llama": SentencePiece's BPE
    pre: str
    tokens: list[str]  # one for each row of the embedding
    types: list[int]  # gguf.TokenType
    scores: list[float] | None  # SentencePiece: the higher, the sooner merged
    merges: list[str] | None  # byte-level: "left right", the first merged first
    special_ids: dict[str, int]  # "bos", "eos", "eot", "eom", "unk", "pad" -> token id
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | list[dict[str, str]] | None


def check_tokenizer(checkpoint: DenseCheckpoint) -> None:
    """Raise UserError if GGUF cannot represent the checkpoint's tokenizer. Takes seconds; call it before training."""
    read_vocabulary(checkpoint)


def read_vocabulary(checkpoint: DenseCheckpoint) -> Vocabulary:
    """Return the GGUF vocabulary of a checkpoint. Raises UserError that names what llama.cpp does not support."""
    tokenizer = checkpoint.tokenizer()
    where = f"{checkpoint.path}: the tokenizer"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"{where} ({type(tokenizer).__name__}) has no fast form; save it as tokenizer.json")
    table = json.loads(backend.to_str())
    model = table["model"]
    if model["type"] != "BPE":
        raise UserError(f"{where} is of type {model['type']}; GGUF output needs BPE, byte-level or SentencePiece's")
    _check_added_tokens(table["added_tokens"], where)
    by_id = _tokens_by_id(table, checkpoint.shape.vocab_size, where)
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(checkpoint.shape.vocab_size)]
    if repeated := [token for token, n in Counter(tokens).items() if n > 1]:
        raise UserError(f"{where} has the token {repeated[0]!r} twice, which llama.cpp refuses; fix tokenizer.json")
    prefix, suffix = _added_by_encode(tokenizer, where)
    ids = _special_ids(tokenizer, checkpoint, by_id, prefix, suffix, where)
    merges = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    if model.get("byte_fallback"):
        space_prefix = _sentencepiece_prefix(table, where)
        kind, pre, scores, merge_lines = "llama", "default", merge_scores(tokens, merges), None
        _check_sentencepiece(tokens, table["added_tokens"], space_prefix, where)
        tokens, types = _sentencepiece_types(tokens, table["added_tokens"], by_id, ids)
    else:
        space_prefix = False
        kind, pre, scores = "gpt2", _pre_tokenizer_name(table, where), None
        merge_lines = [" ".join(pair) for pair in merges]
        types = _byte_level_types(tokens, table["added_tokens"], by_id)
    return Vocabulary(kind, pre, tokens, types, scores, merge_lines, ids, bool(prefix), bool(suffix), space_prefix,
                      _chat_template(tokenizer))


def _check_added_tokens(added: list[dict[str, Any]], where: str) -> None:
    """Check the added tokens. llama.cpp finds them by their plain text and cannot strip spaces around them."""
    for token in added:
        for switch in ("lstrip", "rstrip", "single_word"):
            if token.get(switch):
                raise UserError(f"{where} has {switch} = true on {token['content']!r}, which GGUF cannot represent; "
                                "leave gguf out of --formats or fix tokenizer.json")


def _tokens_by_id(table: dict[str, Any], n_rows: int, where: str) -> dict[int, str]:
    by_id = {i: token for token, i in table["model"]["vocab"].items()}
    by_id |= {token["id"]: token["content"] for token in table["added_tokens"]}
    if max(by_id) >= n_rows:
        raise UserError(f"{where} has ids up to {max(by_id)}, the model's embedding {n_rows} rows; "
                        "get a tokenizer and weights that belong together")
    return by_id


def _added_by_encode(tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[list[int], list[int]]:
    """Return the ids that encoding adds before and after a text. GGUF can represent one BOS and one EOS."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a")
    starts = [i for i in range(len(full)) if full[i:i + len(plain)] == plain]
    prefix, suffix = (full[:starts[0]], full[starts[0] + len(plain):]) if starts else (full, [])
    if not starts or len(prefix) > 1 or len(suffix) > 1:
        raise UserError(f"{where} turns 'a' into {tokenizer.convert_ids_to_tokens(full)}; GGUF can add one BOS before "
                        "and one EOS after a text, nothing else")
    return prefix, suffix


def _special_ids(tokenizer: PreTrainedTokenizerBase, checkpoint: DenseCheckpoint, by_id: dict[int, str],
                 prefix: list[int], suffix: list[int], where: str) -> dict[str, int]:
    """Return tokenizer.ggml.*_token_id. The ids that encoding really adds take precedence over declared ones."""
    config = checkpoint.config

    def declared(name: str) -> int | None:
        own = getattr(tokenizer, f"{name}_token_id", None)
        return own if own is not None else next(iter(ids_of(config, f"{name}_token_id")), None)

    stops = checkpoint.stop_ids(tokenizer)
    ids = {name: declared(name) for name in ("bos", "unk", "pad")}
    ids["bos"] = prefix[0] if prefix else ids["bos"]
    # Chat templates write the tokenizer's eos_token, so that one comes before the other stop tokens.
    ids["eos"] = next((i for i in (*suffix, tokenizer.eos_token_id, *stops) if i is not None), None)
    if ids["eos"] is None:
        raise UserError(f"{where} names no eos_token; without one llama.cpp would stop at an arbitrary token: "
                        "set eos_token in tokenizer_config.json")
    if ids["bos"] is None:
        # Left unsaid, llama.cpp takes token 11 (or 1) for the BOS. Qwen's own files name an end token here, too.
        ids["bos"] = ids["eos"]
    by_text = {text: i for i, text in by_id.items()}
    for name, texts in (("eot", _END_OF_TURN), ("eom", _END_OF_MESSAGE)):
        ids[name] = next((by_text[text] for text in texts if text in by_text), None)
    ids |= _places_of_stops(ids, [i for i in stops if i != ids["eos"] and by_id.get(i) not in _KNOWN_ENDS], where)
    return {name: int(i) for name, i in ids.items() if i is not None and (i in by_id or i in stops)}


def _places_of_stops(ids: dict[str, int | None], unknown: list[int], where: str) -> dict[str, int]:
    """Where llama.cpp finds the tokens that end a generation without being its EOS or known to it by their text.

    It also ends at the EOT and the EOM, and knows those that `ids` holds by their text: they can give up their places.
    """
    places = sorted(("eot", "eom"), key=lambda name: ids[name] is not None)
    if len(unknown) > len(places):
        raise UserError(f"{where} and generation_config.json name {len(unknown) + 1} tokens that end a generation and "
                        f"that llama.cpp does not know ({', '.join(map(str, (ids['eos'], *unknown)))}); GGUF holds "
                        f"{len(places) + 1}: remove some from eos_token_id, or leave gguf out of --formats")
    return dict(zip(places, unknown, strict=False))


def _pre_tokenizer_name(table: dict[str, Any], where: str) -> str:
    """Return llama.cpp's name of a byte-level pre-tokenizer. Raises UserError that describes an unknown one."""
    normalizer = (table["normalizer"] or {}).get("type")
    # NFC alone is accepted: llama.cpp tokenizes text as it comes, which differs only for text that is not in NFC.
    if normalizer not in (None, "NFC"):
        raise UserError(f"{where} normalizes text with {_brief(table['normalizer'])}, which llama.cpp does not; "
                        "leave gguf out of --formats")
    steps = _steps(table["pre_tokenizer"])
    ignore_merges = bool(table["model"].get("ignore_merges"))
    name = PRE_TOKENIZERS.get((steps, ignore_merges))
    if name is None:
        known = ", ".join(PRE_TOKENIZERS.values())
        raise UserError(f"{where} splits text with {_brief(table['pre_tokenizer'])} (ignore_merges = {ignore_merges}), "
                        f"for which lrc-edge knows no llama.cpp pre-tokenizer; known: {known}; "
                        "leave gguf out of --formats")
    return name


def _steps(pre_tokenizer: dict[str, Any] | None) -> tuple[tuple[Any, ...], ...]:
    """Return the steps of a pre-tokenizer, except those that do not change the ids."""
    if pre_tokenizer is None:
        return ()
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        return tuple(step for part in pre_tokenizer["pretokenizers"] for step in _steps(part))
    if kind == "Split" and pre_tokenizer["behavior"] == "Isolated" and not pre_tokenizer["invert"]:
        return (("Split", pre_tokenizer["pattern"].get("Regex")),)
    if kind == "Digits":
        return (("Digits", pre_tokenizer["individual_digits"]),)
    if kind == "ByteLevel" and not pre_tokenizer["add_prefix_space"]:
        return (("ByteLevel", pre_tokenizer.get("use_regex", True)),)
    return ((_brief(pre_tokenizer),),)


def _brief(part: Any) -> str:
    text = json.dumps(part, ensure_ascii=False)
    return text if len(text) <= 600 else text[:600] + "..."


def _sentencepiece_prefix(table: dict[str, Any], where: str) -> bool:
    """Whether a space is added before the text. Raises UserError if llama.cpp's SentencePiece lacks a feature."""
    normalizer, splitter = table["normalizer"], table["pre_tokenizer"]
    parts = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    if splitter is None and parts == [{"type": "Prepend", "prepend": _SPACE}, replace]:
        return True
    metaspace = splitter is not None and splitter["type"] == "Metaspace" and not splitter.get("split", True)
    if (splitter is None and parts == [replace]) or (
            normalizer is None and metaspace and splitter.get("prepend_scheme") == "never"):
        return False
    raise UserError(
        f"{where} prepares text with normalizer {_brief(normalizer)} and pre-tokenizer {_brief(splitter)}; llama.cpp "
        "puts one space before every stretch of text, also where it begins with a space or follows a special token, "
        "or none at all: the ids would differ; leave gguf out of --formats, or give the model a tokenizer.json with "
        f"the normalizer Prepend {_SPACE!r}, which reads such text as llama.cpp does")


def merge_scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Return SentencePiece scores that keep the order of merges: minus the rank of each token's first merge."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    # No merge makes the other tokens (characters, bytes, special ones): their score is never compared.
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _check_sentencepiece(tokens: list[str], added: list[dict[str, Any]], space_prefix: bool, where: str) -> None:
    if missing := _BYTE_TOKENS - set(tokens):
        raise UserError(f"{where} lacks {len(missing)} of 256 byte tokens ({min(missing)}), which llama.cpp needs; "
                        "leave gguf out of --formats")
    for token in added:
        if space_prefix and token["normalized"]:
            # Its text is normalized, too, so Hugging Face finds it only after a space, llama.cpp everywhere.
            raise UserError(f"{where} has normalized = true on {token['content']!r}, which GGUF cannot represent; "
                            "set it to false in tokenizer.json")


def _sentencepiece_types(tokens: list[str], added: list[dict[str, Any]], by_id: dict[int, str],
                         ids: dict[str, int]) -> tuple[list[str], list[int]]:
    types = [TokenType.BYTE if token in _BYTE_TOKENS else TokenType.NORMAL if i in by_id else TokenType.UNUSED
             for i, token in enumerate(tokens)]
    tokens = list(tokens)
    for token in added:
        i = token["id"]
        if token["special"]:
            types[i] = TokenType.UNKNOWN if i == ids.get("unk") else TokenType.CONTROL
        else:
            types[i] = TokenType.USER_DEFINED
        if token["normalized"]:
            tokens[i] = tokens[i].replace(_SPACE, " ")  # llama.cpp looks for it before it marks the spaces
    return tokens, [int(kind) for kind in types]


def _byte_level_types(tokens: list[str], added: list[dict[str, Any]], by_id: dict[int, str]) -> list[int]:
    types = [TokenType.NORMAL if i in by_id else TokenType.UNUSED for i in range(len(tokens))]
    for token in added:
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    return [int(kind) for kind in types]


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> str | list[dict[str, str]] | None:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        return [{"name": name, "template": text} for name, text in template.items()]
    return template or None
