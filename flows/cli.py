"""The command ``overnight``. Each command imports what it needs when it runs, so that ``--help`` is quick."""

import atexit
import contextlib
import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup
from typer.exceptions import TyperException

from flows.mistakes import mistakes_are_told
from flows.serve import PARALLEL
from tasks.errors import EXIT_USER_MISTAKE


@contextlib.contextmanager
def _slips_are_told(of: Any = None) -> Iterator[None]:
    """Tells what is wrong with a command line as every other mistake is told: Typer draws a box of several lines.

    ``of`` is the context of the whole command, where the slip may be one of a command of it.
    """
    try:
        yield
    except TyperException as slip:
        # None where the help was shown instead.
        if message := " ".join(slip.format_message().split()):
            end = "" if message.endswith(("?", ".")) else "."
            # Of an option without its value it says no context.
            own = f"overnight {of.invoked_subcommand}" if of is not None else "overnight"
            command = getattr(getattr(slip, "ctx", None), "command_path", own)
            typer.echo(f"error: {message}{end} `{command} --help` says what there is.", err=True)
        raise typer.Exit(EXIT_USER_MISTAKE) from None


class _Overnight(TyperGroup):
    """The command: a slip in its own options is met when it is read, one in a command's when that is called."""

    def make_context(self, *arguments: Any, **settings: Any) -> Any:
        with _slips_are_told():
            return super().make_context(*arguments, **settings)

    def invoke(self, ctx: Any) -> Any:
        with _slips_are_told(ctx):
            return super().invoke(ctx)


app = typer.Typer(
    name="overnight",
    cls=_Overnight,
    help="Retrain a language model, harden it to INT8, and rebuild any version. Run it in the project's folder.\n\n"
    "Exit code: 0 when all is well, 1 when something failed or is lost, 2 for a mistake, which one line tells, 75 for "
    "what passes by itself: run it again later; 130 when interrupted, 143 when told to end.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# What a command imports stays; to look for garbage in it, again and again and at the end, takes a fifth of `status`.
gc.set_threshold(100_000)
atexit.register(gc.freeze)


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
    Exit code: 0 when all is up to date, 1 when a stage failed, 2 for a mistake to mend, 75 when another run is at work
    or Prefect's server has gone away.
    """
    with mistakes_are_told():
        from flows.run import Request
        from flows.run import run as run_project

        code = run_project(Request(from_stage, force, wait), Console(), Console(stderr=True))
    raise typer.Exit(code)


@app.command()
def status() -> None:
    """Say for each stage: up to date, stale (and what changed), never run, failed (and why), stopped or running."""
    with mistakes_are_told():
        from flows import project
        from flows import status as status_of

        root = project.find()
        status_of.show(Console(), status_of.read(root, project.parameters(root)))


@app.command()
def runs(
    number: Annotated[int, typer.Option("-n", min=1, help="Show this many, the newest last.")] = 20,
) -> None:
    """List the runs: state, stage, duration, version, and why the failed ones failed."""
    with mistakes_are_told():
        from flows import history, project
        from flows import runs as runs_of

        found = runs_of.read(project.find())
        if not found:
            Console(stderr=True).print("no run yet; `overnight run` starts the first.", soft_wrap=True)
        history.show(Console(), found[-number:])


@app.command()
def rerun(
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="A run of `overnight runs`.", show_default="the last one")
    ] = None,
    from_stage: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Begin at this stage instead, also of a finished run.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Repeat stages though unchanged.")] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="When this run or another is at work, wait until it has ended.")
    ] = False,
) -> None:
    """Go on with a run that failed, was stopped or was killed; what it had finished is not repeated.

    Training resumes at its checkpoint, and Prefect shows one more attempt at the same run. Exit code: as `overnight
    run` has it.
    """
    with mistakes_are_told():
        from flows.rerun import rerun as go_on

        code = go_on(run, from_stage, force, wait, Console(), Console(stderr=True))
    raise typer.Exit(code)


@app.command()
def schedule(
    at: Annotated[
        str | None,
        typer.Option("--at", metavar="HH:MM", help="Start every night at this time.", show_default="02:00"),
    ] = None,
    timezone: Annotated[
        str | None,
        typer.Option(metavar="ZONE", help="Whose clock: an IANA name.", show_default="this machine's"),
    ] = None,
    cron: Annotated[
        str | None, typer.Option(metavar="LINE", help="Five cron fields instead of --at, such as '0 2 * * 1-5'.")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of Prefect's UI on this machine, if it is free.")] = 4200,
) -> None:
    """Start a run every night, for as long as this command runs; see what is due and what was in Prefect's UI.

    Each night works on the last commit, in a worktree of its own. Set PREFECT_API_URL to use a server of your team.
    """
    with mistakes_are_told():
        from flows.schedule import Request
        from flows.schedule import schedule as serve_project

        code = serve_project(Request(at, timezone, cron, port), Console())
    raise typer.Exit(code)


_Temperature = Annotated[float, typer.Option(min=0, help="Higher varies more; 0 takes the likeliest token.")]
_TopK = Annotated[int, typer.Option(min=0, help="Choose among this many likeliest tokens; 0 among all.")]
_TopP = Annotated[float, typer.Option(help="Of those, the fewest that together are this likely.")]
_RepetitionPenalty = Annotated[
    float, typer.Option(help="Above 1, tokens that the text has already become less likely.")
]
_Stop = Annotated[list[str] | None, typer.Option(help="End before this text. May be given several times.")]
_Seed = Annotated[int, typer.Option(min=0, help="Equal seeds write equal text.")]
_SPIN = "Threads wait for each other awake: faster alone, slower beside other work."
_Spin = Annotated[
    bool | None, typer.Option("--spin/--no-spin", help=_SPIN, show_default="where nothing else computes at the start")
]
_Version = Annotated[
    str | None,
    typer.Option(
        "--version",
        metavar="V",
        help="Take the model of a version, such as v1.2.0 or prod.",
        show_default="the one that lies here",
    ),
]


@app.command()
def generate(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The beginning, which the model continues.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most this many tokens are written.")] = 200,
    temperature: _Temperature = 0.8,
    top_k: _TopK = 40,
    top_p: _TopP = 1.0,
    repetition_penalty: _RepetitionPenalty = 1.0,
    stop: _Stop = None,
    seed: _Seed = 0,
    spin: _Spin = None,
    version: _Version = None,
) -> None:
    """Continue TEXT with the project's INT8 model.

    The text ends where the model ends it, after --max-new-tokens, or when the model's context is full.
    """
    with mistakes_are_told():
        from flows import generate as generation
        from flows import project
        from lm.sampling import Sampling

        sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
        stops = tuple(filter(None, stop or []))
        how = generation.Writing(max_new_tokens, sampling, stops, spin, version)
        generation.write(project.find(), text, how, sys.stdout, sys.stderr)


@app.command()
def chat(
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="An answer has at most this many tokens.")] = 1000,
    temperature: _Temperature = 0.8,
    top_k: _TopK = 40,
    top_p: _TopP = 1.0,
    repetition_penalty: _RepetitionPenalty = 1.0,
    stop: _Stop = None,
    seed: _Seed = 0,
    spin: _Spin = None,
    version: _Version = None,
) -> None:
    """Converse with the project's INT8 model, if it has a chat template; a line is a message.

    Ctrl-C stops an answer, Ctrl-D ends the conversation. From a pipe, each line is answered in turn.
    """
    with mistakes_are_told():
        from flows import chat as conversing
        from flows import project
        from lm.sampling import Sampling

        sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
        stops = tuple(filter(None, stop or []))
        settings = conversing.Settings(max_new_tokens, sampling, stops, spin, version, system)
        code = conversing.chat(project.find(), settings, sys.stdin, sys.stdout, sys.stderr)
    raise typer.Exit(code)


@app.command()
def serve(
    host: Annotated[
        str, typer.Option(help="Where to listen; others than this machine need OVERNIGHT_API_KEY.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")] = 8000,
    parallel: Annotated[
        int,
        typer.Option(
            min=1,
            max=64,
            help="So many texts are written side by side, each cached in memory; 16 requests wait, and more get 429.",
        ),
    ] = PARALLEL,
    spin: Annotated[bool, typer.Option("--spin", help=_SPIN)] = False,
    version: _Version = None,
) -> None:
    """Serve the project's INT8 model by OpenAI's protocol, completions and chat, until it is stopped.

    Metrics are at /metrics. If OVERNIGHT_API_KEY is set, requests must send it as 'Authorization: Bearer ...'.
    """
    with mistakes_are_told():
        from flows import project
        from flows.serve.command import serve as serve_model

        code = serve_model(project.find(), host, port, Console(), parallel, spin, version)
    raise typer.Exit(code)


@app.command()
def export(
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="gguf (llama.cpp), hf (transformers) or onnx.")],
    output: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="A file for gguf, else a folder; in .overnight/export if not said."),
    ] = None,
    type_: Annotated[
        str | None,
        typer.Option(
            "--type",
            help="Of a GGUF's matrices: f16 (if not said), f32, bf16 or q8_0. Of hf's weights: f32 (if not said), bf16 "
            "or f16. Of a graph: onnxruntime (if not said), or standard, in ONNX's own operators alone: for other "
            "runtimes, and slower in that one.",
        ),
    ] = None,
) -> None:
    """Write the project's model as other programs take it: gguf and hf the float model, onnx the INT8 one.

    The folders of hf and onnx carry the model's card.
    """
    with mistakes_are_told():
        from flows import export as exporting
        from flows import project

        exporting.export(project.find(), exporting.Request(to, output, type_), Console(), Console(stderr=True))


@app.command()
def publish() -> None:
    """Make a version of what the last run made: push, commit, tag it, and promote it when the gate passed.

    Where it is pushed, and whether it is promoted, stands in params.yaml under publish. A publication that was stopped
    is finished by the next one. Exit code: 75 when a remote does not answer or another version was promoted meanwhile.
    """
    with mistakes_are_told(goes_on=True):
        from flows.publish import publish_by_hand

        code = publish_by_hand(Console(), Console(stderr=True))
    raise typer.Exit(code)


@app.command()
def push(
    version: Annotated[
        list[str] | None, typer.Argument(metavar="V", help="Such as v1.2.0.", show_default="all")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read back every byte at DVC's remote; mend what is damaged there.")
    ] = False,
) -> None:
    """Bring versions to DVC's and Git's remotes, where these lack them or were named after they were made.

    Exit code: 1 when bytes of one are neither there nor here, or damaged at both (it is named), 75 when a remote does
    not answer.
    """
    with mistakes_are_told(goes_on=True):
        from flows.push import push as push_versions

        code = push_versions(version or [], Console(), Console(stderr=True), verify)
    raise typer.Exit(code)


@app.command()
def versions(
    last: Annotated[int, typer.Option("--last", metavar="N", min=1, help="Show this many, the newest first.")] = 20,
    everything: Annotated[bool, typer.Option("--all", help="Show them all.")] = False,
) -> None:
    """List the versions: date, data, commit, quality, the gate's verdict, what is in production, size."""
    with mistakes_are_told():
        from flows.versions import versions as list_versions

        code = list_versions(None if everything else last, Console(), Console(stderr=True))
    raise typer.Exit(code)


@app.command()
def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="A version (v1.2.0, latest, prod) or a Git revision.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
) -> None:
    """Say what differs between A and B: parameters, data, code, environment and metrics."""
    with mistakes_are_told():
        from flows.diff import diff as compare_versions

        code = compare_versions(first, second, Console(), Console(stderr=True))
    raise typer.Exit(code)


@app.command()
def promote(version: Annotated[str, typer.Argument(metavar="V", help="v1.2.0, or latest.")]) -> None:
    """Put the version V into production, whatever the gate said. New models are measured against it from now on."""
    with mistakes_are_told():
        from flows.promote import promote as promote_version

        code = promote_version(version, Console(), Console(stderr=True))
    raise typer.Exit(code)


@app.command()
def rollback() -> None:
    """Put the version that was in production before back there. Once more goes back one further."""
    with mistakes_are_told():
        from flows.promote import rollback as roll_back

        code = roll_back(Console(), Console(stderr=True))
    raise typer.Exit(code)


@app.command()
def prune(
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; without this, only say what would go.")] = False,
    remote: Annotated[bool, typer.Option("--remote", help="Prune DVC's remote too, not only this machine.")] = False,
) -> None:
    """Find what no version, branch or run needs any more: objects in DVC's cache, checkpoints, worktrees.

    Every registered version keeps all its bytes. --remote needs publish.git_remote, which tells of other machines'
    versions; it must be no remote that other projects push to.
    """
    with mistakes_are_told():
        from flows.prune import prune as prune_project

        code = prune_project(yes, remote, Console(), Console(stderr=True))
    raise typer.Exit(code)


@app.command()
def restore(
    version: Annotated[str, typer.Argument(metavar="VERSION", help="Such as v1.2.0, latest or prod.")],
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="DIR", help="An empty folder.", show_default=".overnight/versions/VERSION"),
    ] = None,
) -> None:
    """Write all files of VERSION into a folder of their own, each verified against its recorded hash.

    What is missing or damaged in the cache is fetched from the remote. Your checkout is left alone.
    Exit code: 0 when every file is there, 1 when one is lost (it is named), 2 for a mistake to mend.
    """
    with mistakes_are_told(goes_on=True):
        from flows.restore import restore as restore_version

        code = restore_version(version, to, Console(), Console(stderr=True))
    raise typer.Exit(code)


@app.command()
def rebuild(
    version: Annotated[str, typer.Argument(metavar="VERSION", help="Such as v1.2.0, latest or prod.")],
    environment: Annotated[
        bool, typer.Option("--environment", help="Run in a virtual environment made from the version's own lock file.")
    ] = False,
) -> None:
    """Compute VERSION anew from its raw data, compare every hash, and write a certificate.

    It works in a worktree of its own, without any cache; your checkout is left alone. Stopped, it goes on next time.
    Exit code: 0 when all is identical, 3 when only the metrics agree (another machine), 1 when not, 2 for a mistake.
    """
    with mistakes_are_told(goes_on=True):
        from flows.rebuild import rebuild as rebuild_version
        from flows.termination import sigterm_raises

        # It may be in the middle of a training.
        with sigterm_raises(
            lambda: typer.echo("terminated; the same command goes on where this one stopped.", err=True)
        ):
            code = rebuild_version(version, environment, Console(), Console(stderr=True))
    raise typer.Exit(code)
