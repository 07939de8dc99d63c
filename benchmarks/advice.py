"""Whether the report's advice is true: a model at several budgets, its speed beside what the runs said of each other.

    python -m benchmarks.advice STORE [--shares 30 40 54 75 100] [--rounds 2] [--ram 6GB] [--prompts 4] [--only-on]
        [--json]

Every run is a process of its own: the prompts once to warm up, and once counted, with and without prefetch in turns.
Each run with prefetch is then asked, from its own statistics alone, what the other budgets would give. Ratios are
predicted over measured tokens per second; prefetch on over off is taken within a round.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

PROMPTS = (
    "Tell me about the sea.",
    "Write a story about a dragon.",
    "Explain how a bicycle works.",
    "What is the capital of France, and why?",
)
TOKENS = 80


def run_once(store: Path, slots: int, prefetch: bool, ram: str, prompts: int, out: Path) -> None:
    """Leaves the statistics of one run in `out`."""
    from pocketmoe.offload import load

    with load(store, slots=slots, prefetch=prefetch, ram=ram, context=1024, warm_start=False) as model:
        for counted in (False, True):
            if counted:
                model.reset_stats()
            for seed, prompt in enumerate(PROMPTS[:prompts]):
                model.generate(prompt, max_tokens=TOKENS, temperature=0.7, seed=seed)
        model.stats(advice=True).save(out)


def in_own_process(store: Path, *arguments: Any) -> None:
    command = [sys.executable, "-m", "benchmarks.advice", str(store), "--one", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--shares", type=int, nargs="+", default=[30, 40, 54, 75, 100], help="slots, %% of the experts")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ram", default="6GB", help="budget of each run, so large that only --shares counts")
    parser.add_argument("--prompts", type=int, default=4, help="of 80 tokens each, to warm up and again to count")
    parser.add_argument("--only-on", action="store_true", help="leave out the runs without prefetch")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        slots, prefetch, ram, prompts, out = args.one
        run_once(args.store, int(slots), prefetch == "True", ram, int(prompts), Path(out))
        return

    from pocketmoe.cache.advice import advise
    from pocketmoe.cache.stats import RunStats
    from pocketmoe.offload.disk_speed import measure_disk
    from pocketmoe.offload.manifest import Manifest

    experts = Manifest.read(args.store).num_experts
    sizes = [experts * share // 100 for share in args.shares]
    speed: dict[tuple[int, bool], list[float]] = {}
    ratios: list[dict[str, Any]] = []
    told: list[tuple[int, dict[int, float], float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for round_ in range(args.rounds):
            for size in sizes:
                for prefetch in (True,) if args.only_on else (True, False) if round_ % 2 == 0 else (False, True):
                    out = Path(folder) / "run.json"
                    in_own_process(args.store, size, prefetch, args.ram, args.prompts, out)
                    run = RunStats.load(out)
                    speed.setdefault((size, prefetch), []).append(run.answer.steps / run.answer.seconds)
                    if prefetch and (advice := advise(run, measure_disk(args.store), sizes)) is not None:
                        said = {setting.slots: setting.tokens_per_second for setting in advice.budgets}
                        told.append((size, said, advice.predicted / advice.measured))
    for size, said, own in told:
        others = [other for other in sizes if other != size]
        ratios += [
            {"from": size, "to": other, "said": said[other], "measured": median(speed[other, True])} for other in others
        ]
        shown = ", ".join(f"{other}: {said[other] / median(speed[other, True]):.2f}" for other in others)
        print(f"asked at {size} slots (own speed, model over measured: {own:.2f}), said over measured {shown}")
    off = {
        size: [on / off for on, off in zip(speed[size, True], speed.get((size, False), []), strict=False)]
        for size in sizes
    }
    for size in sizes:
        shown = ", ".join(f"{ratio:.2f}" for ratio in off[size])
        print(f"{size} slots: {median(speed[size, True]):.1f} tokens/s with prefetch, on over off {shown or '-'}")
    errors = [abs(r["said"] / r["measured"] - 1) for r in ratios]
    within = sum(error <= 0.2 for error in errors)
    print(
        f"{within} of {len(errors)} predictions within 20 %, median error {median(errors):.0%}, worst {max(errors):.0%}"
    )
    if args.json:
        print(json.dumps({"predictions": ratios, "prefetch_on_over_off": off}))


if __name__ == "__main__":
    main()
