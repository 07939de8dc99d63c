"""Which kernels compute a model's experts: native ones where they can, torch where not, and never in silence."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from ..quant.activations import Activation
from ..quant.codecs import packed_format
from ..quant.kernels import ExpertJob, ExpertKernels, ResidentKernels, TorchKernels
from ..quant.native import NativeKernels, NativePool, load_native, why_missing
from ..quant.triton_kernels import TritonKernels, load_triton
from ..quant.triton_kernels import why_missing as why_no_triton
from .config import OffloadConfig
from .device import Device
from .errors import UsageError
from .hf import MoeSite
from .manifest import Manifest
from .source import OnNotice


def open_pool(config: OffloadConfig, on_notice: OnNotice) -> NativePool | None:
    """The threads that experts and trunk matrices share; None where torch has to compute, and says so.

    Raises:
        UsageError: `kernels="native"` was asked for and there is no library; says why.
    """
    if config.kernels == "torch":
        return None
    if load_native() is None:
        if config.kernels == "native":
            raise UsageError(f"native kernels were asked for: {why_missing()}")
        on_notice(
            f"{why_missing()} Using torch meanwhile, which is several times slower and cannot keep the trunk packed."
        )
        return None
    return NativePool(config.threads)


def make_kernels(
    sites: list[MoeSite], manifest: Manifest, config: OffloadConfig, pool: NativePool | None, on_notice: OnNotice
) -> list[ExpertKernels]:
    """One kernel per MoE layer, all on one pool of threads.

    Raises:
        UsageError: `kernels="native"` was asked for and cannot compute these experts; says why.
    """
    codec, layouts = manifest.codec_and_layouts()
    fmt = packed_format(codec)
    if pool is not None and fmt is not None and (activations := _native_activations(sites)):
        return [
            _with_norm(site, NativeKernels(fmt, layout, site.layer.shape, activation, pool=pool), on_cpu=True)
            for site, layout, activation in zip(sites, layouts, activations, strict=True)
        ]
    if pool is not None:  # where there is none, `open_pool` has said why
        obstacle = (
            f"The native kernels have no codec {codec.name}."
            if fmt is None
            else f"The native kernels lack the activation of {type(sites[0].experts).__name__}."
        )
        if config.kernels == "native":
            raise UsageError(f"native kernels were asked for: {obstacle}")
        if fmt is not None:  # who takes records that are not packed does not ask for speed
            on_notice(f"{obstacle} Using torch for the experts meanwhile, which is several times slower.")
    return [
        _with_norm(site, TorchKernels(codec, layout, site.apply_gate), on_cpu=True)
        for site, layout in zip(sites, layouts, strict=True)
    ]


def make_device_kernels(
    sites: list[MoeSite], manifest: Manifest, config: OffloadConfig, device: Device, on_notice: OnNotice
) -> list[ExpertKernels]:
    """One kernel per MoE layer, for experts in the memory of a device."""
    codec, layouts = manifest.codec_and_layouts()
    fmt, activations = packed_format(codec), _native_activations(sites)
    obstacle = device.lacks
    if obstacle is None and load_triton() is None:
        obstacle = why_no_triton()
    if obstacle is None and fmt is not None and activations and config.kernels != "torch":
        return [
            _with_norm(site, TritonKernels(fmt, layout, site.layer.shape, activation))
            for site, layout, activation in zip(sites, layouts, activations, strict=True)
        ]
    if config.kernels != "torch" and fmt is not None:
        obstacle = obstacle or f"The GPU kernels lack the activation of {type(sites[0].experts).__name__}."
        on_notice(f"{obstacle} Experts on {device.name} are dequantised for every use, which is many times slower.")
    return [
        _with_norm(site, TorchKernels(codec, layout, site.apply_gate))
        for site, layout in zip(sites, layouts, strict=True)
    ]


def _with_norm(site: MoeSite, kernels: ExpertKernels, on_cpu: bool = False) -> ExpertKernels:
    norm = site.form.post_norm
    if norm is None:
        return kernels
    if on_cpu and any(parameter.device.type != "cpu" for parameter in norm.parameters()):
        norm = copy.deepcopy(norm).cpu()  # the trunk's own lies on a GPU
    return _NormedResident(kernels, norm) if isinstance(kernels, ResidentKernels) else _Normed(kernels, norm)


class _Normed:
    """Kernels whose outputs go through a norm of the model's own, each expert's before they are weighted."""

    def __init__(self, kernels: ExpertKernels, norm: nn.Module) -> None:
        self.name, self._kernels, self._norm = kernels.name, kernels, norm

    def run(self, hidden: torch.Tensor, rows: torch.Tensor, jobs: Sequence[ExpertJob], out: torch.Tensor) -> None:
        self._kernels.run(hidden, rows, jobs, out)
        for _, start, count in jobs:
            out[start : start + count] = self._norm(out[start : start + count])


class _NormedResident(_Normed):
    """The same for kernels that find records themselves."""

    def __init__(self, kernels: ResidentKernels, norm: nn.Module) -> None:
        super().__init__(kernels, norm)
        self._finders = kernels

    def run_resident(
        self, hidden: torch.Tensor, chosen: torch.Tensor, addresses: torch.Tensor, out: torch.Tensor
    ) -> None:
        self._finders.run_resident(hidden, chosen, addresses, out)
        for i in range(len(chosen)):  # row by row, as above, for the same bits; what was not written stays undefined
            out[i : i + 1] = self._norm(out[i : i + 1])


def _native_activations(sites: list[MoeSite]) -> list[Activation] | None:
    """Each layer's activation, or None when the native kernels lack one."""
    found = [site.activation() for site in sites]
    return None if None in found else [activation for activation in found if activation is not None]
