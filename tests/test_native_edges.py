"""The native embedding and head against the modules that they stand for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pocketmoe.quant.int4 import Int4Format
from pocketmoe.quant.int8 import Int8Format
from pocketmoe.quant.linear import PackedMatrix
from pocketmoe.quant.native import FLOAT32, Matrix, NativeError, NativeMatrix, NativePool, load_native
from pocketmoe.quant.native_edges import NativeEmbedding, NativeHead
from pocketmoe.quant.native_step import Norm

pytestmark = pytest.mark.skipif(load_native() is None, reason="the native kernels are not built")
ROWS, COLS = 37, 200
FORMATS = [Int8Format(32), Int4Format(32), Int4Format(64), Int4Format(32, "asym")]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_packed_row_comes_out_as_torch_unpacks_it(fmt):
    pool, weight = NativePool(1), torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(1))
    packed = PackedMatrix.pack(weight, fmt)
    embedding = NativeEmbedding(pool, NativeMatrix(pool, packed.data, ROWS, COLS, fmt).spec)
    x = torch.empty(COLS)
    for row in range(ROWS):
        embedding.run(row, x)
        assert torch.equal(x, packed.take_rows(torch.tensor([row]))[0])
    for row in (-1, ROWS):
        with pytest.raises(NativeError, match=f"token {row}"):
            embedding.run(row, x)


def test_a_plain_row_and_what_follows_the_last_layer_agree_with_torch():
    generator = torch.Generator().manual_seed(2)
    pool, weight = NativePool(2), torch.randn(ROWS, COLS, generator=generator)
    matrix = Matrix(data=weight.data_ptr(), rows=ROWS, cols=COLS, format=FLOAT32)
    norm = Norm(1 + torch.randn(COLS, generator=generator), 1e-3)
    delta, x = torch.randn(COLS, generator=generator), torch.empty(COLS)
    NativeEmbedding(pool, matrix).run(5, x)
    assert torch.equal(x, weight[5])
    got = NativeHead(pool, norm, matrix).run(delta, x)
    residual = weight[5] + delta
    want = F.linear(F.rms_norm(residual, (COLS,), norm.weight, norm.epsilon), weight)
    torch.testing.assert_close(x, residual)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
