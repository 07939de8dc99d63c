"""Keys and values of one sequence, in buffers that are allocated once and filled in place.

They are cache layers of transformers, so that its own modules and our decode step (`lean.py`) fill the same buffers.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from .hf_families import OWN_CACHE

_LARGEST_HALF = 65504.0


class Room(NamedTuple):
    """Where the next token goes: it attends to buffer positions `first`..`position`, the last being its own."""

    keys: int
    """Address of [kv_heads, capacity, head_dim]."""
    values: int
    half: bool
    """Keys and values are float16, else float32."""
    capacity: int
    first: int
    position: int


class _Buffers:
    """What both kinds of layer share: two tensors [1, kv_heads, capacity, head_dim] and how far they are filled."""

    capacity: int
    stored: torch.dtype | None
    """What keys and values are kept in; None = as they come."""
    end = 0
    buffers: tuple[torch.Tensor, ...] = ()
    _addresses: tuple[int, ...] = ()

    def allocate(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.end = 0
        # Untouched pages of an empty tensor are not resident: memory is used as the context fills.
        self.buffers = tuple(
            states.new_empty((*states.shape[:2], self.capacity, states.shape[3]), dtype=self.stored)
            for states in (key_states, value_states)
        )
        self._addresses = tuple(0 if buffer.is_meta else buffer.data_ptr() for buffer in self.buffers)

    def write(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        start, self.end = self.end, self.end + key_states.shape[2]
        assert self.end <= self.capacity, (self.end, self.capacity)
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            if self.stored == torch.float16:
                states = states.clamp(-_LARGEST_HALF, _LARGEST_HALF)
            buffer[:, :, start : self.end] = states

    def between(self, first: int, end: int, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of keys and values, or copies in another dtype."""
        keys, values = (buffer.narrow(2, first, end - first).to(dtype or buffer.dtype) for buffer in self.buffers)
        return keys, values

    def room(self, first: int) -> Room:
        keys, values = self._addresses
        return Room(keys, values, self.stored == torch.float16, self.capacity, first, self.end - 1)

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)


class FullLayer(_Buffers, DynamicLayer):
    """All tokens of a context. The library's own layer concatenates, which copies the cache for every token."""

    def __init__(self, capacity: int, stored: torch.dtype | None = None) -> None:
        super().__init__()
        self.capacity, self.stored = capacity, stored

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.allocate(key_states, value_states)
        self.keys, self.values = self.between(0, 0)
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.write(key_states, value_states)
        self.keys, self.values = self.between(0, self.end)
        return self.between(0, self.end, key_states.dtype)

    def extend(self) -> Room:
        """Room for one more token, which counts as cached from now on. `keys` and `values` follow at the next update:
        two views for each layer and token take longer than anything else here."""
        self.end += 1
        return self.room(0)

    def get_seq_length(self) -> int:
        return self.end

    def crop(self, tokens_to_remove: int) -> None:
        if not self.is_initialized:  # nothing has come yet
            return
        self.keys, self.values = self.between(0, self.end)
        super().crop(tokens_to_remove)
        self.end = self.keys.shape[2]


class WindowLayer(_Buffers, DynamicSlidingWindowLayer):
    """The last tokens of a context, for layers that look back no further. When the buffer is full, those that are still
    in sight move to its front, so that keys stay contiguous and the cost of moving is spread over many tokens."""

    def __init__(self, sliding_window: int, context: int, chunk: int, stored: torch.dtype | None = None) -> None:
        super().__init__(sliding_window)
        self.stored = stored
        self.capacity = min(context, sliding_window - 1 + max(chunk, sliding_window))

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.allocate(key_states, value_states)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        kept = self._make_room(key_states.shape[2])
        self.write(key_states, value_states)
        self.cumulative_length += key_states.shape[2]
        self.keys, self.values = self._in_sight()
        return self.between(self.end - key_states.shape[2] - kept, self.end, key_states.dtype)

    def _in_sight(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.between(max(0, self.end - self.sliding_window + 1), self.end)

    def crop(self, tokens_to_remove: int) -> None:
        raise RuntimeError("a window that moves on cannot take tokens back; see can_crop")

    def extend(self) -> Room:
        """Room for one more token, which counts as cached from now on."""
        kept = self._make_room(1)
        self.end += 1
        self.cumulative_length += 1
        return self.room(self.end - 1 - kept)

    def _make_room(self, tokens: int) -> int:
        """Returns how many tokens are in sight of the next one."""
        kept = min(self.cumulative_length, self.sliding_window - 1)
        if self.end + tokens > self.capacity:
            for buffer in self.buffers:
                buffer[:, :, :kept] = buffer[:, :, self.end - kept : self.end].clone()
            self.end = kept
        return kept


def new_kv_cache(config: Any, context: int, chunk: int, stored: torch.dtype | None = None) -> DynamicCache:
    """A KV cache for one sequence of at most `context` tokens, fed at most `chunk` at a time, kept in dtype `stored`.
    Layers of a kind that is unknown here (recurrent states and the like) stay the library's own."""
    model_type = config.get_text_config().model_type
    if model_type in OWN_CACHE:
        module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
        return getattr(module, OWN_CACHE[model_type])()

    def preallocated(layer: Any) -> Any:
        if type(layer) is DynamicLayer:
            return FullLayer(context, stored)
        if type(layer) is DynamicSlidingWindowLayer:
            return WindowLayer(layer.sliding_window, context, chunk, stored)
        return layer

    cache = DynamicCache(config=config)
    cache.layers = [preallocated(layer) for layer in cache.layers]
    return cache


def announce_prompt(cache: DynamicCache, tokens: int) -> None:
    """Say how many tokens the prompt of an empty cache has, to layers that never drop it (unlimited_ocr)."""
    for layer in cache.layers:
        if hasattr(layer, "set_prefill_length"):
            layer.set_prefill_length(tokens)  # type: ignore[attr-defined]


def can_crop(cache: DynamicCache) -> bool:
    """Whether the last tokens can be taken back (not with recurrent states or a window that has moved on)."""
    return type(cache) is DynamicCache and all(type(layer) in (FullLayer, DynamicLayer) for layer in cache.layers)


def take_back(cache: DynamicCache, length: int) -> bool:
    """Undo a forward that was cut short: every layer keeps its first `length` tokens. False where one cannot."""
    if not can_crop(cache):
        return False
    for layer in cache.layers:
        layer.crop(min(0, length - layer.get_seq_length()))  # type: ignore[union-attr]
    return True


def allocates_ahead(cache: DynamicCache) -> bool:
    """Whether every layer takes all its memory with the first token."""
    return all(isinstance(layer, _Buffers) for layer in cache.layers)


def capacities(cache: DynamicCache) -> list[int]:
    """Tokens that each layer has room for, where `allocates_ahead`."""
    return [layer.capacity for layer in cache.layers]  # type: ignore[attr-defined]


def token_bytes(cache: DynamicCache) -> list[int]:
    """What one token takes in each layer, once a token has been there; layers that keep none of their own take 0."""
    return [layer.nbytes // layer.capacity for layer in cache.layers]  # type: ignore[attr-defined]


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of keys, values and states, as far as they are allocated."""
    tensors = {id(tensor): tensor for tensor in _tensors(vars(cache))}
    for layer in cache.layers:
        own = layer.buffers if isinstance(layer, _Buffers) else _tensors(vars(layer))
        tensors |= {id(tensor): tensor for tensor in own}
    return sum(tensor.nbytes for tensor in tensors.values())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)
