"""What one run says about noise: nothing."""

from __future__ import annotations

from typing import Any

from moeplan.executor.validation.agreement import Compared, summary


def compared(name: str, measured_s: float, again: float | None) -> Compared:
    given: dict[str, Any] = {
        "group": "g",
        "predicted_s": 1.0,
        "relative_uncertainty": 0.1,
        "tokens_per_step": 1.0,
        "count_differences": (),
    }
    return Compared(name=name, measured_s=measured_s, measured_half_s=measured_s, measured_again_s=again,
                    hit_rate_predicted=0.5, hit_rate_measured=0.5, **given)  # fmt: skip


def test_a_single_run_has_no_noise_instead_of_none_at_all() -> None:
    found = [compared("a", 1.0, None), compared("b", 1.2, None)]
    assert summary(found)["noise_floor"] is None
    assert found[0].to_dict()["noise"] is None and found[0].to_dict()["measured_interval_s"] is None
    assert summary([compared("a", 1.0, 1.1)])["noise_floor"] == abs(1.0 / 1.1 - 1)


def test_only_pairs_that_differ_by_more_than_noise_are_ordered() -> None:
    quiet = [compared("a", 1.0, 1.01), compared("b", 1.2, 1.21), compared("c", 1.5, 1.51)]
    assert summary(quiet)["num_pairs"] == 3
    unsteady = [
        quiet[0],
        quiet[1],
        compared("c", 1.5, 1.0),
    ]  # its halves differ by half: it is behind nobody for certain
    assert summary(unsteady)["num_pairs"] == 1
    alike = [compared("a", 1.0, 1.05), compared("b", 1.02, 0.97)]
    assert summary(alike)["kendall_tau"] is None and summary(alike)["num_pairs"] == 0
