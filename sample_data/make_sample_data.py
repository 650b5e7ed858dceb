"""Make the folders of sample_data/: `python sample_data/make_sample_data.py tiny` (or tiny-moe, smollm2, bad, all).

Seeds are fixed and one thread is used: the same machine and library versions give the same files again. Training a tiny
model takes a few minutes; `measure` prints what its rollouts show.
"""

from __future__ import annotations

from pathlib import Path

import click

HERE = Path(__file__).resolve().parent


@click.group(help=__doc__)
def cli() -> None:
    """The group of commands; each makes one folder."""


@cli.command()
def tiny() -> None:
    """Train the dense model and record its rollouts."""
    _make_tiny("tiny")


@cli.command("tiny-moe")
def tiny_moe() -> None:
    """Train the mixture of experts and record its rollouts."""
    _make_tiny("tiny-moe")


@cli.command()
@click.argument("source", type=click.Path(exists=True, file_okay=False, path_type=Path))
def smollm2(source: Path) -> None:
    """Cut the slice of llama.cpp rollouts out of the folder SOURCE (llamacpp-top20/, llamacpp-full/)."""
    from making import smollm2_slice

    smollm2_slice.make(source, HERE / "smollm2")


@cli.command()
def bad() -> None:
    """Write one file or folder per way of being bad."""
    from making import bad_cases

    bad_cases.make(HERE / "bad")


@cli.command("all")
@click.argument("source", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.pass_context
def make_all(context: click.Context, source: Path) -> None:
    """Make everything; SOURCE as for smollm2."""
    for command in (bad, tiny, tiny_moe):
        context.invoke(command)
    context.invoke(smollm2, source=source)


@cli.command()
def measure() -> None:
    """Print divergence by staleness, and routing flips, of the tiny folders as they are."""
    from making.measure import print_drift, print_flips

    for name in ("tiny", "tiny-moe"):
        print(f"\n{name}\n")
        print_drift(HERE / name)
    print_flips(HERE / "tiny-moe")


def _make_tiny(name: str) -> None:
    from making import tiny_models

    tiny_models.make(name, HERE / name)


if __name__ == "__main__":
    cli()
