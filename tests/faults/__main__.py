"""`python -m faults --kills 100 --mutations 10000 --seed 1`: see --help. Exit status 1 when a case failed."""
from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

# Before numpy and torch are imported: a process without threads can be forked.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "100",
               "TOKENIZERS_PARALLELISM": "false"}

from faults import full_disk, kills, memory_limit, mutations, same_bytes
from faults.bench import STAGES, Bench
from faults.runs import import_everything

KINDS = ("same", "kills", "disk", "memory", "mutations")
SHOWN_EVERY = 20.0  # seconds
SHOWN_FAILURES = 40


@dataclass
class Result:
    """Of one case. tally: what the table counts, such as kills by stage; problems: empty when it passed."""

    kind: str
    number: int
    seconds: float = 0.0
    tally: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=0, help="SIGKILLs, spread over all stages")
    parser.add_argument("--disk", type=int, default=0, help="full disks; every stage has one after the other")
    parser.add_argument("--memory", type=int, default=0, help="memory limits, likewise")
    parser.add_argument("--mutations", type=int, default=0, help="damaged inputs")
    parser.add_argument("--same", type=int, default=0, help="builds elsewhere that must have the same bytes")
    parser.add_argument("--seed", type=int, default=1, help="every case follows from the seed and its number")
    parser.add_argument("--replay", action="append", default=[], metavar="KIND:NUMBER", help="only this case, verbose")
    parser.add_argument("--log", type=Path, help="JSON lines, one a case; cases that passed in it are not run again")
    parser.add_argument("--keep", type=Path, help="a folder for what --replay leaves; default: nothing is kept")
    return parser.parse_args()


def planned(options: argparse.Namespace) -> list[tuple[str, int]]:
    """(kind, number) of every case."""
    if options.replay:
        return [(kind, int(number)) for kind, _, number in (text.partition(":") for text in options.replay)]
    counts = {"same": options.same, "kills": len(kills.cases(options.kills)), "disk": options.disk,
              "memory": options.memory, "mutations": options.mutations}
    return [(kind, number) for kind in KINDS for number in range(counts[kind])]


def run_case(bench: Bench, options: argparse.Namespace, kind: str, number: int, folder: Path) -> Result:
    rng, started = random.Random(f"{options.seed} {kind} {number}"), time.monotonic()
    result = Result(kind, number)
    stage = STAGES[number % len(STAGES)]
    if kind == "same":
        result.problems = same_bytes.case(bench, rng, folder)
    elif kind == "kills":
        counts = kills.cases(options.kills)
        n_kills = counts[number] if number < len(counts) else kills.PER_CASE
        result.problems, tally = kills.case(bench, rng, folder, number, n_kills)
        result.tally = dict(tally)
    elif kind == "mutations":
        what, result.problems = mutations.case(bench, rng, folder)
        result.tally = {what.split(",")[0]: 1}
    else:
        how, problems = (full_disk if kind == "disk" else memory_limit).case(bench, rng, folder, stage)
        result.tally = {f"{stage}: {re.sub(', .*', '', how)}": 1}
        result.problems = [f"{stage}, {how}: {problem}" for problem in problems]
    result.seconds = time.monotonic() - started
    return result


def earlier(log: Path | None, seed: int) -> dict[tuple[str, int], Result]:
    """The cases of this seed that passed, by the log."""
    if log is None or not log.exists():
        return {}
    rows = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
    return {(row["kind"], row["number"]): Result(**{k: v for k, v in row.items() if k != "seed"})
            for row in rows if row["seed"] == seed and not row["problems"]}


def main() -> int:
    options = arguments()
    cases, results = planned(options), [] if options.replay else list(earlier(options.log, options.seed).values())
    done = {(result.kind, result.number) for result in results}
    print(f"seed {options.seed}: {len(cases)} cases, {len(done & set(cases))} of them done earlier", flush=True)
    import_everything()
    # In memory: a thousand small copies a minute.
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="faults-", dir=where) as folder:
        bench = Bench.make(Path(folder) / "bench")
        if any(kind == "mutations" for kind, _ in cases):
            mutations.prepare(bench)
        left = [case for case in cases if case not in done]
        if any(kind == "disk" for kind, _ in left) and (reason := full_disk.reason_to_skip(bench.folder)):
            print(f"SKIPPED: full disks: {reason}", flush=True)
            left = [case for case in left if case[0] != "disk"]
        for result in run_all(bench, options, left, Path(folder) / "case"):
            results.append(result)
            if options.log:
                options.log.parent.mkdir(parents=True, exist_ok=True)
                with options.log.open("a") as log:
                    log.write(json.dumps({"seed": options.seed, **asdict(result)}) + "\n")
    wanted = set(cases)
    return summary([result for result in results if (result.kind, result.number) in wanted], options.seed)


def run_all(bench: Bench, options: argparse.Namespace, cases: list[tuple[str, int]], folder: Path) -> Iterator[Result]:
    started = shown = time.monotonic()
    first: dict[str, float] = {}
    ended = Counter[str]()
    total = Counter(kind for kind, _ in cases)
    for kind, number in cases:
        first.setdefault(kind, time.monotonic())
        folder.mkdir()
        result = run_case(bench, options, kind, number, folder)
        if options.keep:
            shutil.copytree(folder, options.keep / f"{kind}-{number}", symlinks=True)
        shutil.rmtree(folder)
        ended[kind] += 1
        for problem in result.problems[:3]:
            print(f"FAILED {kind}:{number}  {problem}", flush=True)
        now = time.monotonic()
        if now - shown > SHOWN_EVERY or options.replay:
            shown, took = now, now - first[kind]
            print(f"{kind} {ended[kind]}/{total[kind]}  {60 * ended[kind] / took:.1f} a minute  "
                  f"eta {took / ended[kind] * (total[kind] - ended[kind]) / 60:.1f} min  "
                  f"{(now - started) / 60:.1f} min in all", flush=True)
        yield result


def summary(results: list[Result], seed: int) -> int:
    """The table; the failures, those of one cause together; the exit status."""
    print(f"\n{'kind':<10} {'cases':>6} {'failed':>6} {'minutes':>8}")
    for kind in KINDS:
        if mine := [result for result in results if result.kind == kind]:
            print(f"{kind:<10} {len(mine):>6} {sum(bool(r.problems) for r in mine):>6} "
                  f"{sum(r.seconds for r in mine) / 60:>8.1f}")
    for kind in KINDS[1:]:
        tally = sum((Counter(result.tally) for result in results if result.kind == kind), Counter[str]())
        if tally:
            print(f"\n{kind}: {sum(tally.values())}: " + ", ".join(f"{name} {n}" for name, n in sorted(tally.items())))
    failed = [result for result in results if result.problems]
    causes: dict[str, list[str]] = {}
    for result in failed:
        cause = re.sub(r"^.*?: ", "", result.problems[0], count=1)
        causes.setdefault(f"{result.kind}: {re.sub(r'[0-9]+', 'N', cause)[:150]}", []).append(
            f"{result.kind}:{result.number}")
    for cause, names in sorted(causes.items(), key=lambda item: -len(item[1]))[:SHOWN_FAILURES]:
        print(f"\n{len(names)} x {cause}\n    replay with --seed {seed} --replay {names[0]}")
    print(f"\n{len(failed)} of {len(results)} cases failed" if failed else f"\nall {len(results)} cases passed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
