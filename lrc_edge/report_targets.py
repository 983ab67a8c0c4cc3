"""What the page tells of devices: a table a target, rows as they were checked, why others were not."""
from __future__ import annotations

from typing import Any

from lrc_edge.figures import NONE, figure, human_bytes, percent, visible
from lrc_edge.report_view import Names, Report


def target_tables(report: Report, names: Names) -> list[dict[str, Any]]:
    return [{"name": visible(result["target"]), "description": visible(result["description"]),
             "rows": [_row(row, names) for row in result["rows"]]} for result in report.get("targets") or []]


def _row(row: dict[str, Any], names: Names) -> dict[str, Any]:
    positions = row.get("positions")
    n_texts = row.get("n_texts")
    return {"state": row["state"], "mark": {"passed": "pass", "failed": "FAIL"}.get(row["state"], "not checked"),
            "artifact": names(row["artifact"]), "label": visible(row["label"]), "why": visible(row.get("why", "")),
            "kl": figure(row.get("kl_mean")), "top1": percent(row.get("top1")),
            "note": f"{positions:,} positions; p99 {figure(row['kl_p99'])}" if positions else "",
            "token_ids": f"{n_texts - row['token_mismatches']:,} of {n_texts:,}" if n_texts else NONE,
            "context": f"{row['n_ctx']:,}" if "context" in row else NONE,
            "memory": human_bytes(row.get("memory", {}).get("peak_bytes")),
            "memory_note": visible(row.get("memory", {}).get("how", "")),
            "speed": [_speed(rates) for rates in row.get("speed", [])]}


def _speed(rates: dict[str, Any]) -> str:
    ratio = (f" ({rates['prefill_of_teacher']:.2f} and {rates['decode_of_teacher']:.2f} × the teacher's)"
             if "decode_of_teacher" in rates else "")
    return (f"after {rates['depth']:,} tokens: prefill {rates['prefill']:,.0f}, decode {rates['decode']:,.0f} "
            f"tokens/s{ratio}")
