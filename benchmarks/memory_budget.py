"""Does `--ram` hold? Peak resident memory of whole processes at several budgets, and inside a cgroup of that size.

    python -m benchmarks.memory_budget MODEL [--ram 1GB 2GB 4GB] [--json]

MODEL is a store or a checkpoint. Each budget gets a fresh process that loads the model, reads a prompt (so that a
prefill's workspace is touched) and generates; its peak is the kernel's own count (VmHWM). The same process then runs
again inside a memory cgroup of exactly the budget without swap (Linux, root; skipped with a reason otherwise), where
going over means being killed. Mapped library files count in VmHWM but may be charged to another cgroup: the first run
is the stricter test of the plan, the second of what the plan does not see (page cache, kernel memory).

Exit status 1 when a peak exceeds its budget or a limited process is killed. Budgets that the model refuses (with a
sentence that says what would fit) are shown and do not count as failures.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from pocketmoe.cache.units import format_bytes, parse_bytes

from . import machine

PROGRAM = """
import json, sys
from pocketmoe.offload import load
from pocketmoe.offload.errors import PocketMoEError
path, ram, prompt, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
try:
    with load(path, ram=ram) as model:
        sequence = model.new_sequence()
        vocabulary = model.transformers_model.config.get_text_config().vocab_size
        sequence.feed([(7919 * i) % (vocabulary - 1) for i in range(min(prompt, model.context - tokens - 1))])
        for i in range(tokens):
            sequence.feed([(104729 * i) % (vocabulary - 1)])
        print(json.dumps({"plan": str(model.plan), **model.stats().to_dict()}))
except PocketMoEError as error:
    print(json.dumps({"refused": str(error)}))
"""


def run(path: Path, ram: int, options: argparse.Namespace, cgroup: machine.Cgroup | None = None) -> dict[str, Any]:
    """One fresh process at one budget: its statistics, `refused`, or `error`."""
    command = [sys.executable, "-c", PROGRAM, str(path), str(ram), str(options.prompt), str(options.tokens)]
    if cgroup is not None:
        machine.drop_from_page_cache(path)
        command = cgroup.enter(command)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return {"error": "killed for memory"}
    if done.returncode or not done.stdout.strip():
        return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--ram", nargs="+", default=["1GB", "1.5GB", "2GB", "4GB"])
    parser.add_argument("--prompt", type=int, default=600, help="tokens")
    parser.add_argument("--tokens", type=int, default=24, help="decoded after the prompt")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    no_cgroup = machine.why_no_cgroup()
    failed, results = False, []
    for text in options.ram:
        ram = parse_bytes(text)
        free = run(options.model, ram, options)
        result: dict[str, Any] = {"ram": ram, "alone": free}
        results.append(result)
        print(f"--ram {text}:", end=" ")
        if "refused" in free:
            print(f"refused: {free['refused']}")
            continue
        if "error" in free:
            print(f"failed: {free['error']}")
            failed = True
            continue
        ratio = result["ratio"] = free["peak_rss_bytes"] / ram
        failed |= ratio > 1
        peak = format_bytes(free["peak_rss_bytes"])
        verdict = "" if ratio <= 1 else "  OVER THE BUDGET"
        print(f"peak {peak}, {ratio:.3f} of the budget, {free['slots']:,} slots{verdict}\n  {free['plan']}")
        if no_cgroup:
            print(f"  in a cgroup of that size: skipped, {no_cgroup}")
            continue
        with machine.Cgroup("pocketmoe-budget", ram) as group:
            limited = result["limited"] = run(options.model, ram, options, group)
        problem = limited.get("error") or limited.get("refused")
        failed |= problem is not None
        peak = problem or f"peak {format_bytes(limited['peak_rss_bytes'])}, {limited['slots']:,} slots"
        print(f"  in a cgroup of that size: {peak}")
    if options.json:
        ratios = [r["ratio"] for r in results if "ratio" in r]
        print(json.dumps({"peak_rss_vs_ram": max(ratios, default=None), "results": results}))
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
