"""Choose the tokens of a smaller vocabulary: the rarest leaves of the tree of BPE merges go.

A leaf is a token that is not a part of a merge of another kept token. When a leaf goes, its text becomes other tokens,
which inherit its occurrences and may become leaves. So every merge of a kept token is kept, and a text whose ids are
all kept is encoded as before.
"""
from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.corpus.encode import DAY
from lrc_edge.corpus.sources import Messages
from lrc_edge.errors import UserError
from lrc_edge.train.trimmed_teacher import named_ids, tokenizer_table

COUNTED_TOKENS = 2_000_000  # occurrences are counted in this much of the training text
# What a chat template writes around these: roles, a default system prompt, the beginning of an answer.
_CONVERSATIONS: tuple[Messages, ...] = (
    [{"role": "user", "content": "a"}],
    [{"role": role, "content": "a"} for role in ("system", "user", "assistant", "user")],
)
_KEEP_ALL = "set student.vocab_size=0 to keep all tokens"

Merge = tuple[int, int, int]  # left part, right part, the token that they make


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a teacher, and how merges make them."""

    n_rows: int  # of the embedding; rows without a token are padding
    texts: dict[int, str]  # id -> text, in the symbols of the merges
    merges: tuple[Merge, ...]  # the first merged first
    must_stay: frozenset[int]

    @classmethod
    def of(cls, teacher: DenseCheckpoint) -> Vocabulary:
        """Read a teacher's tokenizer. Raises UserError unless it is a BPE without SentencePiece's byte tokens."""
        if not (teacher.path / "tokenizer.json").exists():
            raise _unsupported(teacher, "is SentencePiece's (tokenizer.model)")
        tokenizer = teacher.tokenizer()  # raises if the file does not load
        table = tokenizer_table(teacher.path)
        _check_model(teacher, table["model"])
        vocab = table["model"]["vocab"]
        texts = {token: text for text, token in [*tokenizer.get_added_vocab().items(), *vocab.items()]}
        n_rows = teacher.shape.vocab_size
        if max(texts) >= n_rows:
            raise UserError(f"{teacher.path}: the tokenizer has ids up to {max(texts)}, the embedding {n_rows} rows; "
                            "get a tokenizer and weights that belong together")
        merges = tuple(_ids_of_merge(teacher, pair, vocab) for pair in table["model"]["merges"])
        stays = {*_indivisible(vocab), *tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids,
                 *_written_by_template(tokenizer), *named_ids(teacher.path)}
        if table["model"]["unk_token"] in vocab:
            stays.add(vocab[table["model"]["unk_token"]])
        return cls(n_rows, texts, merges, _with_parts(stays & set(range(n_rows)), merges))

    def check_size(self, size: int) -> None:
        """Raise UserError if fewer than `size` tokens can go."""
        if size < len(self.must_stay):
            raise UserError(f"student.vocab_size = {size}: {len(self.must_stay)} tokens must stay (bytes, special "
                            "tokens, those that the chat template writes, and their parts); need at least "
                            f"{len(self.must_stay)}, or 0 to keep all")

    def choose(self, size: int, counts: np.ndarray) -> list[int]:
        """Return the `size` ids that stay, in ascending order.

        counts: (n_rows,) occurrences of each id. Among equally rare tokens, the one that is merged last goes first.
        Padding goes before all tokens. Raises UserError as `check_size` does.
        """
        self.check_size(size)
        forest, kept = _Forest(self), set(range(self.n_rows))
        n = [int(counts[i]) if i in self.texts else -1 for i in range(self.n_rows)]

        def entry(token: int) -> tuple[int, int, int]:
            return n[token], -forest.rank(token), -token

        heap = [entry(token) for token in kept - self.must_stay if forest.is_leaf(token)]
        heapq.heapify(heap)
        while len(kept) > size:
            count, _, negative = heapq.heappop(heap)
            token = -negative
            if token not in kept or count != n[token]:
                continue  # an entry from before the token's count changed
            kept.remove(token)
            changed = forest.remove(token)
            for piece in forest.encode(self.texts.get(token, "")):
                n[piece] += count
                changed.add(piece)
            for other in changed - self.must_stay:
                if forest.is_leaf(other):
                    heapq.heappush(heap, entry(other))
        return sorted(kept)


class _Forest:
    """The merges of the tokens that are still kept."""

    def __init__(self, vocabulary: Vocabulary):
        self._symbols = {text: token for token, text in vocabulary.texts.items() if len(text) == 1}
        self._merges = {(left, right): (rank, made) for rank, (left, right, made) in enumerate(vocabulary.merges)}
        self._pairs_of = defaultdict[int, list[tuple[int, int]]](list)  # token -> the pairs that make it, by rank
        for pair, (_, made) in self._merges.items():
            self._pairs_of[made].append(pair)
        self._n_uses = Counter(part for pair in self._merges for part in pair)
        self._last = len(vocabulary.merges)

    def is_leaf(self, token: int) -> bool:
        return not self._n_uses[token]

    def rank(self, token: int) -> int:
        """Return when the token is first merged. Tokens without a merge count as the last."""
        pairs = self._pairs_of.get(token)
        return self._merges[pairs[0]][0] if pairs else self._last

    def remove(self, leaf: int) -> set[int]:
        """Remove the leaf's merges; return its parts."""
        pairs = self._pairs_of.pop(leaf, [])
        for pair in pairs:
            del self._merges[pair]
            self._n_uses.subtract(pair)
        return {part for pair in pairs for part in pair}

    def encode(self, text: str) -> list[int]:
        """Return the ids that the merges make of a text of known symbols."""
        ids = [self._symbols[symbol] for symbol in text]
        while found := [(*self._merges[pair], i) for i, pair in enumerate(pairwise(ids)) if pair in self._merges]:
            _, made, i = min(found, key=lambda merge: (merge[0], merge[2]))
            ids[i:i + 2] = [made]
        return ids


def _unsupported(teacher: DenseCheckpoint, what: str) -> UserError:
    return UserError(f"{teacher.path}: the tokenizer {what}; student.vocab_size needs a byte-level BPE in "
                     f"tokenizer.json; {_KEEP_ALL}")


def _check_model(teacher: DenseCheckpoint, model: dict[str, Any]) -> None:
    if model["type"] != "BPE":
        raise _unsupported(teacher, f"is of type {model['type']}")
    if model["byte_fallback"]:
        raise _unsupported(teacher, "is SentencePiece's (BPE with byte_fallback)")
    for affix in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model[affix]:
            raise _unsupported(teacher, f"is a BPE with {affix} = {model[affix]!r:.40}")


def _ids_of_merge(teacher: DenseCheckpoint, pair: Sequence[str], vocab: dict[str, int]) -> Merge:
    texts = (*pair, "".join(pair))
    if missing := [text for text in texts if text not in vocab]:
        raise UserError(f"{teacher.path / 'tokenizer.json'}: merge {' '.join(pair)!r:.60} needs token "
                        f"{missing[0]!r:.60}, which is missing; get an intact copy")
    left, right, made = (vocab[text] for text in texts)
    return left, right, made


def _indivisible(vocab: dict[str, int]) -> Iterable[int]:
    """Yield the single symbols (of a byte-level BPE: the bytes), and tokens that other tokens cannot spell."""
    symbols = {text for text in vocab if len(text) == 1}
    return (token for text, token in vocab.items() if text in symbols or not symbols.issuperset(text))


def _written_by_template(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of what the chat template writes, by itself, in a few conversations."""
    found: set[int] = set()
    template = tokenizer.chat_template
    for text in template.values() if isinstance(template, dict) else [template] if template else []:
        for messages in _CONVERSATIONS:
            for answer_next in (False, True):
                try:
                    written = tokenizer.apply_chat_template(messages, chat_template=text, tokenize=False,
                                                            add_generation_prompt=answer_next, date_string=DAY)
                except Exception:  # a template may refuse a role, by raising whatever it likes
                    continue
                found.update(tokenizer(str(written), add_special_tokens=False, verbose=False)["input_ids"])
    return found


def _with_parts(tokens: set[int], merges: Iterable[Merge]) -> frozenset[int]:
    """Return the tokens and all parts of the merges that make them."""
    parts = defaultdict[int, set[int]](set)
    for left, right, made in merges:
        parts[made] |= {left, right}
    found, left_to_do = set(tokens), list(tokens)
    while left_to_do:
        new = parts[left_to_do.pop()] - found
        found |= new
        left_to_do += new
    return frozenset(found)
