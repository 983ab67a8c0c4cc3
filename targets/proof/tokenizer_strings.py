"""Tokenizer test strings: difficult pieces, each alone, in context, and in seeded mixtures.

Every run uses the same strings. Characters come from Unicode 13 or earlier, because libraries differ in their support
of later characters.
"""
from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator, Sequence

SEED = 20250521
_SPACES = (" ", "\t", "\n", "\r", "\r\n", "\v", "\f", "\u00a0", "\u1680", "\u2003", "\u2009", "\u200a", "\u2028",
           "\u2029", "\u202f", "\u205f", "\u3000", "\u0085")
_INVISIBLE = ("\u200b", "\u200c", "\u200d", "\u2060", "\ufeff", "\u00ad", "\u034f", "\u180e", "\u200e", "\u200f",
              "\u202e", "\u2066", "\u2069", "\ufe0f", "\ufffd", "\ufffc")
_CONTROLS = tuple(chr(i) for i in [*range(1, 32), *range(0x7f, 0xa0)])
_SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "Der Fluß übertönt Äpfel, Öl und Überfluss – „wirklich“?",
    "L’été dernier, où étais-tu ? Ça va bien, cœur d’artichaut !",
    "El niño comió piñas; ¿cuántas? ¡Muchísimas!",
    "Zażółć gęślą jaźń. Příliš žluťoučký kůň úpěl ďábelské ódy.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "שלום עולם, מה שלומך היום?",
    "مرحبا بالعالم، كيف حالك؟ ١٢٣٤",
    "नमस्ते दुनिया, आप कैसे हैं? क्षत्रिय १२३",
    "สวัสดีชาวโลก ภาษาไทยไม่มีช่องว่าง",
    "வணக்கம் உலகம். বাংলা ভাষা। ગુજરાતી",
    "你好，世界！今天天气怎么样？",
    "吾輩は猫である。名前はまだ無い。カタカナ ﾊﾝｶｸ ＡＢＣ１２３",
    "안녕하세요 세계, 오늘 날씨가 어때요?",
    "Việt Nam: tiếng Việt có nhiều dấu, ệ ữ ặ.",
    "Türkçe: ığdır İstanbul, şişli; AZERBAYCAN ı İ",
    "አማርኛ ሰላም ልዑል; ქართული ენა; Հայերեն լեզու",
)
_CODE = (
    "def f(x):\n    if x > 0:\n\treturn x**2  # square\n    return -x\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] << 2; }\n\n\n",
    "fn main() -> Result<(), Box<dyn Error>> {\n    println!(\"{:?}\", x?);\n}\n",
    "const f = async ({a, ...rest}) => `${a ?? 'none'}\\n`;",
    "SELECT COUNT(*) FROM t WHERE a LIKE '%x_%' AND b IS NOT NULL;--",
    "<div class=\"a b\"><!-- c --><br/>&nbsp;&#x1F600;</div>",
    "{\"key\": [1, 2.5e-10, null, true], \"\\u00e9\": \"\\\\n\"}",
    "#include <stdio.h>\r\n#define MAX(a,b) ((a)>(b)?(a):(b))\r\n",
    "\\documentclass{article} $\\frac{a}{b} \\leq \\sum_{i=0}^{n} x_i^2$",
    "find . -name '*.py' | xargs grep -nE '^(class|def) ' > /dev/null 2>&1",
    "                                deeply.indented(call)",
    "https://user:pa%20ss@example.org:8080/a/b.html?q=1&r=%E2%82%AC#frag",
    "C:\\Users\\name\\file.txt; ../../etc/passwd; ~/.bashrc",
    "----- ===== +++++ ##### ***** _____ ..... !!!!! ?????",
    "0x1F 0b1010 1_000_000 1e-9 .5 5. 1,234,567.89 192.168.0.1",
)
_EMOJI = ("😀", "👍🏽", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪🇫🇷", "❤️", "☺", "1️⃣", "🧑🏿‍🚀", "👁️‍🗨️", "🏴󠁧󠁢󠁥󠁮󠁧󠁿")
_COMBINING = ("é", "e\u0301", "ñ", "n\u0303", "Å", "A\u030a", "\u212b", "ﬁ", "ǆ", "ｶﾞ", "が", "か\u3099", "각",
              "\u1100\u1161\u11a8", "ệ", "e\u0323\u0302", "e\u0302\u0323", "Z\u0351\u036b\u0343", "ß", "ẞ", "İ", "ı",
              "\u0301", "a\u0308\u0323\u0327")
_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'T", "'RE", "'Ve", "'M", "'lL", "'D", "’s", "'x",
                 "''", "'", "'em", "'ss")
# At the edges of planes, of UTF-8's lengths, and of what surrogates leave out.
_EDGES = ("\u007f", "\u0080", "\u07ff", "\u0800", "\ud7ff", "\ue000", "\uf8ff", "\uffef", "\ufffe", "\U00010000",
          "\U0001d54f", "\U0001f9ff", "\U00020000", "\U0002a6d6", "\U000e0001", "\U0010fffd")
# Ranges (first, last) to draw characters from, with the weight of each.
_RANGES = ((0x20, 0x7e, 8), (0xa1, 0x24f, 4), (0x250, 0x36f, 1), (0x370, 0x52f, 2), (0x531, 0x556, 1),
           (0x5d0, 0x5ea, 1), (0x620, 0x64a, 1), (0x904, 0x939, 1), (0xe01, 0xe30, 1), (0x1e00, 0x1eff, 1),
           (0x2010, 0x2027, 1), (0x20a0, 0x20bf, 1), (0x2190, 0x22ff, 1), (0x3041, 0x3096, 1), (0x30a1, 0x30fa, 1),
           (0x4e00, 0x9fef, 2), (0xac00, 0xd7a3, 1), (0xff01, 0xff5e, 1), (0x1f600, 0x1f64f, 1), (0x1d400, 0x1d454, 1))


def awkward_strings(special_tokens: Sequence[str]) -> list[str]:
    """At least 1,000 distinct strings, the same ones on every call; `special_tokens` are put inside some of them."""
    fixed = [*_single_pieces(), *_runs(), *_digits(), *_with_context(), *_with_special(special_tokens)]
    strings = dict.fromkeys([*fixed, *_mixtures(random.Random(SEED), 250), *_unicode(random.Random(SEED + 1), 250)])
    return list(strings)


def _single_pieces() -> Iterator[str]:
    yield ""
    for table in (_SPACES, _INVISIBLE, _CONTROLS, _SENTENCES, _CODE, _EMOJI, _COMBINING, _CONTRACTIONS, _EDGES):
        yield from table
    for text in _SENTENCES:
        yield unicodedata.normalize("NFD", text)
        yield text.upper()
        yield text.replace(" ", "")


def _runs() -> Iterator[str]:
    """Return pieces repeated many times, whose tokens depend on the order of merging."""
    for space in (" ", "\t", "\n", "\r\n", "\u00a0", "\u3000"):
        for n in (2, 3, 4, 5, 7, 8, 15, 16, 17, 33, 64):
            yield space * n
            yield "a" + space * n + "b"
            if n < 9:
                yield space * n + "x"
                yield "x" + space * n
    for piece in ("a", "A", "the", "ab", "=", "-", "!", "é", "中", "😀", "\u0301", "ha", ".,", "\n ", " \n", "\t "):
        for n in (2, 3, 5, 9, 40):
            yield piece * n
    yield "a" * 1000
    yield "lorem ipsum " * 100


def _digits() -> Iterator[str]:
    for n in range(1, 21):
        run = ("1234567890" * 2)[:n]
        yield run
        yield f"x{run}y"
        yield f" {run} "
    yield from ("3.14159", "1,000,000", "-42", "+7", "2024-05-21T10:30:00Z", "½ ¾ ² ³ ¹", "Ⅷ ⅷ", "①②③", "1a2b3c",
                "٠١٢٣٤٥٦٧٨٩", "०१२३४५६", "１２３４５", "0000000", "12 345 678", "1'000'000", "v1.2.3-rc4", "50%", "#1")


def _with_context() -> Iterator[str]:
    """Return pieces between letters, spaces and line ends, because the context decides where text is split."""
    for piece in (*_CONTRACTIONS, *_COMBINING, *_EMOJI):
        yield f"I{piece} we{piece}\n"
    for piece in (*_SPACES, *_INVISIBLE, "\u0001", "\u001b"):
        yield f"a{piece}b"
        yield f"{piece}Hello, world!{piece}"
        yield f"one {piece} two{piece}\n"
    for first in (" ", "\n", "\t", "!", "(", "_", "1"):
        for second in (" ", "\n", "\r\n", "a", "É", "?", "2", "中"):
            yield f"{first}{second}{first}{second}"
            yield f"end{first}{second}start"


def _with_special(special_tokens: Sequence[str]) -> Iterator[str]:
    for token in special_tokens:
        yield token
        yield f"a{token}b"
        yield f"a {token} b"
        yield f" {token}\n{token}{token} end"
        yield f"{token[:-1]} {token[1:]}"  # almost one
        yield token.upper() + token.lower()
    yield "<|nothing|> <s></s><unk><pad> [PAD1] [INST] <|im_start|>user\n<|eot_id|> <0x0A> ▁ Ġ Ċ <|endoftext|>"


def _mixtures(rng: random.Random, n: int) -> Iterator[str]:
    """Return strings that mix words, spaces and pieces of every table."""
    words = [word for text in (*_SENTENCES, *_CODE) for word in text.split(" ") if word]
    pieces = [*_EMOJI, *_COMBINING, *_CONTRACTIONS, *_INVISIBLE, *_EDGES, "123", "45678", "0.5", "\n\n", "\t"]
    for _ in range(n):
        parts = rng.choices(words, k=rng.randint(1, 6)) + rng.choices(pieces, k=rng.randint(1, 4))
        rng.shuffle(parts)
        yield "".join(part + rng.choice(("", " ", " ", "  ", *_SPACES[:5])) for part in parts)


def _unicode(rng: random.Random, n: int) -> Iterator[str]:
    """Return characters of the ranges above, except unassigned ones."""
    weights = [weight for _, _, weight in _RANGES]
    for _ in range(n):
        drawn = (chr(rng.randint(first, last))
                 for first, last, _ in rng.choices(_RANGES, weights=weights, k=rng.randint(2, 24)))
        yield "".join(char for char in drawn if unicodedata.category(char) != "Cn")
