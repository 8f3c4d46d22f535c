"""The `promptloop` command."""

from __future__ import annotations

import os
import sys

import typer

from . import artifact, demo, doctor, evaluate, generate, rewrite, score, train

app = typer.Typer(
    name="promptloop", help="Step-wise prompt refinement for diffusion models.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False,
)  # fmt: skip
app.command("demo")(demo.demo)
app.command("generate")(generate.generate)
app.command("rewrite")(rewrite.rewrite)
app.command("score")(score.score)
app.command("artifact")(artifact.artifact)
app.command("eval")(evaluate.evaluate)
app.command("train", context_settings=train.CONTEXT, add_help_option=False)(train.train)
app.command("doctor")(doctor.doctor)


@app.callback()
def _root() -> None:
    """Keeps the commands named, even while there is one of a kind."""


def main() -> None:
    """Runs the command line. Bad input ends in one clear line and exit code 2; PROMPTLOOP_TRACEBACK=1 shows where it came from."""
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as e:
        if os.environ.get("PROMPTLOOP_TRACEBACK"):
            raise
        message = " ".join(str(e).split()) or type(e).__name__
        print(f"promptloop: {message}", file=sys.stderr)
        raise SystemExit(2) from None
