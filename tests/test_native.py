"""The native CPU kernels against the plain reference: unpacked weights, and activations quantised in torch.

Two references. `emulated` quantises the activations exactly as the kernels do and multiplies in float64: agreement is
near exact. The float reference does not quantise: the distance must stay within what rounding to int8 can explain.
"""

from __future__ import annotations

import math
import os
import threading

import pytest
import torch
from experts import ACTIVATIONS, CODECS, SILU, inner, inner_error, nearest_mxfp4, project, random_expert
from pocketmoe.quant import int4, int8, mxfp4, native, native_build
from pocketmoe.quant.activations import Activation
from pocketmoe.quant.codecs import ExpertShape, encode_expert, get_codec, record_layout
from pocketmoe.quant.int4 import Int4Format
from pocketmoe.quant.int8 import Int8Format
from pocketmoe.quant.kernels import ExpertJob
from pocketmoe.quant.mxfp4 import Mxfp4Format
from pocketmoe.quant.native import PackedFormat

FORMATS = [*(Int4Format(group, kind) for group in int4.GROUPS for kind in int4.KINDS)]
FORMATS = [*FORMATS, *(Int8Format(group) for group in int4.GROUPS), Mxfp4Format()]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> native.NativeLibrary:
    """The installed library if it is of the sources at hand, else one that is built for these tests."""
    found = native.load_native()
    if found is not None:
        return found
    path = tmp_path_factory.mktemp("native") / f"{native_build.STEM}{native_build.library_suffix()}"
    try:
        native_build.build_library(path)
    except native_build.BuildError as error:
        pytest.skip(f"the native kernels cannot be built: {error}")
    return native.NativeLibrary(path)


@pytest.fixture(params=["avx512vnni", "avxvnni", "avx2", "portable"])
def isa(request: pytest.FixtureRequest, library: native.NativeLibrary) -> str:
    if request.param not in library.isas:
        pytest.skip(f"this machine has no {request.param}")
    return request.param


@pytest.fixture
def pool(library: native.NativeLibrary, isa: str):
    pool = native.NativePool(2, isa, library)
    yield pool
    pool.close()


def packed_matrix(fmt: PackedFormat, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The packed bytes and the matrix they stand for, float64."""
    if isinstance(fmt, Mxfp4Format):
        packed = mxfp4.pack(mxfp4.quantize(nearest_mxfp4(weight)))
        return packed, mxfp4.dequantize(packed, weight.shape[0], weight.shape[1]).double()
    if isinstance(fmt, Int8Format):
        packed = int8.pack(*int8.quantize(weight, fmt), fmt)
        return packed, int8.dequantize(packed, weight.shape[0], weight.shape[1], fmt).double()
    packed = int4.pack(*int4.quantize(weight, fmt), fmt)
    return packed, int4.dequantize(packed, weight.shape[0], weight.shape[1], fmt).double()


def quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the kernels make of activations [T, K]: values (float64), half a step, and how near to a tie each is."""
    rows, cols = x.shape
    groups = torch.nn.functional.pad(x.float(), (0, -cols % 32)).reshape(rows, -1, 32)
    scale = groups.abs().amax(-1, keepdim=True) * torch.tensor(1 / 127)
    scale = (scale.view(torch.int32) & ~3).view(torch.float32)
    scale = torch.where(scale < 1e-30, 0.0, scale)
    steps = groups * torch.where(scale == 0, 0.0, 1 / scale)
    values = steps.round().double() * scale.double()
    tie = (steps - steps.floor() - 0.5).abs()

    def ungroup(t: torch.Tensor) -> torch.Tensor:
        return t.expand(rows, -1, 32).reshape(rows, -1)[:, :cols]

    return ungroup(values), ungroup(scale.double() / 2), ungroup(tie)


def expert_reference(
    weights: dict[str, torch.Tensor], activation: Activation, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """For rows x: the emulated result and its tolerance, the float result and the bound of int8 rounding's effect."""

    down = weights["down_proj"].abs().T
    x_int8, x_step, _ = quantized(x)
    hidden = inner(weights, activation, x_int8)
    hidden_int8, hidden_step, tie = quantized(hidden)
    emulated = project(weights, "down_proj", hidden_int8)
    # float32 instead of float64 may move a value across a tie: one whole step of that value.
    tolerance = 1e-5 * emulated.abs().amax(1, keepdim=True) + (2 * hidden_step * (tie < 2e-3)) @ down
    exact = project(weights, "down_proj", inner(weights, activation, x.double()))
    # The step of the quantised hidden values is known from the emulation; their error adds to the rounding.
    bound = (inner_error(weights, activation, x.double(), x_step) + hidden_step * 1.01) @ down + tolerance
    return emulated, tolerance, exact, bound


def make_kernels(
    codec: str, shape: ExpertShape, activation: Activation, pool: native.NativePool
) -> native.NativeKernels:
    return native.NativeKernels(codec, record_layout(get_codec(codec), shape), shape, activation, pool=pool)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 33, 256])
def test_linear_agrees_with_the_emulated_reference(pool: native.NativePool, fmt: PackedFormat, tokens: int):
    torch.manual_seed(tokens)
    for rows, cols in [(64, 128), (50, 72), (7, 200), (17, 31), (35, 1090)]:
        weight, bias = torch.randn(rows, cols), torch.randn(rows)
        packed, exact = packed_matrix(fmt, weight)
        x = torch.randn(tokens, cols) * torch.rand(tokens, 1) * 10
        y = native.NativeMatrix(pool, packed, rows, cols, fmt, bias)(x)
        x_int8, x_step, _ = quantized(x)
        expected = x_int8 @ exact.T + bias
        scale = (x_int8.abs() @ exact.abs().T + bias.abs()).amax(1, keepdim=True)
        assert ((y - expected).abs() <= 1e-6 * scale + 1e-5 * expected.abs()).all()
        bound = x_step * 1.001 @ exact.abs().T + 1e-6 * scale
        assert ((y - (x.double() @ exact.T + bias)).abs() <= bound).all()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_codes_and_activations_of_one_sign_overflow_nothing(
    pool, fmt: PackedFormat, tokens: int, sign: int
):
    packed, exact = packed_matrix(fmt, torch.full((16, 128), 12.0))
    x = torch.full((tokens, 128), 127.0 * sign)
    y = native.NativeMatrix(pool, packed, 16, 128, fmt)(x)
    assert torch.allclose(y.double(), x.double() @ exact.T, rtol=1e-5)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.kind)
def test_experts_agree_with_the_references(pool: native.NativePool, codec: str, activation: Activation):
    for hidden, intermediate, bias, counts in [
        (128, 96, False, (1, 2, 3)),
        (200, 48, True, (7, 1)),
        (72, 100, True, (33, 0, 5)),
        (40, 17, False, (256,)),
    ]:
        torch.manual_seed(hidden)
        shape = ExpertShape(hidden, intermediate, activation.has_gate, bias)
        experts = [random_expert(codec, shape, seed) for seed in range(len(counts))]
        tokens = max(counts)
        x = torch.randn(tokens, hidden) * 2
        picks = [torch.randperm(tokens)[:count].sort().values for count in counts]
        starts = [sum(counts[:i]) for i in range(len(counts))]
        jobs = [ExpertJob(record, start, n) for (record, _), start, n in zip(experts, starts, counts, strict=True)]
        out = torch.full((sum(counts), hidden), math.nan)
        rows = torch.cat(picks).int()
        make_kernels(codec, shape, activation, pool).run(x, rows, jobs, out)
        for (_, weights), start, count, pick in zip(experts, starts, counts, picks, strict=True):
            if count:
                emulated, tolerance, exact, bound = expert_reference(weights, activation, x[pick])
                got = out[start : start + count].double()
                assert ((got - emulated).abs() <= tolerance).all(), (hidden, (got - emulated).abs().max())
                assert ((got - exact).abs() <= bound).all(), (hidden, (got - exact).abs().max())


def test_a_rows_result_does_not_depend_on_the_rows_jobs_and_threads_beside_it(library: native.NativeLibrary, isa: str):
    torch.manual_seed(1)
    shape = ExpertShape(288, 160)
    for codec in ("int4-g32", "int4-g32-asym", "int4-g32-zp", "int4-g64", "mxfp4"):
        records = [random_expert(codec, shape, seed)[0] for seed in range(4)]
        x = torch.randn(70, shape.hidden)
        counts = [67, 1, 6, 70]
        starts = [0, 67, 68, 74]
        rows = torch.cat([torch.arange(67), torch.tensor([5]), torch.arange(20, 26), torch.arange(70)]).int()
        jobs = [ExpertJob(r, start, count) for r, start, count in zip(records, starts, counts, strict=True)]
        results = []
        for threads in (1, 2, 3):
            pool = native.NativePool(threads, isa, library)
            kernels = make_kernels(codec, shape, SILU, pool)
            out = torch.empty(144, shape.hidden)
            kernels.run(x, rows, jobs, out)
            results.append(out)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])
        alone = torch.empty(1, shape.hidden)
        for job in jobs:
            for row in range(job.start, job.start + job.count):
                token = int(rows[row])
                kernels.run(
                    x[token : token + 1], torch.zeros(1, dtype=torch.int32), [ExpertJob(job.record, 0, 1)], alone
                )
                assert torch.equal(alone[0], results[0][row]), (codec, row)
        pool.close()


@pytest.mark.parametrize("fmt", [Int4Format(32), Int4Format(64, "zp"), Int8Format(128), Mxfp4Format()], ids=str)
def test_a_linear_row_does_not_depend_on_the_rows_beside_it(pool: native.NativePool, fmt: PackedFormat):
    torch.manual_seed(2)
    packed, _ = packed_matrix(fmt, torch.randn(300, 1100))
    matrix = native.NativeMatrix(pool, packed, 300, 1100, fmt)
    x = torch.randn(133, 1100)
    together = matrix(x)
    for tokens in (1, 2, 3, 4, 5, 7, 8, 9, 12, 131):
        assert torch.equal(matrix(x[:tokens]), together[:tokens]), tokens
    assert torch.equal(matrix(x[132:]), together[132:])


def test_combine_sums_in_the_order_of_the_index(pool: native.NativePool):
    torch.manual_seed(3)
    tokens, k, hidden = 19, 4, 203
    parts, weights = torch.randn(tokens * k, hidden), torch.rand(tokens, k)
    index = torch.randperm(tokens * k).reshape(tokens, k).int()
    index[3, 1] = index[5, 0] = -1
    out = torch.empty(tokens, hidden)
    pool.combine(parts, index, weights, out)
    expected = torch.zeros(tokens, hidden)
    for j in range(k):
        used = index[:, j] >= 0
        expected[used] += weights[used, j, None] * parts[index[used, j].long()]
    assert torch.equal(out, expected)


def test_extreme_activations_saturate_as_the_reference_does(pool: native.NativePool):
    """Gates far beyond the range of exp, zero rows, and rows too small to quantise give finite, right results."""
    shape = ExpertShape(64, 64)
    record, weights = random_expert("int4-g32", shape, 4)
    for scale in (1e4, 1e-35, 0.0):
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(5)) * scale
        out = torch.empty(5, 64)
        make_kernels("int4-g32", shape, SILU, pool).run(x, torch.arange(5).int(), [ExpertJob(record, 0, 5)], out)
        emulated, tolerance, _, _ = expert_reference(weights, SILU, x)
        assert ((out - emulated).abs() <= tolerance).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_gives_nan_and_spoils_no_other(pool: native.NativePool, bad: float):
    shape = ExpertShape(64, 64)
    record, _ = random_expert("int4-g32", shape, 6)
    kernels = make_kernels("int4-g32", shape, SILU, pool)
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(7))
    rows, jobs = torch.arange(9).int(), [ExpertJob(record, 0, 9)]
    clean, spoiled = torch.empty(9, 64), torch.empty(9, 64)
    kernels.run(x, rows, jobs, clean)
    x[4, 11] = bad
    kernels.run(x, rows, jobs, spoiled)
    assert spoiled[4].isnan().all()
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(spoiled[others], clean[others])


def test_silu_is_accurate_to_float32(pool: native.NativePool):
    """Projections with a single one show the activation itself; a group with a single value is exact."""
    shape = ExpertShape(32, 32)
    layout = record_layout(get_codec("int4-g32"), shape)
    one = torch.zeros(32, 32)
    one[0, 0] = 1.0
    record = encode_expert(get_codec("int4-g32"), layout, {"gate_proj": one, "up_proj": one, "down_proj": one})
    kernels = make_kernels("int4-g32", shape, SILU, pool)
    x = torch.zeros(1000, 32)
    x[:, 0] = torch.linspace(-60, 60, 1000)
    out = torch.empty(1000, 32)
    kernels.run(x, torch.arange(1000).int(), [ExpertJob(record, 0, 1000)], out)
    gate = quantized(x)[0][:, 0]
    expected = torch.nn.functional.silu(gate) * gate
    # exp's own error, the 22 bits of the scale, and what rounding the gate to float32 does to e^-gate.
    tolerance = 1e-6 + gate.clamp(max=0).abs() * 2**-23
    assert ((out[:, 0] - expected).abs() <= tolerance * expected.abs()).all()


def test_calls_from_many_threads_and_changes_of_the_thread_count_give_the_same_bits(library: native.NativeLibrary):
    shape = ExpertShape(256, 128)
    record, _ = random_expert("int4-g32", shape, 8)
    pool = native.NativePool(3, None, library)
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(9))
    rows, jobs = torch.arange(40).int(), [ExpertJob(record, 0, 40)]
    expected = torch.empty(40, 256)
    make_kernels("int4-g32", shape, SILU, pool).run(x, rows, jobs, expected)
    wrong = []

    def work() -> None:
        kernels, out = make_kernels("int4-g32", shape, SILU, pool), torch.empty(40, 256)
        for _ in range(100):
            out.fill_(math.nan)
            kernels.run(x, rows, jobs, out)
            if not torch.equal(out, expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for count in (1, 4, 2, 5, 3):
        pool.threads = count
    for thread in threads:
        thread.join()
    assert not wrong
    pool.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_computes_alone(library: native.NativeLibrary):
    shape = ExpertShape(256, 256)
    record, _ = random_expert("int4-g32", shape, 10)
    pool = native.NativePool(3, None, library)
    kernels = make_kernels("int4-g32", shape, SILU, pool)
    x = torch.ones(8, 256)
    rows, jobs = torch.arange(8).int(), [ExpertJob(record, 0, 8)]
    expected, out = torch.empty(8, 256), torch.empty(8, 256)
    kernels.run(x, rows, jobs, expected)
    child = os.fork()
    if child == 0:  # no pytest, no torch operations here: only the call and a comparison of bytes
        try:
            kernels.run(x, rows, jobs, out)
            os._exit(0 if out.numpy().tobytes() == expected.numpy().tobytes() else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    pool.close()


def test_bad_arguments_are_refused_by_name(library: native.NativeLibrary):
    shape = ExpertShape(64, 64)
    layout = record_layout(get_codec("int4-g32"), shape)
    record, _ = random_expert("int4-g32", shape, 11)
    with pytest.raises(native.NativeError, match="instruction set 'mmx' is not available"):
        native.NativePool(1, "mmx", library)
    pool = native.NativePool(1, None, library)
    with pytest.raises(ValueError, match="no codec 'bf16'"):
        native.NativeKernels("bf16", layout, shape, SILU, pool=pool)
    with pytest.raises(ValueError, match="has_gate=True"):
        native.NativeKernels("int4-g32", layout, shape, Activation("relu2"), pool=pool)
    kernels = native.NativeKernels("int4-g32", layout, shape, SILU, pool=pool)
    with pytest.raises(native.NativeError, match="bad argument"):
        kernels.run(torch.ones(2, 64), torch.tensor([2]).int(), [ExpertJob(record, 0, 1)], torch.empty(1, 64))
    with pytest.raises(native.NativeError, match="bad argument"):
        kernels.run(torch.ones(2, 64), torch.tensor([1]).int(), [ExpertJob(record, 0, 2)], torch.empty(1, 64))


def test_a_library_of_other_sources_is_not_loaded(library: native.NativeLibrary, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native_build, "source_hash", lambda: "0" * 12)
    with pytest.raises(native.NativeError, match="built from other sources"):
        native.NativeLibrary(library.path)
