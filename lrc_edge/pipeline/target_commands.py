"""`lrc-edge targets` and `lrc-edge serve`. Nothing here imports torch or transformers, so both also run on devices."""
from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.prompt import Confirm
from rich.table import Table

from lrc_edge.config_file import PROVENANCE_FILE, read_config, read_table, shape_of
from lrc_edge.console import running
from lrc_edge.errors import UserError, one_line
from lrc_edge.exit_status import ExitStatus
from lrc_edge.figures import human_bytes, human_count
from lrc_edge.machine import architecture, threads_for
from lrc_edge.recipe import Recipe
from lrc_edge.shape import ModelShape
from lrc_edge.student import student_of
from lrc_edge.targets.devices import emulation
from lrc_edge.targets.devices.kits import Kit
from lrc_edge.targets.fit import Fit, FormatFit, check_fit
from lrc_edge.targets.memory import GROUPS, bytes_by_group, kv_bytes_per_token
from lrc_edge.targets.profile import all_profiles, load_profile
from lrc_edge.targets.runtimes.llama_probe import extra_buffers
from lrc_edge.targets.runtimes.table import RUNTIMES, runtimes_of
from lrc_edge.targets.serve.command import page_server
from lrc_edge.workspace import MANIFEST, Workspace

NOTES = ("total: the predicted peak of the resident set; llama.cpp and onnxruntime on x86-64 were within a tenth of "
         "it (benchmarks/fit.py); other processors are estimated, browsers fitted to a few measurements in Chromium. "
         "decode bound: memory bandwidth over the bytes that one token reads, an upper bound, not a measurement.")
VERDICT_STYLES = {"fits": "green", "tight": "yellow", "does not fit": "red"}


def list_targets(console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in ("target", "device", "RAM for the app", "plan for", "take"):
        table.add_column(header, no_wrap=header == "target")
    for profile in all_profiles():
        table.add_row(profile.name, escape(profile.description),
                      f"{profile.usable_gb.value:g} of {profile.ram_gb.value:g} GB", f"{profile.context:,} tokens",
                      profile.recommended)
    console.print(table, highlight=False)
    console.print("\nlrc-edge targets show NAME    its figures with their sources, and why these formats\n"
                  "lrc-edge targets fit MODEL --target NAME    does a model fit it?\n"
                  "lrc-edge targets setup NAME    install what its check runs; then lrc-edge check OUT --target NAME\n"
                  "Your own device is a file of the same keys: --target ./my-device.toml",
                  style="dim", highlight=False, soft_wrap=True)
    if advice := extra_buffers().advice:
        console.print(f"\nnote: {advice}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def time_anchors(model: Path, targets: Sequence[str], format_: str | None, context: int | None, out: Path,
                 console: Console) -> ExitStatus:
    """Time the anchors of a teacher on this machine, and write them to out/timings.json. model: a config.json, or a
    folder with one. format_: None: the device's recommended one. Raises UserError."""
    from lrc_edge.targets.timing.anchors import anchors_of
    from lrc_edge.targets.timing.measured import measured_here, runtime_here

    file = model / "config.json" if model.is_dir() else model
    shape = shape_of(read_table(file), file)
    if len(targets) != 1:
        raise UserError("--time-anchors: give this device with --target; `lrc-edge targets` lists them")
    profile = load_profile(targets[0])
    format_ = profile.format_named(format_)
    if (runtime := runtime_here(profile, format_)) is None:
        timed = ", ".join(row.name for row in RUNTIMES.values() if row.python_flags)
        raise UserError(f"--time-anchors: {profile.runtime_of(format_)} of {profile.name} ({profile.architecture}) is "
                        f"not timed on this machine ({architecture()}); timed are {timed} on the device itself")
    shapes = anchors_of(shape)
    with running(console, "timing") as task:
        found = measured_here(runtime, shapes, format_, min(context or profile.context, shape.max_position_embeddings),
                              threads_for(shapes[0]), task.update)
    found.save(out / "timings.json")
    console.print(f"{len(found.timings)} timings on {found.machine}, within {found.model().worst:.0%} of the model: "
                  f"{out / 'timings.json'}\nthen, where PyTorch is: lrc-edge plan TEACHER --timings timings.json "
                  f"--format {format_} ...",
                  highlight=False, markup=False, soft_wrap=True)
    return ExitStatus.PASSED


def show_target(name_or_path: str, console: Console) -> None:
    profile = load_profile(name_or_path)
    console.print(f"[bold]{escape(profile.name)}[/]  {escape(profile.description)}", highlight=False)
    emulated = f"; emulated as {profile.emulate} on other machines" if profile.emulate else ""
    console.print(f"{profile.architecture} with {', '.join(profile.features)}{emulated}. Plan for {profile.context:,} "
                  f"tokens. Checked in {', '.join(profile.runtimes)}.", highlight=False)
    figures = _table("figure", "value", "looked at", "source")
    units = {"cores": "", "ram_gb": " GB", "usable_gb": " GB", "bandwidth_gb_s": " GB/s"}
    for key, figure in profile.figures.items():
        figures.add_row(key, f"{figure.value:g}{units[key]}", f"{figure.date}", escape(figure.source))
    formats = _table("format", "why, best first")
    for format_ in profile.formats:
        recommended = format_.name == profile.recommended
        formats.add_row(format_.name, escape(format_.why) + (" (recommended)" if recommended else ""))
    for table in (figures, formats):
        console.print()
        console.print(table, highlight=False)


def kits_named(name: str) -> tuple[Kit, ...]:
    """Return what `lrc-edge targets setup NAME` installs: the kits of a runtime or target, or "aarch64" (the emulator).

    Raises UserError for any other name.
    """
    single = {**{row.name: row.kits for row in RUNTIMES.values()}, "aarch64": (emulation.KIT,)}
    return single[name] if name in single else tuple(kit for runtime in runtimes_of(load_profile(name))
                                                     for kit in runtime.kits)


def setup(names: list[str], yes: bool, console: Console) -> None:
    """Print what setting up these targets or runtimes will do, ask for confirmation on a terminal, and do it."""
    kits = [kit for kit in dict.fromkeys(kit for name in names for kit in kits_named(name)) if kit.missing()]
    if not kits:
        console.print("everything is there")
        return
    for line in (line for kit in kits for line in kit.plan()):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if console.is_interactive and not yes and not Confirm.ask("do that?", console=console, default=True):
        return
    for kit in kits:
        with running(console, "setup") as task:
            kit.install(task.update)
    console.print("done")


def serve(path: Path, encoding: str, host: str, port: int) -> None:
    """Serve a page to chat with the GGUF, until Ctrl-C."""
    with page_server(path, encoding, host, port) as server:
        print(f"{server.origin}/  (Ctrl-C ends)", flush=True)
        server.wait()


@dataclass(frozen=True)
class Model:
    """The model whose fit is estimated. `is_teacher`: the recipe would make a student of it."""

    name: str
    shape: ModelShape
    is_teacher: bool


def fit(source: str, target: str, context: int | None, recipe: Recipe, console: Console) -> ExitStatus:
    """Print the memory fit of the model; for a teacher, also of its planned student.

    The status is GATE_FAILED if the model (for a teacher: the student) does not fit.
    """
    profile, model = load_profile(target), find_model(source)
    plans = [(model.name, check_fit(model.shape, profile, context))]
    if model.is_teacher:
        student, name = student_of(recipe, model.shape, model.name)
        plans.insert(0, (name, check_fit(student, profile, context)))
    for i, (name, plan) in enumerate(plans):
        kind = ("student as planned", "its teacher, unchanged")[i] if model.is_teacher else "model"
        _print_fit(f"{name} ({kind})", plan, console)
    console.print(NOTES, style="dim", highlight=False)
    return ExitStatus.GATE_FAILED if plans[0][1].take is None else ExitStatus.PASSED


def find_model(source: str) -> Model:
    """Return the model of a build directory, a Hugging Face directory or a hub id (downloads its config.json).

    Raises UserError.
    """
    path = Path(source).expanduser()
    if (path / MANIFEST).exists():
        folder = Path(Workspace(path).manifest.get("job", {}).get("student") or path / "student")
        if not folder.exists():
            raise UserError(f"{path}: no student in it yet; give its teacher, and the recipe with --recipe and --set")
        return Model(path.resolve().name, shape_of(read_config(folder), folder / "config.json"), False)
    name = path.resolve().name
    if not path.exists() and not source.startswith(("/", ".", "~")):
        path = _download_config(source)
    shape = shape_of(read_config(path), path / "config.json")
    return Model(name, shape, not (path / PROVENANCE_FILE).exists())


def _download_config(hub_id: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise UserError(f"{hub_id}: no such directory, and without huggingface_hub nothing can be downloaded; give a "
                        "directory with the model's config.json") from error
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every attempt
    try:
        return Path(hf_hub_download(hub_id, "config.json")).parent
    except Exception as error:  # offline, gated, misspelt: the hub client raises many types
        raise UserError(f"{hub_id}: no such directory, and the hub did not give its config.json "
                        f"({one_line(error)}); give a local model directory or a hub id that you can download"
                        ) from error


def _print_fit(title: str, plan: Fit, console: Console) -> None:
    shape, profile = plan.shape, plan.profile
    console.print(f"[bold]{escape(title)}[/]: {human_count(shape.n_params)} parameters on {escape(profile.name)} at "
                  f"{plan.context:,} tokens, {human_bytes(profile.usable_bytes)} for the app", highlight=False)
    table = _table("", *(f"{row.format}\n{row.runtime}" for row in plan.formats))
    for label, cell in _rows(shape, plan):
        table.add_row(label, *(cell(row) for row in plan.formats), style="bold" if label == "total" else None)
    console.print(table, highlight=False)
    best = plan.take
    console.print(f"take {best.format}: {best.verdict}" if best and best.verdict == "fits" else str(plan.warning),
                  style=VERDICT_STYLES[best.verdict if best else "does not fit"], highlight=False, markup=False,
                  soft_wrap=True)
    console.print()


def _rows(shape: ModelShape, plan: Fit) -> list[tuple[str, Callable[[FormatFit], str]]]:
    """Return the label and cells of each table row."""
    layers = shape.num_hidden_layers

    def group(name: str) -> Callable[[FormatFit], str]:
        def cell(row: FormatFit) -> str:
            n_bytes = bytes_by_group(shape, row.format)[name]
            if name == "head" and shape.tied:
                return "the embedding"
            each = f" ({human_bytes(n_bytes / layers)} a layer)" if name in ("attention", "ffn") else ""
            return human_bytes(n_bytes) + each
        return cell

    def verdict(row: FormatFit) -> str:
        return f"[{VERDICT_STYLES[row.verdict]}]{row.verdict}[/]"

    return [*((name, group(name)) for name in GROUPS),
            ("copies for kernels", lambda row: human_bytes(row.memory.copies)),
            ("KV cache", lambda row: f"{human_bytes(row.memory.kv_cache)} "
                                     f"({human_bytes(kv_bytes_per_token(shape, row.format))} a token)"),
            ("working memory", lambda row: human_bytes(row.memory.working)),
            ("the runtime's own", lambda row: human_bytes(row.memory.runtime)),
            ("total", lambda row: human_bytes(row.memory.peak)),
            ("", verdict),
            ("longest context", lambda row: f"{row.longest_context:,} tokens"),
            ("decode bound", lambda row: f"{row.decode_bound:,.0f} tokens/s")]


def _table(*headers: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in headers:
        table.add_column(header, overflow="fold")
    return table
