"""The proof: each artifact, in its real runtime, against the PyTorch student on the same held-out tokens."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lrc_edge.artifact import Artifact
from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.parity import AS_TRAINED, Gate, gates_of_artifact, gates_of_grid
from lrc_edge.recipe import Recipe
from lrc_edge.stored_reference import REFERENCE_FILE, StoredReference
from lrc_edge.targets.llamacpp import LlamaCpp
from lrc_edge.targets.onnxrt import OnnxRuntime
from lrc_edge.targets.ort_genai import OrtGenai
from lrc_edge.targets.reference import HeldOutRows, Reference
from lrc_edge.targets.runtime import Runtime, TextRuntime
from lrc_edge.targets.token_parity import compare_token_ids, corpus_of, normalize

CONVERSATIONS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "Hello!"}],
    [{"role": "system", "content": "You tell stories."}, {"role": "user", "content": "  One about a cat, please.\n"}],
    [{"role": "user", "content": "Count: 1 2 3"}, {"role": "assistant", "content": "4, 5 é 😀"},
     {"role": "user", "content": "{{ 'go' }} <on> & \"on\""}],
)
Progress = Callable[[str], None]


@dataclass
class Proof:
    """What the report says of the artifacts, and the gates."""

    artifacts: list[dict[str, Any]] = field(default_factory=list)
    gates: list[Gate] = field(default_factory=list)
    tokenizer: list[dict[str, Any]] = field(default_factory=list)
    chat_template: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    teacher_perplexity: float | None = None  # on the proof's rows


def prove(artifacts: list[Artifact], folder: Path, student: DenseCheckpoint, on_grid: DenseCheckpoint | None,
          ids: np.ndarray, prompts: list[str], recipe: Recipe, threads: int, teacher: DenseCheckpoint | None,
          progress: Progress) -> Proof:
    """Run every artifact below `folder`. `ids`: held-out rows (n, L); `prompts`: beginnings for sample texts.

    `on_grid`: the student trained on the grid of the 4-bit files. What is made of it is compared with both: with the
    student for what the file has lost, with `on_grid` for whether it says what was trained.
    """
    proof = Proof()
    tokenizer = student.tokenizer()
    stop = stop_ids(student, tokenizer)
    n_tokens = recipe.parity.generate_tokens
    prompts_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    proof.samples = [{"prompt": prompt, "outputs": []} for prompt in prompts]

    def sample(who: str, runtime: Runtime) -> None:
        for row, prompt in zip(proof.samples, prompts_ids, strict=True):
            text = tokenizer.decode(runtime.generate(prompt, n_tokens, stop), skip_special_tokens=True)
            row["outputs"].append({"who": who, "text": text})

    progress("student: reference logits in PyTorch")
    reference = Reference(student.model())
    held_out = HeldOutRows.of(reference, ids)
    sample("student", reference)
    reference.close()
    _store(held_out, tokenizer, student).save(folder / REFERENCE_FILE)
    if teacher is not None:
        progress("teacher: perplexity and sample texts")
        original = Reference(teacher.model())
        proof.teacher_perplexity = held_out.compare(original.prefill, recipe.parity.near_tie).as_dict()["ppl"]
        sample("teacher", original)
        for row in proof.samples:
            row["outputs"].reverse()  # the teacher first
    trained: HeldOutRows | None = None
    if on_grid is not None:
        progress("student on its grid: reference logits in PyTorch")
        trained = HeldOutRows.of(Reference(on_grid.model()), ids)
    for artifact in artifacts:
        runtime = open_runtime(artifact, folder, ids.shape[1] + n_tokens, threads)
        try:
            entry = _logits_parity(proof, artifact, runtime, held_out, recipe, progress)
            if artifact.identical_blocks is not None and trained is not None:
                metrics = trained.compare(runtime.prefill, recipe.parity.near_tie)
                entry["parity"][AS_TRAINED] = metrics.as_dict()
                proof.gates += gates_of_grid(artifact.path, artifact.identical_blocks, metrics, recipe.gates)
            progress(f"{artifact.path}: generation")
            sample(artifact.path, runtime)
            entry["generation"] = _smoke(proof, artifact, runtime, tokenizer, prompts[0], n_tokens, stop)
            if isinstance(runtime, TextRuntime):
                progress(f"{artifact.path}: token ids and chat template")
                _token_parity(proof, artifact, runtime, tokenizer)
                _template_parity(proof, artifact, runtime, tokenizer)
        finally:
            runtime.close()
        if artifact.format == "onnx":
            progress(f"{artifact.path}: onnxruntime-genai")
            _prove_genai(proof, artifact, folder, tokenizer, prompts[0], n_tokens, stop, threads)
        proof.artifacts.append(entry)
    return proof


def _store(held_out: HeldOutRows, tokenizer: PreTrainedTokenizerBase, student: DenseCheckpoint) -> StoredReference:
    """For devices, where there is no PyTorch."""
    texts = corpus_of(tokenizer)
    return StoredReference.of(held_out.ids, held_out.logits, [normalize(tokenizer, text) for text in texts],
                              [tokenizer.encode(text, verbose=False) for text in texts], student.shape)


def open_runtime(artifact: Artifact, folder: Path, n_ctx: int, threads: int) -> Runtime:
    path = folder / artifact.path
    if artifact.format == "gguf":
        return LlamaCpp(path, n_ctx=n_ctx, threads=threads)
    return OnnxRuntime(path, threads=threads)


def stop_ids(student: DenseCheckpoint, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """End-of-sequence ids of the config and the tokenizer."""
    eos = student.config.get("eos_token_id")
    ids = set(eos) if isinstance(eos, list) else {eos}
    return {int(i) for i in ids | {tokenizer.eos_token_id} if i is not None}


def _logits_parity(proof: Proof, artifact: Artifact, runtime: Runtime, held_out: HeldOutRows, recipe: Recipe,
                   progress: Progress) -> dict[str, Any]:
    kind = f"{artifact.format}:{artifact.encoding}"
    parity: dict[str, Any] = {}
    for mode, logits_of in (("prefill", runtime.prefill), ("decode", runtime.decode)):
        progress(f"{artifact.path}: {mode}, {held_out.ids.size:,} positions")
        metrics = held_out.compare(logits_of, recipe.parity.near_tie)
        parity[mode] = metrics.as_dict()
        proof.gates += gates_of_artifact(artifact.path, kind, mode, metrics, recipe.gates)
    return {**artifact.as_dict(), "runtime": runtime.label, "parity": parity}


def _smoke(proof: Proof, artifact: Artifact, runtime: Runtime, tokenizer: PreTrainedTokenizerBase, prompt: str,
           n_tokens: int, stop: set[int], name: str = "smoke generation") -> dict[str, str]:
    """A runtime that answers nothing, or ids outside the vocabulary, has failed whatever its logits said."""
    made = runtime.generate(tokenizer(prompt)["input_ids"], n_tokens, stop)
    known = [token for token in made if 0 <= token < len(tokenizer)]
    proof.gates.append(Gate(name, artifact.path, "tokens", len(known) if len(known) == len(made) else None, 1, ">="))
    return {"prompt": prompt, "text": str(tokenizer.decode(known, skip_special_tokens=True))}


def _token_parity(proof: Proof, artifact: Artifact, runtime: TextRuntime, tokenizer: PreTrainedTokenizerBase) -> None:
    found = compare_token_ids(tokenizer, runtime)
    proof.tokenizer.append({"artifact": artifact.path, "n_strings": found.n_strings,
                            "n_mismatches": found.n_mismatches, "n_normalized": found.n_normalized,
                            "examples": [example.as_dict() for example in found.examples]})
    proof.gates.append(Gate("token ids", artifact.path, "mismatches", found.n_mismatches, 0, "=="))


def _template_parity(proof: Proof, artifact: Artifact, runtime: TextRuntime, tokenizer: PreTrainedTokenizerBase,
                     name: str = "chat template") -> None:
    """Rendered string and its ids, equal to Hugging Face's on every conversation that the template accepts."""
    if not tokenizer.chat_template:
        return
    mismatches = 0
    shown: dict[str, Any] | None = None
    for messages in CONVERSATIONS:
        try:
            expected = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception:  # a template may refuse a role, by raising whatever it likes
            continue
        expected_ids = tokenizer(expected, add_special_tokens=False)["input_ids"]
        got, got_ids = runtime.render_chat(messages)
        equal = got == expected and list(got_ids) == list(expected_ids)
        mismatches += not equal
        if shown is None or not equal:
            detail = "" if got != expected or equal else f" {list(got_ids)} instead of {list(expected_ids)}"
            shown = {"artifact": f"{artifact.path} ({runtime.label})", "equal": equal, "expected": expected,
                     "got": got + detail}
    if shown is not None:
        proof.chat_template.append(shown)
        proof.gates.append(Gate(name, artifact.path, "mismatches", mismatches, 0, "=="))


def _prove_genai(proof: Proof, artifact: Artifact, folder: Path, tokenizer: PreTrainedTokenizerBase, prompt: str,
                 n_tokens: int, stop: set[int], threads: int) -> None:
    """The same files through onnxruntime-genai: its generation loop, its tokenizer's template."""
    model_file = folder / artifact.path
    runtime = OrtGenai(model_file.parent.parent, f"{model_file.parent.name}/{model_file.name}", threads)
    try:
        _smoke(proof, artifact, runtime, tokenizer, prompt, n_tokens, stop, "smoke generation, genai")
        _template_parity(proof, artifact, runtime, tokenizer, "chat template, genai")
    finally:
        runtime.close()
