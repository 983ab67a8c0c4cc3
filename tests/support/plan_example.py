"""plan.json's table of a small invented plan."""
from __future__ import annotations

from typing import Any

TEACHER = {"family": "llama", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8,
           "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 1024,
           "tied": True}
TARGET = "./my devices/raspberry-pi-5.toml"  # a file, with a space
TIMINGS = {"machine": "aarch64, 4 processors, Cortex-A76", "library": "llama-cpp-python 0.3.36", "threads": 4,
           "n_shapes": 7, "n_timings": 14, "worst": 0.0831}


def shape(width: int, layers: int) -> dict[str, Any]:
    return TEACHER | {"hidden_size": width, "num_hidden_layers": layers}


def row(width: int, layers: int, price: tuple[float, float | None, float, float],
        trial: tuple[float | None, float | None, list[str]] | None = None, within: bool = True) -> dict[str, Any]:
    """price: ms per token, seconds to the first token, memory, file. trial: KL of the start, loss, fronts."""
    return {"shape": shape(width, layers), "n_params": 1000 * width * layers, "within": within,
            "price": dict(zip(("token_ms", "first_token_s", "memory_bytes", "file_bytes"), price, strict=True)),
            "expected": 0.001 * width, "trial": trial and {"start_kl": trial[0], "loss": trial[1]},
            "front": trial[2] if trial else []}


def example_plan() -> dict[str, Any]:
    """Three trials, the last of which diverged, and two other shapes. The second trial is dominated in memory alone."""
    first, file = ["token_ms", "first_token_s"], ["file_bytes"]
    rows = [row(192, 4, (12.25, 3.5, 90e6, 21e6), (0.8123, 2.7181, ["memory_bytes", *first, *file])),
            row(128, 8, (8.5, 2.25, 91e6, 20e6), (1.25, 2.9, [*first, *file])),
            row(256, 2, (11.0, 2.0, 80e6, 22e6), (3.0, None, [])),
            row(64, 8, (7.75, 1.5, 70e6, 15e6)), row(64, 7, (7.0, 1.25, 65e6, 14e6))]
    return {"lrc_edge": "0.1.0", "created": "2026-11-22T10:00:00Z", "key": "0123",
            "teacher": {"name": "storyteller", **{k: v for k, v in row(256, 8, (31.5, 9.0, 240e6, 63e6)).items()
                                                  if k in ("shape", "n_params", "price")}},
            "device": "raspberry-pi-5", "target": TARGET, "description": "Raspberry Pi 5 with 8 GB",
            "runtime": "llama.cpp",
            "bandwidth_gb_s": 17.1, "format": "gguf:q4_0", "context": 2048,
            "timings": dict(TIMINGS),
            "budget": {"token_ms": 12.5, "first_token_s": None, "memory_bytes": 95e6, "file_bytes": None},
            "search": {"effort": "short", "tokens": 51_200}, "chosen": shape(192, 4), "shapes": rows,
            "command": "lrc-edge build storyteller --recipe plan/recipe.toml --out out"}


def estimated_plan() -> dict[str, Any]:
    """A device that was not timed, and no trials."""
    plan = example_plan() | {"timings": None, "search": {"effort": "none", "tokens": 0}}
    plan["shapes"] = [found | {"trial": None} for found in plan["shapes"]]
    for priced in (plan["teacher"], *plan["shapes"]):
        priced["price"]["first_token_s"] = None
    return plan
