"""A realistic report for the tests of the page, with the shapes and figures of a small build."""
from __future__ import annotations

import hashlib
import math
from typing import Any

TEACHER_SHAPE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
                 "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 4096, "max_position_embeddings": 1024,
                 "tied": True}
NAME = "Fable-10M-LRC-256"
STORY = ("Once upon a time, there was a little girl named Lily. She loved to play in the garden with her red ball. "
         "One day, the ball rolled under a big tree, and a small bird said, “I can help you find it.”")
ENCODINGS = (  # format, encoding, bits per weight, KL, gate limit
    ("gguf", "f16", 16.0, 3.1e-8, 1e-4), ("gguf", "q8_0", 8.51, 4.3e-4, 5e-3), ("gguf", "q4_k_m", 5.21, 0.0203, 0.15),
    ("gguf", "q4_0", 4.52, 0.0415, 0.15), ("onnx", "fp32", 32.0, 2.2e-13, 1e-8), ("onnx", "q4", 4.55, 0.0415, 0.15))


def metrics(kl: float) -> dict[str, Any]:
    ppl = 8.412
    return {"positions": 2048, "kl_mean": kl, "kl_p99": 9 * kl, "kl_max": 40 * kl, "top1": 1 - min(0.5, kl**0.5 / 3),
            "near_ties": 12, "nmse": kl / 4, "max_abs": 20 * kl**0.5, "delta_ppl": 4 * kl, "delta_ppl_se": kl**0.5 / 9,
            "ppl": ppl + 4 * kl}


def artifact(format_: str, encoding: str, bits: float, kl: float, name: str = NAME) -> dict[str, Any]:
    path = (f"gguf/{name}-5.3M-{encoding.upper()}.gguf" if format_ == "gguf" else
            "onnx/onnx/model.onnx" if encoding == "fp32" else f"onnx/onnx/model_{encoding}.onnx")
    runtime = "llama.cpp (llama-cpp-python 0.3.36)" if format_ == "gguf" else "onnxruntime 1.31.1"
    return {"path": path, "format": format_, "encoding": encoding, "bytes": int(5_310_000 * bits / 8 + 90_000),
            "bits_per_weight": bits, "sha256": hashlib.sha256(path.encode()).hexdigest(), "fallbacks": [],
            "tensor_types": {encoding.upper(): 57, "F32": 17}, "runtime": runtime,
            "parity": {"prefill": metrics(kl), "decode": metrics(kl * 1.02)},
            "generation": {"prompt": "Once upon a time", "text": STORY}}


def kl_gate(made: dict[str, Any], mode: str, limit: float) -> dict[str, Any]:
    value = made["parity"][mode]["kl_mean"]
    return {"name": f"{mode} vs student", "artifact": made["path"], "metric": "kl_mean", "value": value, "limit": limit,
            "relation": "<=", "passed": value <= limit}


def example_report() -> dict[str, Any]:
    """A clone of a 10M teacher with six artifacts, whose gates all passed."""
    artifacts = [artifact(*row[:4]) for row in ENCODINGS]
    artifacts[2]["fallbacks"] = [
        {"tensor": f"blk.{i}.attn_k.weight", "wanted": "Q4_K", "got": "Q5_0",
         "reason": "rows of 160 are no multiple of 256"} for i in range(8)]
    gates = [{"name": "folded vs clone", "artifact": "student", "metric": "max_abs", "value": 7.63e-6, "limit": 1e-4,
              "relation": "<=", "passed": True},
             {"name": "folded vs clone", "artifact": "student", "metric": "top1", "value": 1.0, "limit": 1.0,
              "relation": ">=", "passed": True}]
    for made, row in zip(artifacts, ENCODINGS, strict=True):
        gates += [kl_gate(made, mode, row[4]) for mode in ("prefill", "decode")]
    ggufs = [made["path"] for made in artifacts if made["format"] == "gguf"]
    gates += [{"name": "token ids", "artifact": path, "metric": "mismatches", "value": 0, "limit": 0, "relation": "==",
               "passed": True} for path in ggufs]
    return {
        "lrc_edge": "0.1.0", "created": "2026-11-21T05:00:00Z", "machine": "2 CPU threads",
        "command": "lrc-edge build examples/demo/teacher --data examples/demo/text --out out",
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "gguf": "0.19.0", "onnxruntime": "1.31.1"},
        "teacher": {"name": "Fable-10M", "path": "teacher", "family": "llama", "shape": TEACHER_SHAPE,
                    "n_params": 27_300_000, "license": "apache-2.0",
                    "proof_perplexity": 6.6,
                    "held_out": {"loss": 1.902, "perplexity": math.exp(1.902), "bits_per_byte": 0.731}},
        "student": {"name": NAME, "path": "student", "family": "llama", "shape": {**TEACHER_SHAPE, "hidden_size": 256},
                    "n_params": 13_900_000, "license": "apache-2.0",
                    "held_out": {"loss": 2.131, "perplexity": math.exp(2.131), "bits_per_byte": 0.819},
                    "training": {"steps": 1200, "tokens": 9_830_400, "seconds": 161.0, "device": "cpu",
                                 "precision": "fp32", "init": "selection",
                                 "terms": {"lm": "LM", "kl": "KL", "clone": "clone"}, "curve": _curve(1200)}},
        "artifacts": artifacts, "gates": gates,
        "tokenizer": [{"artifact": path, "n_strings": 1204, "n_mismatches": 0, "examples": []} for path in ggufs],
        "chat_template": [{"artifact": f"{path} (llama.cpp)", "equal": True, "expected": "<|user|>Hello!",
                           "got": "<|user|>Hello!"} for path in ggufs],
        "samples": [{"prompt": "Once upon a time", "outputs": _outputs(artifacts)}]}


def _outputs(artifacts: list[dict[str, Any]]) -> list[dict[str, str]]:
    texts = {"q4_0": STORY.replace("a small bird", "a little bird"), "q4_k_m": STORY[:150]}
    return [{"who": "teacher", "text": STORY.replace("Lily", "Mia")}, {"who": "student", "text": STORY},
            *({"who": made["path"], "text": texts.get(made["encoding"], STORY)} for made in artifacts)]


def _curve(steps: int) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    for step in range(0, steps + 1, 10):
        fall, ripple = math.exp(-step / 160), 0.06 * math.sin(step * 1.7) * math.cos(step * 0.31)
        lm, kl, clone = 2.15 + 5.6 * fall + ripple, 0.21 + 4.4 * fall + ripple / 2, 0.9 * fall + 0.06
        if step:
            rows.append({"step": step, "tokens": step * 8192, "loss": lm + kl + 0.2 * clone, "lm": lm, "kl": kl,
                         "clone": clone, "lr": 1e-3, "tokens_per_second": 61_000.0})
        if step % 150 == 0:
            rows.append({"step": step, "tokens": step * 8192, "held_out_loss": 2.131 + 5.9 * fall})
    return rows


def many_artifacts(n: int = 20) -> dict[str, Any]:
    """An export of a third-party checkpoint: no teacher, no training, n encodings, a long name."""
    report = example_report()
    name = "Some-Organisation-With-A-Long-Name-Model-3.2-Instruct-Preview-2026-11"
    kinds = ["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1",
             "q4_0", "iq4_xs", "iq4_nl", "q3_k_l", "q3_k_m", "q3_k_s", "iq3_s", "q2_k", "iq2_s", "iq1_m"]
    bits = [32, 16, 16, 8.5, 6.6, 5.7, 5.5, 6.0, 5.5, 4.9, 4.6, 5.0, 4.5, 4.3, 4.5, 4.2, 3.9, 3.5, 3.4, 3.0, 2.6, 1.9]
    made = [artifact("gguf", kind, b, 0.0 if kind == "f32" else 1e-8 if b == 16 else 6 * 2.0**(-1.45 * b), name)
            for kind, b in zip(kinds[:n], bits, strict=False)]
    report |= {"teacher": None, "artifacts": made, "samples": [], "tokenizer": [], "chat_template": [],
               "gates": [kl_gate(a, mode, 0.15) for a in made for mode in ("prefill", "decode")]}
    report["student"] = {key: value for key, value in report["student"].items() if key not in ("training", "held_out")}
    report["student"]["name"] = name
    return report


def failed_report() -> dict[str, Any]:
    """Two failed gates; token ids and a template that differ."""
    report = example_report()
    q4 = report["artifacts"][3]
    q4["parity"]["prefill"], q4["parity"]["decode"] = metrics(0.31), metrics(0.33)
    report["gates"] = [kl_gate(q4, g["name"].split()[0], g["limit"]) if g["artifact"] == q4["path"] and
                       g["metric"] == "kl_mean" else g for g in report["gates"]]
    report["gates"][-1] |= {"value": 2, "passed": False}
    report["tokenizer"][-1] |= {"n_mismatches": 2, "examples": [
        {"text": "  two  spaces\tand\u00a0one", "expected": [1, 220, 811, 93, 7, 44],
         "got": [1, 220, 220, 811, 93, 7, 44]},
        {"text": "", "expected": [1], "got": []}]}
    report["chat_template"][-1] |= {"equal": False, "got": "<|user|> Hello!"}
    return report
