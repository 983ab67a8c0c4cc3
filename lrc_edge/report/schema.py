"""report.json as types: what the report of a build, an export or a verification holds.

`total=False` marks what only some reports have. Lengths are in tokens, KL in nats per token, sizes in bytes.
"""
from __future__ import annotations

from typing import Any, Required, TypedDict


class GateRow(TypedDict, total=False):
    """A metric with its limit (parity.Gate). `target`: the device whose check judged it."""

    name: Required[str]
    artifact: Required[str]
    metric: Required[str]
    value: Required[float | None]
    limit: Required[float]
    relation: Required[str]
    passed: Required[bool]
    why: str
    target: str


class ArtifactRow(TypedDict, total=False):
    """A file (artifact.Artifact) and what it computed in its runtime."""

    path: Required[str]
    format: Required[str]
    encoding: Required[str]
    bytes: Required[int]
    bits_per_weight: Required[float]
    sha256: Required[str]
    fallbacks: Required[list[dict[str, Any]]]
    tensor_types: Required[dict[str, int]]
    runtime: Required[str]
    parity: Required[dict[str, dict[str, Any]]]  # "prefill", "decode", ... -> parity.Metrics
    identical_blocks: float | None
    kv_cache: dict[str, float | None]  # type of the KV cache -> mean KL
    generation: dict[str, str]


class HeldOutFigures(TypedDict):
    loss: float
    perplexity: float
    bits_per_byte: float


class Sizes(TypedDict):
    """What ModelRow and the rows of plan.json have in common."""

    shape: dict[str, Any]
    n_params: int


class ModelRow(TypedDict, total=False):
    """Teacher or student."""

    name: Required[str]
    path: Required[str]
    family: Required[str]
    shape: Required[dict[str, Any]]  # shape.ModelShape without the family
    n_params: Required[int]
    license: Required[str | None]
    provenance: dict[str, Any]
    proof_perplexity: float | None  # of the teacher, on the rows of the verification
    held_out: HeldOutFigures  # of the teacher: with the student's vocabulary
    full_vocabulary: HeldOutFigures  # of the teacher with its own vocabulary, if the student has fewer tokens
    # training.json, the rows of metrics.jsonl as "curve", start.json as "start", and training.json of the "hops" before
    training: dict[str, Any]


class Sample(TypedDict):
    """A prompt, and the text that each model or file generated from it."""

    prompt: str
    outputs: list[dict[str, str]]  # who, text


class Report(TypedDict, total=False):
    """report.json."""

    lrc_edge: Required[str]  # version
    created: Required[str]  # UTC, ISO 8601
    versions: Required[dict[str, str]]
    machine: str
    command: str
    teacher: ModelRow | None
    student: Required[ModelRow]
    artifacts: Required[list[ArtifactRow]]
    gates: Required[list[GateRow]]
    samples: Required[list[Sample]]
    tokenizer: Required[list[dict[str, Any]]]
    chat_template: Required[list[dict[str, Any]]]
    calibration: dict[str, Any] | None
    grid: dict[str, Any] | None  # the quantization-aware phase
    allocation: dict[str, Any] | None  # the mixed precision
    rounding: float | None  # PyTorch's own, of a logit
    lengths: list[dict[str, int]]  # of the rows longer than the recipe's
    notes: list[str]
    targets: list[dict[str, Any]]  # a result per device
    kv_cache_advice: list[dict[str, Any]]
