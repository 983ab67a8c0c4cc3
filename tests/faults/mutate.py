"""Damage: of bytes, and of what JSON, TOML, safetensors and npz files hold, so that it passes the first checks."""
from __future__ import annotations

import io
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

Mutation = Callable[[random.Random, bytes], bytes]

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 0.5, -0.0, 2**31, 2**63, 2**64, -2**63, 10**400, 1e308, float("nan"), float("inf"),
    -float("inf"), "", " ", "x", "0", "nan", "../../etc/passwd", "/dev/null", "\u0000", "\u202e", "😀", "\ud800",
    "[red]", "{{ x }}", "{%", "a" * 10_000, [], [[]], [None], {}, {"": None}, {"x": {"y": []}}, [0] * 1000)
ODD_TOML = ("0", "-1", "1e308", "nan", "inf", "-inf", "true", '""', '"x"', "[]", "[[]]", "{}", '["x"]', "[1, 2]",
            "1979-05-27", "07:32:00", "99999999999999999999999", '"\\u0000"', "0.5", "[nan]", '"[red]"', "'''x",
            "{ x = 1 }", "9223372036854775808")
DEEP = 100_000


# -- bytes -------------------------------------------------------------------------------------------------------------


def flip(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        changed[_place(rng, len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(rng: random.Random, data: bytes) -> bytes:
    return data[:rng.choice((0, 1, _place(rng, len(data)), len(data) - 1))]


def zero(rng: random.Random, data: bytes) -> bytes:
    start, length = _place(rng, len(data)), rng.choice((1, 4, 8, 64, 4096))
    return data[:start] + bytes(min(length, len(data) - start)) + data[start + length:]


def splice(rng: random.Random, data: bytes) -> bytes:
    """A part of the file over, or into, another part."""
    source, target, length = rng.randrange(len(data)), _place(rng, len(data)), rng.choice((1, 8, 64, 1024))
    return data[:target] + data[source:source + length] + data[target + rng.choice((0, length)):]


def huge(rng: random.Random, data: bytes) -> bytes:
    """A length, a count or an offset that no file has."""
    start, width = _place(rng, len(data)) // 4 * 4, rng.choice((1, 2, 4, 8))
    value = rng.choice((2**(8 * width) - 1, 2**(8 * width - 1), 2**(8 * width - 1) - 1, 2**(4 * width)))
    return data[:start] + value.to_bytes(width, "little") + data[start + width:]


def _place(rng: random.Random, size: int) -> int:
    """Anywhere, but mostly near the beginning, where headers are."""
    return min(int(size * rng.random() ** rng.choice((1, 3, 8))), max(0, size - 1))


BYTES: tuple[Mutation, ...] = (flip, truncate, zero, splice, huge)


# -- JSON --------------------------------------------------------------------------------------------------------------


def json_value(rng: random.Random, data: bytes) -> bytes:
    """One value, or one key, of the table is another, is gone or is there twice."""
    table = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 3))):
        table = _changed(rng, table)
    return json.dumps(table).encode("utf-8", "surrogatepass")


def _changed(rng: random.Random, table: Any) -> Any:
    spots = list(_spots(table))
    if not spots or rng.random() < 0.03:
        return rng.choice(ODD_VALUES)
    # Few keys are near the top, and those decide most.
    depth = rng.choice(sorted({depth for depth, _, _ in spots}))
    _, parent, key = rng.choice([spot for spot in spots if spot[0] == depth])
    what = rng.random()
    if what < 0.25:
        del parent[key]
    elif what < 0.35 and isinstance(parent, dict):
        parent[rng.choice(("x", "", key.upper(), key + " "))] = parent.pop(key)
    elif what < 0.45 and isinstance(parent, list):
        parent.insert(key, parent[key])
    elif what < 0.55:
        _, other, other_key = rng.choice(spots)
        if (key in parent if isinstance(parent, dict) else key < len(parent)) and (
                other_key in other if isinstance(other, dict) else other_key < len(other)):
            parent[key] = json.loads(json.dumps(other[other_key]))
    elif what < 0.65 and isinstance(parent[key], int | float) and not isinstance(parent[key], bool):
        parent[key] = rng.choice((-parent[key], parent[key] + 1, parent[key] - 1, parent[key] * 1000, str(parent[key]),
                                  float(parent[key]), parent[key] + 0.5))
    else:
        parent[key] = rng.choice(ODD_VALUES)
    return table


def _spots(table: Any, depth: int = 0) -> Any:
    """(depth, parent, key) of every value below."""
    items = table.items() if isinstance(table, dict) else enumerate(table) if isinstance(table, list) else ()
    for key, value in items:
        yield depth, table, key
        yield from _spots(value, depth + 1)


def json_text(rng: random.Random, data: bytes) -> bytes:
    """Not quite JSON, or not quite text."""
    start = _place(rng, len(data))
    return rng.choice((
        lambda: b"\xef\xbb\xbf" + data, lambda: data.decode("utf-8", "replace").encode("utf-16"), lambda: b"[" * DEEP,
        lambda: b'{"a":' * DEEP, lambda: data[:start] + b"\xff\xfe" + data[start:], lambda: b"null", lambda: b"[]",
        lambda: b"{}", lambda: b'"x"', lambda: b"1e999", lambda: b"", lambda: data + data,
        lambda: re.sub(rb"\d+", b"1e999", data, count=rng.choice((1, 0))),
        lambda: re.sub(rb"\d+", b"9" * 5000, data, count=1), lambda: data.replace(b'"', b"'")))()


def json_line(rng: random.Random, data: bytes) -> bytes:
    """Like `json_value`, in one line of JSON lines."""
    lines = data.split(b"\n")
    number = rng.randrange(min(len(lines), 40))
    try:
        lines[number] = rng.choice((json_value, json_text))(rng, lines[number])
    except ValueError:
        lines[number] = b"x"
    return b"\n".join(lines)


JSON: tuple[Mutation, ...] = (json_value, json_value, json_value, json_text, flip, truncate, splice)
JSON_LINES: tuple[Mutation, ...] = (json_line, json_line, flip, truncate, splice, zero)


# -- TOML --------------------------------------------------------------------------------------------------------------


def toml_line(rng: random.Random, data: bytes) -> bytes:
    """One line's value is another, the line is gone, is there twice, or its key is another."""
    lines = data.decode().splitlines()
    number = rng.randrange(len(lines))
    key, equals, _ = lines[number].partition("=")
    lines[number:number + 1] = rng.choice((
        [f"{key}= {rng.choice(ODD_TOML)}"] if equals else [f"[{rng.choice(('x', '', 'data', 'train.x', '[x]'))}]"],
        [f"{key}= {rng.choice(ODD_TOML)}"] if equals else [],
        [], [lines[number]] * 2, [f"x{lines[number]}"], [f"{key.strip()}.x = 1"], ["x = " + "[" * 2000]))
    return "\n".join(lines).encode()


TOML: tuple[Mutation, ...] = (toml_line, toml_line, toml_line, flip, truncate, splice, zero)


# -- containers --------------------------------------------------------------------------------------------------------


def safetensors_header(rng: random.Random, data: bytes) -> bytes:
    """The header says something else; its length is right."""
    length = int.from_bytes(data[:8], "little")
    header = rng.choice(JSON)(rng, data[8:8 + length])
    return len(header).to_bytes(8, "little") + header + data[8 + length:]


def npz_array(rng: random.Random, data: bytes) -> bytes:
    """One array has another shape, type or content; or is gone."""
    import numpy as np

    with np.load(io.BytesIO(data)) as table:
        arrays = {name: table[name] for name in table.files}
    name = rng.choice(list(arrays))
    array = arrays.pop(name)
    if name == "words" and rng.random() < 0.7:
        arrays[name] = np.frombuffer(rng.choice(JSON)(rng, array.tobytes()), np.uint8)
    elif rng.random() < 0.9:
        flat = array.reshape(-1)
        arrays[name] = rng.choice((
            lambda: flat, lambda: flat[:0], lambda: flat[:1], lambda: array[:1], lambda: array[..., :1],
            lambda: array[:, ::-1] if array.ndim > 1 else flat[::-1], lambda: array.astype(np.float64) * np.nan,
            lambda: array.astype(np.complex64), lambda: array.astype(str), lambda: array.astype(object),
            lambda: -array.astype(np.int64), lambda: array.astype(np.int64) + 10**9, lambda: array.astype(bool),
            lambda: np.array(3), lambda: np.array([{"x": 1}], dtype=object), lambda: array * 0,
            lambda: array.astype(np.float32) + 1e30, lambda: array[None]))()
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def parquet_column(rng: random.Random, data: bytes) -> bytes:
    """The text column is of another type, has another name, or holds nothing."""
    import pyarrow
    import pyarrow.parquet

    values = rng.choice(([1, 2], [None, None], [["a"], []], [{"a": 1}, None], [b"\xff", b""], [True, False], [],
                         [[{"role": "user", "content": "x"}], [{"role": None, "content": None}]], [1.5, None]))
    table = pyarrow.table({rng.choice(("text", "text", "messages", "x", "")): values})
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file)
    return file.getvalue()


SAFETENSORS: tuple[Mutation, ...] = (*BYTES, safetensors_header, safetensors_header, safetensors_header)
NPZ: tuple[Mutation, ...] = (*BYTES, npz_array, npz_array, npz_array, npz_array)
PARQUET: tuple[Mutation, ...] = (*BYTES, parquet_column)
TEXT: tuple[Mutation, ...] = (flip, truncate, zero, splice)


def mutations_of(file: Path) -> tuple[Mutation, ...]:
    """What can be done to a file of this kind."""
    return {".json": JSON, ".jsonl": JSON_LINES, ".toml": TOML, ".safetensors": SAFETENSORS, ".npz": NPZ,
            ".parquet": PARQUET, ".jinja": TEXT, ".md": TEXT, ".txt": TEXT}.get(file.suffix, BYTES)


def damage(rng: random.Random, file: Path) -> str:
    """Change the file. Returns the name of what was done."""
    data = file.read_bytes()
    mutation = rng.choice(mutations_of(file))
    try:
        changed = mutation(rng, data)
    except RecursionError:
        changed, mutation = truncate(rng, data), truncate
    file.unlink()  # it may be a link to the original
    file.write_bytes(changed)
    return mutation.__name__
