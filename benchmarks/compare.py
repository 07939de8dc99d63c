"""pocketmoe beside llama.cpp, transformers and accelerate, on the same weights, the same tokens and this machine.

    python -m benchmarks.compare                    the whole comparison (an hour or so)
    python -m benchmarks.compare --quick --json     a small one, under 10 minutes once llama.cpp is built (8 more, once)

Three parts (`--only` picks some):

in-ram    Everything in RAM: decode and a prompt of 512 tokens. llama.cpp loads its Q4_0 file with repacking (its
          default and its fastest), pocketmoe has a slot for every expert.
limited   Decode in a memory cgroup of 60, 40 and 25 % of the model (the GGUF file's size; no swap), for uniform and for
          realistic routing. llama.cpp uses mmap without repacking, since with repacking or direct I/O the whole model
          has to be in memory and the kernel kills it; once with the disk's read-ahead at 128 KB, as desktops have it,
          and once at the machine's own setting where that differs. pocketmoe is given `ram=` the size of the cgroup.
          The GGUF file leaves the page cache before each run, so that its pages are charged to the cgroup. Needs root;
          is skipped with a reason otherwise.
stock     transformers in bfloat16 all in memory, and with accelerate's disk offload of the decoder layers: with the
          whole machine's page cache, and in a cgroup of 40 % of its checkpoint. pocketmoe for the same number of
          layers: all in RAM, and with slots for 40 % of the experts (direct reads, so without the page cache).

Every measurement is a fresh process with `--threads` threads; the engines take turns within a round, because the
machine's speed moves between rounds; ratios are taken within a round. Tables and ratios show the median and the lowest
and highest round. All engines are fed the same token ids one at a time (no sampling, no loop that settles on a few
experts), from `synthetic_weights.token_stream`; llama.cpp through `llama_driver.cpp`, because llama-bench draws its
own. In-RAM prompts: one of 512 tokens to warm up, then one that counts. Decode: after an empty start, `warm` tokens
that do not count. tokens/s of a run is tokens by total time. The last column compares the most likely next token of
each engine with pocketmoe's: all compute the same model (differences come from rounding activations to INT8 and from
pocketmoe's INT8 trunk).

The machine's limits, measured in the same round: a streaming read of memory by as many threads, and random record-sized
direct reads of the very store file by four threads.
"""

from __future__ import annotations

import argparse
import datetime
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from pocketmoe.offload.disk_speed import direct_read_rate
from pocketmoe.offload.manifest import Manifest

from . import machine
from .comparison_report import ACCELERATE, ACCELERATE_LIMITED, LIMITED_SLOTS, ratios, table
from .llama_cpp import CMAKE_FLAGS, PACKAGE, BuildError, cache_folder, driver_path
from .shapes import SHAPES, VOCABULARY
from .synthesize import synthesize
from .synthetic_weights import STREAMS, token_stream

PARTS = ("in-ram", "limited", "stock")
DESKTOP_READ_AHEAD = 128
SHARE = 0.4  # of the experts, in the comparison with accelerate
PROMPT = 512


class Comparison:
    """Runs the engines and collects one dict per run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.runs: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.folder: Path = options.folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.driver: Path | None = None
        try:
            self.driver = driver_path()
        except BuildError as error:
            self.notes.append(f"llama.cpp left out: {error}")

    def ids(self, kind: str, round_: int) -> Path:
        """A file of token ids; every engine of a round gets the same ones."""
        path = self.folder / f"ids-{kind}-{round_}.i32"
        np.array(token_stream(kind, 4 * PROMPT, VOCABULARY, seed=round_), dtype=np.int32).tofile(path)
        return path

    def run(self, what: dict[str, Any], command: list[str], cgroup: machine.Cgroup | None = None) -> dict[str, Any]:
        """One fresh process; its result, or why there is none, is entered under `what`."""
        if cgroup is not None:
            command = cgroup.enter(command)
        if self.options.quiet_session:
            command = machine.in_quiet_session(command)
        print(
            "  " + ", ".join(str(what[k]) for k in ("engine", "share", "routing") if k in what) + " ...",
            end="",
            file=sys.stderr,
            flush=True,
        )
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=self.options.timeout)
            code, out, error = done.returncode, done.stdout, done.stderr
        except subprocess.TimeoutExpired:
            code, out, error = 1, "", f"not done after {self.options.timeout} s"
        if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
            result = {"error": "killed for memory"}
        elif code or not out.strip():
            result = {"error": (error.strip().splitlines() or [f"exit status {code}"])[-1][:200]}
        else:
            result = json.loads(out.strip().splitlines()[-1])
        entry = {**what, **result}
        if seconds := sum(entry.get("decode_s", [])):
            entry["decode_tps"] = len(entry["decode_s"]) / seconds
        if entry.get("prefill_s"):
            entry["prefill_tps"] = PROMPT / float(np.median(entry["prefill_s"]))
        self.runs.append(entry)
        print(f" {entry.get('error') or format(entry.get('decode_tps', 0), '.2f')}", file=sys.stderr)
        return entry

    def llama(
        self, what: dict[str, Any], gguf: Path, mode: str, repack: bool, kind: str, counts: tuple[int, int, int], **more
    ) -> None:
        if self.driver is None:
            return
        prefill, warm, decode = counts
        numbers = [int(repack), self.options.threads, 1024, prefill, 1, warm, decode]
        ids = self.ids(kind, what["round"])
        self.run({**what, "counts": counts}, [str(self.driver), str(gguf), str(ids), mode, *map(str, numbers)], **more)

    def ours(
        self,
        what: dict[str, Any],
        engine: str,
        model: Path,
        kind: str,
        counts: tuple[int, int, int],
        extra: tuple[str, ...] = (),
        **more,
    ) -> None:
        prefill, warm, decode = counts
        command = [sys.executable, "-m", "benchmarks.worker", engine, str(model), str(self.ids(kind, what["round"]))]
        command += ["--threads", str(self.options.threads), "--prefill", str(prefill), "--warm", str(warm)]
        self.run({**what, "counts": counts}, [*command, "--decode", str(decode), *extra], **more)

    def limits(self, round_: int, store: Path) -> None:
        """The machine's limits in this round."""
        command = [sys.executable, "-m", "benchmarks.worker", "stream", "--threads", str(self.options.threads)]
        self.run({"part": "limits", "engine": "stream", "round": round_}, command)
        self.disk_limit(round_, store, "limits")

    def disk_limit(self, round_: int, store: Path, part: str, **what: Any) -> None:
        manifest = Manifest.read(store)
        file = store / manifest.expert_files[0].name
        rate = direct_read_rate(file, manifest.record_bytes, seed=round_)
        entry = {"part": part, "engine": "disk", "round": round_, "disk_bytes_per_s": rate, **what}
        self.runs.append(entry)

    # The parts, one round each

    def in_ram(self, round_: int, paths: dict[str, Path]) -> None:
        counts = (PROMPT, 8, self.options.tokens)
        what = {"part": "in-ram", "routing": "uniform", "round": round_}
        self.llama({**what, "engine": "llama.cpp"}, paths["gguf"], "none", True, "uniform", counts)
        self.ours({**what, "engine": "pocketmoe"}, "pocketmoe", paths["store"], "uniform", counts)
        if not self.options.quick:
            self.llama({**what, "engine": "llama.cpp no repack"}, paths["gguf"], "none", False, "uniform", counts)
        self.limits(round_, paths["store"])

    def limited(self, round_: int, paths: dict[str, Path]) -> None:
        setting = machine.read_ahead_file(paths["gguf"])
        own = int(setting.read_text()) if setting else DESKTOP_READ_AHEAD
        settings = [DESKTOP_READ_AHEAD] + ([own] if own != DESKTOP_READ_AHEAD else [])
        size = paths["gguf"].stat().st_size
        for share in self.options.shares:
            limit = int(size * share / 100)
            for kind in self.options.routing:
                what = {"part": "limited", "share": share, "routing": kind, "round": round_, "limit": limit}
                for kb in settings:
                    slow = kb > 1024  # reads megabytes for every page fault: a few tokens tell enough
                    if slow and self.options.quick and (round_ or kind != "uniform"):
                        continue
                    counts = (0, 6, 8) if slow else (0, self.options.warm, self.options.limited_tokens)
                    machine.drop_from_page_cache(paths["gguf"])
                    name = f"llama.cpp mmap, read-ahead {kb} KB"
                    with machine.read_ahead(paths["gguf"], kb), machine.Cgroup("pocketmoe-bench", limit) as group:
                        self.llama({**what, "engine": name}, paths["gguf"], "mmap", False, kind, counts, cgroup=group)
                self.disk_limit(round_, paths["store"], "limited", share=share, routing=kind)
                machine.drop_from_page_cache(paths["store"])
                counts = (0, self.options.warm, self.options.limited_tokens)
                with machine.Cgroup("pocketmoe-bench", limit) as group:
                    extra = ("--ram", str(limit))
                    self.ours(
                        {**what, "engine": "pocketmoe"}, "pocketmoe", paths["store"], kind, counts, extra, cgroup=group
                    )

    def stock(self, round_: int, paths: dict[str, Path]) -> None:
        layers = self.options.stock_layers
        what = {"part": "stock", "layers": layers, "routing": "uniform", "round": round_}
        tokens = max(8, self.options.tokens // 4)
        experts = Manifest.read(paths["store"]).num_experts
        offload = ("--offload-folder", str(self.folder))
        self.ours({**what, "engine": "transformers"}, "transformers", paths["hf"], "uniform", (PROMPT, 4, tokens))
        self.ours(
            {**what, "engine": "pocketmoe"}, "pocketmoe", paths["store"], "uniform", (PROMPT, 8, self.options.tokens)
        )
        self.ours({**what, "engine": ACCELERATE}, "accelerate", paths["hf"], "uniform", (0, 3, 8), offload)
        if not machine.why_no_cgroup():
            limit = int(SHARE * sum(file.stat().st_size for file in paths["hf"].iterdir()))
            machine.drop_from_page_cache(paths["hf"])  # what is cached already would not be charged to the cgroup
            with machine.Cgroup("pocketmoe-bench", limit) as group:
                what_limited = {**what, "engine": ACCELERATE_LIMITED, "limit": limit}
                self.ours(what_limited, "accelerate", paths["hf"], "uniform", (0, 1, 3), offload, cgroup=group)
        slots = ("--slots", str(round(SHARE * experts)))
        counts = (0, self.options.warm, self.options.limited_tokens)
        self.ours({**what, "engine": LIMITED_SLOTS}, "pocketmoe", paths["store"], "uniform", counts, slots)

    def measure(self) -> None:
        """Write what is missing, then the rounds."""
        options, shape = self.options, self.options.shape
        reason = machine.why_no_cgroup()
        parts = list(options.only)
        if "limited" in parts and reason:
            parts.remove("limited")
            self.notes.append(f"memory-limited runs left out: {reason}")
        paths: dict[str, Path] = {}
        if {"in-ram", "limited"} & set(parts):
            with_gguf = ("gguf",) if self.driver is not None else ()
            paths = synthesize(self.folder / f"{shape}-{options.layers}", shape, options.layers, ("store", *with_gguf))
        if "limited" in parts and "gguf" not in paths:
            parts.remove("limited")
            self.notes.append("memory-limited runs left out: nothing to compare with")
        stock_paths: dict[str, Path] = {}
        if "stock" in parts:
            layers = options.stock_layers
            stock_paths = synthesize(self.folder / f"{shape}-{layers}", shape, layers, ("store", "hf"))
        runners = {"in-ram": (self.in_ram, paths), "limited": (self.limited, paths), "stock": (self.stock, stock_paths)}
        for round_ in range(options.rounds):
            for part in parts:
                print(f"round {round_ + 1} of {options.rounds}, {part}", file=sys.stderr)
                run, where = runners[part]
                run(round_, where)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 layers, 2 rounds, 40 %% only, few tokens")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON: the ratios under stable names")
    parser.add_argument("--save", type=Path, help="write all single runs to this JSON file")
    parser.add_argument("--shape", choices=[n for n, s in SHAPES.items() if s.gguf_arch], default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, help="default 24; --quick 8")
    parser.add_argument("--stock-layers", type=int, help="layers of the bfloat16 checkpoint; default 4; --quick 2")
    parser.add_argument("--rounds", type=int, help="default 5; --quick 2")
    parser.add_argument("--shares", type=int, nargs="+", help="cgroup limits in %% of the model; default 60 40 25")
    parser.add_argument("--routing", choices=STREAMS, nargs="+", default=list(STREAMS))
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, help="decoded in RAM; default 64; --quick 32")
    parser.add_argument("--limited-tokens", type=int, help="decoded in a cgroup; default 48; --quick 24")
    parser.add_argument("--warm", type=int, help="tokens that fill the caches in a cgroup; default 32; --quick 20")
    parser.add_argument("--timeout", type=int, default=600, help="seconds for one process")
    parser.add_argument("--folder", type=Path, default=cache_folder() / "models", help="where checkpoints are kept")
    parser.add_argument("--quiet-session", action="store_true", help="give the runs the highest CPU share (root)")
    options = parser.parse_args()
    defaults = {
        "layers": (24, 8),
        "stock_layers": (4, 2),
        "rounds": (5, 2),
        "shares": ([60, 40, 25], [40]),
        "tokens": (64, 32),
        "limited_tokens": (48, 24),
        "warm": (32, 20),
    }
    for name, (full, quick) in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else full)
    about, contended = machine.describe(), machine.contention()
    comparison = Comparison(options)
    if contended:
        comparison.notes.append(contended)
    try:
        comparison.measure()
    except KeyboardInterrupt:
        comparison.notes.append("interrupted: what was measured until then")
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    date = datetime.date.today().isoformat()
    print(f"{date}, {about}")
    print(f"{options.shape}: {options.layers} layers, {options.threads} threads, {options.rounds} rounds")
    print(f"llama.cpp: {PACKAGE}, {' '.join(CMAKE_FLAGS[:1])}, instruction sets of this processor without AMX")
    print("\n".join([*table(comparison.runs), *comparison.notes]))
    kernels = {run["kernels"] for run in comparison.runs if "kernels" in run}
    print(f"pocketmoe's kernels: {', '.join(sorted(kernels)) or 'none ran'}")
    found = ratios(comparison.runs)
    for name, r in found.items():
        low, high = r["spread"]
        middle = f"{r['ratio']:8.3f}  ({low:.3f}..{high:.3f}, n={r['n']})"
        print(f"{name:46} {middle}  {r['numerator']:.4g} / {r['denominator']:.4g}")
    if options.save:
        options.save.write_text(json.dumps({"date": date, "settings": settings, "runs": comparison.runs}, indent=1))
    if options.json:
        summary = {"version": 1, "date": date, "machine": about, "settings": settings}
        summary |= {"contended": bool(contended), "notes": comparison.notes}
        print(json.dumps({**summary, "ratios": found}))


if __name__ == "__main__":
    main()
