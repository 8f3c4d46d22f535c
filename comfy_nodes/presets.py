"""Presets: what a language model is told, by name. The built-in templates, and the user's own text files beside them."""

from __future__ import annotations

from pathlib import Path

from promptloop_pipeline.refiners.template import FOLDER, Template, load_template


def user_folder() -> Path:
    """Where the user's own templates lie; it need not be there."""
    import folder_paths

    return Path(folder_paths.get_user_directory()) / "promptloop" / "templates"


def _files() -> dict[str, Path]:
    """By name; the user's own file of a built-in name stands in for it."""
    return {f.stem: f for folder in (FOLDER, user_folder()) for f in sorted(folder.glob("*.txt"))}


def preset_names(looking: bool | None = None) -> list[str]:
    """looking: True for those that show the model a picture, False for those that can do without one, None for all.

    A file that cannot be read is listed too: it tells what is wrong with it when it is chosen.
    """
    return [name for name, file in _files().items() if looking is None or _suits(file, looking)]


def _suits(file: Path, looking: bool) -> bool:
    try:
        template = load_template(file)
    except (ValueError, OSError):
        return True
    if looking:
        return template.looks
    return any(
        title != "system" and "{image}" not in text and "{source}" not in text for title, text in template.sections.items()
    )


def load_preset(name: str) -> Template:
    """Raises ValueError: for an unknown name with what there is, for a broken file with its path and what is wrong."""
    files = _files()
    if name not in files:
        raise ValueError(
            f"there is no template {name!r}; use one of {', '.join(files)}, or put {name}.txt into {user_folder()} "
            f"(made like those in {FOLDER})"
        )
    try:
        return load_template(files[name])
    except OSError as e:
        raise ValueError(f"the template {files[name]} cannot be read: {e}") from e


def preset_stamp(name: str) -> int:
    """Another number when the preset's file has been edited, in nanoseconds; 0 where there is none. For `fingerprint_inputs`."""
    file = _files().get(name)
    return file.stat().st_mtime_ns if file else 0
