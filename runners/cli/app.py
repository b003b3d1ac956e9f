"""The installed command `weightgeom`: every part is imported when it is asked for."""

from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from runners.cli.choices import defaults, listing, reference
from runners.errors import nearest

HELP = ["--help", "-h"]
# The rest of the command line goes on as it is, `--help` included.
PASSED_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

PLURALS = {group if group == "data" else f"{group}s": group for group in defaults() if "/" not in group}


@app.callback(invoke_without_command=True, context_settings={"help_option_names": []})
def weightgeom(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    help: Annotated[bool, typer.Option(*HELP, help="Print this and every group, choice and key.")] = False,
) -> None:
    """Measure where a training changes the weights of a transformer."""
    if version:
        print(f"weightgeom {metadata.version('weightgeom')}")
        raise typer.Exit
    if help or context.invoked_subcommand is None:
        print(f"{context.get_help()}\n\n{reference()}")
        raise typer.Exit


@app.command(context_settings=PASSED_ON)
def run(context: typer.Context) -> None:
    """One run, or with -m a sweep: GROUP=CHOICE KEY=VALUE ..."""
    from runners.cli.run import main

    main(context.args)


@app.command(context_settings={"help_option_names": HELP})
def compare(
    before: Annotated[
        str, typer.Argument(metavar="BEFORE", help="A directory, a hub name@revision, or a URL.")
    ],
    after: Annotated[str, typer.Argument(metavar="AFTER", help="The same, or a LoRA adapter.")],
    text: Annotated[
        list[Path],
        typer.Option(metavar="FILE", exists=True, dir_okay=False, help="Text to measure on; repeatable."),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings of `weightgeom run`, such as device=cpu."),
    ] = None,
    k: Annotated[
        int | None, typer.Option(metavar="K", min=1, help="Dimension of the subspaces.  [default: d/8]")
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", file_okay=False, help="Directory of the results.")
    ] = Path("outputs"),
) -> None:
    """Measure the update between two checkpoints BEFORE and AFTER."""
    from runners.cli.compare import compared
    from runners.cli.run import main

    main([*compared(before, after, text, k, out), *(overrides or ())])


@app.command(context_settings={"help_option_names": HELP})
def align(
    before: Annotated[
        str, typer.Argument(metavar="BEFORE", help="The base: a directory, or a hub name@revision.")
    ],
    trainings: Annotated[
        list[str],
        typer.Argument(metavar="NAME=AFTER", help="Ends of trainings; the same NAME again is another seed."),
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", file_okay=False, help="Directory of the results.")
    ] = Path("alignment"),
) -> None:
    """Cosines and shared subspaces of the updates of several trainings of BEFORE."""
    from runners.cli.align import aligned
    from runners.errors import USER_ERRORS, explanation

    try:
        aligned(before, trainings, out)
    except USER_ERRORS as error:
        typer.echo(f"error: {explanation(error)}", err=True)
        raise typer.Exit(2) from error


@app.command(context_settings={"help_option_names": HELP})
def origin(
    before: Annotated[str, typer.Argument(metavar="BEFORE", help="A directory, or a hub name@revision.")],
    after: Annotated[str, typer.Argument(metavar="AFTER", help="The same, or a LoRA adapter.")],
    known: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", exists=True, dir_okay=False, help="Known updates of your own, in parquet."
        ),
    ] = None,
) -> None:
    """Which kind of training made the update between BEFORE and AFTER, or that nobody can tell."""
    from runners.cli.origin import answered
    from runners.errors import USER_ERRORS, explanation

    try:
        print(answered(before, after, known))
    except USER_ERRORS as error:
        typer.echo(f"error: {explanation(error)}", err=True)
        raise typer.Exit(2) from error


@app.command(context_settings=PASSED_ON)
def sweep(context: typer.Context) -> None:
    """status, wait, cancel or resubmit: the jobs in SWEEP_DIR."""
    from runners.launcher.__main__ import main

    raise typer.Exit(main(context.args))


@app.command(context_settings=PASSED_ON)
def sync(context: typer.Context) -> None:
    """Publish records to MLflow that an outage or a kill left unpublished."""
    from runners.tracking.__main__ import main

    raise typer.Exit(main(["sync", *context.args]))


@app.command(context_settings=PASSED_ON)
def report(context: typer.Context) -> None:
    """Tables, figures and one page on the MLflow experiment NAME."""
    from runners.report.__main__ import main

    raise typer.Exit(main(context.args))


@app.command(context_settings=PASSED_ON)
def check(context: typer.Context) -> None:
    """Verify the residual map of MODEL by behaviour."""
    from weightgeom.check import main

    raise typer.Exit(main(context.args))


@app.command("list", context_settings={"help_option_names": HELP})
def list_choices(group: Annotated[str, typer.Argument(metavar="GROUP", help=", ".join(PLURALS))]) -> None:
    """List the choices of a group, each with its meaning."""
    if group not in PLURALS:
        raise typer.BadParameter(f"unknown group {group!r}; {nearest(group, PLURALS)}")
    print(listing(PLURALS[group]))
