"""The command ``overnight``. Each command imports what it needs when it runs, so that ``--help`` is quick."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tasks.errors import TryAgain, UserMistake

EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="overnight",
    help="Retrain a language model, harden it to INT8, and rebuild any version. Run it in the project's folder.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@contextmanager
def _told() -> Iterator[None]:
    """Turns what a user can mend into one line and an exit code: 2 for a mistake, 75 when waiting helps."""
    try:
        yield
    except (UserMistake, TryAgain) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        typer.echo("interrupted; `overnight run` goes on where this run stopped.", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None


@app.command()
def run(
    from_stage: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Skip every stage before this one, stale or not.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Run the stages (with --from: that one and what follows) though unchanged.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="When another run is at work, wait until it has ended.")] = False,
) -> None:
    """Collect new text, then run each stage that is stale: ingest, shard, train, quantize, evaluate, card.

    Unchanged stages are not run again. A run that failed or was stopped goes on where it was, inside a training too.
    Exit code: 0 when all is up to date, 1 when a stage failed, 2 for a mistake to mend, 75 when another run is at work.
    """
    with _told():
        from flows.run import Request
        from flows.run import run as run_project

        code = run_project(Request(from_stage, force, wait), Console(), Console(stderr=True))
    raise typer.Exit(code)


@app.command()
def status() -> None:
    """Say for each stage: up to date, stale (and what changed), never run, or failed (and why)."""
    with _told():
        from flows import project
        from flows import status as status_of

        root = project.find()
        project.parameters(root)
        status_of.show(Console(), status_of.read(root))


@app.command()
def generate(
    text: Annotated[str, typer.Argument(help="The beginning, which the model continues.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most this many tokens are written.")] = 200,
    temperature: Annotated[float, typer.Option(min=0, help="Higher varies more; 0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=1, help="Choose among this many likeliest tokens.")] = 40,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds write equal text.")] = 0,
) -> None:
    """Continue TEXT with the project's INT8 model."""
    with _told():
        from flows.generate import continue_text
        from tasks import paths

        pieces = continue_text(Path.cwd() / paths.INT8, text, max_new_tokens, temperature, top_k, seed)
        first = next(pieces, "")
        sys.stdout.write(text + first)
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
