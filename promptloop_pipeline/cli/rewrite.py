"""`promptloop rewrite`: one prompt, rewritten once, without a generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .named import EMBEDDED, NO_MODEL, load_refiner

if TYPE_CHECKING:
    from PIL.Image import Image


def rewrite(
    prompt: Annotated[str, typer.Argument(help="What you want to see; with --preset editing, what is to be changed.")],
    rewriter: Annotated[
        str, typer.Option(help='"tiny" (embedded), a model\'s folder or hub id, a server\'s URL, or "module:object".')
    ] = "tiny",
    preset: Annotated[
        str | None,
        typer.Option(help="reprompt (default), promptenhancer, promptist, plain, rewrite, editing, or the path of a template."),
    ] = None,
    image: Annotated[Path | None, typer.Option(help="The picture to be edited, for --preset editing.")] = None,
    server_model: Annotated[str | None, typer.Option(help="The model's name on the server, where it has several.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For a temperature above 0.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print prompt, reasoning and raw output as JSON.")] = False,
) -> None:
    """Prints the rewritten prompt; the prompt as it was, where the rewriter keeps it."""
    from .output import check_text, quiet_libraries

    check_text(prompt)
    quiet_libraries()
    from ..refiner import View
    from ..session import RefinerError, Session

    picture = _picture(image) if image else None
    embedded = rewriter in NO_MODEL
    if rewriter in EMBEDDED:
        from ..tiny.language import parse

        parse(prompt)  # says at once if the world has no such thing
    own = embedded or (":" in rewriter and "//" not in rewriter)
    options = {} if own else {"temperature": temperature, "seed": seed}
    refiner = load_refiner(rewriter, preset if embedded else preset or "reprompt", server_model, **options)
    template = getattr(refiner, "template", None)
    if template is not None and template.conversation(View(prompt, prompt, 0, 1, source=picture), None, picture) is None:
        what = (
            "needs the preview of a running generation"
            if picture or "{source}" not in str(template.sections)
            else "needs --image"
        )
        raise ValueError(f"the preset {template.name!r} {what}; use another, such as reprompt, or promptloop generate")
    session = Session([prompt], refiner, "start", strict=True, sources=[picture])
    session.start(1)
    try:
        session.observe(0, None, None)
    except RefinerError as e:
        raise RefinerError(f"nothing was rewritten: {str(e).removeprefix('step 0: ')}") from e
    (turn,) = session.trajectories[0].turns
    if as_json:
        names = ("before", "after", "reasoning", "raw", "format_ok", "tokens", "notes", "seconds")
        print(json.dumps({name: getattr(turn, name) for name in names}, indent=1))
    else:
        print(turn.after)


def _picture(path: Path) -> Image:
    import PIL.Image

    try:
        with PIL.Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, PIL.Image.DecompressionBombError) as e:
        raise OSError(f"cannot read the picture {path}: {e}") from e
