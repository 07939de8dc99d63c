"""Slots in RAM: aligned for direct reads, shared with the kernels without a copy, and given back on demand."""

from __future__ import annotations

import gc
import mmap
import sys
from pathlib import Path

import pytest
import torch
from pocketmoe.offload.tiers import RamSlots

RECORD = 12_288
MB = 1 << 20


@pytest.mark.parametrize("capacity", [1, 3, 700])
def test_every_slot_begins_on_4_kib_and_the_first_on_a_huge_page(capacity):
    slots = RamSlots(capacity, RECORD)
    addresses = [slots.record(slot).data_ptr() for slot in range(capacity)]
    assert addresses[0] % (2 * MB) == 0
    assert addresses == [addresses[0] + slot * RECORD for slot in range(capacity)]
    assert all(address % 4096 == 0 for address in addresses)


def test_what_is_read_into_a_view_is_what_the_kernel_sees_and_the_neighbours_are_untouched():
    slots = RamSlots(4, RECORD)
    view = slots.view(2)
    assert len(view) == RECORD and not view.readonly
    view[:] = bytes(range(256)) * (RECORD // 256)
    assert slots.record(2).dtype == torch.uint8 and slots.record(2).shape == (RECORD,)
    assert bytes(slots.record(2).tolist()) == bytes(view)
    slots.record(2)[5] = 99
    assert view[5] == 99, "the same memory"
    for slot in (0, 1, 3):
        assert not slots.record(slot).any()
    assert torch.frombuffer(slots.view(2), dtype=torch.uint8).data_ptr() == slots.record(2).data_ptr()


def test_a_record_stays_where_it_is_however_often_it_is_asked_for():
    slots = RamSlots(2, RECORD)
    assert slots.record(1).data_ptr() == slots.record(1).data_ptr()


def test_a_record_size_that_is_no_multiple_of_4_kib_is_a_mistake():
    with pytest.raises(AssertionError, match="5000"):
        RamSlots(2, 5000)


def test_no_slots_at_all_are_possible():
    assert RamSlots(0, RECORD).capacity == 0


def resident() -> int:
    """Bytes of anonymous memory that this process holds."""
    status = Path("/proc/self/status")
    if sys.platform != "linux" or "RssAnon" not in status.read_text():
        pytest.skip("needs Linux's RssAnon")
    [line] = [line for line in status.read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


def test_slots_cost_memory_when_they_are_written_and_shrinking_gives_it_back():
    gc.collect()
    before, record = resident(), MB
    slots = RamSlots(64, record)
    assert resident() < before + 4 * MB, "untouched slots cost nothing"
    for slot in range(64):
        slots.record(slot).fill_(slot)
    full = resident()
    assert full > before + 60 * MB
    slots.resize(16)
    assert resident() < full - 40 * MB
    assert slots.capacity == 16
    for slot in range(16):
        assert (slots.record(slot) == slot).all(), "the slots that stay keep their bytes"
    with pytest.raises(IndexError):
        slots.record(16)
    slots.resize(0)
    assert resident() < before + 16 * MB


def test_shrinking_never_touches_a_slot_that_stays_even_off_the_page_grid(monkeypatch):
    monkeypatch.setattr(mmap, "PAGESIZE", 16_384)  # as on a Mac; a record is smaller than a page there
    slots = RamSlots(9, 4096)
    for slot in range(9):
        slots.record(slot).fill_(slot + 1)
    for capacity in (7, 5, 2, 1):
        slots.resize(capacity)
        assert [int(slots.record(slot)[0]) for slot in range(capacity)] == list(range(1, capacity + 1))
        assert all((slots.record(slot) == slot + 1).all() for slot in range(capacity))


def test_slots_that_were_given_back_can_be_used_again():
    slots = RamSlots(8, RECORD)
    slots.record(7).fill_(9)
    slots.resize(3)
    slots.resize(8)
    slots.record(7).fill_(5)
    assert (slots.record(7) == 5).all()
    assert slots.capacity == 8


def test_slots_never_grow_beyond_what_they_were_made_with():
    with pytest.raises(AssertionError):
        RamSlots(2, RECORD).resize(3)


def test_memory_goes_back_when_the_slots_go():
    gc.collect()
    before = resident()
    slots = RamSlots(64, MB)
    for slot in range(64):
        slots.record(slot).fill_(1)
    assert resident() > before + 60 * MB
    del slots
    gc.collect()
    assert resident() < before + 16 * MB
