"""The command line. It parses arguments and calls the commands; heavy imports wait until a command runs."""
from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lrc_edge import __version__
from lrc_edge.errors import UserError, shortage
from lrc_edge.exit_status import ExitStatus

app = typer.Typer(
    name="lrc-edge", no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Shrink a Hugging Face language model, export it to GGUF and ONNX, and verify every file against PyTorch.

[bold]lrc-edge build[/] runs all stages; the other commands run or use single stages.
Run an interrupted command again to resume it.

[dim]lrc-edge build HuggingFaceTB/SmolLM2-360M --data stories.jsonl --out out[/]

Exit status:
0  every gate passed
1  a gate failed; the report names it
2  a mistake in the input; one line explains it
3  a requested device cannot be checked on this machine""")

Teacher = Annotated[str, typer.Argument(help="Hugging Face model directory, or hub id (HuggingFaceTB/SmolLM2-360M).")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Directory to build in; an interrupted build is resumed.")]
RecipeFile = Annotated[Path | None, typer.Option(
    "--recipe", "-r", help="TOML file with settings, or a built-in recipe: edge-1.5b, edge-1.7b, edge-4b; or the "
                           "Low-Rank Clone paper's method, lrc-1.5b, lrc-1.7b, lrc-4b. `lrc-edge recipe` prints "
                           "every setting.")]
Settings = Annotated[list[str] | None, typer.Option(
    "--set", "-s", metavar="SECTION.KEY=VALUE", help="Override one setting of the recipe. May be repeated.")]
Sources = Annotated[list[str] | None, typer.Option(
    "--data", "-d", metavar="SRC",
    help="Text or conversations: a .txt, .jsonl or .parquet file, a folder of them, a hub dataset (name, name:config, "
         "name:config:split), or `self` for the teacher's own samples. May be repeated.")]
VerificationText = Annotated[list[str] | None, typer.Option(
    "--data", "-d", metavar="SRC", help="Text to verify on, in the same forms as for `build`. Default: Python's own "
                                        "documentation.")]
Formats = Annotated[str | None, typer.Option(
    help="Formats to write, comma-separated: gguf:f32, gguf:f16, gguf:bf16, gguf:q8_0, gguf:q4_0, gguf:q4_k_m and the "
         "other llama.cpp types; onnx:fp32, onnx:fp16, onnx:q8, onnx:q4.")]
BitsPerWeight = Annotated[float | None, typer.Option(
    help="Also write a mixed-precision GGUF of at most this many bits per weight (e.g. 4.25).")]
Targets = Annotated[list[str] | None, typer.Option(
    "--target", "-t", metavar="NAME", help="A device (`lrc-edge targets` lists them) or profile file: write "
                                           "the formats it runs and check them in its runtimes. May be repeated.")]
TokensPerSecond = Annotated[float | None, typer.Option(
    min=0, metavar="N", help="Budget: the student writes at least N tokens/s on the device, at the end of --context.")]
FirstToken = Annotated[float | None, typer.Option(
    "--time-to-first-token", min=0, metavar="S", help="Budget: at most S seconds, after a prompt of --context tokens.")]
Memory = Annotated[float | None, typer.Option(min=0, metavar="MB", help="Budget: at most so many MB of RAM.")]
FileSize = Annotated[float | None, typer.Option(min=0, metavar="MB", help="Budget: at most so many MB on disk.")]
Context = Annotated[int | None, typer.Option(min=1, help="Tokens of context to plan for. Default: the device's.")]
Effort = Annotated[str | None, typer.Option(
    "--search", metavar="EFFORT", help="How sizes are chosen: none (by what cuts cost elsewhere), short or full (by "
                                       "short training runs).")]
PlannedFormat = Annotated[str | None, typer.Option(
    "--format", help="Which of the device's formats to plan for or time, as in onnx:q4. Default: the recommended one.")]
Timings = Annotated[Path | None, typer.Option(help="Timings that `lrc-edge plan --time-anchors` made on the device.")]
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="The --out directory of a build or an export.")]
Chattable = Annotated[Path, typer.Argument(metavar="DIR", help="The --out directory of a build, or a .gguf file.")]
Encoding = Annotated[str, typer.Option(help="Which GGUF of the build, as in q8_0. Default: the smallest.")]


@app.callback(invoke_without_command=True)
def _options(show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if show_version:
        print(__version__)
        raise typer.Exit


@app.command()
def build(teacher: Teacher, out: Out, recipe: RecipeFile = None, settings: Settings = None, data: Sources = None,
          formats: Formats = None, bits_per_weight: BitsPerWeight = None, target: Targets = None,
          tokens_per_second: TokensPerSecond = None, time_to_first_token: FirstToken = None, memory: Memory = None,
          file_size: FileSize = None, context: Context = None, search: Effort = None, timings: Timings = None) -> None:
    """Train a student of TEACHER, export it to GGUF and ONNX, verify each file, and write a report.

    With a budget, the student's sizes are chosen first, as by `lrc-edge plan`.

    [dim]lrc-edge build HuggingFaceTB/SmolLM2-360M --data stories.jsonl --target raspberry-pi-5 --out out[/]
    """
    from lrc_edge.pipeline import commands

    job = _recipe(recipe, settings, data, formats, bits_per_weight, target, tokens_per_second=tokens_per_second,
                  time_to_first_token=time_to_first_token, memory=memory, file_size=file_size, context=context,
                  search=search, timings=timings)
    raise typer.Exit(commands.build(teacher, out, job, _console()))


@app.command()
def train(teacher: Teacher, out: Out, recipe: RecipeFile = None, settings: Settings = None,
          data: Sources = None) -> None:
    """Only train: the part of a build that benefits from a GPU. `build` with the same --out continues from there.

    [dim]lrc-edge train HuggingFaceTB/SmolLM2-360M --data stories.jsonl --set train.tokens=1e8 --out out[/]
    """
    from lrc_edge.pipeline import commands

    raise typer.Exit(commands.build(teacher, out, _recipe(recipe, settings, data), _console(), only_train=True))


@app.command()
def fold(directory: Directory) -> None:
    """Merge the projections trained in DIR into dense weights: DIR/student, an ordinary Hugging Face checkpoint.

    [dim]lrc-edge fold out[/]
    """
    from lrc_edge.pipeline import commands

    raise typer.Exit(commands.fold(directory, _console()))


@app.command()
def export(model: Annotated[str, typer.Argument(
               metavar="HF_DIR", help="Hugging Face model directory or hub id of a supported family.")],
           out: Out, recipe: RecipeFile = None, settings: Settings = None, data: VerificationText = None,
           formats: Formats = None, bits_per_weight: BitsPerWeight = None, target: Targets = None) -> None:
    """Export a dense checkpoint from any source to GGUF and ONNX, and verify each file.

    [dim]lrc-edge export Qwen/Qwen3-0.6B --out out --formats gguf:q4_k_m,onnx:q4[/]
    """
    from lrc_edge.pipeline import commands

    job = _recipe(recipe, settings, data, formats, bits_per_weight, target)
    raise typer.Exit(commands.export(model, out, job, _console()))


@app.command()
def check(directory: Directory, target: Annotated[list[str] | None, typer.Option(
        "--target", "-t", metavar="NAME", help="Check only in the runtimes of this device, without PyTorch. May "
                                               "be repeated.")] = None) -> None:
    """Verify the files of a build again and rewrite the report.

    With --target it needs neither PyTorch nor transformers. It uses the PyTorch
    outputs stored in DIR/check.

    [dim]lrc-edge check out --target raspberry-pi-5[/]
    """
    if target:
        from lrc_edge.pipeline.device_checks import check_targets

        raise typer.Exit(check_targets(directory, target, _plain_console()))
    from lrc_edge.pipeline import commands

    raise typer.Exit(commands.check(directory, _console()))


@app.command()
def verify(model: Annotated[str, typer.Argument(
               metavar="MODEL", help="Hugging Face directory or hub id of the model that the files were made from.")],
           files: Annotated[list[Path], typer.Argument(metavar="FILE...", help=".gguf files, .onnx files, or folders "
                                                                               "with one.")],
           out: Annotated[Path, typer.Option("--out", "-o", help="Directory for report.json and report.html.")],
           recipe: RecipeFile = None, settings: Settings = None,
           data: VerificationText = None) -> None:
    """Verify GGUF and ONNX files that other tools made against the model they were made from.

    Compares shapes, RoPE, tokenizer, chat template and weights with MODEL and
    names each difference. Then runs each file and compares the logits.

    [dim]lrc-edge verify Qwen/Qwen3-0.6B Qwen3-0.6B-Q4_K_M.gguf --out verified[/]
    """
    from lrc_edge.pipeline.verify import verify as verify_files

    raise typer.Exit(verify_files(model, files, out, _recipe(recipe, settings, data), _console()))


@app.command()
def report(directory: Directory) -> None:
    """Print the gates of a build and write report.html again from its report.json.

    [dim]lrc-edge report out[/]
    """
    from lrc_edge.pipeline import commands

    raise typer.Exit(commands.show_report(directory, _console()))


@app.command()
def chat(directory: Chattable, encoding: Encoding = "",
         temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")] = 0.7,
         max_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens per answer.")] = 256) -> None:
    """Chat with a GGUF in the terminal, through llama.cpp. Ctrl-D ends.

    [dim]lrc-edge chat out --encoding q8_0[/]
    """
    from lrc_edge.pipeline import commands

    commands.chat(directory, encoding, temperature, max_tokens, _console())


@app.command()
def plan(teacher: Teacher, out: Out, recipe: RecipeFile = None, settings: Settings = None, data: Sources = None,
         target: Targets = None, tokens_per_second: TokensPerSecond = None, time_to_first_token: FirstToken = None,
         memory: Memory = None, file_size: FileSize = None, context: Context = None, search: Effort = None,
         timings: Timings = None, format_: PlannedFormat = None,
         time_anchors: Annotated[bool, typer.Option(
             "--time-anchors", help="Only time shapes on this machine, in --format, and write OUT/timings.json. Needs "
                                    "no PyTorch; of TEACHER only config.json is read.")] = False) -> None:
    """Choose a student's sizes for a device and a budget, and write them as a recipe for `build`.

    [dim]lrc-edge plan HuggingFaceTB/SmolLM2-360M --data a.jsonl --target raspberry-pi-5 --memory 300 --out plan[/]
    """
    if time_anchors:
        from lrc_edge.pipeline.target_commands import time_anchors as time_them

        raise typer.Exit(time_them(Path(teacher), target or [], format_, context, out, _plain_console()))
    from lrc_edge.pipeline import planner

    job = _recipe(recipe, settings, data, targets=target, tokens_per_second=tokens_per_second,
                  time_to_first_token=time_to_first_token, memory=memory, file_size=file_size, context=context,
                  search=search, timings=timings, format=format_)
    raise typer.Exit(planner.plan(teacher, job, out, _console()))


@app.command()
def serve(directory: Chattable,
          port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the page; 0 = any free port.")] = 8080,
          host: Annotated[str, typer.Option(help="Address to listen on. 0.0.0.0 admits other devices, which run "
                                                 "the model with one thread.")] = "127.0.0.1",
          encoding: Encoding = "") -> None:
    """Chat with a GGUF in a browser page, which also works with the network off. Ctrl-C ends.

    [dim]lrc-edge serve out --port 0[/]
    """
    from lrc_edge.pipeline import target_commands

    target_commands.serve(directory, encoding, host, port)


@app.command()
def inspect(path: Annotated[Path, typer.Argument(help="Hugging Face directory, .gguf or .onnx file, or the --out "
                                                             "directory of a build.")],
            tensors: Annotated[bool, typer.Option("--tensors", help="Also list every tensor.")] = False) -> None:
    """Print the contents of a model: shapes, types, bits per weight, metadata.

    [dim]lrc-edge inspect out/gguf/model-Q4_0.gguf --tensors[/]
    """
    from lrc_edge.inspect.command import print_description

    print_description(path, _console(), tensors=tensors)


@app.command("recipe")
def show_recipe(recipe: RecipeFile = None, settings: Settings = None) -> None:
    """Print every setting with an explanation and its value, as TOML for --recipe.

    [dim]lrc-edge recipe --set student.hidden_size=512 > my.toml[/]
    """
    from lrc_edge.recipe import to_toml

    print(to_toml(_recipe(recipe, settings)), end="")


targets_app = typer.Typer(invoke_without_command=True, rich_markup_mode="rich")
app.add_typer(targets_app, name="targets")


@targets_app.callback()
def targets(context: typer.Context) -> None:
    """List the known devices. Subcommands explain one, estimate whether a model fits, and install what checks need.

    [dim]lrc-edge targets show raspberry-pi-5[/]
    """
    if context.invoked_subcommand is None:
        from lrc_edge.pipeline.target_commands import list_targets

        list_targets(_plain_console())


@targets_app.command("show")
def show_target(target: Annotated[str, typer.Argument(
                    metavar="NAME", help="A target, or a profile file, as in ./my.toml.")]) -> None:
    """Explain one device: every figure with its source, and why its formats run well there.

    [dim]lrc-edge targets show raspberry-pi-5[/]
    """
    from lrc_edge.pipeline import target_commands

    target_commands.show_target(target, _plain_console())


@targets_app.command("fit")
def fit_target(model: Annotated[str, typer.Argument(help="A teacher (directory or hub id), or a build directory.")],
               target: Annotated[str, typer.Option("--target", "-t", metavar="NAME",
                                                     help="A target, or a profile file, as in ./my.toml.")],
               context: Annotated[int | None, typer.Option(help="Context in tokens. Default: the target's.")] = None,
               recipe: RecipeFile = None, settings: Settings = None) -> None:
    """Estimate whether a model fits a device: memory by layer group for each format, longest context, speed limit.

    For a teacher, the student that the recipe plans is estimated too.

    [dim]lrc-edge targets fit HuggingFaceTB/SmolLM2-360M --target android-low --set student.hidden_size=480[/]
    """
    from lrc_edge.pipeline import target_commands

    raise typer.Exit(target_commands.fit(model, target, context, _recipe(recipe, settings), _plain_console()))


@targets_app.command("setup")
def setup_targets(names: Annotated[list[str], typer.Argument(
        metavar="NAME...", help="Targets, or single runtimes (wllama, llama.cpp).")],
                  yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False
                  ) -> None:
    """Install what checking a target needs: emulator, browser, runtimes. Prints the plan first.

    [dim]lrc-edge targets setup raspberry-pi-5 wllama[/]
    """
    from lrc_edge.pipeline import target_commands

    target_commands.setup(names, yes, _plain_console())


def _recipe(file: Path | None, settings: list[str] | None, data: list[str] | None = None, formats: str | None = None,
            bits_per_weight: float | None = None, targets: list[str] | None = None, **budget: Any) -> Any:
    """Return the recipe with these options, of which None and [] leave it as it is."""
    from lrc_edge.recipe import load_recipe

    overrides: dict[str, dict[str, Any]] = {}
    if data:
        overrides["data"] = {"sources": data}
    export = {"formats": formats, "bits_per_weight": bits_per_weight, "targets": targets}
    overrides["export"] = {key: value for key, value in export.items() if value is not None}
    overrides["budget"] = {key: str(value.resolve()) if isinstance(value, Path) else value
                           for key, value in budget.items() if value is not None}
    return load_recipe(file, settings or (), **overrides)


def _console() -> Any:
    """Return a console with the progress bars and notices of libraries turned off."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import logging

    from rich.console import Console

    logging.getLogger("transformers").setLevel(logging.ERROR)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return Console(stderr=False, soft_wrap=False)


def _plain_console() -> Any:
    """Return a console for commands that work without transformers."""
    from rich.console import Console

    return Console()


def main() -> None:
    """Run the command line. A user's mistake, a full disk or too little memory is one line and status 2. A bug keeps
    its traceback."""
    try:
        app()
    except UserError as error:
        sys.exit(_complain(str(error)))
    except (KeyboardInterrupt, SystemExit) as ended:
        # Inside a command, typer turns KeyboardInterrupt into SystemExit(130).
        if isinstance(ended, SystemExit) and ended.code != ExitStatus.INTERRUPTED:
            raise
        print("\nlrc-edge: interrupted; run the same command to resume", file=sys.stderr)
        sys.exit(ExitStatus.INTERRUPTED)
    except Exception as error:
        if (message := shortage(error)) is None:
            raise
        sys.exit(_complain(message))


def _complain(text: str) -> ExitStatus:
    print(f"lrc-edge: {' '.join(text.split())}", file=sys.stderr)
    return ExitStatus.BAD_INPUT


if __name__ == "__main__":
    main()
