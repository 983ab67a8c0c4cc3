"""Recommend a type of llama.cpp's KV cache for a device, from the measured cost and the known size of each type."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lrc_edge.figures import figure, human_bytes
from lrc_edge.shape import ModelShape
from lrc_edge.targets.memory import memory_of
from lrc_edge.targets.profile import Profile

DEFAULT = "f16"  # llama.cpp's own


def kv_cache_advice(artifacts: Iterable[Mapping[str, Any]], shape: ModelShape, profiles: Iterable[Profile],
                    most_added: float) -> list[dict[str, Any]]:
    """Return a row for each profile with its best GGUF: the largest cache type that fits, if it is precise enough.

    `most_added`: nats that a cache may add to the KL of llama.cpp's default cache.
    """
    measured = {f"{a['format']}:{a['encoding']}": a for a in artifacts if a.get("kv_cache")}
    rows = []
    for profile in profiles:
        formats = sorted(profile.format_names, key=lambda name: name != profile.recommended)
        name = next((name for name in formats if name in measured), None)
        if name is not None:
            rows.append(_advise(measured[name], name, shape, profile, most_added))
    return rows


def _advise(artifact: Mapping[str, Any], name: str, shape: ModelShape, profile: Profile, most_added: float
            ) -> dict[str, Any]:
    context = min(shape.max_position_embeddings, profile.context)
    runtime = profile.runtime_of(name)
    kl: dict[str, float | None] = artifact["kv_cache"]  # the largest type first
    row = {"target": profile.name, "artifact": artifact["path"], "context": context, "cache": None}
    reasons = []
    for cache, measured in kl.items():
        if measured is None:
            reasons.append(f"{cache} was not measured")
            continue
        added = measured - (kl[DEFAULT] or 0.0)
        needed = memory_of(shape, name, runtime, context, profile.features, cache).needed
        if needed > profile.usable_bytes:
            reasons.append(f"{cache} needs {human_bytes(needed)} of {human_bytes(profile.usable_bytes)}")
        elif added > most_added:
            reasons.append(f"{cache} adds {figure(added)} nats, more than {figure(most_added)}")
        else:
            cost = f", and adds {figure(max(added, 0.0))} nats" if cache != DEFAULT else ""
            reasons.append(f"{cache} fits in {human_bytes(profile.usable_bytes)}{cost}")
            return {**row, "cache": cache, "why": "; ".join(reasons)}
    return {**row, "why": "; ".join(reasons)}
