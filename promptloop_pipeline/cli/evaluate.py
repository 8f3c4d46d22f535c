"""`promptloop eval`: arms side by side on the same requests and seeds."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..schedule import RefinementSchedule
from .named import DTYPES, NO_MODEL, PARTS, is_server, is_told, own_template
from .output import checked_folder, quiet_libraries, write_json
from .tables import print_comparison, print_results, shown
from .tables import report as write

if TYPE_CHECKING:
    from ..evaluation.arms import ArmSpec
    from ..evaluation.benchmarks import Benchmark

MANIFEST, RESULTS, VERSION = "manifest.json", "results.json", 2
SAMPLES = ("requests", "seeds", "scores")  # parts of the results that are as long as the evaluation
OF_REFINER = ("refiner", "template", "server_model", "refine_at")  # settings that arms without a refiner do not read
PACKAGES = ("torch", "diffusers", "transformers", "numpy", "pillow")
HASHED = 256 * 2**20  # bytes of a folder up to which its contents count; above, names, sizes and times do


def evaluate(
    benchmark: Annotated[
        str, typer.Option(help="shapes (embedded), geneval, ocr, drawbench, or a .jsonl or .txt file of prompts.")
    ] = "shapes",
    model: Annotated[str | None, typer.Option(help='"tiny" (embedded), a folder, or a hub id of a diffusers pipeline.')] = None,
    arms: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated; default: all of raw,single,blind,loop,loop-noimage,best-of-2 (shapes: gold,oracle)."
        ),
    ] = None,
    n: Annotated[int | None, typer.Option(help="How many requests. Default: all; shapes: 300.")] = None,
    per_prompt: Annotated[int | None, typer.Option(help="Pictures of each request. Default: 1; geneval: 4.")] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            help="NAME[:WEIGHT][<=CAP], separated by commas, the one that matters first; weight 0: reported, not in the total."
        ),
    ] = None,
    reward_model: Annotated[
        list[str] | None,
        typer.Option(help=f"NAME[:PART]=WEIGHTS, repeatable, as --model of `promptloop score`; PART: {', '.join(PARTS)}."),
    ] = None,
    refiner: Annotated[
        str | None,
        typer.Option(help='The refiner under test: "tiny" (embedded), a folder or hub id, a server\'s URL, "module:object".'),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            help="What a language model is told; see `promptloop generate`. Default: the template.txt in its folder, else repair."
        ),
    ] = None,
    server_model: Annotated[str | None, typer.Option(help="The refiner's name on its server, where that has several.")] = None,
    refine_at: Annotated[
        str | None, typer.Option(help="When the arms with the refiner in the loop look. Default: 20%, 50%, 80%; shapes: often.")
    ] = None,
    versus: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=REFINER or NAME=REFINER@SCHEDULE, repeatable: one more arm, with another refiner at the schedule of loop, or at "
            "its own. A template.txt in its folder goes before --template. A folder whose name has an @ is to end in a slash."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first picture; the others count up.")] = 0,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 20,
    guidance_scale: Annotated[float | None, typer.Option(help="Default: the pipeline's own (shapes: 3).")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels. Default: the pipeline's own.")] = None,
    objects: Annotated[int, typer.Option(help="shapes: how many objects a request names.")] = 2,
    split: Annotated[str, typer.Option(help="shapes: test (held-out pairs and words), any (held-out pairs), train.")] = "test",
    batch: Annotated[int, typer.Option(help="Pictures at a time through the pipeline.")] = 32,
    reward_batch: Annotated[int, typer.Option(help="Pictures at a time through a reward.")] = 32,
    device: Annotated[str | None, typer.Option(help='"cuda", "cpu", ...; default: the best there is.')] = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"Of the pipeline: {', '.join(DTYPES)}. Default: what fits device and model.")
    ] = None,
    report: Annotated[
        Path, typer.Option(help="Folder for the results; given again with the same settings, it is taken up where it stopped.")
    ] = Path("promptloop-eval"),
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Nothing is run: two results.json, or their folders, side by side.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Arms on the same requests and seeds, with intervals, paired differences and a report. Takes up a run that was stopped."""
    if compare:
        print_comparison([_results(path) for path in compare], as_json)
        return
    for option, value in (
        ("--n", n),
        ("--steps", steps),
        ("--batch", batch),
        ("--reward-batch", reward_batch),
        ("--per-prompt", per_prompt),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{option} {value}: give a number from 1 up")
    if seed < 0:
        raise ValueError(f"--seed {seed}: give a number from 0 up")
    if dtype not in (None, *DTYPES):
        raise ValueError(f"--dtype {dtype}: use {', '.join(DTYPES)}")
    call: dict[str, Any] = {"num_inference_steps": steps, **_size(size)}
    folder = checked_folder(report, "--report")
    quiet_libraries()
    from ..evaluation.evaluate import Samples
    from ..rewards.combine import parse_rewards
    from .named import check_model, load_model, load_named_reward, load_refiner, reward_options, where_to_run
    from .versus import parse_versus, versus_arm

    the_benchmark = _benchmark(benchmark, n, objects, split)
    chosen = _chosen(arms, the_benchmark)
    refine_at = str(RefinementSchedule.parse(refine_at or the_benchmark.refine_at))
    others = parse_versus(versus or [], [a.name for a in the_benchmark.arms])
    for at in (*(a.refine_at for a in chosen), *(at for _, at in others.values())):
        RefinementSchedule.parse(at or refine_at).steps(steps)
    made_of = {name: _made_of(name, place, at or refine_at, template, server_model) for name, (place, at) in others.items()}
    for name, (place, at) in others.items():
        load = partial(load_refiner, *(made_of[name][k] for k in ("refiner", "template", "server_model")))
        chosen.append(versus_arm(name, place, at, load))
    model = _named(_needed("--model", model, the_benchmark.model, the_benchmark, "a folder or hub id of a diffusers pipeline"))
    check_model(model)
    device, dtype = where_to_run(model, device, dtype)
    if any(a.needs_refiner for a in chosen):
        what = "a model's folder or hub id, a server's URL, or \"module:object\", or only arms without one, such as raw"
        refiner = _named(_needed("--refiner", refiner, the_benchmark.refiner, the_benchmark, what))
        if is_server(refiner) and server_model is None:
            raise ValueError(f"--refiner {refiner}: give --server-model too, so that the record says which model it was")
        if others and not is_told(refiner):
            template = None  # it is for the others, and so is a model on a server
        if others and not is_server(refiner):
            server_model = None
    own_words = own_template(refiner or "")
    template = own_words if template is None or _named(template) == own_words else template
    rewards = _needed("--reward", reward, the_benchmark.rewards, the_benchmark, "such as image-reward, pickscore:0")
    specs = parse_rewards(rewards)
    if "win-rate" in (s.name for s in specs):
        raise ValueError(
            "win-rate compares the pictures of one prompt with each other, so that the mean of any arm is one half; use a reward that "
            "marks single pictures, such as vlm-judge"
        )
    own = reward_options(reward_model or [], specs, "--reward-model")
    if (guidance := the_benchmark.guidance_scale if guidance_scale is None else guidance_scale) is not None:
        call["guidance_scale"] = guidance
    samples = Samples.of(the_benchmark, seed, per_prompt or the_benchmark.per_prompt)
    settings = {
        "benchmark": the_benchmark.name, "model": model, "n": len(the_benchmark.requests),
        "per_prompt": per_prompt or the_benchmark.per_prompt,
        "refiner": refiner, "template": template, "server_model": server_model, "refine_at": refine_at, "seed": seed, "steps": steps,
        "objects": objects, "split": split, "batch": batch, "guidance_scale": guidance, "size": size, "device": device, "dtype": dtype,
    }  # fmt: skip
    manifest = {
        "version": VERSION, "settings": settings, "versions": _versions(), "files": _files(the_benchmark, model, refiner, template),
        "versus": made_of,
    }  # fmt: skip
    manifest = _checked_manifest(folder, manifest)
    told = _hash(json.dumps(the_benchmark.context, sort_keys=True, default=str).encode())
    judged_by = {name: _sources(name, options) for name, options in own.items()}
    by = {name: json.dumps(what | {"told": told}, sort_keys=True) for name, what in judged_by.items()}
    common = {"device": device, "batch_size": reward_batch}
    from ..evaluation.evaluate import evaluate as run

    with _Bars() as bars:
        found = run(
            the_benchmark, chosen, samples, specs, folder,
            model=lambda: load_model(model, device, dtype),
            refiner=lambda: load_refiner(str(refiner), template, server_model),
            rewards={name: partial(load_named_reward, name, options, **common) for name, options in own.items()}, by=by,
            refine_at=refine_at, batch=batch, reward_batch=reward_batch, begin=partial(_begin, folder, manifest), progress=bars.next,
            **call,
        )  # fmt: skip
    manifest |= {"versus": made_of, "rewards": judged_by}
    results, page = write(the_benchmark, chosen, samples, specs, found, manifest, folder)
    write_json(folder / RESULTS, results)
    if as_json:
        print(json.dumps({k: v for k, v in results.items() if k not in SAMPLES} | {"report": str(page)}, indent=1))
        return
    print_results(results, page)


def _begin(folder: Path, manifest: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / MANIFEST, manifest)


class _Bars:
    """One progress bar after another."""

    def __init__(self) -> None:
        self.bar: Any = None

    def next(self, what: str, total: int, done: int) -> Any:
        from tqdm import tqdm

        self.__exit__()
        self.bar = tqdm(total=total, initial=done, unit="image", leave=False, desc=what)
        return self.bar.update

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


# --- what is asked for, before anything is loaded -----------------------------------------------------------------------


def _benchmark(name: str, n: int | None, objects: int, split: str) -> Benchmark:
    from ..evaluation.benchmarks import BENCHMARKS, from_file

    if name == "shapes":
        return BENCHMARKS[name](n, objects, split)
    if name in BENCHMARKS:
        return BENCHMARKS[name](n)
    path = Path(name).expanduser()
    if path.suffix not in (".jsonl", ".txt"):
        raise ValueError(
            f"unknown benchmark {name!r}; there are: {', '.join(BENCHMARKS)}, and .jsonl or .txt files of your own"
        )
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of prompts at {path}")
    return from_file(path, n)


def _needed(option: str, given: str | None, default: str | None, benchmark: Benchmark, what: str) -> str:
    if found := given or default:
        return found
    raise ValueError(f"the benchmark {benchmark.name} has no {option[2:]} of its own; give {option}, {what}")


def _made_of(arm: str, place: str, refine_at: str, template: str | None, server_model: str | None) -> dict[str, Any]:
    """What an arm of --versus is made of, its refiner checked as far as that needs no loading."""
    from .versus import check_refiner

    refiner = _named(place)
    if is_server(refiner) and server_model is None:
        raise ValueError(f"--versus {arm}={place}: give --server-model too, so that the record says which model it was")
    template = (own_template(refiner) or template) if is_told(refiner) else None
    server_model = server_model if is_server(refiner) else None
    check_refiner(refiner, template, server_model)
    settings = {"refiner": refiner, "template": template, "server_model": server_model, "refine_at": refine_at}
    return settings | _refiner_files(refiner, template)


def _size(text: str | None) -> dict[str, int]:
    if text is None:
        return {}
    if not (found := re.fullmatch(r"([1-9]\d{0,4})[xX]([1-9]\d{0,4})", text.strip())):
        raise ValueError(f"--size {text!r}: give WIDTHxHEIGHT in pixels, such as 1024x768")
    return {"width": int(found[1]), "height": int(found[2])}


def _chosen(arms: str | None, benchmark: Benchmark) -> list[ArmSpec]:
    known = {a.name: a for a in benchmark.arms}
    names = list(known) if arms is None else [name.strip() for name in arms.split(",") if name.strip()]
    there_are = f"{benchmark.name} has: {', '.join(known)}"
    if not names:
        raise ValueError(f"--arms {arms!r} names no arm; {there_are}")
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown arm {unknown[0]!r}; {there_are}")
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ValueError(f"--arms names {twice[0]!r} twice; name each arm once")
    return [known[name] for name in names]


def _versions() -> dict[str, str]:
    from .. import __version__

    return {"promptloop": __version__, "python": platform.python_version(), **{p: metadata.version(p) for p in PACKAGES}}


def _named(place: str) -> str:
    """A model's folder by its one name, from wherever it is called."""
    path = Path(place).expanduser()
    return str(path.resolve()) if path.exists() and place not in NO_MODEL else place


def _files(benchmark: Benchmark, model: str, refiner: str | None, template: str | None) -> dict[str, str]:
    """Check sums of what pictures are made of, so that retrained weights, an edited refiner or other prompts are not taken for the old
    ones."""
    from ..tiny import WEIGHTS

    sources = sorted(set(benchmark.context.get("source", ())))
    found = {"requests": _hash(json.dumps([benchmark.requests, benchmark.context.get("source")]).encode())}
    found |= _check_sums({"embedded weights": WEIGHTS, "model files": Path(model)}) | _refiner_files(refiner, template)
    return found | ({"source pictures": _hash("".join(_check_sum(Path(s)) for s in sources).encode())} if sources else {})


def _refiner_files(refiner: str | None, template: str | None) -> dict[str, str]:
    from ..dotted import file_of

    places = {"template file": Path(template or "").expanduser()}
    if refiner and not is_server(refiner):
        places["refiner files"] = (file_of(refiner) if ":" in refiner else None) or Path(refiner)
    return _check_sums(places)


def _check_sums(places: dict[str, Path]) -> dict[str, str]:
    return {what: _check_sum(path) for what, path in places.items() if path.exists() and path != Path() and str(path) != "tiny"}


def _sources(name: str, options: dict[str, str]) -> dict[str, str]:
    """A reward's options, with check sums of those that are files, and of itself where it is somebody's own."""
    from ..dotted import file_of
    from ..rewards.combine import NAMED

    places = {key: Path(value).expanduser() for key, value in options.items()}
    if name not in NAMED and (own := file_of(name)):
        places["own"] = own
    return options | {f"{key} files": _check_sum(path) for key, path in places.items() if path.exists()}


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _check_sum(path: Path) -> str:
    total = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    contents = sum(file.stat().st_size for file in files) <= HASHED
    for file in files:
        total.update(str(file.relative_to(path)).encode())
        if contents:
            with open(file, "rb") as f:
                total.update(hashlib.file_digest(f, "sha256").digest())
        else:
            total.update(f"{file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    return total.hexdigest()[:16]


def _checked_manifest(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """What the folder is to hold: arms and rewards may be added to an evaluation, and a refiner where none has been used; all else has
    to be as it was. An arm of --versus that is not asked for now stays in it."""
    file = folder / MANIFEST
    if not file.is_file():
        if folder.is_dir() and any(p for p in folder.iterdir() if not p.name.startswith(".")):
            raise ValueError(f"the folder {folder} holds something, but no evaluation; choose another one with --report")
        return manifest
    old = _read_json(file)
    if old["version"] != VERSION:
        raise ValueError(
            f"the folder {folder} holds an evaluation of an older version of PromptLoop; choose another one with --report"
        )
    unused = [m for m in (old, manifest) if m["settings"]["refiner"] is None]
    for part, keys in (("settings", OF_REFINER), ("files", ("refiner files", "template file"))) if unused else ():
        theirs = manifest if unused[0] is old else old
        unused[0][part] = {k: v for k, v in unused[0][part].items() if k not in keys}
        unused[0][part] |= {k: theirs[part][k] for k in keys if k in theirs[part]}
    others = {arm: of for arm, of in old.get("versus", {}).items() if (folder / arm).is_dir()}  # of which there are pictures
    parts = [(part, old.get(part), wanted) for part, wanted in manifest.items() if part != "versus"]
    parts += [(f"settings of {arm}", others[arm], wanted) for arm, wanted in manifest["versus"].items() if arm in others]
    for part, before, wanted in parts:
        if before == wanted:
            continue
        a, b = (p if isinstance(p, dict) else {part: p} for p in (before, wanted))
        key = next(k for k in [*b, *a] if a.get(k) != b.get(k))
        raise ValueError(
            f"the folder {folder} holds an evaluation of which the {part} differ: {key} is {shown(a.get(key))} there and "
            f"{shown(b.get(key))} now; nothing was changed. Repeat what it was made with to go on with it, or choose another folder "
            "with --report"
        )
    return manifest | {"versus": others | manifest["versus"]}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{file} is no JSON ({e})") from None
    if not isinstance(found, dict) or not isinstance(found.get("version"), int) or found["version"] > VERSION:
        raise ValueError(f"{file} was not written by this version of `promptloop eval`")
    return found


def _results(path: Path) -> tuple[Path, dict[str, Any]]:
    path = path / RESULTS if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no results at {path}: --compare takes two {RESULTS} of `promptloop eval`, or their folders")
    results = _read_json(path)
    if missing := [k for k in ("settings", "arms", *SAMPLES) if k not in results]:
        raise ValueError(f"{path} holds no results of `promptloop eval`: it lacks {', '.join(missing)}")
    return path, results
