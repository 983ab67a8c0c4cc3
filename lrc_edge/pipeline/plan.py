"""The plan of a run: teacher, recipe, formats, devices and the student's shape, resolved once. Stages only read it."""
from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from lrc_edge.checkpoint import DenseCheckpoint, resolve_model
from lrc_edge.formats import Format, format_of
from lrc_edge.machine import threads_for
from lrc_edge.recipe import Recipe
from lrc_edge.shape import ModelShape
from lrc_edge.student import hops_of, row_lengths, student_of
from lrc_edge.targets.profile import Profile, load_profiles
from lrc_edge.targets.runtimes.table import is_here


@dataclass(frozen=True)
class Source:
    """A model as the user named it, and the checkpoint that the name stands for."""

    given: str
    revision: str  # "local", or the hub's commit
    checkpoint: DenseCheckpoint

    @classmethod
    def of(cls, given: str) -> Source:
        """Open the model. Raises UserError unless it is a dense checkpoint of a supported family."""
        path, name, revision = resolve_model(given)
        return cls(given, revision, DenseCheckpoint.open(path, name))


@dataclass(frozen=True)
class Plan:
    """The input and the outputs of a run.

    source: the teacher of a build, or the finished model of an export. formats: the files to write; empty on a machine
    that only trains.
    """

    recipe: Recipe
    source: Source
    trains: bool  # a student of `source`; otherwise `source` is exported as it is
    student: ModelShape
    student_name: str
    hops: tuple[ModelShape, ...]  # of students that are trained before, each cut from the one before
    formats: tuple[Format, ...]
    profiles: tuple[Profile, ...]  # of the devices that the recipe names

    @classmethod
    def of_build(cls, given: str, recipe: Recipe, writes: bool = True) -> Plan:
        """Plan a student of the teacher `given`. Raises UserError, also if the student is not narrower."""
        source = Source.of(given)
        student, name = student_of(recipe, source.checkpoint.shape, source.checkpoint.name)
        profiles = tuple(load_profiles(recipe.export.targets))
        formats = _wanted_formats(recipe, profiles, student, source.checkpoint.shape) if writes else ()
        hops = tuple(hops_of(recipe, source.checkpoint.shape, student))
        return cls(recipe, source, True, student, name, hops, formats, profiles)

    @classmethod
    def of_export(cls, given: str, recipe: Recipe) -> Plan:
        """Plan the export of the finished model `given`. Raises UserError."""
        source = Source.of(given)
        shape = source.checkpoint.shape
        if recipe.quantize.tokens and not recipe.train.tokens:  # read only as much of --data as is used
            recipe = replace(recipe, train=replace(recipe.train, tokens=recipe.quantize.tokens))
        profiles = tuple(load_profiles(recipe.export.targets))
        return cls(recipe, source, False, shape, source.checkpoint.name, (),
                   _wanted_formats(recipe, profiles, shape, shape), profiles)

    @property
    def teacher(self) -> DenseCheckpoint | None:
        """Return the teacher of a build, with its full vocabulary; None for an export."""
        return self.source.checkpoint if self.trains else None

    @property
    def shapes(self) -> list[ModelShape]:
        """Return the shapes of all students that are trained: those of the hops, and the student's."""
        return [*self.hops, self.student]

    @property
    def trims_vocabulary(self) -> bool:
        """Whether the student has fewer tokens than its teacher."""
        return self.student.vocab_size < self.source.checkpoint.shape.vocab_size

    @property
    def threads(self) -> int:
        """Return the number of threads for running the student."""
        return threads_for(self.student)

    def encodings(self, kind: str) -> list[str]:
        """Return the encodings to write as files of this kind ("gguf" or "onnx"), except mixed precision."""
        return [row.encoding for row in self.formats if row.kind == kind]

    @property
    def mixes_types(self) -> bool:
        """Whether a mixed-precision GGUF is written."""
        return self.recipe.export.bits_per_weight > 0

    def writes(self, kind: str) -> bool:
        return bool(self.encodings(kind)) or (kind == "gguf" and self.mixes_types)

    def calibrates(self, kind: str) -> bool:
        """Whether the importance matrix changes any file of this kind."""
        if not self.recipe.export.calibration_tokens:
            return False
        return {"gguf": self.writes("gguf"), "onnx": "q4" in self.encodings("onnx")}[kind]

    @property
    def trains_on_grid(self) -> bool:
        """Whether to run quantization-aware training: the recipe asks for it, and a file on its grid is written."""
        return self.recipe.quantize.tokens > 0 and any(row.trained_on_grid for row in self.formats)

    @cached_property
    def times_teacher(self) -> bool:
        """Whether a device has this machine's processor, so that the speeds of student and teacher are compared."""
        return self.trains and any(is_here(profile) for profile in self.profiles)


def _wanted_formats(recipe: Recipe, profiles: tuple[Profile, ...], shape: ModelShape, teacher: ModelShape
                    ) -> tuple[Format, ...]:
    """Return the formats of the recipe and its devices, or the defaults for a model of this shape."""
    named = [*recipe.export.formats, *(name for profile in profiles for name in profile.format_names)]
    default = ["gguf:f16", "gguf:q8_0", "onnx:fp32"]
    # llama.cpp has other types for rows that do not fit, but a student's need not be such.
    resized = [row for row, most in zip(row_lengths(shape).values(), row_lengths(teacher).values(), strict=True)
               if row < most]
    if all(row % 256 == 0 for row in (shape.hidden_size, *resized)):
        default += ["gguf:q4_k_m", "gguf:q4_0", "onnx:q4"]
    return tuple(dict.fromkeys(format_of(text) for text in named or default))
