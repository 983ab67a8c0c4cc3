"""The command line: verbs only. It parses, calls and prints; heavy imports wait until a command runs."""
from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lrc_edge import __version__
from lrc_edge.errors import UserError, shortage

INTERRUPTED = 130  # exit status, as shells give it to what Ctrl-C ended

app = typer.Typer(
    name="lrc-edge", no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""From a Hugging Face teacher to a small on-device student: train a Low-Rank Clone, fold it, write GGUF and
ONNX, and prove on their real runtimes that each says what the PyTorch student says.

[bold]lrc-edge build[/] does everything; the other commands are its stages alone. Exit status: 0 every gate passed, 1 a
gate failed (the report says which), 2 a mistake in the input (one line says what), 3 a device was asked for that could
not be checked here.""")

Teacher = Annotated[str, typer.Argument(help="Hugging Face model directory, or hub id (HuggingFaceTB/SmolLM2-360M).")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Directory to build in. Run again to continue what is there.")]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", "-r",
                                                 help="TOML file, or one that comes along: lrc-1.5b, lrc-1.7b, "
                                                      "lrc-4b. `lrc-edge recipe` prints every key.")]
Settings = Annotated[list[str] | None, typer.Option("--set", "-s", metavar="SECTION.KEY=VALUE",
                                                    help="Override one recipe key; may be repeated.")]
Sources = Annotated[list[str] | None, typer.Option(
    "--data", "-d", metavar="SRC",
    help="Text or conversations: a .txt, .jsonl or .parquet file, a folder of them, a hub dataset (name, name:config, "
         "name:config:split), or `self`, what the teacher itself says; may be repeated.")]
Formats = Annotated[str | None, typer.Option(
    help="What to write, comma-separated: gguf:f32, gguf:f16, gguf:bf16, gguf:q8_0, gguf:q4_0, gguf:q4_k_m and every "
         "other llama.cpp type; onnx:fp32, fp16, q8, q4.")]
BitsPerWeight = Annotated[float | None, typer.Option(
    help="One more GGUF, of this size and mixed precision: each matrix gets the type that, as measured, loses least "
         "(4.25).")]
Targets = Annotated[list[str] | None, typer.Option(
    "--target", "-t", metavar="NAME", help="A device (`lrc-edge targets` lists them) or ./my-device.toml: write what "
                                           "it runs, and check that in its runtimes; may be repeated.")]
BuildDirectory = Annotated[Path, typer.Argument(metavar="DIR", help="The --out directory of a build or an export.")]


@app.callback(invoke_without_command=True)
def _options(show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if show_version:
        print(__version__)
        raise typer.Exit


@app.command()
def build(teacher: Teacher, out: Out, recipe: RecipeFile = None, settings: Settings = None, data: Sources = None,
          formats: Formats = None, bits_per_weight: BitsPerWeight = None, target: Targets = None) -> None:
    """Everything: teacher in, proved GGUF and ONNX out, with a report.

    [dim]lrc-edge build HuggingFaceTB/SmolLM2-360M --data stories.jsonl --target raspberry-pi-5 --out out[/]
    """
    from lrc_edge.pipeline import commands

    job = _recipe(recipe, settings, data, formats, bits_per_weight, target)
    _exit(commands.build(teacher, out, job, _console()))


@app.command()
def train(teacher: Teacher, out: Out, recipe: RecipeFile = None, settings: Settings = None,
          data: Sources = None) -> None:
    """Train only (the GPU's part of a build). `build` or `fold` on the same directory goes on."""
    from lrc_edge.pipeline import commands

    _exit(commands.build(teacher, out, _recipe(recipe, settings, data), _console(), last="train"))


@app.command()
def fold(directory: BuildDirectory) -> None:
    """Fold a trained DIR into DIR/student: an ordinary dense Hugging Face checkpoint."""
    from lrc_edge.pipeline import commands

    _exit(commands.fold(directory, _console()))


@app.command()
def export(model: Annotated[str, typer.Argument(metavar="HF_DIR", help="Any dense checkpoint of a supported family.")],
           out: Out, recipe: RecipeFile = None, settings: Settings = None,
           data: Annotated[list[str] | None, typer.Option(
               "--data", "-d", metavar="SRC", help="Text to prove on; default: Python's own documentation.")] = None,
           formats: Formats = None, bits_per_weight: BitsPerWeight = None, target: Targets = None) -> None:
    """Write and prove GGUF and ONNX of any dense checkpoint, trained here or not.

    [dim]lrc-edge export Qwen/Qwen3-0.6B --out out --formats gguf:q4_k_m,onnx:q4[/]
    """
    from lrc_edge.pipeline import commands

    job = _recipe(recipe, settings, data, formats, bits_per_weight, target)
    _exit(commands.export(model, out, job, _console()))


@app.command()
def check(directory: BuildDirectory, target: Annotated[list[str] | None, typer.Option(
        "--target", "-t", metavar="NAME", help="Only in the runtimes of this device, without PyTorch; may be "
                                               "repeated.")] = None) -> None:
    """Prove the artifacts of DIR again, from the files, and write the report anew.

    With --target it needs neither PyTorch nor transformers: DIR/check holds what the PyTorch student says.
    """
    if target:
        from lrc_edge.pipeline.device_checks import check_targets

        _exit(check_targets(directory, target, _plain_console()))
    from lrc_edge.pipeline import commands

    _exit(commands.check(directory, _console()))


@app.command()
def verify(model: Annotated[str, typer.Argument(metavar="MODEL", help="The Hugging Face directory, or hub id, that the "
                                                                      "files were made of.")],
           files: Annotated[list[Path], typer.Argument(metavar="FILE...", help=".gguf files, .onnx files, or folders "
                                                                               "with one.")],
           out: Annotated[Path, typer.Option("--out", "-o", help="Directory for report.json and report.html.")],
           recipe: RecipeFile = None, settings: Settings = None,
           data: Annotated[list[str] | None, typer.Option(
               "--data", "-d", metavar="SRC", help="Text to verify on; default: Python's own documentation.")] = None
           ) -> None:
    """Verify GGUF and ONNX files that other tools made, against the model that they claim to hold.

    Compares shapes, RoPE, tokenizer, chat template and weights with MODEL and names each difference; then runs each
    file in its runtime and compares the logits.

    [dim]lrc-edge verify Qwen/Qwen3-0.6B Qwen3-0.6B-Q4_K_M.gguf --out verified[/]
    """
    from lrc_edge.pipeline.verify import verify as verify_files

    _exit(verify_files(model, files, out, _recipe(recipe, settings, data), _console()))


@app.command()
def report(directory: BuildDirectory) -> None:
    """Print the gates of DIR and write report.html again from its report.json."""
    from lrc_edge.pipeline import commands

    _exit(commands.show_report(directory, _console()))


@app.command()
def chat(directory: Annotated[Path, typer.Argument(metavar="DIR", help="A build, or a .gguf file.")],
         encoding: Annotated[str, typer.Option(help="Which GGUF of a build; default: the smallest.")] = "",
         temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.7,
         max_tokens: Annotated[int, typer.Option(min=1, help="Of one answer.")] = 256) -> None:
    """Talk to the GGUF in the terminal, through llama.cpp. Ctrl-D ends."""
    from lrc_edge.pipeline import commands

    commands.chat(directory, encoding, temperature, max_tokens, _console())


@app.command()
def serve(directory: Annotated[Path, typer.Argument(metavar="DIR", help="A build, or a .gguf file.")],
          port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8080,
          host: Annotated[str, typer.Option(help="0.0.0.0 lets other devices in; they get one thread.")] = "127.0.0.1",
          encoding: Annotated[str, typer.Option(help="Which GGUF of a build; default: the smallest.")] = "") -> None:
    """A page in which the GGUF answers in the browser. It works with the network off. Ctrl-C ends."""
    from lrc_edge.pipeline import target_commands

    target_commands.serve(directory, encoding, host, port)


@app.command()
def inspect(path: Annotated[Path, typer.Argument(help="Hugging Face directory, .gguf, .onnx, or a build directory.")],
            tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False) -> None:
    """What is in a model: shapes, types, real bits per weight, metadata."""
    from lrc_edge.inspect.command import print_description

    print_description(path, _console(), tensors=tensors)


@app.command("recipe")
def show_recipe(recipe: RecipeFile = None, settings: Settings = None) -> None:
    """Print the recipe with every key and its default, as TOML to start from."""
    from lrc_edge.recipe import to_toml

    print(to_toml(_recipe(recipe, settings)), end="")


targets_app = typer.Typer(invoke_without_command=True, rich_markup_mode="rich",
                          help="Devices: what they are, and whether a model fits them.")
app.add_typer(targets_app, name="targets")


@targets_app.callback()
def targets(context: typer.Context) -> None:
    """List the devices that are known, with what they have and which artifact to take."""
    if context.invoked_subcommand is None:
        from lrc_edge.pipeline.target_commands import list_targets

        list_targets(_plain_console())


@targets_app.command("show")
def show_target(target: Annotated[str, typer.Argument(metavar="NAME", help="A target, or a file like ./device.toml.")]
                ) -> None:
    """Explain one: every figure with its source, and why its formats run well there."""
    from lrc_edge.pipeline import target_commands

    target_commands.show_target(target, _plain_console())


@targets_app.command("fit")
def fit_target(model: Annotated[str, typer.Argument(help="A teacher (directory or hub id), or a build's directory.")],
               target: Annotated[str, typer.Option("--target", "-t", metavar="NAME", help="A target, or a file.")],
               context: Annotated[int | None, typer.Option(help="Tokens; default: what the target plans for.")] = None,
               recipe: RecipeFile = None, settings: Settings = None) -> None:
    """Does it fit? Memory by layer group for each format, the longest context, and a bound of the speed.

    [dim]lrc-edge targets fit HuggingFaceTB/SmolLM2-360M --target android-low --set student.hidden_size=512[/]
    """
    from lrc_edge.pipeline import target_commands

    _exit(target_commands.fit(model, target, context, _recipe(recipe, settings), _plain_console()))


@targets_app.command("setup")
def setup_targets(names: Annotated[list[str], typer.Argument(
        metavar="NAME...", help="Targets, or single runtimes (wllama, llama.cpp).")],
                  yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False) -> None:
    """Install what the check of a target runs: emulator, browser, runtimes. It says what before it does it."""
    from lrc_edge.pipeline import target_commands

    target_commands.setup(names, yes, _plain_console())


def _recipe(file: Path | None, settings: list[str] | None, data: list[str] | None = None, formats: str | None = None,
            bits_per_weight: float | None = None, targets: list[str] | None = None) -> Any:
    from lrc_edge.recipe import load_recipe

    overrides: dict[str, dict[str, Any]] = {}
    if data:
        overrides["data"] = {"sources": data}
    export = {"formats": formats, "bits_per_weight": bits_per_weight, "targets": targets}
    overrides["export"] = {key: value for key, value in export.items() if value is not None}
    return load_recipe(file, settings or (), **overrides)


def _console() -> Any:
    """Ours is the only voice on the terminal: libraries' bars and notices are turned off."""
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
    """For commands that work without transformers."""
    from rich.console import Console

    return Console()


def _exit(status: bool | int) -> None:
    """Whether everything passed, or the status itself."""
    raise typer.Exit(int(not status) if isinstance(status, bool) else status)


def main() -> None:
    """Entry point. A user's mistake, a full disk and too little memory are one line and status 2; a bug keeps its
    traceback."""
    try:
        app()
    except UserError as error:
        sys.exit(_complain(str(error)))
    except (KeyboardInterrupt, SystemExit) as ended:
        # Within a command typer has made the first of them the second.
        if isinstance(ended, SystemExit) and ended.code != INTERRUPTED:
            raise
        print("\nlrc-edge: interrupted; the same command continues", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if (told := shortage(error)) is None:
            raise
        sys.exit(_complain(told))


def _complain(text: str) -> int:
    print(f"lrc-edge: {' '.join(text.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
