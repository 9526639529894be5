"""The ``hubtransfer`` command. What takes long to import is imported by the command that needs it."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

app = typer.Typer(
    name="hubtransfer",
    help="Adapt any timm or transformers backbone to a new task, train it, and share it on the Hub.",
    epilog="--debug anywhere on the line shows the whole traceback of an error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="dotted.path=value, as YAML")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs in place of a table.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from hubtransfer import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Adapt any timm or transformers backbone to a new task, train it, and share it on the Hub."""


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe (YAML), a folder of them, or a pattern in quotes.")],
    overrides: Overrides = None,
    results: Annotated[str | None, typer.Option(help="Results file (default: beside the recipe).")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run finished cells again.")] = False,
) -> None:
    """Run a recipe: every seed and every cell of its grid that is not finished yet."""
    from hubtransfer.commands import train

    train.run(recipe, overrides or [], results=results, fresh=fresh)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or repository of a saved model.")],
    data: Annotated[str, typer.Option(help="Name of a data set, as in a recipe's data section.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="keywords of the data set, such as limit=100")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Task of the model (default: its active one).")] = None,
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "test",
    batch_size: Annotated[int, typer.Option(help="Examples at a time.")] = 128,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Evaluate a saved model on a data set."""
    from hubtransfer.commands import evaluate

    evaluate.run(model, data, overrides or [], task, split, batch_size, revision, as_json)


@app.command()
def methods(
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="The tables of the README.")] = False,
    readme: Annotated[str | None, typer.Option(help="Write them between the markers of this file.")] = None,
) -> None:
    """List the methods: name, family, paper, what data they need, hyper-parameters."""
    from hubtransfer.commands import tables

    tables.methods(as_json, markdown, readme)


@app.command()
def patches(as_json: Json = False) -> None:
    """List the kinds of patches and their options."""
    from hubtransfer.commands import tables

    tables.patches(as_json)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="A backbone (timm/..., a repository, a folder) or a saved model.")],
    image_size: Annotated[int | None, typer.Option(help="Side of the images in pixels.")] = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Show a model's layers, layer groups, and how many parameters each kind of patch would have."""
    from hubtransfer.commands import inspect

    inspect.run(model, image_size, revision, as_json)


@app.command()
def push(
    folder: Annotated[str, typer.Argument(help="From save_pretrained or save_patch.")],
    repo: Annotated[str, typer.Argument(help="Such as me/birds.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to.")] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
) -> None:
    """Push a saved model or patch to the Hub (HF_ENDPOINT, HF_TOKEN)."""
    from hubtransfer.models import hub

    print(hub.push(folder, repo, private=private, revision=revision, commit_message=message))


@app.command()
def card(
    folder: Annotated[str, typer.Argument(help="A saved model or patch.")],
    repo: Annotated[str | None, typer.Option(help="Repository it will be pushed to, for the code in the card.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Write README.md in place of printing.")] = False,
    baseline: Annotated[
        list[str] | None, typer.Option(help="Single-task run or results file: tell of the gain over it.")
    ] = None,
) -> None:
    """Generate the model card of a saved model from what is known about it."""
    from hubtransfer.commands import card

    card.run(folder, repo, write, baseline or [])


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="Output folder of a run, or a results file.")],
    as_json: Json = False,
    baseline: Annotated[
        list[str] | None,
        typer.Option(help="Single-task run or results file, or key=value of rows: show the gain over it."),
    ] = None,
    plots: Annotated[str | None, typer.Option(help="Folder for a picture of two tasks against one another.")] = None,
) -> None:
    """Show what a run gave: numbers, confidence intervals over seeds, learning curves, gain over single tasks."""
    from hubtransfer.commands import report

    report.run(run, as_json, baseline or [], plots)


@app.command()
def compare(
    document: Annotated[str, typer.Argument(help="A Markdown file with <!-- compare:begin {...} --> in it.")],
) -> None:
    """Write a document's table and picture of several recipes' results anew."""
    from hubtransfer.commands import compare

    compare.run(document)


@app.command()
def quickstart(overrides: Overrides = None) -> None:
    """The main job from end to end in a few minutes: patch, train, compare, save, share, reload.

    Options by key=value: source, data, epochs, limit, image_size, output_dir, repo, seed, fast.
    """
    from hubtransfer import quickstart

    quickstart.run(overrides or [])


def main(words: list[str] | None = None) -> None:
    """Run the command line; what a person can put right is one line and exit code 2."""
    words = list(sys.argv[1:] if words is None else words)
    debug = "--debug" in words
    try:
        app([word for word in words if word != "--debug"])
    except Exception as error:
        if debug or not _can_be_put_right(error):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)


def _can_be_put_right(error: Exception) -> bool:
    """Whether an error is about what a person gave us, not a mistake in the program.

    Wrong values, missing files, refused or lost connections (all OSErrors), losses that are not finite; and any
    TypeError or RuntimeError that this library raises itself with its own message.
    """
    if isinstance(error, (ValueError, OSError, ArithmeticError, ImportError)):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    ours = trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("hubtransfer.")
    return ours and isinstance(error, (TypeError, RuntimeError))


if __name__ == "__main__":
    main()
