"""The texts and values of the report page, prepared from the report's figures, without markup.

Keys that a report may lack are handled here, so the template needs no conditions on them.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from lrc_edge.figures import NONE, duration, figure, human_bytes, human_count, is_number, percent, prose, visible
from lrc_edge.report.schema import ArtifactRow, GateRow, ModelRow, Report, Sizes

SHAPE_NAMES = {
    "hidden_size": "residual width", "num_hidden_layers": "layers", "num_attention_heads": "query heads",
    "num_key_value_heads": "key/value heads", "head_dim": "head size", "intermediate_size": "FFN width",
    "vocab_size": "vocabulary", "max_position_embeddings": "context", "tied": "tied embeddings"}
HELD_OUT_NAMES = {"loss": "held-out loss, nats per token", "perplexity": "held-out perplexity",
                  "bits_per_byte": "held-out bits per byte"}
METRIC_NAMES = {"kl_mean": "KL mean", "kl_p99": "KL p99", "kl_max": "KL max", "top1": "top-1", "nmse": "NMSE",
                "max_abs": "max abs", "delta_ppl": "Δ perplexity", "identical_blocks": "identical blocks"}
SHARES = ("top1", "identical_blocks")
RELATIONS = {"<=": ("≤", ">"), ">=": ("≥", "<"), "==": ("=", "≠")}  # of a gate that passed, of one that failed


class Names:
    """Short names of artifacts, as --formats writes them ("gguf:q8_0"); the path if two would share one."""

    def __init__(self, artifacts: Iterable[ArtifactRow]):
        paths: dict[str, list[str]] = {}
        for artifact in artifacts:
            paths.setdefault(f"{artifact['format']}:{artifact['encoding']}", []).append(artifact["path"])
        self._short = {path: name if len(group) == 1 else path for name, group in paths.items() for path in group}

    def __call__(self, artifact: Any) -> str:
        """Shorten a path, also in "<path> (<runtime>)". Any other text ("student") is returned as it is."""
        text = str(artifact)
        for path in sorted(self._short, key=len, reverse=True):
            if text == path or text.startswith(path + " "):
                return visible(self._short[path] + text[len(path):])
        return visible(text)


def ordered_gates(report: Report) -> list[GateRow]:
    """Return the gates, failed ones first, otherwise in their order. Only passed = true counts as passed."""
    return sorted(report["gates"], key=lambda gate: gate.get("passed") is True)


def gate_cells(gate: GateRow, names: Names) -> dict[str, Any]:
    passed, metric = gate.get("passed") is True, str(gate["metric"])
    asked, missed = RELATIONS.get(gate["relation"], (visible(gate["relation"]),) * 2)
    why = visible(gate.get("why") or "")
    return {"passed": passed, "name": visible(gate["name"]), "artifact": names(gate["artifact"]),
            "path": visible(gate["artifact"]), "metric": METRIC_NAMES.get(metric, visible(metric)),
            "value": "none" if gate["value"] is None and why else _metric_text(metric, gate["value"]), "why": why,
            "exact": visible(gate["value"]), "asked": asked,
            "relation": asked if passed else missed, "limit": _metric_text(metric, gate["limit"], exact=True)}


def _metric_text(metric: str, value: Any, exact: bool = False) -> str:
    if value is None:
        return "not a number"
    if metric not in SHARES:
        return figure(value, 4)
    return f"{100 * value:.10g} %" if exact else percent(value)


# -- header ------------------------------------------------------------------------------------------------------------


def tiles(report: Report, names: Names) -> list[dict[str, str]]:
    """Return the most important figures: name, value, and what to compare it with."""
    student, teacher, artifacts = report["student"], report.get("teacher"), report["artifacts"]
    found = [{"name": "Parameters", "value": human_count(student["n_params"]),
              "note": _ratio_note(teacher, student) if teacher else visible(student["family"])}]
    failed = {gate["artifact"] for gate in report["gates"] if gate.get("passed") is not True}
    if sound := [a for a in artifacts if a["path"] not in failed]:
        smallest = min(sound, key=lambda a: a["bytes"])
        found.append({"name": "Smallest that passed" if failed else "Smallest artifact",
                      "value": human_bytes(smallest["bytes"]),
                      "note": f"{names(smallest['path'])}, {figure(smallest['bits_per_weight'])} bits per weight"})
    full = teacher.get("full_vocabulary") if teacher else None
    if student.get("held_out") and full:  # perplexities per token of two vocabularies are not comparable
        found.append({"name": "Held-out bits per byte", "value": figure(student["held_out"]["bits_per_byte"]),
                      "note": f"teacher, full vocabulary: {figure(full['bits_per_byte'])}"})
    elif student.get("held_out"):
        of_teacher = teacher.get("held_out") if teacher else None
        found.append({"name": "Held-out perplexity", "value": figure(student["held_out"]["perplexity"]),
                      "note": f"teacher: {figure(of_teacher['perplexity'])}" if of_teacher else "student"})
    elif (perplexity := student_perplexity(report)) is not None:
        found.append({"name": "Perplexity", "value": figure(perplexity), "note": "student, on the held-out text"})
    measured = [(kl, a["path"]) for a in artifacts if (kl := worst_kl(a)) is not None]
    if measured:
        kl, path = max(measured)
        found.append({"name": "Largest KL", "value": figure(kl), "note": f"nats per token, {names(path)}"})
    return found


def _ratio_note(teacher: ModelRow, student: ModelRow) -> str:
    ratio = teacher["n_params"] / student["n_params"]
    return f"{figure(ratio)}× fewer than the teacher's {human_count(teacher['n_params'])}"


def worst_kl(artifact: ArtifactRow) -> float | None:
    """Return the larger mean KL of prefill and decode."""
    found = [m["kl_mean"] for m in (artifact.get("parity") or {}).values() if m and is_number(m.get("kl_mean"))]
    return max(found, default=None)


def student_perplexity(report: Report) -> float | None:
    """Return the student's perplexity on the held-out text: an artifact's, minus its difference from the student."""
    for artifact in report["artifacts"]:
        m = (artifact.get("parity") or {}).get("prefill")
        if m and is_number(m.get("ppl")) and is_number(m.get("delta_ppl")):
            return float(m["ppl"] - m["delta_ppl"])
    return None


# -- models -----------------------------------------------------------------------------------------------------------


def models(report: Report) -> list[dict[str, Any]]:
    found = [("Teacher", report.get("teacher")), ("Student" if report.get("teacher") else "Model", report["student"])]
    return [{"who": who, "name": visible(m["name"]), "family": visible(m["family"]), "path": visible(m["path"]),
             "license": _license(m.get("license"))} for who, m in found if m]


def _license(value: Any) -> str:
    names = value if isinstance(value, list) else [value]
    return ", ".join(visible(name) for name in names if name) or "not stated"


def size_rows(student: Sizes, teacher: Sizes | None) -> list[dict[str, str]]:
    """Return one row per shape field, and one for the parameters: teacher, student, how many times smaller."""
    rows = []
    for field in [*SHAPE_NAMES, *(set(student["shape"]) - SHAPE_NAMES.keys() - {"family"})]:
        if field in student["shape"]:
            rows.append(compared(SHAPE_NAMES.get(field, visible(field)), student["shape"][field],
                                 teacher["shape"].get(field) if teacher else None, lambda n: f"{n:,}"))
    rows.append(compared("parameters", student["n_params"], teacher["n_params"] if teacher else None,
                         lambda n: f"{n:,}"))
    return rows


def shape_rows(report: Report) -> list[dict[str, str]]:
    """Return the rows of the sizes, and one per held-out figure."""
    student, teacher = report["student"], report.get("teacher")
    rows = size_rows(student, teacher)
    full = teacher.get("full_vocabulary") if teacher else None
    whose = ", student's vocabulary" if full else ""
    for key, name in HELD_OUT_NAMES.items():
        held_out: list[Any] = [m.get("held_out") if m else None for m in (student, teacher)]
        of_student, of_teacher = (figures.get(key) if figures else None for figures in held_out)
        if of_student is not None:
            rows.append({**compared(name + whose, of_student, of_teacher, lambda x: figure(x, 4)), "ratio": ""})
    if full:
        rows.append(compared(f"{HELD_OUT_NAMES['bits_per_byte']}, teacher's vocabulary", None, full["bits_per_byte"],
                             lambda x: figure(x, 4)))
    return rows


def compared(name: str, of_student: Any, of_teacher: Any, write: Callable[[Any], str]) -> dict[str, str]:
    """Return the cells of one figure of both models. write: formats a number."""
    def cell(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        return str(write(value)) if is_number(value) else NONE if value is None else visible(value)

    known = is_number(of_student) and is_number(of_teacher) and of_student > 0
    ratio = figure(of_teacher / of_student) if known else "1"
    return {"name": name, "teacher": cell(of_teacher), "student": cell(of_student),
            "ratio": f"÷ {ratio}" if ratio != "1" else "",
            "same": "same" if of_student == of_teacher else ""}


def _start_facts(start: dict[str, Any], teacher: ModelRow | None) -> list[tuple[str, str]]:
    """Return the KL of the student before training, and which layers and heads of the teacher it has."""
    facts = [("KL from the teacher before training", figure(start["kl"]))] if is_number(start.get("kl")) else []
    layers = start.get("layers") or []
    if teacher and len(layers) < teacher["shape"]["num_hidden_layers"]:
        facts.append(("layers of the teacher", ", ".join(map(str, layers))))
    for key, name in (("query_heads", "query heads"), ("key_value_heads", "key/value heads")):
        if of_layers := start.get(key):
            heads = [" ".join("+".join(map(str, members)) for members in of_layer) for of_layer in of_layers]
            text = "; ".join(f"layer {layer}: {text}" for layer, text in enumerate(heads))
            facts.append((f"the teacher's {name} in each layer", text))
    return facts


def training_facts(report: Report) -> list[tuple[str, str]]:
    training = report["student"].get("training")
    if not training:
        return []
    facts = [("tokens", f"{training['tokens']:,}"), ("steps", f"{training['steps']:,}"),
             ("time", duration(training["seconds"])), ("device", training["device"]),
             ("precision", training["precision"]), ("initialization", training["init"])]
    dense_steps = training["steps"] - training.get("dense_from_step", training["steps"])
    if dense_steps:
        facts.append(("dense phase", f"the last {dense_steps:,} steps" if dense_steps < training["steps"] else "all"))
    for name, phase in training.get("phases", {}).items():
        facts.append((f"peak learning rate, {name} phase", figure(phase["learning_rate"])))
    before, after = (training.get(f"{which}_held_out_loss") for which in ("first", "student"))
    if is_number(before) and is_number(after):
        facts.append(("held-out loss", f"{before:.4f} before the first step, {after:.4f} after the last"))
    if hops := training.get("hops"):
        facts.insert(1, ("tokens of the hops before", ", ".join(f"{hop['tokens']:,}" for hop in hops)))
    facts += _start_facts(training.get("start") or {}, report.get("teacher"))
    if training.get("skipped_batches"):
        facts.append(("bad batches skipped", f"{training['skipped_batches']:,}"))
    if training["seconds"]:
        facts.insert(3, ("speed", f"{training['tokens'] / training['seconds']:,.0f} tokens/s"))
    return [(name, visible(value)) for name, value in facts]


# -- artifacts ---------------------------------------------------------------------------------------------------------


def artifact_rows(report: Report, names: Names) -> list[dict[str, Any]]:
    rows = []
    for a in report["artifacts"]:
        gates = [gate for gate in report["gates"] if gate["artifact"] == a["path"]]
        failed = sum(gate.get("passed") is not True for gate in gates)
        rows.append({
            "name": names(a["path"]), "path": visible(a["path"]), "runtime": visible(a.get("runtime") or ""),
            "size": human_bytes(a["bytes"]), "bytes": f"{a['bytes']:,} bytes", "bits": figure(a["bits_per_weight"]),
            "sha256": visible(a["sha256"]), "failed": failed, "gates": len(gates),
            "types": ", ".join(f"{n} × {visible(kind)}" for kind, n in sorted(a["tensor_types"].items())),
            "parity": [_parity_cells(what, m) for what, m in (a.get("parity") or {}).items() if m]})
    return rows


def _parity_cells(what: str, m: dict[str, Any]) -> dict[str, str]:
    error = f" ± {figure(m.get('delta_ppl_se'), 2)}" if is_number(m.get("delta_ppl_se")) else ""
    delta: Any = m.get("delta_ppl")
    sign = "+" if is_number(delta) and delta > 0 else ""
    note = (f"{m.get('positions', 0):,} positions; KL p99 {figure(m.get('kl_p99'))}, max {figure(m.get('kl_max'))}; "
            f"NMSE {figure(m.get('nmse'))}; max abs {figure(m.get('max_abs'))}; perplexity {figure(m.get('ppl'), 4)}; "
            f"{m.get('near_ties', 0):,} near-ties excluded from top-1")
    return {"what": visible(what), "kl": figure(m.get("kl_mean")), "delta": f"{sign}{figure(delta)}{error}",
            "top1": percent(m.get("top1")), "note": note}


def fallback_groups(report: Report, names: Names) -> list[dict[str, Any]]:
    """Return the tensors stored in another type than requested: one group per artifact, equal cases together."""
    groups = []
    for a in report["artifacts"]:
        alike: dict[tuple[str, str, str], list[str]] = {}
        for f in a["fallbacks"]:
            key = (visible(f["wanted"]), visible(f["got"]), visible(f["reason"]))
            alike.setdefault(key, []).append(visible(f["tensor"]))
        rows = [{"wanted": key[0], "got": key[1], "reason": key[2], "tensors": tensors}
                for key, tensors in alike.items()]
        if rows:
            groups.append({"artifact": names(a["path"]), "n": len(a["fallbacks"]), "rows": rows,
                           "n_tensors": sum(a["tensor_types"].values()), "bits": figure(a["bits_per_weight"])})
    return groups


# -- texts -------------------------------------------------------------------------------------------------------------


def sample_rows(report: Report, names: Names) -> list[dict[str, Any]]:
    """Return each prompt's continuations; models with the same text share one entry."""
    samples = report.get("samples") or [
        {"prompt": a["generation"]["prompt"], "outputs": [{"who": a["path"], "text": a["generation"]["text"]}]}
        for a in report["artifacts"] if a.get("generation")]
    merged: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        merged.setdefault(prose(sample["prompt"]), []).extend(sample["outputs"])
    return [{"prompt": prompt, "outputs": _outputs(outputs, names)} for prompt, outputs in merged.items()]


def _outputs(outputs: list[dict[str, Any]], names: Names) -> list[dict[str, Any]]:
    """Return one entry per different text. All but the teacher's are compared with the student's text."""
    student = next((prose(o["text"]) for o in outputs if o["who"] == "student"), None)
    sources: dict[tuple[str, bool], list[str]] = {}
    for output in outputs:
        key = (prose(output["text"]), output["who"] == "teacher")
        sources.setdefault(key, []).append(names(output["who"]))
    rows = []
    for (text, is_teacher), who in sources.items():
        same, differs, rest = (text, "", "") if student is None or is_teacher else split_at_difference(text, student)
        first, *echoes = dict.fromkeys(who)
        rows.append({"who": first, "echoes": echoes, "same": same, "differs": differs, "rest": rest})
    return rows


def split_at_difference(text: str, reference: str) -> tuple[str, str, str]:
    """Return (common beginning, first differing word, rest). "∎" marks a text that only stops earlier."""
    if text == reference:
        return text, "", ""
    at = next((i for i, (a, b) in enumerate(zip(text, reference, strict=False)) if a != b),
              min(len(text), len(reference)))
    if at == len(text):
        return text, "∎", ""
    start = at
    while start > 0 and not text[start - 1].isspace() and not text[at].isspace():
        start -= 1
    end = max(at + 1, next((i for i in range(at, len(text)) if text[i].isspace()), len(text)))
    return text[:start], text[start:end], text[end:]


def tokenizer_rows(report: Report, names: Names) -> list[dict[str, Any]]:
    return [{"artifact": names(t["artifact"]), "n": f"{t['n_strings']:,}", "bad": t["n_mismatches"],
             "examples": [{"text": visible(e["text"]), "expected": _ids(e["expected"], e["got"]),
                           "got": _ids(e["got"], e["expected"])} for e in t.get("examples") or []]}
            for t in report.get("tokenizer") or []]


def _ids(ids: list[int], other: list[int]) -> dict[str, str]:
    """Return the ids as text, split where the lists start to differ."""
    at = next((i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b), min(len(ids), len(other)))
    return {"same": " ".join(map(str, ids[:at])), "rest": " ".join(map(str, ids[at:])) or "∎"}


def template_rows(report: Report, names: Names) -> list[dict[str, Any]]:
    rows = []
    for t in report.get("chat_template") or []:
        expected, got = prose(t["expected"]), prose(t["got"])
        same, differs, rest = split_at_difference(got, expected)
        rows.append({"artifact": names(t["artifact"]), "equal": t["equal"], "expected": expected, "same": same,
                     "differs": differs, "rest": rest,
                     "engines": [(name, prose(answer)) for name, answer in (t.get("engines") or {}).items()]})
    return rows


def cache_rows(report: Report, names: Names) -> list[dict[str, Any]]:
    """Return the KL mean of each GGUF with llama.cpp's KV cache in each type."""
    return [{"artifact": names(a["path"]), "kl": [(kind, figure(kl)) for kind, kl in a["kv_cache"].items()]}
            for a in report["artifacts"] if a.get("kv_cache")]


def cache_advice_rows(report: Report, names: Names) -> list[dict[str, Any]]:
    return [{"target": visible(row["target"]), "artifact": names(row["artifact"]), "context": f"{row['context']:,}",
             "cache": row["cache"] or "none fits", "why": visible(row["why"])}
            for row in report.get("kv_cache_advice") or []]


def build_facts(report: Report) -> list[tuple[str, str]]:
    """Return how the report was made, for the foot of the page."""
    versions = ", ".join(f"{name} {number}" for name, number in (report.get("versions") or {}).items())
    facts = [("made", report["created"]), ("command", report.get("command")), ("machine", report.get("machine")),
             ("versions", versions)]
    facts += [(key.replace("_", " "), value) for key, value in (report["student"].get("provenance") or {}).items()]
    return [(visible(name), visible(value)) for name, value in facts if value]
