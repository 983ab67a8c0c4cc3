"""The page's section on devices: one table per target, with the checked rows and the reasons for unchecked ones."""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lrc_edge.figures import NONE, figure, human_bytes, percent, visible
from lrc_edge.parity import CHANGES, Gate
from lrc_edge.report.view import RELATIONS, Names


def target_tables(results: Iterable[dict[str, Any]], names: Names) -> list[dict[str, Any]]:
    return [{"name": visible(result["target"]), "description": visible(result["description"]),
             "absent": ", ".join(result.get("absent", [])), "energy": visible(result.get("energy", "")),
             "rows": [_row(row, names) for row in result["rows"]],
             "budget": [_budget_row(row) for row in result.get("budget", [])]} for result in results]


def _row(row: dict[str, Any], names: Names) -> dict[str, Any]:
    positions = row.get("positions")
    n_texts = row.get("n_texts")
    return {"state": row["state"], "mark": {"passed": "pass", "failed": "FAIL"}.get(row["state"], "not checked"),
            "artifact": names(row["artifact"]), "label": visible(row["label"]),
            "why": failures(row) or ([visible(row["why"])] if "why" in row else []),
            "kl": figure(row.get("kl_mean")), "top1": percent(row.get("top1")),
            "positions": f"{positions:,}" if positions else "",
            "note": f"p99 {figure(row['kl_p99'])}" if positions else "",
            "token_ids": f"{n_texts - row['token_mismatches']:,} of {n_texts:,}" if n_texts else NONE,
            "context": f"{row['n_ctx']:,}" if "context" in row else NONE,
            "memory": memory_text(row), "memory_note": visible(_memory_note(row.get("memory", {}))),
            "speed": [speed_text(rates) for rates in row.get("speed", [])]}


def _memory_note(memory: dict[str, Any]) -> str:
    return str(memory["how"]) if memory.get("peak_bytes") else "estimated" if memory else ""


def failures(row: dict[str, Any]) -> list[str]:
    """Return why a row failed: the runtime's error and the failed gates. Empty if it did not fail."""
    if row["state"] != "failed":
        return []
    reasons = [visible(row["why"])] if "why" in row else []
    for gate in row["gates"]:
        if gate["metric"] == CHANGES and not gate["passed"]:
            reasons.append("the file is not what the build wrote (its SHA-256 differs)")
        elif gate["metric"] != "failures" and not gate["passed"]:
            reasons.append(f"{gate['name']}: {gate['metric']} {figure(gate['value'], 4)}, need {gate['relation']} "
                           f"{figure(gate['limit'], 4)}")
    return reasons


def memory_text(row: dict[str, Any]) -> str:
    """Return the measured memory, or with a ~ the memory estimated from the shape."""
    memory = row.get("memory", {})
    if memory.get("peak_bytes"):
        return human_bytes(memory["peak_bytes"])
    return f"~{human_bytes(memory['predicted_bytes'])}" if memory else NONE


def speed_text(rates: dict[str, Any]) -> str:
    """ "after 1,024 tokens: prefill 155 tok/s (3.1 × the teacher), decode 42 tok/s (4 × the teacher), energy 0.31
    J/token (0.2 × the teacher)"; "energy unavailable" where it was not measured."""
    parts = []
    for key, name, unit in (("prefill", "prefill", "tok/s"), ("decode", "decode", "tok/s"),
                            ("joules", "energy", "J/token")):
        ratio = rates.get(f"{key}_of_teacher")
        value = "unavailable" if key == "joules" and not rates.get(key) else f"{figure(rates[key])} {unit}"
        parts.append(f"{name} {value}" + (f" ({figure(ratio)} × the teacher)" if ratio else ""))
    return f"after {rates['depth']:,} tokens: {', '.join(parts)}"


def _budget_row(row: dict[str, Any]) -> dict[str, str]:
    kept = row["measured"] is not None and Gate("budget", "", row["unit"], row["measured"], row["asked"],
                                                row["relation"]).passed
    return {"asked": f"{RELATIONS[row['relation']][0]} {figure(row['asked'])} {visible(row['unit'])}",
            "predicted": figure(row["predicted"]), "measured": figure(row["measured"]),
            "mark": "not measured here" if row["measured"] is None else "kept" if kept else "EXCEEDED"}


def budget_text(row: dict[str, Any]) -> str:
    """ ">= 30 tokens/s: predicted 33, measured 34.1, kept"."""
    cells = _budget_row(row)
    return f"{cells['asked']}: predicted {cells['predicted']}, measured {cells['measured']}, {cells['mark']}"
