"""What a run did: shown, saved, loaded, played again, taken elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io

from . import records
from .types import HISTORY, REFINER

NOTHING = "none"


def _history() -> Any:
    return HISTORY.Input("history", tooltip="From a PromptLoop Sampler, a PromptLoop Result, Rewrite Prompt or Load History.")


class PromptLoopHistory(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            "PromptLoopHistory",
            "Show History",
            "PromptLoop/history",
            is_output_node=True,
            description="Draws the timeline of a run: what was seen, what changed in the prompt, and why.",
            inputs=[_history()],
            outputs=[
                HISTORY.Output("passed", "history", tooltip="The history, as it came."),
                io.String.Output("text", "text", tooltip="The same in words, to be copied or saved."),
                io.Image.Output("timeline", "timeline", tooltip="All that was looked at, in order, and the finished pictures."),
            ],
        )

    @classmethod
    def execute(cls, history: Any) -> io.NodeOutput:
        from . import live
        from .pictures import timeline

        return io.NodeOutput(history, records.text_of(history), timeline(history), ui=live.ui_of(history, cls))


class PromptLoopSaveHistory(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            "PromptLoopSaveHistory",
            "Save History",
            "PromptLoop/history",
            is_output_node=True,
            description="Adds the runs, with their pictures, to trajectories.jsonl in a folder of ComfyUI's output. Nothing is "
            "written over.",
            inputs=[
                _history(),
                io.String.Input(
                    "folder",
                    default="promptloop",
                    tooltip="A folder in ComfyUI's output folder, such as promptloop or cats/monday. It is made if need be.",
                ),
            ],
            outputs=[
                io.String.Output("path", "path", tooltip="The file with the runs: Load History and `promptloop` read it.")
            ],
        )

    @classmethod
    def validate_inputs(cls, folder: Any = None) -> bool | str:
        import folder_paths

        try:
            return folder is None or bool(records.folder_in(folder_paths.get_output_directory(), folder))
        except ValueError as e:
            return str(e)

    @classmethod
    def execute(cls, history: Any, folder: str) -> io.NodeOutput:
        import folder_paths

        from promptloop_pipeline.trajectory import save

        path = str(save(history, records.folder_in(folder_paths.get_output_directory(), folder)))
        return io.NodeOutput(path, ui={"text": (path,)})


def _files() -> list[str]:
    """Pictures in the input folder, and saved records in the output and input folders, as ComfyUI writes file names of folders."""
    import folder_paths

    source, target = folder_paths.get_input_directory(), folder_paths.get_output_directory()
    pictures = sorted(f.name for f in Path(source).iterdir() if f.suffix.lower() == ".png") if Path(source).is_dir() else []
    found = [f"{name} [output]" for name in records.saved(target)] + [f"{name} [input]" for name in records.saved(source)]
    return found + pictures or [NOTHING]


def _path(file: str) -> Path:
    """Raises FileNotFoundError for what is not in one of ComfyUI's own folders."""
    import folder_paths

    name, folder = folder_paths.annotated_filepath(file)
    folder = Path(folder or folder_paths.get_input_directory()).resolve()
    found = folder if "\0" in name else (folder / name).resolve()
    if not name or not found.is_relative_to(folder) or not found.is_file():
        raise FileNotFoundError(
            f"there is no file {file!r} in ComfyUI's folders; drop a PNG of a PromptLoop run on the node, or choose a saved record"
        )
    return found


class PromptLoopLoadHistory(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            "PromptLoopLoadHistory",
            "Load History",
            "PromptLoop/history",
            description="Reads runs back: from a PNG that was saved after a PromptLoop run, or from what Save History wrote.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=_files(),
                    upload=io.UploadType.image,
                    image_folder=io.FolderType.input,
                    tooltip="A PNG in the input folder (drop one here), or a trajectories.jsonl of Save History.",
                ),
                io.String.Input(
                    "run",
                    default="",
                    optional=True,
                    tooltip="For a PNG with runs of several nodes: the id of the node. For a saved record: the id of one run. "
                    "Empty: what there is.",
                ),
                io.Int.Input(
                    "sample",
                    default=0,
                    min=0,
                    max=100000,
                    optional=True,
                    tooltip="0: all pictures of the run. From 1: that one.",
                ),
            ],
            outputs=[HISTORY.Output("history", "history", tooltip="To be shown, replayed, exported.")],
        )

    @classmethod
    def validate_inputs(cls, file: Any = None) -> bool | str:
        try:
            path = None if file is None else _path(file)
            if path is not None and path.suffix.lower() not in records.RECORDS:
                records.in_picture(path)
        except (OSError, ValueError) as e:
            return str(e)
        return True

    @classmethod
    def fingerprint_inputs(cls, file: Any = None, **others: Any) -> str:
        try:
            return records.stamp(_path(file))
        except (OSError, ValueError, TypeError):  # execute says what is wrong with it
            return ""

    @classmethod
    def execute(cls, file: str, run: str = "", sample: int = 0) -> io.NodeOutput:
        return io.NodeOutput(records.read(_path(file), run, sample))


class PromptLoopReplay(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            "PromptLoopReplay",
            "Replay",
            "PromptLoop/history",
            description="Makes a run again without its model: a refiner that says at each step what was said then. With the same "
            "seed and settings, the same picture.",
            inputs=[_history()],
            outputs=[
                REFINER.Output("refiner", "refiner", tooltip="Says what was said. Runs that differ need a batch of as many."),
                io.String.Output(
                    "refine_at", "refine_at", tooltip="The steps at which it was said: for refine_at of the loop."
                ),
                io.String.Output("prompt", "prompt", tooltip="What the run was asked for: for prompt of the loop."),
            ],
        )

    @classmethod
    def execute(cls, history: Any) -> io.NodeOutput:
        from promptloop_pipeline.refiners.scripted import ScheduleRefiner

        refiner = ScheduleRefiner(records.schedules(history))
        return io.NodeOutput(refiner, refiner.refine_at, history[0].request)


class PromptLoopExportSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            "PromptLoopExportSchedule",
            "Export Prompt Schedule",
            "PromptLoop/history",
            is_output_node=True,
            description="The prompts of a run by step, as text for other tools.",
            inputs=[
                _history(),
                io.Combo.Input(
                    "form",
                    options=list(records.FORMS),
                    default=records.FORMS[0],
                    tooltip="json: what `promptloop` and its Python read. prompt editing: the web UI's [from:to:when]. table: to be "
                    "read.",
                ),
            ],
            outputs=[
                io.String.Output("schedule", "schedule", tooltip="One text for each picture of the batch.", is_output_list=True)
            ],
        )

    @classmethod
    def execute(cls, history: Any, form: str) -> io.NodeOutput:
        if not history:
            raise ValueError("the history is empty; there is no run to be exported")
        texts = [records.exported(t, form) for t in history]
        return io.NodeOutput(texts, ui={"text": tuple(texts)})


NODES = [PromptLoopHistory, PromptLoopSaveHistory, PromptLoopLoadHistory, PromptLoopReplay, PromptLoopExportSchedule]
