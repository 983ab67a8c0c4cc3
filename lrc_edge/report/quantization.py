"""What the page tells of quantization: the text behind it, training on the grid, and the types of a mixed precision."""
from __future__ import annotations

from collections import Counter
from typing import Any

from lrc_edge.figures import duration, figure, is_number, percent, visible
from lrc_edge.report.view import Names, Report


def quantization_facts(report: Report, names: Names) -> list[tuple[str, str]]:
    """Rows (what, how) of the section; none where nothing was calibrated, trained on a grid or mixed."""
    facts: list[tuple[str, str]] = []
    if calibration := report.get("calibration"):
        left_out = calibration["rows_left_out"]
        facts.append(("Importance matrix", f"{calibration['tokens']:,} tokens of {calibration['source']}; SHA-256 of "
                      f"the ids {calibration['sha256']}; disjoint from the proof's text" +
                      f", {left_out:,} rows left out for that" * bool(left_out)))
    if grid := report.get("grid"):
        facts.append(("Trained on the Q4_0 grid", _grid(grid, report, names)))
    if mixed := report.get("allocation"):
        types = Counter(mixed["types"].values())
        told = ", ".join(f"{n} × {kind}" for kind, n in sorted(types.items(), key=lambda item: -item[1]))
        facts.append((f"{mixed['bits_per_weight']:g} bits a weight, mixed",
                      f"{told}. {figure(mixed['measured_bits_per_weight'], 4)} bits a weight measured; KL "
                      f"{figure(mixed['predicted_kl'])} predicted, {figure(mixed['measured_kl'])} measured"))
    return [(visible(name), visible(value)) for name, value in facts]


def _grid(grid: dict[str, Any], report: Report, names: Names) -> str:
    plain, trained, whole = (grid[f"{who}_held_out_loss"] for who in ("first", "student", "teacher"))
    files = [a for a in report["artifacts"] if is_number(a.get("identical_blocks"))]
    blocks = "; ".join(f"{names(a['path'])}: {percent(a['identical_blocks'])} of the blocks as trained" for a in files)
    won = f", {100 * (plain - trained) / (plain - whole):.0f} % of the loss won back" if plain > whole else ""
    return (f"{grid['tokens']:,} tokens in {duration(grid['seconds'])}; held-out loss {plain:.4f} rounded, "
            f"{trained:.4f} trained, {whole:.4f} of what it was to say{won}. {blocks}")
