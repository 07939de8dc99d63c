"""What is known of a GPU without one."""

from __future__ import annotations

import pytest
import torch
from pocketmoe.offload.device import memory_errors, ran_out
from pocketmoe.offload.errors import DeviceMemoryError


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
        "CUDA driver error: out of memory",
        "cudaErrorMemoryAllocation: unknown",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "HIP out of memory. Tried to allocate 20.00 MiB.",
        "HIP error: hipErrorOutOfMemory",
        "rocblas_status_memory_error",
        "XPU out of memory. Tried to allocate 20.00 MiB.",
        "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
        "Native API failed. Native API returns: -5 (PI_ERROR_OUT_OF_RESOURCES)",
        "Triton Error [CUDA]: out of memory",
    ],
)
def test_whoever_says_that_memory_has_run_out_is_understood(message):
    assert ran_out(RuntimeError(message))
    with pytest.raises(DeviceMemoryError, match="cuda:0 has run out of memory"), memory_errors("cuda:0"):
        raise RuntimeError(message)


def test_torch_and_we_have_types_for_it():
    assert ran_out(torch.OutOfMemoryError("")) and ran_out(DeviceMemoryError(""))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: no kernel image is available for execution on the device"),
        RuntimeError("out of resource: shared memory, Required: 147456, Hardware limit: 101376."),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (1x8 and 16x4)"),
        MemoryError("out of memory"),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_stay_what_they_are(error):
    assert not ran_out(error)
    with pytest.raises(type(error)) as raised, memory_errors("cuda:0"):
        raise error
    assert raised.value is error
