"""The demo model: SmolLM2-135M-Instruct turned into a Mixture-of-Experts model by sparse upcycling.

No MoE weights can be had from a package registry, so the demo makes a real MoE out of a small dense model that can. In
every layer the router's rows are the centroids of the feed-forward inputs, found by spherical k-means on calibration
text, and each of 8 experts keeps the neurons of the dense feed-forward block that matter in its cluster. Which they are
is the recipe, `data/demo_recipe.safetensors`, made by benchmarks/make_demo_recipe.py. Neurons are left out in the
source's own groups of 32, so an expert's INT4 values are exactly the source's and no quality is lost in conversion.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import platformdirs
import torch

from ..quant.codecs import ExpertShape
from .convert import convert, is_free
from .demo_download import GGUF_SHA256, ready_gguf
from .demo_store import CODEC, RECIPE, default_place, is_built, recipe_version
from .errors import DataError, UsageError
from .gguf_llama import GgufLlama
from .gguf_tokenizer import write_json
from .source import MoeLayer, OnNotice, OnProgress, TrunkSize

GROUP = 32
"""Neurons of one quantisation group of the source's down projection."""
TOP_K = 2
GENERATION = {
    "do_sample": True,
    "temperature": 0.2,
    "top_p": 0.9,
    "repetition_penalty": 1.1,
    "max_new_tokens": 512,
}
"""Temperature and top-p as SmolLM2's authors recommend (model card of SmolLM2-135M-Instruct). A model of this size
falls into loops, so repetition is penalised and an answer has an end."""


class Recipe(NamedTuple):
    """What turns the dense model into the MoE."""

    version: int
    router: torch.Tensor
    """[layers, experts, hidden] float32, the routers' rows."""
    dropped: torch.Tensor
    """[layers, experts, n] int64, the groups of 32 neurons that each expert leaves out; ascending."""

    def neurons(self, layer: int, expert: int, intermediate: int) -> torch.Tensor:
        """[intermediate - 32 n] int64: the neurons that an expert keeps, ascending."""
        groups = torch.arange(intermediate).reshape(-1, GROUP)
        keep = torch.ones(len(groups), dtype=torch.bool)
        keep[self.dropped[layer, expert]] = False
        return groups[keep].reshape(-1)


def load_recipe() -> Recipe:
    """The recipe that ships with the package."""
    from safetensors.torch import load

    tensors = load(RECIPE.read_bytes())
    return Recipe(recipe_version(), tensors["router"].float(), tensors["dropped_groups"].long())


class UpcycledSource:
    """The demo model as a checkpoint to convert: a `mixtral` model made from a dense GGUF file and a recipe.

    Implements `source.Source`.
    """

    dtype = torch.float32

    def __init__(self, dense: GgufLlama, recipe: Recipe) -> None:
        layers, self._experts, hidden = recipe.router.shape
        if (layers, hidden) != (dense.layers, dense.hidden):
            raise DataError(
                f"{dense.path} has {dense.layers} layers of width {dense.hidden}, "
                f"but the demo's recipe is for {layers} of {hidden}"
            )
        self._dense, self._recipe = dense, recipe
        self._intermediate = dense.intermediate - GROUP * recipe.dropped.shape[-1]
        self._block: tuple[int, dict[str, torch.Tensor]] = (-1, {})
        self.name = f"SmolLM2-135M-Instruct upcycled to {self._experts} experts per layer (demo v{recipe.version})"
        self.config: dict[str, Any] = {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "dtype": "float32",
            **dense.config(),
            "intermediate_size": self._intermediate,
            "num_local_experts": self._experts,
            "num_experts_per_tok": TOP_K,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
            "router_jitter_noise": 0.0,
            "sliding_window": None,
        }

    def fingerprint(self) -> list[Any]:
        """What the store is made from, besides the name."""
        return [GGUF_SHA256, self._recipe.version]

    def layers(self) -> list[MoeLayer]:
        shape = ExpertShape(self._dense.hidden, self._intermediate)
        return [
            MoeLayer(f"model.layers.{layer}.mlp.experts", self._experts, TOP_K, shape)
            for layer in range(self._dense.layers)
        ]

    def expert(self, layer: int, index: int) -> dict[str, torch.Tensor]:
        block = self._dense_block(layer)
        keep = self._recipe.neurons(layer, index, self._dense.intermediate)
        return {
            "gate_proj": block["gate_proj"][keep],
            "up_proj": block["up_proj"][keep],
            "down_proj": block["down_proj"][:, keep],
        }

    def _dense_block(self, layer: int) -> dict[str, torch.Tensor]:
        """The dense feed-forward block of one layer; kept until another layer is asked for."""
        if self._block[0] != layer:
            names = ("gate_proj", "up_proj", "down_proj")
            block = {name: self._dense.tensor(f"model.layers.{layer}.mlp.{name}.weight") for name in names}
            self._block = layer, block
        return self._block[1]

    def trunk(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in self._dense.names():
            if ".mlp." not in name:
                yield name, self._dense.tensor(name)
        for layer in range(self._dense.layers):
            yield f"model.layers.{layer}.mlp.gate.weight", self._recipe.router[layer].clone()

    def trunk_sizes(self) -> list[TrunkSize]:
        weights = self.config["vocab_size"] * self._dense.hidden  # the embedding is the largest
        return [TrunkSize(weights, weights * self.dtype.itemsize)]

    def packable(self) -> set[str]:
        names = self._dense.names()
        return {n for n in names if ".mlp." not in n and n.endswith(("_proj.weight", "embed_tokens.weight"))}

    def copy_files(self, dest: Path) -> None:
        self._dense.write_tokenizer(dest)
        ids = {key: self.config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        # The end of a turn, and the end of a text, which a base model's habits still bring up at times.
        ids["eos_token_id"] = [ids["eos_token_id"], self._dense.token_id("<|endoftext|>")]
        write_json(dest / "generation_config.json", ids | GENERATION)


def build_demo(
    dest: Path | str | None = None,
    on_progress: OnProgress | None = None,
    on_notice: OnNotice | None = None,
    wheel: Path | str | None = None,
    ram: int | None = None,
) -> Path:
    """The store of the demo model, built if it is not there yet, in this process.

    Args:
        dest: directory of the store; by default in the user's cache directory, under a name with the recipe's version.
        wheel: the downloaded wheel, or the GGUF file out of it; by default the one in the cache's `downloads`
            directory, which is downloaded with the environment's own pip (or uv) if it is not there.
        ram: bytes of memory that this process may take.

    Raises:
        DataError: the wheel cannot be had or is damaged; the message says how to place it by hand.
        UsageError: `dest` is something else, or another process is building the demo.
        MemoryBudgetError: `ram` is too little for it.
    """
    notice = on_notice or (lambda _: None)
    recipe = load_recipe()
    dest = Path(dest) if dest is not None else default_place(recipe.version)
    if is_built(dest, recipe.version):
        return dest
    if not is_free(dest):  # before anything is downloaded for it
        raise UsageError(f"{dest} exists already and is not this demo model; choose another place or remove it")
    downloads, given = platformdirs.user_cache_path("pocketmoe") / "downloads", Path(wheel) if wheel else None
    with _only_builder(downloads), ready_gguf(given, downloads, on_progress, notice) as gguf:
        source = UpcycledSource(GgufLlama(gguf), recipe)
        return convert(source, dest, CODEC, on_progress, on_notice, ram=ram)


@contextmanager
def _only_builder(downloads: Path) -> Iterator[None]:
    """Make the downloads directory and keep other processes out of it."""
    lock = filelock.FileLock(downloads / ".lock")
    try:
        downloads.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UsageError(f"another process is building the demo model in {downloads}; wait for it to end") from None
    except OSError as error:
        raise DataError(f"cannot write to {downloads}: {error.strerror or error}") from None
    try:
        yield
    finally:
        lock.release()
