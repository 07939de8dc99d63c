"""How well the experts of a layer are guessed 1, 2 and 3 MoE layers ahead: its own router on an earlier residual.

    python -m benchmarks.prediction STORE [--tokens 60]

Decodes a few answers with everything in memory. Recall: the share of a layer's chosen experts among as many guesses.
Beside it, the share that the previous token's choice in the same layer names, and what chance would.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .advice import PROMPTS

AHEAD = (1, 2, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--tokens", type=int, default=60, help="per prompt (default 60)")
    parser.add_argument("--ram", default="8GB")
    args = parser.parse_args()

    from pocketmoe.offload import load

    with load(args.store, ram=args.ram, context=1024, prefetch=True, warm_start=False) as model:
        model._lean = None  # the modules run, so that residuals can be seen between layers
        runtime = model._runtime
        predictor = runtime.predictor
        assert predictor is not None
        layers, run_layer = runtime.cache.layers, runtime.run_layer
        experts = model.plan.needs.experts // layers
        guesses: dict[tuple[int, int], set[int]] = {}
        previous: dict[int, set[int]] = {}
        right = {name: [0] * layers for name in (*AHEAD, "previous token")}
        asked = {name: [0] * layers for name in right}

        def watch(
            layer: int, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
        ) -> torch.Tensor:
            if hidden_states.shape[0] == 1:
                chosen = set(top_k_index[0].tolist())
                named = {ahead: guesses.pop((layer, ahead), None) for ahead in AHEAD}
                for name, guess in {**named, "previous token": previous.get(layer)}.items():
                    if guess is not None:
                        right[name][layer] += len(chosen & guess)
                        asked[name][layer] += len(chosen)
                previous[layer] = chosen
                for ahead in AHEAD:
                    if (guess := predictor.predict(layer + ahead)) is not None:
                        guesses[layer + ahead, ahead] = set(guess.reshape(-1).tolist())
            else:
                previous.clear()
            return run_layer(layer, hidden_states, top_k_index, top_k_weights)

        runtime.run_layer = watch
        for seed, prompt in enumerate(PROMPTS):
            model.generate(prompt, max_tokens=args.tokens, temperature=0.7, seed=seed)
    print(f"{layers} layers x {experts} experts, top-{runtime.cache.floor}; chance {runtime.cache.floor / experts:.2f}")
    for name in right:
        rates = [r / a for r, a in zip(right[name], asked[name], strict=True) if a]
        what = f"{name} ahead" if name in AHEAD else name
        print(
            f"{what:15} recall {sum(right[name]) / sum(asked[name]):.3f}, layers {min(rates):.2f} to {max(rates):.2f}"
        )


if __name__ == "__main__":
    main()
