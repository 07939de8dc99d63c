"""The GPU kernels against exact results, in Triton's interpreter and, where there is one, on a GPU.

Neither a GPU nor the interpreter is needed to compile them: what the compiler makes of them is looked at, too.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from experts import ACTIVATIONS, CODECS, SILU, inner, inner_error, project, random_expert
from pocketmoe.quant import triton_kernels
from pocketmoe.quant.activations import Activation
from pocketmoe.quant.codecs import ExpertShape, get_codec, packed_format, record_layout
from pocketmoe.quant.kernels import ExpertJob
from pocketmoe.quant.triton_kernels import Launch, Schedule, TritonError, TritonKernels, schedule
from triton_devices import DEVICES, needs_triton


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return request.param


def make_kernels(codec: str, shape: ExpertShape, activation: Activation = SILU) -> TritonKernels:
    fmt = packed_format(get_codec(codec))
    assert fmt is not None, codec
    return TritonKernels(fmt, record_layout(get_codec(codec), shape), shape, activation)


def make_jobs(records: Sequence[torch.Tensor], counts: Sequence[int], device: torch.device) -> list[ExpertJob]:
    """Jobs whose records are slots of one slab on the device."""
    slab = torch.stack(list(records)).to(device)
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return [ExpertJob(record, start, count) for record, start, count in zip(slab, starts, counts, strict=True)]


def run(kernels: TritonKernels, x: torch.Tensor, rows: torch.Tensor, jobs: Sequence[ExpertJob]) -> torch.Tensor:
    """The result in main memory; NaN where nothing was written."""
    device = jobs[0].record.device
    out = torch.full((len(rows), kernels.shape.hidden), math.nan, device=device)
    kernels.run(x.to(device), rows.to(device), jobs, out)
    return out.cpu()


def check_experts(
    codec: str, shape: ExpertShape, activation: Activation, counts: Sequence[int], device: torch.device
) -> None:
    """Every row of jobs of these counts is within the stated bound of the exact result."""
    torch.manual_seed(shape.hidden)
    experts = [random_expert(codec, shape, seed) for seed in range(len(counts))]
    x = torch.randn(max(counts), shape.hidden) * 2
    picks = [torch.randperm(max(counts))[:count] for count in counts]
    jobs = make_jobs([record for record, _ in experts], counts, device)
    out = run(make_kernels(codec, shape, activation), x, torch.cat(picks).int(), jobs).double()
    for (_, weights), (_, start, count), pick in zip(experts, jobs, picks, strict=True):
        left_out = 2.0**-14 if count > triton_kernels.MATVEC_ROWS else 0.0
        rounded = left_out + max(shape.hidden, shape.intermediate) * 2.0**-23  # of sums in float32, and of exp
        rows = x[pick].double()
        between = inner(weights, activation, rows)
        error = inner_error(weights, activation, rows, rounded * rows.abs()) + rounded * between.abs()
        exact, bound = project(weights, "down_proj", between), error @ weights["down_proj"].abs().T + 1e-6
        distance = (out[start : start + count] - exact).abs()
        assert (distance <= bound).all(), (count, (distance / bound).max())


@pytest.mark.parametrize("codec", CODECS)
def test_experts_of_every_codec_are_within_the_stated_bound(device: torch.device, codec: str):
    check_experts(codec, ExpertShape(72, 50, True, True), SILU, (1, 5, 0, 1), device)
    check_experts(codec, ExpertShape(200, 7, True, False), SILU, (7, 1), device)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.kind)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_experts_of_every_activation_are_within_the_stated_bound(
    device: torch.device, activation: Activation, bias: bool
):
    check_experts("int4-g32", ExpertShape(40, 17, activation.has_gate, bias), activation, (1, 6), device)


@pytest.mark.parametrize("codec", ["int4-g32-zp", "int4-g64-asym", "mxfp4"])
def test_any_number_of_rows_is_computed(device: torch.device, codec: str):
    check_experts(codec, ExpertShape(40, 16), SILU, (1, 4, 5, 16, 17, 32, 33, 512), device)


def test_matrices_longer_than_one_read_and_taller_than_one_tile_are_summed_whole(device: torch.device):
    longer = 8 * max(triton_kernels.MATVEC_CHUNKS) + 96
    check_experts("int4-g32-asym", ExpertShape(longer, triton_kernels.TILE_ROWS + 20), SILU, (1, 9), device)


def test_a_job_gives_the_same_bits_whatever_else_is_in_the_call(device: torch.device):
    shape = ExpertShape(104, 20)
    counts = (20, 1, 2, 33, 1)
    for codec in ("int4-g32", "mxfp4"):
        records = [random_expert(codec, shape, seed)[0] for seed in range(len(counts))]
        jobs = make_jobs(records, counts, device)
        kernels = make_kernels(codec, shape)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(40, shape.hidden, generator=generator)
        rows = torch.randint(40, (sum(counts),), generator=generator, dtype=torch.int32)
        together = run(kernels, x, rows, jobs)
        assert torch.equal(run(kernels, x, rows, jobs[::-1]), together)
        for record, start, count in jobs:
            alone = run(kernels, x, rows[start : start + count], [ExpertJob(record, 0, count)])
            assert torch.equal(alone, together[start : start + count]), (codec, count)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.kind)
def test_a_row_that_is_not_finite_gives_no_numbers_and_spoils_no_other(
    device: torch.device, bad: float, activation: Activation
):
    shape = ExpertShape(32, 16, activation.has_gate)
    kernels, (record, _) = make_kernels("int4-g32", shape, activation), random_expert("int4-g32", shape, 6)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(7))
    for count in (2, 5):  # by matvec and by tiles
        rows = torch.arange(count).int()
        jobs = make_jobs([record], [count], device)
        clean, spoiled = x.clone(), x.clone()
        spoiled[1, 11] = bad
        clean, spoiled = run(kernels, clean, rows, jobs), run(kernels, spoiled, rows, jobs)
        others = rows != 1
        assert torch.equal(spoiled[others], clean[others])
        if activation.limit == 0 or math.isnan(bad):  # a clamp makes a number of infinity
            assert not spoiled[1].isfinite().any()


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_gates_far_beyond_the_range_of_exp_are_right(device: torch.device):
    shape = ExpertShape(32, 32)
    record, weights = random_expert("int4-g32", shape, 4)
    for scale in (1e4, 0.0):
        x = torch.randn(3, 32, generator=torch.Generator().manual_seed(5)) * scale
        out = run(make_kernels("int4-g32", shape), x, torch.arange(3).int(), make_jobs([record], [3], device))
        exact = project(weights, "down_proj", inner(weights, SILU, x.double()))
        assert torch.allclose(out.double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


def test_a_table_that_lies_on_the_device_already_gives_the_same_as_run(device: torch.device):
    shape, counts = ExpertShape(40, 24), (1, 18)
    kernels = make_kernels("int4-g32", shape)
    jobs = make_jobs([random_expert("int4-g32", shape, seed)[0] for seed in range(2)], counts, device)
    x, rows = torch.randn(18, 40, device=device), torch.randint(18, (19,), device=device).int()
    prepared, out = schedule(jobs), torch.empty(19, 40, device=device)
    kernels.launch(x, rows, Schedule(prepared.table.to(device), prepared.launches), out)
    assert torch.equal(out.cpu(), run(kernels, x, rows, jobs))


def resident_case(
    codec: str, shape: ExpertShape, activation: Activation, device: torch.device
) -> tuple[TritonKernels, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Kernels, a token, its five experts of nine in ascending order, the records of all, and what `run` makes of it."""
    records = torch.stack([random_expert(codec, shape, seed)[0] for seed in range(9)]).to(device)
    chosen = torch.tensor([0, 2, 3, 7, 8])
    x = torch.randn(1, shape.hidden, generator=torch.Generator().manual_seed(2))
    jobs = [ExpertJob(records[expert], i, 1) for i, expert in enumerate(chosen.tolist())]
    kernels = make_kernels(codec, shape, activation)
    return kernels, x, chosen, records, run(kernels, x, torch.zeros(5).int(), jobs)


def run_resident(
    kernels: TritonKernels, x: torch.Tensor, chosen: torch.Tensor, addresses: torch.Tensor, device: torch.device
) -> torch.Tensor:
    """The result in main memory; NaN where nothing was written."""
    out = torch.full((len(chosen), kernels.shape.hidden), math.nan, device=device)
    kernels.run_resident(x.to(device), chosen.to(device), addresses.to(device), out)
    return out.cpu()


@pytest.mark.parametrize("codec", CODECS)
def test_experts_that_the_kernel_finds_itself_are_the_same_to_the_bit(device: torch.device, codec: str):
    shape = ExpertShape(72, 50, True, True)
    kernels, x, chosen, records, want = resident_case(codec, shape, SILU, device)
    addresses = torch.tensor([record.data_ptr() for record in records])
    assert torch.equal(run_resident(kernels, x, chosen, addresses, device), want)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.kind)
def test_nothing_is_written_for_experts_without_an_address(device: torch.device, activation: Activation):
    shape = ExpertShape(40, 17, activation.has_gate)
    kernels, x, chosen, records, want = resident_case("int4-g32", shape, activation, device)
    for absent in ([2, 8], [1, 4], chosen.tolist()):
        addresses = torch.tensor([0 if e in absent else record.data_ptr() for e, record in enumerate(records)])
        there = torch.tensor([expert not in absent for expert in chosen.tolist()])
        out = run_resident(kernels, x, chosen, addresses, device)
        assert torch.equal(out[there], want[there]) and out[~there].isnan().all()


# The division of jobs


def test_every_row_of_every_job_is_in_exactly_one_piece_of_its_record():
    records = torch.zeros(6, 64, dtype=torch.uint8)
    counts = (1, 4, 0, 5, 33, 200)
    jobs = make_jobs(list(records), counts, torch.device("cpu"))
    table, launches = schedule(jobs)
    owner = [address for record, _, count in jobs for address in [record.data_ptr()] * count]
    covered: list[int | None] = [None] * sum(counts)
    for tokens, first, pieces in launches:
        for address, start, count in table[first : first + pieces].tolist():
            assert 0 < count <= tokens
            assert covered[start : start + count] == [None] * count
            covered[start : start + count] = [address] * count
    assert covered == owner
    assert sum(launch.pieces for launch in launches) == len(table)


def test_decoding_one_token_is_one_launch_of_one_piece_an_expert():
    jobs = make_jobs([torch.zeros(64, dtype=torch.uint8)] * 8, [1] * 8, torch.device("cpu"))
    assert schedule(jobs).launches == (Launch(tokens=1, first=0, pieces=8),)


def test_no_jobs_are_no_launches():
    empty = schedule([])
    assert empty.launches == () and empty.table.shape == (0, 3)


# What the compiler makes of it


@needs_triton
@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize("codec", ["int4-g32-zp", "int4-g128-asym", "mxfp4"])
def test_compiled_code_reads_16_bytes_at_a_time_and_multiplies_on_tensor_cores(codec: str, capability: int, tmp_path):
    from triton import compile, knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    code = triton_kernels.device_code(interpret=False)
    signature = {"table": "*i64", "first": "i32", "x": "*fp32", "rows": "*i32", "y": "*fp32"}
    resident = {"chosen": "*i64", "addresses": "*i64", "x": "*fp32", "y": "*fp32"}
    kernels = make_kernels(codec, ExpertShape(2048, 768))
    one, many = (
        triton_kernels.variant(tokens, kernels.gate_up, code, interpret=False)
        for tokens in (1, triton_kernels.TILE_TOKENS[-1])
    )
    of_resident = one._replace(kernel=code.matvec_resident)
    for variant, parameters in ((one, signature), (of_resident, resident), (many, signature)):
        aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(parameters.values()) if kind[0] == "*"}
        types = {**parameters, **dict.fromkeys(variant.constants, "constexpr")}
        source = ASTSource(variant.kernel, types, variant.constants, aligned)
        with knobs.cache.scope():
            knobs.cache.dir = str(tmp_path)
            compiled = compile(source, GPUTarget("cuda", capability, 32), options=variant.options)
        ptx = compiled.asm["ptx"]
        if variant is not many:
            assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) >= 2  # of up and of gate
            assert "sizePerThread = [1, 4]" in compiled.asm["ttgir"]  # so that those of a warp lie together
        else:
            assert re.search(r"mma\S*\.bf16\.bf16", ptx)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("arch", "warp"), [("gfx1100", 32), ("gfx942", 64)])
@pytest.mark.parametrize("codec", ["int4-g32-zp", "mxfp4"])
def test_amd_s_compiler_takes_the_kernels_and_uses_its_matrix_cores(codec: str, arch: str, warp: int, tmp_path):
    from triton import compile, knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    code = triton_kernels.device_code(interpret=False)
    kernels = make_kernels(codec, ExpertShape(2048, 768))
    for tokens in (1, *triton_kernels.TILE_TOKENS):
        variant = triton_kernels.variant(tokens, kernels.gate_up, code, interpret=False)
        types = {"table": "*i64", "first": "i32", "x": "*fp32", "rows": "*i32", "y": "*fp32"}
        aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind[0] == "*"}
        types |= dict.fromkeys(variant.constants, "constexpr")
        source = ASTSource(variant.kernel, types, variant.constants, aligned)
        with knobs.cache.scope():
            knobs.cache.dir = str(tmp_path)
            compiled = compile(source, GPUTarget("hip", arch, warp), options=variant.options)
        assert compiled.asm["hsaco"]
        assert bool(re.search(r"v_(wmma|mfma)\w*bf16", compiled.asm["amdgcn"])) == (tokens > 1)
        assert re.search(r"ScratchSize: 0\b", compiled.asm["amdgcn"])  # no registers are spilled


# Without Triton


def test_without_triton_there_is_a_sentence_and_the_module_can_be_imported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    triton_kernels.load_triton.cache_clear()
    try:
        assert triton_kernels.load_triton() is None
        with pytest.raises(TritonError, match="Triton"):
            make_kernels("int4-g32", ExpertShape(32, 32))
    finally:
        triton_kernels.load_triton.cache_clear()


def test_an_activation_that_does_not_fit_the_shape_is_refused():
    with pytest.raises(ValueError, match="has_gate"):
        make_kernels("int4-g32", ExpertShape(32, 32), Activation("relu2"))
    with pytest.raises(ValueError, match="unknown"):
        make_kernels("int4-g32", ExpertShape(32, 32), Activation("softplus"))


def test_the_benchmark_leaves_with_one_sentence_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_kernels"])
    with pytest.raises(SystemExit, match="no CUDA GPU"):
        importlib.import_module("benchmarks.gpu_kernels").main()
