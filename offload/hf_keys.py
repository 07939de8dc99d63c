"""Names in checkpoint files -> parameters of the model, through transformers' own conversion mapping.

The mapping renames keys, and merges, splits or transposes tensors by operations. An expert is loaded by running the
same operations on a batch of one expert, so that every layout which transformers reads (one tensor per expert, all
experts fused in one) works without code per family.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from ..quant.codecs import Weight
from ..quant.int4 import Int4Matrix
from .errors import DataError
from .gptq_awq import PackedLinear
from .hf import MoeSite, Skeleton
from .prequantized import Entry, Int4Entry, Mxfp4Entry, Readable
from .source import LARGE, RowReader, TrunkSize
from .tensorfile import TensorEntry

_FLOATS = ("F64", "F32", "F16", "BF16")


class _Target(NamedTuple):
    """What one parameter is made of: source tensors per pattern of the converter (None: taken as it is)."""

    converter: Any
    sources: dict[str | None, list[Readable]]
    packed: Mxfp4Entry | None = None
    """Instead of sources: a parameter that ships in MXFP4."""

    @property
    def kinds(self) -> int:
        """Kinds of experts under one row of numbers (those for text, then those for images); the first is ours."""
        return 1 if self.converter is None else len(self.converter.target_patterns)

    def of_expert(self, pattern: str | None, index: int) -> list[Readable]:
        """The sources that make one expert, with those of its number of other kinds."""
        found = self.sources[pattern]
        return found[index :: len(found) // self.kinds] if _per_expert(pattern, found) else found[:1]


class KeyMap:
    """Which tensors of a checkpoint make up each trunk parameter and each expert.

    Raises:
        DataError: a parameter of the model has no source, or an expert is missing; the message names the first.
    """

    def __init__(self, skeleton: Skeleton, entries: Mapping[str, Entry]) -> None:
        self.skeleton = skeleton
        model = skeleton.model
        transforms = get_model_conversion_mapping(model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        targets: dict[str, _Target] = {}
        self.unknown: list[str] = []
        for key in sorted(entries, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, skeleton.full_state)
            if name not in skeleton.full_state and key in skeleton.full_state:
                name, pattern = key, None
            if name not in skeleton.full_state:
                self.unknown.append(key)
                continue
            entry = entries[key]
            if isinstance(entry, Mxfp4Entry):
                targets[name] = _Target(None, {}, entry)
                continue
            want = skeleton.full_state[name]
            if not want.is_floating_point() and entry.dtype in _FLOATS:
                raise DataError(f"{entry.path}: tensor {key} is {entry.dtype}, the model expects {want.dtype}")
            if want.is_floating_point() and entry.dtype not in _FLOATS:
                raise DataError(
                    f"{entry.path}: tensor {key} is {entry.dtype}, and config.json does not say how to read it"
                )
            target = targets.setdefault(name, _Target(by_pattern.get(pattern or ""), defaultdict(list)))
            target.sources[pattern].append(entry)
        self._experts = [
            {param: self._expert_target(site, param, targets) for param in site.params} for site in skeleton.sites
        ]
        self._trunk = {}
        for name in skeleton.trunk_names():
            if name in targets:
                self._trunk[name] = target = targets[name]
                if target.packed is not None:
                    raise DataError(f"{name} is in MXFP4, which can be read for routed experts only")
                if target.converter is None:
                    first, *others = next(iter(target.sources.values()))
                    if others:
                        raise DataError(f"{first.path}: tensors {first.name} and {others[0].name} are both {name}")
                    self._check_shape(name, first.shape)
            elif not any(name in _produced(t, n) for n, t in targets.items()):
                raise DataError(f"the checkpoint has no tensor for {name}; is a shard missing?")

    def _expert_target(self, site: MoeSite, param: str, targets: dict[str, _Target]) -> _Target:
        target = targets.get(f"{site.name}.{param}")
        if target is None:
            raise DataError(f"the checkpoint has no tensor for {site.name}.{param}; is a shard missing?")
        if target.packed is not None:
            want = site.params[param][0]
            if param in site.form.transposed:
                want = (want[0], want[2], want[1])
            if target.packed.shape != want:
                raise DataError(
                    f"{site.name}.{param} has MXFP4 tensors for the shape {target.packed.shape}, the config says {want}"
                )
            return target
        shape, whole = site.params[param][0], self.skeleton.full_state[f"{site.name}.{param}"].shape
        if len(shape) != len(whole):  # experts one below the other in a matrix
            target.sources[None] = [
                entry._replace(shape=shape) if isinstance(entry, TensorEntry) and entry.shape == whole else entry
                for entry in target.sources[None]
            ]
        wanted = set(target.converter.source_patterns) if target.converter is not None else {None}
        if set(target.sources) != wanted:
            raise DataError(
                f"{site.name}.{param} lacks source tensors for {sorted(map(str, wanted - set(target.sources)))}"
            )
        for pattern, found in target.sources.items():
            what, wanted_count = f"{site.name}.{param}", site.layer.num_experts * target.kinds
            if not _per_expert(pattern, found):
                count = found[0].shape[0] if found[0].shape else 0
            elif missing := set(range(wanted_count)).difference(_expert_numbers(found)):
                raise DataError(
                    f"expert {min(missing)} of {site.name} has no tensor for {pattern or param}; is a shard missing?"
                )
            else:
                count = len(found)
            # Where some experts compute nothing (longcat_flash), the library gives them weights all the same.
            if count not in (wanted_count, whole[0] if len(whole) == len(shape) else wanted_count):
                raise DataError(f"{what} has {count} experts in the checkpoint, the config says {wanted_count}")
        return target

    def expert(self, layer: int, index: int) -> dict[str, Weight]:
        """One expert's tensors, as parts of its `ExpertShape`, in the checkpoint's dtype."""
        site = self.skeleton.sites[layer]
        params: dict[str, Weight] = {}
        for param, target in self._experts[layer].items():
            if target.packed is not None:
                params[param] = target.packed.read_expert(index)
                continue
            name, shape = f"{site.name}.{param}", site.params[param][0][1:]
            sources = [entry for pattern in target.sources for entry in target.of_expert(pattern, index)]
            if all(isinstance(source, Int4Entry | PackedLinear) for source in sources):
                size, matrix = self._join_codes(name, target, index)
            else:
                tensor = self._gather(name, target, index)
                size, matrix = tuple(tensor.shape), tensor[0]
            if size != (1, *shape):
                raise DataError(f"expert {index} of {name} has shape {size[1:]}, the config says {shape}")
            params[param] = matrix
        return site.split(params)

    def expert_tensors(self, layer: int, index: int) -> Iterator[TensorEntry]:
        """The tensors of the files that `expert` reads."""
        for target in self._experts[layer].values():
            of_expert = [entry for pattern in target.sources for entry in target.of_expert(pattern, index)]
            for entry in [target.packed] if target.packed is not None else of_expert:
                if isinstance(entry, TensorEntry):
                    yield entry
                else:
                    yield from (part for part in entry if isinstance(part, TensorEntry))

    def _join_codes(self, name: str, target: _Target, index: int) -> tuple[tuple[int, ...], Int4Matrix]:
        """One expert's parameter with the codes that it ships with, and its shape as a batch of one.

        What merges experts only puts rows together: of codes and of scales as of numbers.
        """
        matrices = {p: target.of_expert(p, index)[0].matrix() for p in target.sources}  # type: ignore

        def join(parts: dict[str | None, torch.Tensor]) -> torch.Tensor:
            data = {pattern: [part[None] if pattern is None else part] for pattern, part in parts.items()}
            return next(iter(self._convert(name, target, data).values()))

        words = join({pattern: matrix.words for pattern, matrix in matrices.items()})
        scales = join({pattern: matrix.scales for pattern, matrix in matrices.items()})
        minimums = {pattern: m.minimums for pattern, m in matrices.items() if m.minimums is not None}
        joined = Int4Matrix(words[0], scales[0], join(minimums)[0] if minimums else None)
        return (*words.shape[:-1], words.shape[-1] * 8), joined

    def _gather(self, name: str, target: _Target, index: int) -> torch.Tensor:
        """One expert's parameter as a batch of one, made by the library's operations."""
        data: dict[Any, list[torch.Tensor]] = {}
        for pattern, found in target.sources.items():
            if _per_expert(pattern, found):
                tensors = [entry.read() for entry in target.of_expert(pattern, index)]
                data[pattern] = [tensor[None] for tensor in tensors] if pattern is None else tensors
            else:
                data[pattern] = [found[0].read_index(index)]
        with self._in_place_of(name):
            return next(iter(self._convert(name, target, data).values()))

    @contextmanager
    def _in_place_of(self, name: str) -> Iterator[None]:
        """Some operations look up the shape of the parameter that they make: for us, that of a single expert."""
        module_name, _, leaf = name.rpartition(".")
        params = self.skeleton.model.get_submodule(module_name)._parameters
        params[leaf] = nn.Parameter(self.skeleton.full_state[name][:1], requires_grad=False)
        try:
            yield
        finally:
            params[leaf] = None

    def trunk(self) -> Iterator[tuple[str, torch.Tensor | RowReader]]:
        """All trunk parameters, one conversion group at a time; large matrices to be read in pieces."""
        names = set(self.skeleton.trunk_names())
        for name, target in self._trunk.items():
            entries, dtype = next(iter(target.sources.values())), self.skeleton.dtypes[name]
            if _in_pieces(target):
                yield name, RowReader(entries[0].shape, lambda a, b, e=entries[0], d=dtype: e.read_rows(a, b).to(d))
                continue
            data = {pattern: [entry.read() for entry in found] for pattern, found in target.sources.items()}
            for full_name, tensor in self._convert(name, target, data).items():
                if full_name in names:
                    self._check_shape(full_name, tuple(tensor.shape))
                    yield full_name, tensor.to(self.skeleton.dtypes[full_name])

    def trunk_sizes(self) -> Iterator[TrunkSize]:
        """Each as it is read, and again where it changes its dtype or is converted."""
        for name, target in self._trunk.items():
            weights = self.skeleton.full_state[name].numel()
            read = sum(entry.nbytes for found in target.sources.values() for entry in found)
            made = weights * self.skeleton.dtypes[name].itemsize
            whole = read if target.converter is None and read == made else read + made
            yield TrunkSize(weights, 0 if _in_pieces(target) else whole)

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        want = tuple(self.skeleton.full_state[name].shape)
        if shape != want:
            raise DataError(f"tensor {name} has shape {shape} in the checkpoint, the config says {want}")

    def _convert(self, name: str, target: _Target, data: dict[Any, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
        try:
            return self._run_operations(name, target, data)
        except (RuntimeError, IndexError) as error:  # torch's, about tensors that do not fit together
            reason = str(error).partition("\n")[0]
            raise DataError(f"the tensors that make up {name} have wrong shapes: {reason}") from None

    def _run_operations(
        self, name: str, target: _Target, data: dict[Any, list[torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        if target.converter is None:
            return {name: next(iter(data.values()))[0]}
        result: Any = data
        for operation in target.converter.operations:
            result = operation.convert(
                result,
                source_patterns=target.converter.source_patterns,
                target_patterns=target.converter.target_patterns,
                full_layer_name=name,
                model=self.skeleton.model,
                config=self.skeleton.config,
                missing_keys=set(),
            )
        prefix, _, suffix = next((name.partition(key) for key in result if key in name), ("", "", ""))
        return {
            prefix + key + suffix if key in target.converter.target_patterns else key: v[0]
            if isinstance(v, list)
            else v
            for key, v in result.items()
        }


def _in_pieces(target: _Target) -> bool:
    """Whether a trunk parameter is read so."""
    first = next(iter(target.sources.values()))[0]
    return target.converter is None and type(first) is TensorEntry and prod(first.shape) >= LARGE


def _per_expert(pattern: str | None, found: list[Readable]) -> bool:
    return len(found) > 1 or (pattern is not None and "*" in pattern)


def _expert_numbers(found: list[Readable]) -> list[int]:
    """The expert that each of these tensors belongs to: the one number in which their names differ."""
    numbers = [set(column) for column in zip(*(re.findall(r"\d+", entry.name) for entry in found), strict=False)]
    varying = max(numbers, key=len, default=set())
    return [int(number) for number in varying]


def _produced(target: _Target, name: str) -> set[str]:
    """Other parameters that the same converter yields beside its first target."""
    if target.converter is None or len(target.converter.target_patterns) < 2:
        return set()
    first, *others = target.converter.target_patterns
    return {name.replace(first, other, 1) for other in others}
