"""How good the embedded world is, before any refiner comes in:

    python -m promptloop_pipeline.evaluation.quality --n 300

Ground truth and one-attribute near misses through the verifier, reconstructions through the autoencoder, and pictures from the
gold captions of held-out scenes.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..tiny import load_pipeline
from ..tiny.language import system_caption
from ..tiny.scenes import BACKGROUNDS, COLORS, QUADRANTS, RADIUS, SHAPES, Scene, Spec, free_cells, random_scene, render
from ..tiny.verifier import judge, read, verify

NEAR_MISSES = ("color", "shape", "size", "quadrant", "background", "extra", "absent", "sticker")


def truth(scene: Scene) -> Spec:
    """Everything that can be said of a scene: also which of its free cells are clear, and whether all are."""
    clear = tuple(c for c in free_cells(scene.objects) if c not in scene.stickers)
    return Spec(scene.objects, (), scene.background, clear, clean=not scene.stickers)


def near_miss(scene: Scene, kind: str, rng: random.Random) -> Spec:
    """What is true of the scene but for one attribute. Raises IndexError where the scene has no room for it."""
    spec = truth(scene)
    k = rng.randrange(len(spec.objects))
    o = spec.objects[k]
    if kind == "background":
        return replace(spec, background=rng.choice([b for b in BACKGROUNDS if b != spec.background]))
    if kind == "sticker":
        return replace(spec, clear=(rng.choice(scene.stickers),))
    if kind == "absent":
        return replace(spec, objects=(*spec.objects, o))
    if kind == "extra":
        if len(spec.objects) == 1:
            raise IndexError("one object is too few to leave one out")
        return replace(spec, objects=spec.objects[:k] + spec.objects[k + 1 :])
    values: Sequence[str] = {"color": tuple(COLORS), "shape": SHAPES, "size": tuple(RADIUS), "quadrant": tuple(QUADRANTS)}[kind]
    taken = [x.quadrant for x in spec.objects] if kind == "quadrant" else [getattr(o, kind)]
    changed = replace(o, **{kind: rng.choice([v for v in values if v not in taken])})
    return replace(spec, objects=(*spec.objects[:k], changed, *spec.objects[k + 1 :]))


def verifier_rates(n: int, seed: int = 0) -> dict[str, float]:
    """Share of strict verdicts on what is true of rendered scenes, and on near misses of each kind."""
    rng = random.Random(seed)
    hits: dict[str, list[bool]] = {kind: [] for kind in ("truth", *NEAR_MISSES)}
    for _ in range(n):
        scene = random_scene(rng, split="any")
        reading = read(render(scene, rng))
        hits["truth"].append(judge(reading, truth(scene)).strict)
        for kind in NEAR_MISSES:
            try:
                claim = near_miss(scene, kind, rng)
            except IndexError:
                continue
            hits[kind].append(judge(reading, claim).strict)
    return {kind: float(np.mean(found)) for kind, found in hits.items()}


def reconstruction_rate(pipe: Any, n: int, seed: int = 1) -> float:
    """Share of held-out scenes of which everything is still true after the autoencoder."""
    import torch

    rng = random.Random(seed)
    scenes = [random_scene(rng, split="test") for _ in range(n)]
    images = np.stack([render(s, rng) for s in scenes])
    strict = []
    with torch.no_grad():
        for i in range(0, n, 100):
            x = torch.from_numpy(images[i : i + 100]).permute(0, 3, 1, 2).float() / 127.5 - 1
            y = pipe.vae.decode(pipe.vae.encode(x).latents).sample
            back = ((y.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
            strict += [verify(b, truth(s)).strict for b, s in zip(back, scenes[i : i + 100], strict=True)]
    return float(np.mean(strict))


def gold_rates(pipe: Any, n: int, seed: int = 2, steps: int = 20, guidance_scale: float = 3.0) -> dict[str, float]:
    """Pictures from the gold captions of held-out scenes: share with all that the caption says (stickers are not its
    concern), mean score, and share without any sticker."""
    import torch

    rng = random.Random(seed)
    specs = []
    for _ in range(n):
        scene = random_scene(rng, split="test")
        specs.append(Spec(scene.objects, (), scene.background))
    verdicts = []
    for i in range(0, n, 50):
        part = specs[i : i + 50]
        generators = [torch.Generator().manual_seed(seed * 10**6 + i + k) for k in range(len(part))]
        captions = [system_caption(s) for s in part]
        images = pipe(captions, num_inference_steps=steps, guidance_scale=guidance_scale, generator=generators).images
        verdicts += [verify(image, s) for image, s in zip(images, part, strict=True)]
    rates = {"strict": float(np.mean([v.strict for v in verdicts])), "score": float(np.mean([v.score for v in verdicts]))}
    for k in (1, 2, 3):
        rates[f"strict, {k} objects"] = float(np.mean([v.strict for v, s in zip(verdicts, specs) if len(s.objects) == k]))
    return rates | {"without stickers": float(np.mean([not v.reading.stickers for v in verdicts]))}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="promptloop_pipeline.evaluation.quality", description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=300)
    parser.add_argument("--model", type=Path, help="a pipeline folder instead of the embedded one")
    args = parser.parse_args(argv)
    from .headroom import load

    pipe = load(args.model) if args.model else load_pipeline("sd")
    rates = verifier_rates(args.n)
    result = {"n": args.n, "verifier": rates, "reconstruction strict": reconstruction_rate(pipe, args.n)}
    print(json.dumps(result | {"gold": gold_rates(pipe, args.n)}, indent=1))


if __name__ == "__main__":
    main()
