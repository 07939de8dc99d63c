"""Conversion: exact, verifiable, and careful with what is in its way."""

from __future__ import annotations

import contextlib
import os
import signal
import threading

import pytest
import torch
from fakes_store import TOTAL, FakeSource, aligned, flipped, journaled, positions, raise_at, tree
from pocketmoe.cache.expert import ExpertId
from pocketmoe.offload import convert as convert_module
from pocketmoe.offload import memory
from pocketmoe.offload.convert import convert
from pocketmoe.offload.errors import DataError, MemoryBudgetError, UsageError
from pocketmoe.offload.manifest import MANIFEST, TRUNK, Manifest
from pocketmoe.offload.source import TrunkSize
from pocketmoe.offload.store import ExpertStore, verify_store
from pocketmoe.quant.codecs import ExpertShape, codec_names, decode_expert, encode_expert, record_layout
from pocketmoe.quant.linear import PackedMatrix, matrix_format
from safetensors import safe_open


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The files of an uninterrupted conversion."""
    return tree(convert(FakeSource(), tmp_path_factory.mktemp("reference") / "store"))


@pytest.fixture
def notices():
    return []


# What is written


@pytest.mark.parametrize("codec", [name for name in codec_names() if name != "mxfp4"])  # takes no random weights
def test_a_converted_store_verifies_and_holds_each_expert_as_its_codec_encodes_it(tmp_path, codec):
    source = FakeSource()
    dest = convert(source, tmp_path / "store", codec)
    most = 0.6 if codec == "nf4" else 0.4  # NF4's last step is 0.3 of a block's largest magnitude
    assert verify_store(dest) == []
    store = ExpertStore(dest)
    found, layouts = store.manifest.codec_and_layouts()
    for expert in list(source.calls):
        record, view = aligned(store.record_bytes)
        store.read_into(expert, view)
        weights = source.expert(*expert)
        assert torch.equal(record, encode_expert(found, layouts[0], weights))
        for name, tensor in decode_expert(found, layouts[0], record).items():
            if found.lossless and codec == "f32":
                assert torch.equal(tensor, weights[name])
            assert (tensor - weights[name]).abs().max() < most
    store.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_trunk_comes_back_bit_for_bit_in_its_own_dtypes(tmp_path, dtype):
    source = FakeSource(dtype=dtype)
    store = ExpertStore(convert(source, tmp_path / "store", trunk="keep"))
    got, want = dict(store.trunk()), dict(source.trunk())
    assert list(got) == list(want)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor)
    store.close()


def test_packed_trunk_matrices_are_entered_in_the_manifest_and_the_others_stay_as_they_are(tmp_path):
    source = FakeSource()
    store = ExpertStore(convert(source, tmp_path / "store", trunk="int8-g64"))
    got, want = dict(store.trunk()), dict(source.trunk())
    assert store.manifest.trunk_packed == {"embed.weight": ("int8-g64", 50, 64)}
    matrix = PackedMatrix(got.pop("embed.weight"), 50, 64, matrix_format("int8-g64"))
    assert (matrix.dequantize() - want["embed.weight"]).abs().max() < 0.03
    assert all(torch.equal(tensor, want[name]) for name, tensor in got.items())
    store.close()


def test_a_trunk_matrix_that_cannot_be_packed_is_refused_by_name(tmp_path):
    class Poisoned(FakeSource):
        def trunk(self):
            for name, tensor in super().trunk():
                yield name, tensor.fill_(float("nan")) if name == "embed.weight" else tensor

    with pytest.raises(DataError, match=r"trunk tensor embed\.weight: .*NaN or infinity"):
        convert(Poisoned(), tmp_path / "store", trunk="int8-g32")
    assert journaled(tmp_path / "store") == TOTAL


def test_layers_of_different_sizes_share_one_record_size(tmp_path):
    class Mixed(FakeSource):
        def layers(self):
            first, second = super().layers()
            return [first._replace(shape=shapes[0]), second._replace(shape=shapes[1])]

        def expert(self, layer, index):
            self._shape = shapes[layer]
            return super().expert(layer, index)

    shapes = [ExpertShape(64, 96, True, True), ExpertShape(64, 32)]
    source = Mixed()
    dest = convert(source, tmp_path / "store", "f32")
    assert verify_store(dest) == []
    store = ExpertStore(dest)
    codec, layouts = store.manifest.codec_and_layouts()
    assert store.record_bytes == layouts[0].nbytes > layouts[1].nbytes
    record, view = aligned(store.record_bytes)
    store.read_into(ExpertId(1, 2), view)
    assert torch.equal(decode_expert(codec, layouts[1], record)["down_proj"], source.expert(1, 2)["down_proj"])
    store.close()


def test_the_files_of_a_store_are_files_that_safetensors_reads(tmp_path, monkeypatch):
    layout = record_layout(convert_module.get_codec("int4-g32"), ExpertShape(64, 32))
    monkeypatch.setattr(convert_module, "FILE_BYTES", 3 * layout.nbytes)
    dest = convert(FakeSource(), tmp_path / "store")
    manifest = Manifest.read(dest)
    assert [file.count for file in manifest.expert_files] == [3, 3, 2]
    assert verify_store(dest) == []
    seen = {}
    for file in manifest.expert_files:
        raw = (dest / file.name).read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        assert start == file.data_start and start % 4096 == 0
        with safe_open(dest / file.name, "pt") as opened:
            for i, name in enumerate(opened.keys()):
                seen[name] = opened.get_tensor(name)
                begin = start + i * layout.nbytes
                assert bytes(seen[name].tolist()) == raw[begin : begin + layout.nbytes]
    assert set(seen) == {f"layers.{layer}.experts.{e}" for layer in range(2) for e in range(4)}
    store = ExpertStore(dest)
    with safe_open(dest / TRUNK, "pt") as opened:
        for name, tensor in store.trunk():
            assert torch.equal(opened.get_tensor(name), tensor)
    store.close()


def test_conversion_is_deterministic_and_leaves_nothing_else_behind(tmp_path, reference):
    dest = tmp_path / "deep" / "er" / "store"
    convert(FakeSource(), dest)
    assert tree(dest) == reference
    assert [file.name for file in dest.parent.iterdir()] == ["store"]
    assert set(reference) == {
        MANIFEST, TRUNK, "experts-00001.safetensors", "config.json", "generation_config.json", "tokenizer.json"
    }  # fmt: skip


def test_progress_counts_every_expert_also_after_resuming(tmp_path):
    seen = []
    dest = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        convert(FakeSource(before_expert=raise_at(3, KeyboardInterrupt())), dest, on_progress=seen.append)
    convert(FakeSource(), dest, on_progress=seen.append)
    assert [p.done for p in seen if p.stage == "experts"] == list(range(1, TOTAL + 1))
    assert {p.total for p in seen if p.stage == "experts"} == {TOTAL}


# Damage


def test_verify_finds_a_flipped_bit_anywhere_in_any_file(tmp_path):
    dest = convert(FakeSource(), tmp_path / "store")
    data_start = Manifest.read(dest).expert_files[0].data_start
    for file in sorted(dest.iterdir()):
        places = positions(file, 40)
        if file.name.startswith("experts"):
            places = [*places, *range(0, data_start, 97)]  # its header is small beside the records
        for i, position in enumerate(places):
            with flipped(file, position, i % 8):
                try:
                    problems = verify_store(dest)
                except DataError as error:
                    problems = [str(error)]
            assert problems, f"{file.name}, byte {position}, bit {i % 8}"
            assert file.name in problems[0] or "store of version" in problems[0], problems
    assert verify_store(dest) == []


def test_verify_names_every_damaged_expert_and_missing_file(tmp_path):
    dest = convert(FakeSource(), tmp_path / "store")
    manifest = Manifest.read(dest)
    [file] = manifest.expert_files
    with contextlib.ExitStack() as damage:
        for number in (1, 6):
            position = file.data_start + number * manifest.record_bytes + 100
            damage.enter_context(flipped(dest / file.name, position))
        (dest / "tokenizer.json").unlink()
        assert verify_store(dest) == [
            "tokenizer.json is missing",
            f"{file.name}: expert 1 of MoE layer 0 is damaged: its checksum is wrong",
            f"{file.name}: expert 2 of MoE layer 1 is damaged: its checksum is wrong",
        ]
    os.truncate(dest / file.name, file.data_start + 3 * manifest.record_bytes)
    problems = verify_store(dest)
    assert "bytes, expected" in problems[1] and len(problems) == 2 + 5
    (dest / file.name).unlink()
    assert verify_store(dest)[1:] == [f"{file.name} cannot be read: No such file or directory"]


@pytest.mark.parametrize(
    ("codec", "value"),
    [("int4-g32", "nan"), ("bf16", "nan"), ("f32", "inf"), ("f16", "1e5")],
)
def test_weights_that_a_codec_cannot_hold_are_refused_by_name(tmp_path, codec, value):
    class Poisoned(FakeSource):
        def expert(self, layer, index):
            weights = super().expert(layer, index)
            if (layer, index) == (1, 2):
                weights["up_proj"][3, 5] = float(value)
            return weights

    with pytest.raises(DataError, match=r"fake: expert 2 of model\.layers\.1\.experts: up_proj: .*NaN or infinity"):
        convert(Poisoned(), tmp_path / "store", codec)
    assert journaled(tmp_path / "store") == 6, "the experts before it are kept"


@pytest.mark.parametrize("change", ["missing", "shape", "unknown"])
def test_an_expert_that_is_not_what_the_config_says_is_refused_by_name(tmp_path, change):
    class Wrong(FakeSource):
        def expert(self, layer, index):
            weights = super().expert(layer, index)
            if change == "missing":
                del weights["down_proj"]
            elif change == "shape":
                weights["down_proj"] = weights["down_proj"].T
            else:
                weights["norm"] = torch.ones(3)
            return weights

    with pytest.raises(DataError, match=r"expert 0 of model\.layers\.0\.experts: .*(down_proj|norm)"):
        convert(Wrong(), tmp_path / "store")


# What is in the way


def test_somebody_elses_partial_directory_is_not_deleted(tmp_path):
    partial = tmp_path / "store.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match=r"store\.partial is in the way"):
        convert(FakeSource(), tmp_path / "store")
    assert (partial / "thesis.txt").read_text() == "years of work"


def test_a_second_conversion_into_the_same_place_is_refused_while_the_first_runs(tmp_path, reference):
    dest, errors = tmp_path / "store", []

    def second(_count):
        def attempt():
            try:
                convert(FakeSource(), dest)
            except UsageError as error:
                errors.append(str(error))

        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()

    convert(FakeSource(before_expert=second), dest)
    assert tree(dest) == reference
    assert errors == [f"another process is converting into {dest}; wait for it to end"] * TOTAL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_second_process_is_refused_too_and_a_dead_ones_lock_is_not_in_the_way(tmp_path, reference):
    dest, read, write = tmp_path / "store", *os.pipe()
    pid = os.fork()
    if pid == 0:  # the child: start, say so, and be killed in the middle
        try:
            convert(FakeSource(before_expert=lambda count: (os.write(write, b"x"), signal.pause())), dest)
        finally:
            os._exit(1)
    os.read(read, 1)
    with pytest.raises(UsageError, match="another process is converting into"):
        convert(FakeSource(), dest)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    convert(FakeSource(), dest)
    assert tree(dest) == reference
    os.close(read)
    os.close(write)


def test_a_store_that_is_already_there_is_not_made_again(tmp_path, reference, notices):
    dest = convert(FakeSource(), tmp_path / "store")
    source = FakeSource()
    assert convert(source, dest, on_notice=notices.append) == dest
    assert source.calls == [] and notices == [f"{dest} already is this store; nothing to do"]
    assert tree(dest) == reference


def _other_file(dest):
    dest.write_text("mine")
    return "is something else"


def _other_directory(dest):
    dest.mkdir()
    (dest / "mine").write_text("mine")
    return "is something else"


def _dangling_link(dest):
    dest.symlink_to("nowhere")
    return "is something else"


def _link_to_an_empty_directory(dest):
    (dest.parent / "elsewhere").mkdir()
    dest.symlink_to("elsewhere")
    return "is something else"


def _other_store(dest):
    convert(FakeSource(seed=1), dest)
    return "another checkpoint or codec"


def _other_codec(dest):
    convert(FakeSource(), dest, "bf16")
    return "another checkpoint or codec"


def _damaged_store(dest):
    convert(FakeSource(), dest)
    (dest / MANIFEST).write_text("{")
    return "damaged or of another version"


@pytest.mark.parametrize(
    "occupy",
    [
        _other_file, _other_directory, _dangling_link, _link_to_an_empty_directory,
        _other_store, _other_codec, _damaged_store,
    ],
    ids=lambda o: o.__name__,
)  # fmt: skip
def test_what_stands_in_the_place_of_the_store_is_left_alone(tmp_path, occupy):
    dest = tmp_path / "store"
    says = occupy(dest)
    before = tree(dest) if dest.is_dir() else os.lstat(dest)
    source = FakeSource()
    with pytest.raises(UsageError, match=says) as caught:
        convert(source, dest)
    assert str(dest) in str(caught.value) and source.calls == []
    assert before == (tree(dest) if dest.is_dir() else os.lstat(dest))


def test_an_empty_directory_is_taken_as_the_place_for_the_store(tmp_path, reference):
    (tmp_path / "store").mkdir()
    assert tree(convert(FakeSource(), tmp_path / "store")) == reference


def test_a_budget_is_compared_with_what_the_conversion_needs_before_anything_is_written(tmp_path):
    class Wide(FakeSource):
        def trunk_sizes(self):
            return [TrunkSize(10**9, 4 * 10**9), TrunkSize(2 * 10**9, 0)]

    needed = memory.resident_bytes() + 10**9
    with pytest.raises(MemoryBudgetError, match=r"fake takes about \d\.\d GB .*trunk tensor 5\.1 GB"):
        convert(Wide(), tmp_path / "store", ram=needed)
    assert not (tmp_path / "store.partial").exists()
    convert(FakeSource(), tmp_path / "store", ram=needed)


def test_an_unknown_codec_and_an_impossible_place_are_one_sentence(tmp_path):
    with pytest.raises(UsageError, match="unknown codec 'int3'; known: int4-g32"):
        convert(FakeSource(), tmp_path / "store", "int3")
    with pytest.raises(UsageError, match="unknown matrix format 'int3'; known: int8-g32"):
        convert(FakeSource(), tmp_path / "store", trunk="int3")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot create .*file"):
        convert(FakeSource(), tmp_path / "file" / "store")
