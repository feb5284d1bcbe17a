"""Models whose gates choose some layers early: what they compute, what a double buffer then fetches, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moeplan.base.errors import InputError
from moeplan.executor.model.align import recalls
from moeplan.executor.model.calibrate import model_samples
from moeplan.executor.model.figures import differences
from moeplan.executor.model.loading.pre_gates import KEY, PreGates, reads_early
from moeplan.executor.model.session import open_model, run_model, silent
from moeplan.specs.schedules.presets import load_preset

pytest.importorskip("transformers")
from tiny_models import build, save

PROMPTS = [list(b"def main():"), list(b"It was the best of times")]
PLAIN: dict[str, Any] = {"experts__bits": "32"}


def checkpoint(folder: Path, early: Any, family: str = "mixtral") -> Path:
    save(build(family), folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {KEY: early}))
    return folder


def run(folder: Path, preset: str, **options: Any) -> Any:
    with open_model(folder) as loaded:
        mine = load_preset(preset).with_options(**PLAIN | options)
        done = run_model(loaded, mine, PROMPTS, max_new_tokens=5, keep_logits=True, poison=True)
        assert differences(done, mine) == []
        return done


@torch.inference_mode()
def plainly(early: int, prompt: list[int]) -> torch.Tensor:
    """Logits of plain transformers with routers that read what earlier routers read."""
    model = build("mixtral")
    routers = [layer.mlp.gate for layer in model.model.layers]
    reads: dict[int, torch.Tensor] = {}

    def swap(column: int) -> Any:
        def hook(_: Any, given: tuple[torch.Tensor, ...]) -> Any:
            reads[column] = given[0]
            return (reads[column - early],) if column >= early else None

        return hook

    for column, router in enumerate(routers):
        router.register_forward_pre_hook(swap(column))
    return model(torch.tensor([prompt])).logits[0].float()


@pytest.mark.parametrize("early", [1, 2])
def test_routers_read_what_earlier_routers_read(early: int, tmp_path: Path) -> None:
    done = run(checkpoint(tmp_path, early), "on-demand")
    expected = plainly(early, PROMPTS[0])
    assert float((done.logits[0] - expected).abs().max()) < 1e-4
    assert float((plainly(3 - early, PROMPTS[0]) - expected).abs().max()) > 1e-2


def test_a_double_buffer_misses_in_the_first_layer_alone_and_changes_nothing(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 1)
    ahead, demanded = run(folder, "pre-gated"), run(folder, "on-demand")
    assert ahead.tokens == demanded.tokens
    assert max(float((a - b).abs().max()) for a, b in zip(ahead.logits, demanded.logits, strict=True)) < 1e-4
    used = ahead.recording.experts
    first = sum(len(np.unique(used[step, 0])) for step in _passes(ahead))
    later = sum(len(np.unique(used[step, layer])) for step in _passes(ahead) for layer in range(1, used.shape[1]))
    assert (ahead.counts.misses, ahead.counts.prefetches, ahead.counts.prefetches_used) == (first, later, later)


def _passes(done: Any) -> list[Any]:
    """Rows of the recording by pass: a prompt, then one token after the other."""
    found, row = [], 0
    for prompt, tokens in zip(done.prompts, done.tokens, strict=True):
        sizes = [prompt] + [1] * (len(tokens) - 1)
        for size in sizes:
            found.append(slice(row, row + size))
            row += size
    return found


def test_routers_are_given_back() -> None:
    routers = [layer.mlp.gate for layer in build("mixtral").model.layers]
    PreGates(routers, 1).undo()
    assert not any(map(reads_early, routers))


def test_nothing_is_guessed_for_gates_that_choose_early(tmp_path: Path) -> None:
    with open_model(checkpoint(tmp_path, 1)) as loaded, pytest.raises(InputError, match="nothing to guess"):
        recalls(loaded, [list(range(64))], distance=1, widths=[2], length=32, gates=None, progress=silent)


@pytest.mark.parametrize(
    ("early", "preset", "options", "said"),
    [
        (0, "pre-gated", {}, "not fine-tuned"),
        (1, "mixtral-offloading", {"cache__experts_per_layer": 3}, "nothing to guess"),
        (2, "pre-gated", {}, "only one layer"),
        (3, "on-demand", {}, "moeplan_pre_gate"),
        ("one", "on-demand", {}, "moeplan_pre_gate"),
    ],
)
def test_what_gates_cannot_do_is_refused(early: Any, preset: str, options: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        run(checkpoint(tmp_path, early), preset, **options)


@pytest.mark.parametrize("early", [1, 2])
def test_such_a_model_is_calibrated_by_its_own_runs(early: int, tmp_path: Path) -> None:
    with open_model(checkpoint(tmp_path, early)) as loaded:
        found = model_samples(loaded, [list(range(40))], ["32"], longest_prompt=24, progress=silent)
    assert {"run_expert", "run_dense", "run_copy", "host"} <= {sample.kind for sample in found}


def test_a_link_as_slow_as_the_disk_is_calibrated_too(tmp_path: Path) -> None:
    with open_model(save(build("mixtral"), tmp_path)) as loaded:
        loaded.copy_from_disk("2")
        found = model_samples(loaded, [list(range(40))], ["2"], longest_prompt=24, progress=silent)
        mine = load_preset("mixtral-offloading-code").with_options(
            experts__bits="2", cache__experts_per_layer=3, copy__write_back=False
        )
        done = run_model(loaded, mine, PROMPTS, max_new_tokens=3)
    assert any(sample.kind == "run_copy" for sample in found) and differences(done, mine) == []
