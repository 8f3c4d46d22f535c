"""What the loop costs: seconds with a no-op refiner over seconds of the stock pipeline, alternating in one process.

python tests/bench/overhead.py [--runs 30] [--batch 1] [--steps 20]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from promptloop_pipeline import FunctionRefiner, NoOpRefiner, attach, tiny

PROMPT = "large red circle top left , small blue square bottom right , black background"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=30, help="of each kind, after one that does not count")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pipe = tiny.load_pipeline("sd")
    loop = attach(pipe, refiner=NoOpRefiner(), refine_at="20%, 50%, 80%")
    looking = FunctionRefiner(lambda view: None)
    kinds = {
        "stock": lambda **k: pipe(**k),
        "stock again": lambda **k: pipe(**k),  # what the measurement itself is worth
        "no-op refiner, three turns": lambda **k: loop(**k),
        "looking no-op, one turn": lambda **k: loop(refiner=looking, refine_at="50%", **k),  # each look decodes a preview
        "looking no-op, three turns": lambda **k: loop(refiner=looking, **k),
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for run in range(args.runs + 1):
        names = list(kinds)
        for name in names if run % 2 else names[::-1]:
            generator = torch.Generator().manual_seed(run)
            clock = time.perf_counter()
            kinds[name](prompt=[PROMPT] * args.batch, generator=generator, num_inference_steps=args.steps, guidance_scale=3.0)
            seconds[name].append(time.perf_counter() - clock)
    medians = {name: statistics.median(s[1:]) for name, s in seconds.items()}
    ratios = {name: statistics.median(a / b for a, b in zip(s[1:], seconds["stock"][1:])) for name, s in seconds.items()}
    print(json.dumps({"runs": args.runs, "batch": args.batch, "steps": args.steps, "threads": args.threads,
                      "median_seconds": medians, "median_ratio_to_stock": ratios}, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
