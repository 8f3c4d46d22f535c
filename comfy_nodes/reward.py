"""Rewards: pictures scored against what was asked for, the best ones picked, and refining that did harm undone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

from . import scoring
from .pictures import spread, to_pil
from .types import problem

DEVICES = ("gpu", "cpu")
KEPT = 4  # rewards that stay in memory
ROOM = 1 << 30  # bytes on the GPU beside the weights
FRAMES = 4  # of a video that are scored
_loaded: OrderedDict[Any, tuple[Any, Any]] = OrderedDict()  # (reward, its ModelPatcher or None) by what it was loaded with


# --- rewards in ComfyUI's memory ----------------------------------------------------------------------------------------


def folders() -> list[str]:
    """models/rewards, and what extra_model_paths.yaml says under "rewards"."""
    import folder_paths

    folder_paths.add_model_folder_path("rewards", f"{folder_paths.models_dir}/rewards")
    return folder_paths.get_folder_paths("rewards")


def reward_of(name: str, options: dict[str, str], device: str, allow_download: bool) -> Any:
    """The reward, loaded once. On the GPU its weights are ComfyUI's to move: other models make room for them, and they for others."""
    key = (name, tuple(sorted(options.items())), device)
    if key not in _loaded:
        found, patcher = scoring.load(name, options, "cpu", allow_download), None
        if device == "gpu" and (modules := scoring.modules_of(found)):
            patcher = _patcher(modules)
        _loaded[key] = found, patcher
        while len(_loaded) > KEPT:
            _loaded.popitem(last=False)
    _loaded.move_to_end(key)
    found, patcher = _loaded[key]
    if patcher is not None:
        from comfy.model_management import load_models_gpu

        load_models_gpu([patcher], memory_required=ROOM, force_full_load=True)
    return found


def _patcher(modules: Sequence[Any]) -> Any:
    import torch
    from comfy.model_management import get_torch_device

    from .memory import whole_patcher

    return whole_patcher(torch.nn.ModuleList(modules), get_torch_device(), torch.device("cpu"))


def scored(
    pictures: Sequence[Any], prompts: Sequence[str], rewards: str, weights: str, device: str, allow_download: bool,
    groups: Sequence[Any] | None = None,
) -> scoring.Scores:  # fmt: skip
    """Raises ValueError for what cannot be read; a reward that cannot be loaded, or fails, is told in the result."""
    from comfy.utils import ProgressBar

    specs = scoring.read_rewards(rewards)
    scoring.check_prompts(prompts, specs)
    if device not in DEVICES:
        raise ValueError(f"device is {device!r}; use {' or '.join(DEVICES)}")
    options = scoring.weights_of(weights, specs, folders())
    bar = ProgressBar(len(pictures) * len(specs))

    def get(name: str) -> Any:
        return reward_of(name, options[name], device, allow_download)

    return scoring.score(specs, get, pictures, prompts, groups, bar.update_absolute)  # the bar raises where the user cancels


# --- inputs -------------------------------------------------------------------------------------------------------------


def _images() -> Any:
    return io.Image.Input("images", tooltip="Pictures of one size as a batch, or of any sizes as a list.")


def _asked() -> list[Any]:
    return [
        io.String.Input(
            "prompt",
            multiline=True,
            dynamic_prompts=True,
            default="",
            tooltip="What was asked for: your own words, not the refined prompt. A list of prompts is one for each picture.",
        ),
        io.String.Input(
            "rewards",
            default="image-reward",
            tooltip="NAME or NAME:WEIGHT, separated by commas, such as image-reward:1, pickscore:0. Weight 0: shown, and not in "
            f"the total. Names: {', '.join(scoring.NAMES)}.",
        ),
    ]


def _how() -> list[Any]:
    return [
        io.String.Input(
            "weights",
            multiline=True,
            default="",
            optional=True,
            tooltip="Where weights lie, one NAME=PATH a line: a file, a folder, a hub id, or a server's URL for judges. Empty: "
            "what lies under models/rewards.",
        ),
        io.Combo.Input(
            "device",
            options=list(DEVICES),
            default=DEVICES[0],
            optional=True,
            tooltip="gpu: inside ComfyUI's memory, where other models make room. cpu: the GPU is left alone; slower.",
        ),
        io.Boolean.Input(
            "allow_download",
            default=False,
            optional=True,
            tooltip="Whether weights that are not there may be fetched from the Hugging Face hub, often several GB.",
        ),
    ]


def _valid(rewards: Any) -> bool | str:
    text = rewards[0] if isinstance(rewards, (list, tuple)) else rewards
    return problem(text, lambda: scoring.read_rewards(str(text)))


def _settings(weights: Any, device: Any, allow_download: Any) -> dict[str, Any]:
    """With is_input_list, all inputs are lists."""
    return {"weights": weights[0], "device": device[0], "allow_download": allow_download[0]}


def _floats(totals: Sequence[float | None]) -> list[float]:
    return [scoring.plain(t) for t in totals]


class PromptLoopScore(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            "PromptLoopScore",
            "Score Images",
            "PromptLoop/reward",
            is_input_list=True,
            is_output_node=True,
            description="Scores each picture against what was asked for. A reward that fails says so in the table; no picture is lost.",
            inputs=[_images(), *_asked(), *_how()],
            outputs=[
                io.Float.Output("scores", "scores", tooltip="The total of each picture; nan where there is none.", is_output_list=True),
                io.String.Output("table", "table", tooltip="Each reward's own value for each picture, as text."),
                io.Image.Output("passed", "images", tooltip="The pictures, as they came.", is_output_list=True),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, rewards: Any = None) -> bool | str:
        return _valid(rewards)

    @classmethod
    def execute(cls, images: Any, prompt: Any, rewards: Any, weights: Any = ("",), device: Any = DEVICES,
                allow_download: Any = (False,)) -> io.NodeOutput:  # fmt: skip
        prompts = scoring.for_each(prompt, [len(batch) for batch in images])
        pictures = [p for batch in images for p in to_pil(batch)]
        found = scored(pictures, prompts, rewards[0], **_settings(weights, device, allow_download))
        text = scoring.table(found)
        return io.NodeOutput(_floats(found.totals), text, list(images), ui={"text": (text,)})


class PromptLoopPickBest(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            "PromptLoopPickBest",
            "Pick Best",
            "PromptLoop/reward",
            is_input_list=True,
            description="Keeps the pictures with the highest total, best first. Where no reward gives a score, the first are kept.",
            inputs=[
                _images(),
                *_asked(),
                io.Int.Input("count", default=1, min=1, max=4096, tooltip="How many to keep; all of them, where there are fewer."),
                *_how(),
            ],
            outputs=[
                io.Image.Output(
                    "best", "images", tooltip="The best, best first: a batch, or a list where sizes differ.", is_output_list=True
                ),
                io.Float.Output("scores", "scores", tooltip="Their totals; nan where there is none.", is_output_list=True),
                io.Int.Output("indices", "indices", tooltip="Their places among all pictures, from 0.", is_output_list=True),
                io.String.Output("table", "table", tooltip="Each reward's own value for all pictures, as text."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, rewards: Any = None) -> bool | str:
        return _valid(rewards)

    @classmethod
    def execute(cls, images: Any, prompt: Any, rewards: Any, count: Any, weights: Any = ("",), device: Any = DEVICES,
                allow_download: Any = (False,)) -> io.NodeOutput:  # fmt: skip
        import torch

        rows = [row for batch in images for row in batch]
        prompts = scoring.for_each(prompt, [len(batch) for batch in images])
        pictures = [p for batch in images for p in to_pil(batch)]
        found = scored(pictures, prompts, rewards[0], **_settings(weights, device, allow_download))
        places = scoring.best(found.totals, count[0])
        chosen = [rows[k] for k in places]
        alike = len({row.shape for row in chosen}) == 1
        text = f"{scoring.table(found)}\nkept: {', '.join(map(str, places))}"
        return io.NodeOutput(
            [torch.stack(chosen)] if alike else [row[None] for row in chosen],
            _floats([found.totals[k] for k in places]), places, text, ui={"text": (text,)},
        )  # fmt: skip


class PromptLoopDoNoHarm(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            "PromptLoopDoNoHarm",
            "Do No Harm",
            "PromptLoop/reward",
            is_input_list=True,
            description="Holds a refined run against the untouched one of the same seed. For each picture the refined one is kept only "
            "where it scores higher.",
            inputs=[
                io.Latent.Input("refined", tooltip="From the sampler with the loop."),
                io.Latent.Input("untouched", tooltip="From a sampler of the same seed and settings without it."),
                io.Vae.Input("vae", tooltip="To see both."),
                *_asked(),
                *_how(),
            ],
            outputs=[
                io.Latent.Output("kept", "latent", tooltip="For each picture the one that is kept.", is_output_list=True),
                io.Image.Output("image", "image", tooltip="The same, decoded.", is_output_list=True),
                io.String.Output("report", "report", tooltip="Both scores of each picture, which one is kept, and what failed."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, rewards: Any = None) -> bool | str:
        return _valid(rewards)

    @classmethod
    def execute(cls, refined: Any, untouched: Any, vae: Any, prompt: Any, rewards: Any, weights: Any = ("",),
                device: Any = DEVICES, allow_download: Any = (False,)) -> io.NodeOutput:  # fmt: skip
        _check_pairs(refined, untouched)
        specs = scoring.read_rewards(rewards[0])
        counts = [_picture(latent).shape[0] for latent in refined]
        prompts = scoring.for_each(prompt, counts)
        scoring.check_prompts(prompts, specs)  # before anything is decoded
        decoded = [[vae[0].decode(_picture(latent)) for latent in arm] for arm in (refined, untouched)]
        frames = [[f for batch, n in zip(arm, counts) for f in _frames(batch, n)] for arm in decoded]
        shown = [(arm, k, picture) for arm in (0, 1) for k, each in enumerate(frames[arm]) for picture in each]
        found = scored(
            [p for _, _, p in shown], [prompts[k] for _, k, _ in shown], rewards[0], groups=[k for _, k, _ in shown],
            **_settings(weights, device, allow_download),
        )  # fmt: skip
        labels = [f"{k} {('refined', 'untouched')[arm]}" for arm, k, _ in shown]
        keep, lines = scoring.gate(found, [(arm, k) for arm, k, _ in shown], len(prompts))
        text = "\n".join([*lines, "", scoring.table(found, labels)])
        latents, images, start = [], [], 0
        for j, n in enumerate(counts):
            which = keep[start : start + n]
            latents.append({**refined[j], "samples": _mixed(refined[j]["samples"], untouched[j]["samples"], which)})
            images.append(_rows(decoded[0][j], decoded[1][j], which))
            start += n
        return io.NodeOutput(latents, images, text, ui={"text": (text,)})


def _check_pairs(refined: Sequence[Any], untouched: Sequence[Any]) -> None:
    a, b = ([[tuple(p.shape) for p in _parts(latent["samples"])] for latent in arm] for arm in (refined, untouched))
    if a != b:
        raise ValueError(
            f"the latents do not belong together: refined is {_sizes(a)}, untouched is {_sizes(b)}; make both with the same model, "
            "size and batch"
        )


def _sizes(arm: Sequence[Any]) -> str:
    return ", ".join(" x ".join(map(str, shape)) for latent in arm for shape in latent)


def _parts(samples: Any) -> list[Any]:
    """Latents of video with sound hold one tensor for each."""
    return list(samples.unbind()) if samples.is_nested else [samples]


def _picture(latent: Any) -> Any:
    return _parts(latent["samples"])[0]


def _frames(decoded: Any, count: int) -> list[list[Any]]:
    """For each of `count` samples its picture, or some frames of its video. decoded: [count, H, W, C] or [count, frames, H, W, C]."""
    frames = decoded.reshape(count, -1, *decoded.shape[-3:])
    return [to_pil(each[spread(frames.shape[1], FRAMES)]) for each in frames]


def _rows(first: Any, second: Any, keep: Sequence[bool]) -> Any:
    """The frames of the samples that are kept. keep: True takes the first one's."""
    import torch

    a, b = (x.reshape(len(keep), -1, *x.shape[-3:]) for x in (first, second))
    return torch.cat([a[k] if first_one else b[k] for k, first_one in enumerate(keep)])


def _mixed(first: Any, second: Any, keep: Sequence[bool]) -> Any:
    import torch

    mixed = [
        torch.stack([a[k] if first_one else b[k] for k, first_one in enumerate(keep)])
        for a, b in zip(_parts(first), _parts(second), strict=True)
    ]
    if not first.is_nested:
        return mixed[0]
    from comfy.nested_tensor import NestedTensor

    return NestedTensor(mixed)


NODES = [PromptLoopScore, PromptLoopPickBest, PromptLoopDoNoHarm]
