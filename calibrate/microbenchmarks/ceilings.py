"""The two ceilings of a device, measured: memory bandwidth by a large copy inside it, operations by a large matrix
product.

Modelled: bytes of a copy are those read plus those written. Ignored: anything an expert kernel does.
"""

from __future__ import annotations

import torch

from ...base.units import MIB
from ...devices.device import Device
from .harness import Bench

_DTYPES = {"float32": torch.float32, "float16": torch.bfloat16}


def ceiling_benches(device: Device, *, copy_bytes: int, side: int) -> list[Bench]:
    """Return benches of a copy of `copy_bytes` inside device memory and of products of square matrices of `side`."""
    source = torch.ones(copy_bytes // 4, device=device.place)
    target = torch.zeros_like(source)
    found = [
        Bench(
            kind="memory",
            labels={},
            arguments={"bytes": 2 * source.numel() * 4},
            run=lambda _: target.copy_(source, non_blocking=True),
        )
    ]
    for name, dtype in _DTYPES.items():
        left = torch.randn(side, side, device=device.place).to(dtype)
        out = torch.empty_like(left)

        def run(_: int, left: torch.Tensor = left, out: torch.Tensor = out) -> torch.Tensor:
            return torch.mm(left, left, out=out)

        arguments = {"rows": side, "columns": side, "inner": side}
        found.append(Bench(kind="matmul", labels={"dtype": name}, arguments=arguments, run=run))
    return found


def sizes_for(device: Device, *, quick: bool) -> tuple[int, int]:
    """Return (bytes of the copy, side of the matrices) large enough for the device."""
    if device.kind == "cuda":
        return 1024 * MIB, 8192
    return (64 * MIB, 512) if quick else (128 * MIB, 1024)
