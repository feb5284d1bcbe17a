"""The demo's own model: the checkpoint it writes, and what it says three measured schedules teach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moeplan.commands.parts import own_model


def measured(name: str, repeats: list[float], predicted: float, wide: float = 0.2) -> dict[str, Any]:
    step = sorted(repeats)[len(repeats) // 2]
    return {
        "name": name, "measured_step_s": step, "repeats_s": repeats, "predicted_step_s": predicted,
        "interval_s": [predicted * (1 - wide), predicted * (1 + wide)], "relative_error": predicted / step - 1,
    }  # fmt: skip


def test_schedules_that_their_runs_cannot_tell_apart_are_said_to_be_equal() -> None:
    said = own_model.learnt([
        measured("b", [0.0104, 0.0098, 0.0102], 0.0101),
        measured("a", [0.0100, 0.0099, 0.0103], 0.0103),
        measured("c", [0.0150, 0.0151, 0.0149], 0.0110),
    ])  # fmt: skip
    assert said == [
        "a took 10.00 ms a token",
        "b cannot be told apart from it on this machine: 2% more, and single repetitions of one schedule differ by up to 6%",
        "c took 50% more, in every repetition",
        "the prediction had named b, which is as fast as can be told",
        "predicted times were off by 27% at most, and 2 of 3 lie within their intervals",
    ]


@pytest.mark.parametrize(
    ("predicted", "said"),
    [(0.009, "the prediction had named the fastest"), (0.02, "the prediction had named slow: trusting it costs 50%")],
)
def test_what_trusting_the_prediction_costs(predicted: float, said: str) -> None:
    assert said in own_model.learnt([measured("fast", [0.010], predicted), measured("slow", [0.015], 0.0095)])


def test_the_small_model_is_written_as_a_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    if not own_model.available():
        pytest.skip("an installed package brings no weights")
    from moeplan.executor.model.loading.assembly import described
    from moeplan.specs.models.load import load_model

    spec, files, _ = described(own_model.checkpoint(tmp_path))
    bundled = load_model("tiny-moe")
    shape = ("num_moe_layers", "num_experts", "hidden_size", "expert_intermediate_size", "top_k")
    assert all(getattr(spec, name) == getattr(bundled, name) for name in shape)
    assert files.num_bytes_of_the_rest(4) > 0
    assert all(len(path.read_bytes()) > 100 for path in own_model.texts(tmp_path))
