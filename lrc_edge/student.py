"""The student's shape and name, from the recipe and the teacher's shape, and which shapes are refused."""
from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from lrc_edge.errors import UserError
from lrc_edge.families import family_of
from lrc_edge.formats import BLOCK
from lrc_edge.shape import ModelShape

if TYPE_CHECKING:
    from lrc_edge.recipe import Recipe

# Sizes of a recipe's [student] -> the letter that marks them in a student's name.
SIZES = {"hidden_size": "", "num_hidden_layers": "L", "intermediate_size": "F", "num_attention_heads": "H",
         "num_key_value_heads": "K", "vocab_size": "V"}
# In a student's name, between its teacher's and its width: Low-Rank Clone's projections were trained, or weights alone.
CLONE_LABEL, DENSE_LABEL = "LRC", "Edge"


def split_name(name: str) -> tuple[str, str]:
    """Split a name as `student_of` makes it into the teacher's and the rest; the rest of any other name is empty."""
    letters = "".join(SIZES.values())
    match = re.fullmatch(rf"(.+)-((?:{CLONE_LABEL}|{DENSE_LABEL})-\d+(?:-[{letters}]\d+)*)", name)
    return (match[1], match[2]) if match else (name, "")


def student_of(recipe: Recipe, teacher: ModelShape, name: str) -> tuple[ModelShape, str]:
    """Return the shape and the name of the recipe's student of the teacher `name`.

    A size of 0 is the teacher's. If all are 0, the student has half the teacher's hidden_size, rounded down to a
    multiple of 256, 64 or 32. Raises UserError for a shape that is not smaller, or that no start leads to.
    """
    given = {field: getattr(recipe.student, field) for field in SIZES if getattr(recipe.student, field)}
    shape = teacher.resized(given or {"hidden_size": _half_width(teacher)})
    _check_cut(shape, teacher, name)
    label = CLONE_LABEL if recipe.train.dense_share < 1 else DENSE_LABEL
    changed = [f"{letter}{getattr(shape, field)}" for field, letter in SIZES.items()
               if not letter or getattr(shape, field) != getattr(teacher, field)]
    return shape, recipe.student.name or "-".join([name, label, *changed])


def hops_of(recipe: Recipe, teacher: ModelShape, student: ModelShape) -> list[ModelShape]:
    """Return the shapes of the recipe's hops, which begin with the student's vocabulary. Raises UserError."""
    shapes, before = [], replace(teacher, vocab_size=student.vocab_size)
    for hop in recipe.student.hops:
        sizes = dict(part.partition("=")[::2] for part in hop.split())
        if unknown := [f"{name}={size}" for name, size in sizes.items()
                       if name not in SIZES or name == "vocab_size" or not size.isdecimal() or not int(size)]:
            raise UserError(f"student.hops: {unknown[0]!r} in {hop!r}: need a size and a number, as in "
                            "\"num_hidden_layers=20 intermediate_size=4096\"")
        shape = before.resized({name: int(size) for name, size in sizes.items()})
        _check_cut(shape, before, f"before {hop!r} of student.hops")
        shapes.append(shape)
        before = shape
    if shapes:
        _check_cut(student, before, "of the last of student.hops")
    return shapes


def row_lengths(shape: ModelShape) -> dict[str, int]:
    """Return the length of the rows of a shape's matrices, which blocks of a quantized format divide, by the size that
    decides it."""
    return {"hidden_size": shape.hidden_size, "intermediate_size": shape.intermediate_size,
            "num_attention_heads": shape.o_size}


def nearest(value: int, allowed: Iterable[int]) -> str:
    """Return the nearest allowed numbers below and above `value`, as an error words them."""
    found = sorted(allowed)
    below, above = [n for n in found if n < value][-1:], [n for n in found if n > value][:1]
    return " or ".join(map(str, below + above))


def _check_cut(shape: ModelShape, teacher: ModelShape, name: str) -> None:
    """Raise UserError unless a student of this shape can be cut from the teacher `name`."""
    _check_smaller(shape, teacher, name)
    _check_heads(shape, teacher)
    _check_width(shape, teacher)


def sizes_that_work(field: str, shape: ModelShape, teacher: ModelShape, block: int) -> list[int]:
    """Return the sizes that a student of this shape could have in place of its `field`: those whose rows are multiples
    of `block`, and that transformers reads."""
    found = (shape.resized({field: size}) for size in range(1, getattr(teacher, field) + 1))
    return [getattr(other, field) for other in found if row_lengths(other)[field] % block == 0
            and can_be_read(other) and other.num_attention_heads in _query_heads(other, teacher)]


def _check_smaller(shape: ModelShape, teacher: ModelShape, name: str) -> None:
    for field in SIZES:
        size, most = getattr(shape, field), getattr(teacher, field)
        if size > most:
            raise UserError(f"student.{field} = {size}: the teacher {name} has {most}; need a smaller student")
    if shape == teacher:
        raise UserError(f"student: the teacher {name} has these sizes, such as hidden_size = {shape.hidden_size}; "
                        f"need a smaller student: lower one of {', '.join(f'student.{field}' for field in SIZES)}")


def can_be_read(shape: ModelShape) -> bool:
    """Whether transformers reads a config of this shape."""
    return shape.hidden_size % _unit(shape) == 0


def _unit(shape: ModelShape) -> int:
    """Return the number that must divide the student's width in every format."""
    return shape.num_attention_heads if family_of(shape.family).width_divides_by_heads else 1


def _half_width(teacher: ModelShape) -> int:
    """Return half the teacher's width, rounded down to a multiple of the largest block that it can have."""
    half = teacher.hidden_size // 2
    units = [math.lcm(_unit(teacher), block) for block in (256, 64, 32, 1)]
    return next((half // unit * unit for unit in units if half >= unit), max(1, half))


def _check_width(shape: ModelShape, teacher: ModelShape) -> None:
    """Check that transformers reads a config of this shape."""
    if not can_be_read(shape):
        works = sizes_that_work("hidden_size", shape, teacher, BLOCK) or sizes_that_work(
            "hidden_size", shape, teacher, 1)
        raise UserError(f"student.hidden_size = {shape.hidden_size}: transformers' {shape.family} needs a multiple of "
                        f"the {shape.num_attention_heads} query heads; need {nearest(shape.hidden_size, works)}")


def _query_heads(shape: ModelShape, teacher: ModelShape) -> list[int]:
    """Return the numbers of query heads that a student with this shape's key/value heads can have."""
    groups, most = shape.num_key_value_heads, teacher.num_attention_heads
    if family_of(teacher.family).normalizes_heads:  # then each group keeps query heads of its own only
        most = groups * (most // teacher.num_key_value_heads)
    return list(range(groups, most + 1, groups))


def _check_heads(shape: ModelShape, teacher: ModelShape) -> None:
    """Check that key/value heads can be merged or dropped to this number, and that each serves as many query heads."""
    groups, heads = shape.num_key_value_heads, shape.num_attention_heads
    drops = family_of(teacher.family).normalizes_heads
    if not drops and teacher.num_key_value_heads % groups:
        divisors = [n for n in range(1, teacher.num_key_value_heads + 1) if teacher.num_key_value_heads % n == 0]
        raise UserError(f"student.num_key_value_heads = {groups}: the teacher's {teacher.num_key_value_heads} are "
                        f"merged in equal groups; need {nearest(groups, divisors)}")
    allowed = _query_heads(shape, teacher)
    if heads not in allowed:
        why = f"q/k norms of {teacher.family} forbid merging heads, so each of the {groups} key/value heads keeps at " \
              f"most its own {allowed[-1] // groups} query heads" if drops and heads % groups == 0 else \
            f"each of the {groups} key/value heads must serve as many query heads"
        raise UserError(f"student.num_attention_heads = {heads}: {why}; need {nearest(heads, allowed)}")
