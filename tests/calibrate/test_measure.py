"""A whole calibration of this machine at tiny sizes: everything a profile needs is measured, fitted and readable."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moeplan.base.errors import InputError
from moeplan.base.units import KIB, MIB
from moeplan.calibrate.costs.load import load_costs
from moeplan.calibrate.microbenchmarks.measure import Allowance, Extent, measure_device
from moeplan.calibrate.microbenchmarks.standard_shapes import cpu_models, gpu_models, made_up_model
from moeplan.calibrate.samples import read_samples
from moeplan.devices.device import CpuDevice
from moeplan.executor.calibration.calibrate import calibrate_device
from moeplan.executor.calibration.host_overheads import measure_host, random_routing, tiny_like
from moeplan.specs.machines.profile_file import load_hardware
from moeplan.specs.models import weight_format
from moeplan.specs.models.load import list_models, load_model

TINY = made_up_model("tiny", hidden=256, intermediate=64, num_layers=2, num_experts=4, vocab=64)
SMALL = Extent(
    expert_tokens=(1, 4, 16), group_tokens=(1, 4), group_experts=(2, 3), pass_tokens=(1, 4), contexts=(16,),
    copy_bytes=(4 * KIB, 64 * KIB, MIB), passes=2, rounds=2, repetitions=1, disk=True,
)  # fmt: skip


def test_a_calibration_measures_fits_and_writes_what_predictions_need(tmp_path: Path) -> None:
    out = tmp_path / "here.json"
    found = calibrate_device("cpu", models=[TINY], bits=("32", "4"), out=out, extent=SMALL)
    assert {path.name for path in tmp_path.iterdir()} == {"here.json", "here.samples.json"}
    profile = load_hardware(out)
    costs = load_costs(profile, TINY)
    estimates = [
        costs.expert_kernel(2, weight_format("32")), costs.grouped_item(3, weight_format("4")), costs.grouped_base(), costs.head(1),
        costs.dense_layer(0, 4, 64, 4), costs.host_to_device(100_000), costs.device_to_host(100_000), costs.disk_to_host(100_000),
        costs.host_per_layer(), costs.host_per_step(), costs.host_per_transfer(), costs.host_per_kernel(),
    ]  # fmt: skip
    assert all(estimate.seconds > 0 and estimate.source == "measured" for estimate in estimates)
    assert {"compute/h2d", "h2d/compute", "h2d/d2h", "d2h/h2d"} <= set(profile.contention)
    samples = read_samples(tmp_path / "here.samples.json")
    assert samples == found.samples
    assert {
        "expert",
        "grouped",
        "dense",
        "head",
        "copy",
        "copy_piece",
        "copy_while",
        "expert_while",
        "disk",
        "host",
    } <= {s.kind for s in samples}
    # What was measured in two passes stands together, once.
    keys = [(s.kind, tuple(sorted(s.labels.items())), tuple(sorted(s.arguments.items()))) for s in samples]
    assert len(set(keys)) == len(keys)
    assert {len(s.seconds) for s in samples.of("expert")} == {2 * 2 * 1}
    document = json.loads(json.dumps(found.to_dict(str(out))))
    assert document["num_samples"] == sum(len(s.seconds) for s in samples)
    assert document["fit"]["expert.32"]["num_points"] == 3
    assert document["device"]["kind"] == "cpu"


def test_the_engines_own_costs_are_measured_on_a_model_that_computes_nothing() -> None:
    found = {sample.labels["what"]: sample for sample in measure_host(TINY, steps=12)}
    assert {"layer", "transfer", "kernel", "step", "piece", "start"} <= set(found)
    assert all(sample.median_s < 0.05 for sample in found.values())


@pytest.mark.parametrize("name", list_models())
def test_every_bundled_model_can_be_made_tiny(name: str) -> None:
    model = load_model(name)
    tiny = tiny_like(model)
    assert (tiny.num_experts, tiny.top_k) == (model.num_experts, model.top_k)
    assert tiny.total_parameters < 1e8
    trace = random_routing(tiny, steps=3)
    assert trace.experts.shape == (3, tiny.num_moe_layers, model.top_k)


def test_standard_shapes_span_a_range() -> None:
    sizes = [model.expert_parameters for model in cpu_models()]
    assert sizes == sorted(sizes) and sizes[-1] > 3 * sizes[0]
    mixtral = gpu_models()[1]
    assert mixtral.expert_parameters == load_model("mixtral-8x7b").expert_parameters


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "tpu"}, "device"),
        ({"bits": ("5",)}, "bits"),
        ({"out": "profile.txt"}, r"\.json"),
        ({"bits": ()}, "nothing to measure"),
        ({"models": [TINY], "bits": ("mxfp4",), "extent": SMALL}, "mxfp4"),
    ],
)
def test_bad_requests_are_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, object], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        calibrate_device(**arguments)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_measuring_and_running_import_nothing_that_a_gpu_machine_may_lack() -> None:
    code = (
        "import sys, moeplan.executor.calibration.calibrate, moeplan.executor.validation.validate, moeplan.executor.running.execute\n"
        "print([name for name in ('pydantic', 'simpy', 'plotly', 'typer', 'rich', 'transformers') if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


def test_costs_and_fits_need_no_torch() -> None:
    code = (
        "import sys, moeplan.calibrate.fitting.fit, moeplan.calibrate.costs.load, moeplan.calibrate.samples\n"
        "import moeplan.calibrate.imports.nccl_tests, moeplan.calibrate.imports.nvbandwidth\n"
        "import moeplan.calibrate.fitting.all_to_all_fit, moeplan.calibrate.costs.all_to_all_table\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_a_part_leaves_unused_the_later_ones_share(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("moeplan.calibrate.microbenchmarks.measure.time.monotonic", lambda: now[0])
    allowance, given = Allowance(12.0, 6), []
    for taken, count in ((1.0, 1), (3.0, 1), (2.0, 2), (9.0, 1), (1.0, 1)):
        with allowance.part(count) as share:
            given.append(share)
            now[0] += taken
    assert given == pytest.approx([12 / 6, 11 / 5, 8 / 4, 6 / 2, 0.0])
    with Allowance(None, 3).part() as share:
        assert share is None


def test_every_part_of_a_calibration_has_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    allowances: list[Allowance] = []
    real = Allowance.__init__

    def noted(self: Allowance, seconds: float | None, parts: int) -> None:
        real(self, seconds, parts)
        allowances.append(self)

    monkeypatch.setattr(Allowance, "__init__", noted)
    device = CpuDevice()
    measure_device(device, [TINY], ("16", "4"), extent=SMALL, dtype=torch.float32, seconds=0.01)
    device.close()
    assert [each.parts for each in allowances] == [0]
