"""Where the tests of Triton's kernels run them: in its interpreter and, where there is one, on a GPU."""

from __future__ import annotations

import pytest
import torch
from pocketmoe.quant import triton_kernels

needs_triton = pytest.mark.skipif(triton_kernels.load_triton() is None, reason=triton_kernels.why_missing())
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU here")
DEVICES = [
    pytest.param(torch.device("cpu"), marks=needs_triton, id="interpreter"),
    pytest.param(torch.device("cuda"), marks=[needs_triton, needs_gpu, pytest.mark.cuda], id="cuda"),
]
