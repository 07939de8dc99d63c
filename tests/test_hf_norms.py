"""Which norms torch's own kernel takes over, and that nothing changes by it."""

from __future__ import annotations

import copy

import pytest
import torch
from pocketmoe.offload.hf_norms import fuse_norms
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

WIDTH = 48


class OtherEpsilonNorm(Qwen3MoeRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.weight * hidden_states * torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + 2e-5)


def filled(norm: nn.Module, dtype: torch.dtype) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in norm.parameters():
        parameter.data = 1 + torch.randn(parameter.shape, generator=generator) / 4
    return norm.to(dtype)


@pytest.mark.parametrize("kind", [Qwen3MoeRMSNorm, GptOssRMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rms_norms_give_the_same_numbers_with_one_rounding_less(kind: type, dtype: torch.dtype):
    norm = filled(kind(WIDTH, eps=1e-5), dtype)
    fused = copy.deepcopy(norm)
    assert fuse_norms(nn.Sequential(fused)) == 1
    x = (torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(2)) * 3).to(dtype)
    got, want, exact = fused(x), norm(x), copy.deepcopy(norm).double()(x.double()).double()
    assert got.dtype == dtype
    if dtype == torch.float32:
        assert torch.equal(got, want)
    else:
        assert ((got.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() * 1.01 + 1e-7).all()


def test_norms_that_compute_anything_else_stay_as_they_are():
    others = [
        Gemma3RMSNorm(WIDTH, eps=1e-5),  # its weights count from one
        nn.LayerNorm(WIDTH, eps=1e-5, bias=False),
        nn.LayerNorm(WIDTH, eps=1e-5),
        Qwen3NextRMSNormGated(WIDTH, eps=1e-5),  # takes a gate
        OtherEpsilonNorm(WIDTH, eps=1e-5),
    ]
    model = nn.Sequential(*(filled(norm, torch.float32) for norm in others))
    assert fuse_norms(model) == 0
