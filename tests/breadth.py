"""Every Mixture-of-Experts type of the installed transformers against stock, one after the other: `make breadth`.

Prints a line for each type and `N passed, N failed`; `--table FILE` writes docs/families.md. The exit status is 1 when
a type fails that `REFUSED` does not name. The same checks run in `test_breadth.py`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import tiny_families
import torch
import transformers
from pocketmoe.offload.checkpoint import CheckpointSource
from pocketmoe.offload.convert import convert
from pocketmoe.offload.loading import load
from pocketmoe.offload.model import Model
from pocketmoe.offload.store import ExpertStore
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

REFUSED = {
    "diffusion_gemma": "does not generate text token by token",
    "doge": "keeps its experts in DogeCDMoE, a form that is not supported",
}
"""Types that do not run, and a part of the sentence that says so."""
WHY = {
    "diffusion_gemma": "Upstream it fills a block of text at once; its class is no `GenerationMixin`.",
    "doge": "Upstream, routing mixes the tokens of a prompt, as a comment in `modeling_doge.py` says, so a prompt in "
    "pieces would be answered differently; and an expert is one row of two matrices, too small to be read by itself.",
}
"""What lies behind it."""
WANTS = {"inkling_mm_model": "scipy"}
"""Types that upstream builds only where another package is installed (the extra `breadth`)."""
OTHER_RELEASES = {"5.21.0": "71 of 73", "5.22.2": "72 of 74"}
"""What passed with older releases, of the types that they have."""
KNOWN_AS = {
    "deepseek_v3": "DeepSeek-V3, R1, Kimi-K2",
    "ernie4_5_moe": "ERNIE-4.5",
    "glm4_moe": "GLM-4.5, 4.7",
    "gpt_oss": "gpt-oss-20b, 120b",
    "lfm2_moe": "LFM2-8B-A1B",
    "llama4": "Llama-4 Scout, Maverick",
    "minimax_m2": "MiniMax-M2",
    "mixtral": "Mixtral 8x7B, 8x22B",
    "phimoe": "Phi-3.5-MoE",
    "qwen2_moe": "Qwen1.5-MoE, Qwen2-57B-A14B",
    "qwen3_5_moe": "Qwen3.5, 3.6",
    "qwen3_moe": "Qwen3-30B-A3B, 235B-A22B",
    "qwen3_next": "Qwen3-Next-80B-A3B",
}
NEW_TOKENS, PIECE = 10, 9


class Result(NamedTuple):
    """Largest differences from stock's logits."""

    prompt: float
    answer: float


def make_checkpoint(model_type: str, path: Path) -> Any:
    """Write a tiny random checkpoint, and return stock transformers' model of it."""
    config = tiny_families.tiny_config(model_type)
    auto: Any = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32)
    _randomise(model)
    model.save_pretrained(path)
    stock, info = auto.from_pretrained(
        path, dtype=torch.float32, experts_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    return stock.eval()


@torch.no_grad()
def _randomise(model: Any) -> None:
    """Add noise to what starts as zeros, ones or a pattern, so that a weight in a wrong place is noticed."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    kept = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in kept and buffer.dim() == 1 and buffer.is_floating_point():  # corrections of routers
            buffer.add_(torch.rand_like(buffer) * 0.2)
        elif name in kept and buffer.dim() == 2 and not buffer.is_floating_point():  # experts by token id
            buffer.copy_(torch.stack([torch.randperm(8)[: buffer.shape[1]] for _ in buffer]))


def prompt() -> torch.Tensor:
    return torch.randint(3, 120, (1, 23), generator=torch.Generator().manual_seed(3))


def check(model_type: str, directory: Path) -> Result:
    """Convert a checkpoint without loss and compare the whole way to an answer with stock.

    Raises:
        AssertionError: logits, tokens or two settings that must not matter differ.
        PocketMoEError: the type is refused.
    """
    stock = make_checkpoint(model_type, directory / "checkpoint")
    path = convert(CheckpointSource(directory / "checkpoint"), directory / "store", "f32")
    logits, tokens, want = stock_answer(stock)
    common = {"kernels": "torch", "ram": "8GB", "context": 256}
    with load(path, **common) as model:
        with torch.inference_mode():
            got = model.transformers_model(input_ids=prompt(), use_cache=False).logits
        torch.testing.assert_close(got, logits, rtol=1e-5, atol=1e-5)
        answer = own_answer(model, tokens)
        assert answer.argmax(-1).tolist() == tokens, "greedy tokens differ"
        torch.testing.assert_close(answer, want, rtol=1e-5, atol=1e-5)
        model.check_integrity()
    with load(path, prefill_chunk=PIECE, **common) as model:
        in_pieces = own_answer(model, tokens)
        torch.testing.assert_close(in_pieces, want, rtol=1e-5, atol=1e-5, msg="a prompt in pieces differs")
    floor = sum(layer.top_k for layer in ExpertStore(path).manifest.layers)
    for prefetch in (False, True):
        with load(path, slots=floor, prefetch=prefetch, **common) as model:
            assert torch.equal(own_answer(model, tokens), answer), f"cache at its floor, {prefetch=}"
            model.check_integrity()
    return Result(float((got - logits).abs().max()), float((answer - want).abs().max()))


@torch.inference_mode()
def stock_answer(stock: Any) -> tuple[torch.Tensor, list[int], torch.Tensor]:
    """Logits of the prompt, and the tokens of a greedy answer with their logits."""
    logits = stock(input_ids=prompt(), use_cache=False).logits
    answer = stock.generate(
        prompt(),
        attention_mask=torch.ones_like(prompt()),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=-1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return logits, answer.sequences[0, prompt().shape[1] :].tolist(), torch.cat(answer.logits)


def own_answer(model: Model, tokens: list[int]) -> torch.Tensor:
    """Logits of our own token loop, fed with the prompt and then with `tokens`: [NEW_TOKENS, vocabulary]."""
    sequence = model.new_sequence()
    steps = [prompt()[0].tolist(), *([token] for token in tokens[:-1])]
    return torch.stack([sequence.feed(step).clone() for step in steps])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("types", nargs="*", help="model types (all)")
    parser.add_argument("--table", type=Path, help="write the table of families there")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows, passed, unexpected = [], 0, 0
    for model_type in options.types or tiny_families.moe_types():
        begin = time.perf_counter()
        try:
            with tempfile.TemporaryDirectory() as directory:
                result = check(model_type, Path(directory))
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            status, known = f"fails: {reason}", REFUSED.get(model_type, "\0") in reason
            unexpected += not known
        else:
            status = f"passes: prompt within {result.prompt:.0e}, answer within {result.answer:.0e}"
            passed += 1
        rows.append((model_type, status))
        print(f"{model_type:24} {time.perf_counter() - begin:4.1f} s  {status}", flush=True)
    if options.table is not None:
        options.table.write_text(_table(rows), encoding="utf-8")
    print(f"transformers {transformers.__version__}: {passed} passed, {len(rows) - passed} failed")
    return 1 if unexpected else 0


def _table(rows: list[tuple[str, str]]) -> str:
    lines = [f"| `{name}` | {KNOWN_AS.get(name, '')} | {status.partition(':')[0]} |" for name, status in rows]
    failed = [(name, status.partition(": ")[2]) for name, status in rows if status.startswith("fails")]
    reasons = [f"- `{name}`: {reason}. {WHY.get(name, '')}".rstrip() for name, reason in failed]
    passed = sum(status.startswith("passes") for _, status in rows)
    return "\n".join(
        [
            "# Model types",
            "",
            f"`make breadth` with transformers {transformers.__version__}: {passed} of {len(rows)} types that generate "
            "text and have experts pass.",
            "A tiny random checkpoint of each is converted without loss. Logits and a greedy answer must be those of",
            "stock within 1e-5, with the prompt in one piece or several; and bit-identical with the cache at its",
            "floor, with prefetch and without. Of types that also take images or sound, the text part runs.",
            "Older releases: " + ", ".join(f"{count} with {name}" for name, count in OTHER_RELEASES.items()) + ".",
            "",
            "| model type | known as | |",
            "|---|---|---|",
            *lines,
            "",
            "`kimi_k2` is read as `deepseek_v3`. "
            + " ".join(f"`{name}` needs the package `{package}`." for name, package in WANTS.items()),
            "",
            "What fails, and why:",
            "",
            *reasons,
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
