"""Weights of rewards: found, read without running anything that a file may hold, and put into a model with every key accounted for."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger("promptloop")
Source = tuple[str, Callable[[Tensor], Tensor]]  # the published key of a parameter, and how to get it from what lies there


def best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def as_dtype(dtype: Any) -> torch.dtype:
    """A torch dtype from itself or its name; None is float32. Raises ValueError."""
    found = torch.float32 if dtype is None else getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype is {dtype!r}; use float32, float16 or bfloat16")
    return found


def is_hub_id(name: str | Path) -> bool:
    return not Path(name).expanduser().exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name)) is not None


def find_weights(reward: str, model: str | Path | None, file: str, repo: str | None, known: Sequence[Path] = ()) -> Path:
    """The checkpoint of a reward.

    model: a file; a folder with `file`, or with it as .safetensors; a hub id; None: the first of `known` that is there, else the hub's
    `repo`. Raises OSError with one clear line.
    """
    if model is None:
        there = [path for path in known if path.is_file()]
        if there:
            return there[0]
        if repo is None:
            raise FileNotFoundError(f"the weights of {reward} are in no known place; give model=, the path of {file}")
        return _from_hub(reward, repo, file)
    path = Path(model).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        for candidate in (path / Path(file).with_suffix(".safetensors"), path / file):
            if candidate.is_file():
                return candidate
        raise FileNotFoundError(f"the folder {path} holds no weights of {reward}: expected {file} in it")
    if is_hub_id(model):
        return _from_hub(reward, str(model), file)
    raise FileNotFoundError(f"there are no weights of {reward} at {path}; give {file}, a folder with it, or a hub id")


def _from_hub(reward: str, repo: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, file))
    except Exception as e:  # many kinds: not there, no access, no network, asked to be offline
        raise OSError(
            f"cannot get the weights of {reward} ({file} of {repo}) from the hub; give the path of the file ({first_line(e)})"
        ) from e


def load_tokenizer(kind: Any, reward: str, names: Sequence[str | Path | None]) -> Any:
    """A tokenizer of the class `kind`, from the first of `names` that is no folder without one."""
    for name in names:
        folder = Path(name or "").expanduser()
        if name and (not folder.exists() or any((folder / f).is_file() for f in ("tokenizer.json", "vocab.txt", "vocab.json"))):
            try:
                found = kind.from_pretrained(str(name))
                if len(found) <= len(found.all_special_tokens):  # transformers 5 returns an empty one where it finds none
                    raise OSError("it is not there, or cannot be reached")
                return found
            except Exception as e:  # the libraries below agree on no kind of error
                raise OSError(
                    f"cannot load the tokenizer of {reward} from {str(name)!r}; give tokenizer=, a folder with one ({first_line(e)})"
                ) from e
    raise FileNotFoundError(f"there is no tokenizer for {reward} in {' or '.join(map(str, filter(None, names)))}")


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


# --- reading ------------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """PROMPTLOOP_CACHE, or ~/.cache/promptloop."""
    return Path(os.environ.get("PROMPTLOOP_CACHE") or "~/.cache/promptloop").expanduser()


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a .pt file, under their published keys.

    A .pt file is a pickle: it is read without running any code, and refused when it asks for any. It is read once: then as many
    bytes lie as safetensors in the cache folder, and that copy is read as long as the file stays as it is.
    """
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except Exception as e:
            raise ValueError(f"{path} is damaged, or no safetensors file ({first_line(e)}); get it again") from e
    stat = path.stat()
    mark = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    copy = cache_folder() / "weights" / f"{path.stem}-{mark}.safetensors"
    if copy.is_file():
        try:
            return load_file(copy)
        except Exception as e:
            logger.warning("%s is damaged and is made again from %s (%s)", copy, path, first_line(e))
    state = _read_pickle(path)
    _keep(state, copy)
    return state


def _read_pickle(path: Path) -> dict[str, Tensor]:
    with open(path, "rb") as f:
        start = f.read(20)
    if not start.startswith((b"PK", b"\x80")):  # a zip or a pickle; a git-lfs pointer or a web page is neither
        raise ValueError(f"{path} is damaged, or no checkpoint: it begins with {start!r}; get it again")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        asked = re.search(r"GLOBAL (\w+(?:\.\w+)+)", str(e))
        raise ValueError(
            f"{path} holds more than tensors{f' ({asked[1]})' if asked else ''} and was not read, since that could run any program; "
            "get it from its publisher, or as .safetensors"
        ) from e
    except Exception as e:  # a damaged file may raise anything
        raise ValueError(f"{path} is damaged, or no checkpoint ({first_line(e)}); get it again") from e
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not found or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError(f"{path} is no checkpoint of a reward: expected tensors by name")
    return {str(k).removeprefix("module."): v.detach() for k, v in found.items()}


def _keep(state: Mapping[str, Tensor], copy: Path) -> None:
    """Written under another name first, so that nobody ever reads half a file. No room for it is no reason to stop."""
    from safetensors.torch import save_file

    partial = copy.with_name(f"{copy.name}.{os.getpid()}")
    seen: set[int] = set()
    plain = {}
    for key, tensor in state.items():
        place = tensor.untyped_storage().data_ptr()
        plain[key] = tensor.clone(memory_format=torch.contiguous_format) if place in seen else tensor.contiguous()
        seen.add(place)
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        save_file(plain, partial)
        partial.replace(copy)
    except Exception as e:
        logger.warning("cannot keep %s as safetensors (%s); it is read from the original each time", copy.stem, first_line(e))
        try:
            partial.unlink(missing_ok=True)
        except OSError:  # the same trouble, already told
            return


# --- filling ------------------------------------------------------------------------------------------------------------


def plain(key: str) -> Source:
    return key, lambda t: t


def fill(
    build: Callable[[], nn.Module], state: Mapping[str, Tensor], published: Callable[[str], Source], ignored: str, what: str
) -> nn.Module:
    """The model that `build` makes, in eval mode and without gradients of its own, with each parameter from its published key.

    published: where a parameter of the model lies in `state`. ignored: a pattern of published keys that nothing needs. what: for the
    error. It is built without memory of its own and takes the tensors as they are.

    Raises ValueError naming the keys that are missing, left over, or of another shape.
    """
    with torch.device("meta"):
        model = build()
    wanted = model.state_dict()
    sources = {name: published(name) for name in wanted}
    used = {key for key, _ in sources.values()}
    refuse(what, used - set(state), [k for k in state if k not in used and not re.search(ignored, k)])
    taken = {name: how(state[key]).contiguous() for name, (key, how) in sources.items()}
    odd = [
        f"{sources[n][0]} is {tuple(t.shape)}, not {tuple(wanted[n].shape)}"
        for n, t in taken.items()
        if t.shape != wanted[n].shape
    ]
    if odd:
        raise ValueError(f"{what} holds weights of another model: {_some(odd)}")
    model.load_state_dict(taken, assign=True)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta and name == "position_ids":  # the only ones that no checkpoint holds
                module.register_buffer(name, torch.arange(buffer.shape[-1])[None], persistent=False)
    return model.eval().requires_grad_(False)


def refuse(what: str, missing: Any, unexpected: Any) -> None:
    """Raises ValueError naming the keys, if there are any: a model with weights left at random would score, but nothing real."""
    parts = [f"{label} {_some(sorted(keys))}" for label, keys in (("missing", missing), ("unexpected", unexpected)) if keys]
    if parts:
        raise ValueError(f"{what} does not hold the weights that were expected: {'; '.join(parts)}")


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
