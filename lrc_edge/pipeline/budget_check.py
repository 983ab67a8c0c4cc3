"""Whether a student keeps its budget: what was predicted before training, and what its file costs on the device."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lrc_edge.artifact import Artifact
from lrc_edge.parity import Gate
from lrc_edge.recipe import Budget
from lrc_edge.targets import speed
from lrc_edge.targets.devices.device_check import CheckInput
from lrc_edge.targets.profile import Profile
from lrc_edge.targets.runtimes.table import runtimes_of


@dataclass(frozen=True)
class Limit:
    """A limit of recipe.Budget. cost: from a price (targets/timing/price.py) to the limit's unit; None if unknown."""

    key: str
    unit: str
    relation: Literal["<=", ">="]
    cost: Callable[[dict[str, Any]], float | None]


def _part(name: str, scale: float) -> Callable[[dict[str, Any]], float | None]:
    return lambda price: None if price[name] is None else price[name] * scale


LIMITS = (Limit("tokens_per_second", "tokens/s", ">=", lambda price: price["token_ms"] and 1000 / price["token_ms"]),
          Limit("time_to_first_token", "s to the first token", "<=", _part("first_token_s", 1.0)),
          Limit("memory", "MB of memory", "<=", _part("memory_bytes", 1e-6)),
          Limit("file_size", "MB on disk", "<=", _part("file_bytes", 1e-6)))


def check_budget(budget: Budget, predicted: dict[str, Any], artifacts: list[Artifact], profile: Profile,
                 check_input: CheckInput, rows: list[dict[str, Any]], progress: Callable[[str], None]
                 ) -> list[dict[str, Any]]:
    """Return a row for each limit: asked, predicted and measured (None: not measurable here), in its unit. Adds the
    gates to the artifact's row. predicted: planner's prediction. Raises WorkerFailed."""
    artifact = next(artifact for artifact in artifacts if artifact.name == predicted["format"])
    runtime = next(runtime for runtime in runtimes_of(profile)
                   if runtime.name == profile.runtime_of(predicted["format"]))
    row = next(row for row in rows if (row["artifact"], row["runtime"]) == (artifact.path, runtime.name))
    price: dict[str, Any] = {"token_ms": None, "first_token_s": None, "file_bytes": artifact.bytes,
                             "memory_bytes": row.get("memory", {}).get("peak_bytes")}
    if runtime.timed and row["state"] == "passed":
        path, context = check_input.out / artifact.path, min(predicted["context"], check_input.reference.shape
                                                             .max_position_embeddings)
        price |= _measured(runtime, path, check_input, context, progress)
    found = []
    for limit in LIMITS:
        if asked := getattr(budget, limit.key):
            measured = limit.cost(price)
            found.append({"limit": limit.key, "unit": limit.unit, "relation": limit.relation, "asked": asked,
                          "predicted": limit.cost(predicted["price"]), "measured": measured})
            if measured is not None:
                gate = Gate("budget", f"{artifact.path} ({row['label']})", limit.unit, measured, asked, limit.relation)
                row["gates"].append({**gate.as_dict(), "target": profile.name})
                row["state"] = row["state"] if gate.passed else "failed"
    return found


def _measured(runtime: Any, path: Path, check_input: CheckInput, context: int, progress: Callable[[str], None]
              ) -> dict[str, Any]:
    prompt = check_input.reference.long_prompt(context - speed.N_DECODE - 1)
    found = speed.after_prompt(runtime.start, path, prompt, context, check_input.threads, progress)
    read, write = found["prompt"], found["decode"]
    return {"token_ms": write and 1000 / write, "first_token_s": read and context / read,
            "memory_bytes": found["peak_bytes"]}
