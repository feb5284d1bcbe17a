"""Checks of the tensors a kernel is called with: a wrong shape, type, place or stride is one line, not a fault on a device.

Modelled: everything that can be told without waiting for the device. Ignored: values that live on a GPU (expert numbers out of
range there are the caller's promise); on the CPU those are checked too.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..base.errors import InputError

FLOATS = (torch.bfloat16, torch.float16)
"""Types that activations of the GPU kernels may have."""


def described(tensor: torch.Tensor) -> str:
    """Return type, shape and place of a tensor, as messages show it."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} on {tensor.device}"


def check_shape(field: str, tensor: torch.Tensor, shape: tuple[int | None, ...], rule: str) -> None:
    """Return nothing; raises InputError unless `tensor` has `shape`, None standing for any size."""
    fits = tensor.dim() == len(shape) and all(
        want in (None, size) for want, size in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
        raise InputError(field, described(tensor), f"its shape is {wanted}: {rule}", "check how it was made")


def check_dtype(field: str, tensor: torch.Tensor, dtypes: Iterable[torch.dtype]) -> None:
    """Return nothing; raises InputError unless the type of `tensor` is one of `dtypes`."""
    allowed = tuple(dtypes)
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise InputError(field, described(tensor), f"its type is one of: {names}", "convert it first")


def check_rows_contiguous(field: str, tensor: torch.Tensor) -> None:
    """Return nothing; raises InputError unless neighbouring values of the last dimension are neighbours in memory."""
    if tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise InputError(field, described(tensor), "rows are contiguous in memory", "call .contiguous()")


def check_same_device(field: str, tensor: torch.Tensor, device: torch.device) -> None:
    """Return nothing; raises InputError unless `tensor` lies on `device`."""
    if tensor.device != device:
        raise InputError(field, described(tensor), f"everything of one call lies on {device}", "move it there")


def check_runnable(kernel: object, device: torch.device) -> None:
    """Return nothing; raises InputError where `kernel` is compiled for a GPU and `device` is none.

    In Triton's interpreter (TRITON_INTERPRET=1 before triton is first imported) any device will do.
    """
    if device.type != "cuda" and type(kernel).__name__ == "JITFunction":
        raise InputError(
            "device",
            str(device),
            "Triton kernels run on a GPU",
            "use moeplan.kernels.cpu, or set TRITON_INTERPRET=1 before Python starts",
        )


def check_output(
    field: str, out: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Return `out`, or a new uninitialised tensor where it is None; raises InputError for an `out` that does not fit."""
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    check_shape(field, out, shape, "rows of the result")
    check_dtype(field, out, (dtype,))
    check_same_device(field, out, device)
    check_rows_contiguous(field, out)
    return out
