"""Ceilings beside what people measured: nobody is above what nothing can beat."""

from __future__ import annotations

from moeplan.diagnosis.ceiling import token_bytes
from moeplan.papers.field.rows import Report, read_reports
from moeplan.papers.field.setup import NotExpressible, Setup, set_up


def ceilings(report: Report, setup: Setup) -> tuple[float, float]:
    """Return (as it is placed, whatever runs) in tokens a second, from data sheets alone."""
    read = token_bytes(setup, max(1, int(report.number("workload", "context_tokens") or 512) - 1))
    device, kind = setup.profile.device, report.part("placement").get("kind")
    fast = (setup.host_bytes_per_s if device.kind == "cpu" else None) or device.memory_bytes_per_s.value
    slow = 0.0 if device.kind == "cpu" or device.unified_memory or kind == "gpu" else setup.host_bytes_per_s or 0.0
    whatever = setup.batch * (fast + slow) / read.total
    if not slow or kind not in ("cpu-moe", "n-cpu-moe"):
        return whatever, whatever
    on_cores = read.layer * (read.layers if kind == "cpu-moe" else int(report.part("placement")["cpu_layers"]))
    return setup.batch / ((read.total - on_cores) / fast + on_cores / slow), whatever


def test_nobody_measured_more_than_a_ceiling() -> None:
    compared = 0
    for report in read_reports():
        if not report.decodes or report.num_gpus > 1:
            continue
        try:
            setup = set_up(report)
        except NotExpressible:
            continue
        as_placed, whatever = ceilings(report, setup)
        assert report.measured < as_placed <= whatever * 1.000001, report.id
        compared += 1
    assert compared > 100
