"""`promptloop train`: the recipes of `promptloop_training`, which this package never imports but by name."""

from __future__ import annotations

import importlib.util

import typer

from ..dotted import load_object

NEEDED = ("trl", "datasets", "peft")
CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}  # all that is said goes on to the method


def train(ctx: typer.Context) -> None:
    """Train a refiner: `promptloop train grpo --config recipe.yaml [--key value ...]`, or sft. --help lists all keys."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing and ctx.args[:1] not in ([], ["--help"]):
        raise ImportError(f'training needs packages that are not there ({", ".join(missing)}): pip install "promptloop[train]"')
    raise typer.Exit(load_object("promptloop_training.main:main", "trainer")(ctx.args or ["--help"]))
