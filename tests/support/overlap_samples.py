"""Runs of one layer's experts on a GPU that never was, with ratios that are known."""

from __future__ import annotations

from moeplan.calibrate.samples import Sample

ROWS = (16.0, 256.0, 4096.0)
DENSE = (1.6, 1.1, 0.8)
LAUNCHES = {2.0: 1.1, 4.0: 1.3}
SHARES = {0.75: 1.2, 0.5: 1.9}


def layer_samples() -> list[Sample]:
    """Return runs of a layer whose ratios are those above."""
    found = []

    def add(kernel: str, rows: float, seconds: float, launches: float = 1.0, share: float = 1.0) -> None:
        arguments = {"rows": rows, "experts": 8.0, "launches": launches, "share": share}
        found.append(
            Sample(kind="layer_experts", labels={"kernel": kernel}, arguments=arguments, seconds=(seconds,) * 3)
        )

    for rows, ratio in zip(ROWS, DENSE, strict=True):
        whole = 1e-4 + rows * 1e-6
        add("grouped", rows, whole)
        add("dense", rows, whole * ratio)
        for launches, longer in LAUNCHES.items():
            add("grouped", rows, whole * longer, launches=launches)
        for share, longer in SHARES.items():
            add("grouped", rows, whole * longer, share=share)
    for what, seconds in (("products", 1.0), ("copies", 1.5), ("together", 1.75)):
        arguments = {"rows": 256.0, "experts": 8.0, "bytes": 1e9}
        found.append(Sample(kind="layer_beside", labels={"what": what}, arguments=arguments, seconds=(seconds,)))
    return found
