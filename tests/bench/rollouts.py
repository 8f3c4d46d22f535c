"""What sharing is worth: trajectories per second of one shared rollout of a group, over the same trajectories made one by one, and over
the same batch without sharing, alternating in one process. The images are compared.

python tests/bench/rollouts.py [--runs 5] [--group 8] [--turns 3] [--steps 20] [--first 30]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np
import torch
from promptloop_training.rollout import Group, Rollout, Sample, _seed

from promptloop_pipeline import attach, tiny
from promptloop_pipeline.rewards.combine import RewardSpec


class Own:
    """The policy, with the seeds that a trajectory of a group has."""

    looks = True

    def __init__(self, policy, seed: int) -> None:
        self.policy, self.seed = policy, seed

    def refine(self, views):
        return self.policy.refine(views, [_seed(self.seed, views[0].step)] * len(views))


def one_by_one(pipe, policy, sample: Sample, steps: list[int], size: int, call: dict) -> list:
    """What users without training code do."""
    noise = _seed(sample.seed, "noise", 0)
    found = []
    for p in range(size):
        refiner, generator = Own(policy, _seed(sample.seed, "policy", p)), torch.Generator().manual_seed(noise)
        found += attach(pipe)(sample.request, refiner=refiner, refine_at=steps, generator=generator, **call).trajectories
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=5, help="of each kind, after one that does not count")
    parser.add_argument("--group", type=int, default=8, help="trajectories")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--first", type=int, default=30, help="the first turn, in percent of the run; the last is at 80")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pipe, policy = tiny.load_pipeline(), tiny.load_refiner(temperature=args.temperature, logprobs=True)
    call = {"num_inference_steps": args.steps, "guidance_scale": 3.0}
    steps = [round(args.steps * s / 100) for s in np.linspace(args.first, 80, args.turns)]
    requests = tiny.requests(args.runs + 1, "train")

    def rolled(share: bool):
        rollout = Rollout(pipe, policy, {"none": lambda images, prompts, **_: [0.0] * len(images)}, [RewardSpec("none")],
                          size=args.group, share_steps=share, **call)  # fmt: skip
        groups: dict[int, Group] = {}

        def make(sample: Sample) -> list:
            groups[0] = rollout([sample], [steps])[0]
            return groups[0].trajectories

        make.rollout = rollout  # type: ignore[attr-defined]
        return make

    kinds = {
        "shared": rolled(True),
        "one batch, unshared": rolled(False),
        "one by one": lambda sample: one_by_one(pipe, policy, sample, steps, args.group, call),
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    gaps, same, computed = [], [], []
    for run in range(args.runs + 1):
        sample, found = Sample(requests[run], run), {}
        for name in list(kinds) if run % 2 else list(kinds)[::-1]:
            clock = time.perf_counter()
            with tiny.quiet():
                found[name] = kinds[name](sample)
            seconds[name].append(time.perf_counter() - clock)
        rows, done = kinds["shared"].rollout.computed["unet"]
        computed.append(done / rows)
        for name in list(kinds)[1:]:
            for a, b in zip(found["shared"], found[name], strict=True):
                same.append([t.token_ids for t in a.turns] == [t.token_ids for t in b.turns] and a.prompt == b.prompt)
                if same[-1]:
                    gaps.append(float(np.abs(np.asarray(a.image, float) - np.asarray(b.image, float)).max()))
    rate = {name: args.group / statistics.median(s[1:]) for name, s in seconds.items()}
    ratio = {name: statistics.median(b / a for a, b in zip(seconds["shared"][1:], s[1:])) for name, s in seconds.items()}
    print(json.dumps({
        "group": args.group, "turns": steps, "steps": args.steps, "runs": args.runs, "threads": args.threads,
        "temperature": args.temperature, "trajectories_per_second": rate, "median_ratio_of_shared_to": ratio,
        "denoiser_rows_computed": statistics.mean(computed[1:]), "same_words": sum(same) / len(same), "largest_gap_of_255": max(gaps),
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
