"""The page's section on quantization: calibration text, quantization-aware training, and mixed precision."""
from __future__ import annotations

from collections import Counter
from typing import Any

from lrc_edge.figures import duration, figure, is_number, percent, visible
from lrc_edge.report.schema import Report
from lrc_edge.report.view import Names


def quantization_facts(report: Report, names: Names) -> list[tuple[str, str]]:
    """Return rows (name, text); empty without calibration, quantization-aware training and mixed precision."""
    facts: list[tuple[str, str]] = []
    if calibration := report.get("calibration"):
        left_out = calibration["rows_left_out"]
        overlap = f" ({left_out:,} sequences left out because they overlapped)" if left_out else ""
        facts.append(("Importance matrix", f"{calibration['tokens']:,} tokens of {calibration['source']}; SHA-256 of "
                      f"the ids {calibration['sha256']}; disjoint from the held-out text{overlap}"))
    if grid := report.get("grid"):
        facts.append(("Quantization-aware training, Q4_0", _grid(grid, report, names)))
    if mixed := report.get("allocation"):
        types = Counter(mixed["types"].values())
        mix = ", ".join(f"{n} × {kind}" for kind, n in sorted(types.items(), key=lambda item: -item[1]))
        facts.append((f"{mixed['bits_per_weight']:g} bits per weight, mixed precision",
                      f"{mix}. {figure(mixed['measured_bits_per_weight'], 4)} bits per weight measured; KL "
                      f"{figure(mixed['predicted_kl'])} predicted, {figure(mixed['measured_kl'])} measured"))
    return [(visible(name), visible(value)) for name, value in facts]


def _grid(grid: dict[str, Any], report: Report, names: Names) -> str:
    plain, trained, source = (grid[f"{who}_held_out_loss"] for who in ("first", "student", "teacher"))
    files = [a for a in report["artifacts"] if is_number(a.get("identical_blocks"))]
    blocks = "; ".join(f"{names(a['path'])}: {percent(a['identical_blocks'])} of the blocks equal the trained ones"
                       for a in files)
    gain = 100 * (plain - trained) / (plain - source) if plain > source else None
    recovered = f"; {gain:.0f} % of the loss recovered" if gain is not None else ""
    return (f"{grid['tokens']:,} tokens in {duration(grid['seconds'])}; held-out loss {plain:.4f} rounded "
            f"without training, {trained:.4f} trained, {source:.4f} of the model it copies{recovered}. {blocks}")
