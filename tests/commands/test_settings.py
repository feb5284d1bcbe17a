"""`--set`: every constant of a machine and field of a model can be set in its own units, and what was set stands in the document."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration_samples import lawful_samples
from moeplan.api.settings import machine_keys, split_settings
from moeplan.base.errors import InputError
from moeplan.base.units import parse_quantity, unit_of
from moeplan.calibrate.fitting.fit import fit_profile
from moeplan.cli import main
from moeplan.specs.machines.profile import Constant
from moeplan.specs.machines.profile_file import load_hardware
from moeplan.specs.models.load import load_model
from moeplan.specs.schedules.offload import WorkloadOptions

MACHINES = [load_hardware(name) for name in ("t4", "rtx-4090", "h800-sxm")]
MODEL = load_model("deepseek-v2-lite")
# A value of each unit, and what it is.
WRITTEN = {
    "bytes": ("3GiB", 3 * 2**30), "bytes/s": ("2.5GB/s", 2.5e9), "FLOP/s": ("7TFLOP/s", 7e12), "s": ("5us", 5e-6),
    "share": ("50%", 0.5), "number": ("12", 12.0),
}  # fmt: skip


def constants(profile) -> dict[str, Constant]:
    return dict(profile.constants())


@given(st.sampled_from(MACHINES), st.data())
def test_every_constant_can_be_set_in_its_unit_and_says_so(machine, data):
    key = data.draw(st.sampled_from(sorted(constants(machine))))
    text, value = WRITTEN[unit_of(key)]
    settings = split_settings([f"machine.{key}={text}"])
    changed = settings.changed_machine(machine)
    was = constants(machine)[key]
    now = constants(changed)[key]
    assert (now.value, now.source, now.relative_uncertainty) == (value, "set by the user", 0.0)
    assert was.citation in now.citation and f"--set machine.{key}={text}" in now.citation
    assert {name: one for name, one in constants(changed).items() if name != key} == {
        name: one for name, one in constants(machine).items() if name != key
    }
    assert settings.made == [{"setting": f"machine.{key}={text}", "key": f"machine.{key}", "value": value, "was": was.value,
                              "source": "set by the user"}]  # fmt: skip


@given(st.sampled_from(MACHINES), st.data())
def test_wrong_values_and_keys_are_one_line(machine, data):
    key = data.draw(st.sampled_from(sorted(constants(machine))))
    value = data.draw(st.sampled_from(["", "-1", "nan", "inf", "1e999", "3 parsecs", "x", "9" * 400, "1GB/s/s"]))
    with pytest.raises(InputError) as told:
        split_settings([f"machine.{key}={value}"]).changed_machine(machine)
    assert f"machine.{key}" in str(told.value) and "\n" not in str(told.value)
    wrong = key[:-2] + key[-1]
    if wrong not in machine_keys(machine):
        with pytest.raises(InputError, match="did you mean 'machine") as told:
            split_settings([f"machine.{wrong}=1"]).changed_machine(machine)
        assert len(str(told.value)) < 300


def test_a_part_that_is_absent_needs_all_of_its_constants():
    t4 = load_hardware("t4")
    with pytest.raises(InputError, match=r"t4 has no disk; set machine\.disk\.latency_s too"):
        split_settings(["machine.disk.read_bytes_per_s=3GB/s"]).changed_machine(t4)
    settings = split_settings(["machine.disk.read_bytes_per_s=3GB/s", "machine.disk.latency_s=80us"])
    disk = settings.changed_machine(t4).disk
    assert disk is not None and (disk.read_bytes_per_s.value, disk.latency_s.value) == (3e9, 80e-6)
    assert [one["was"] for one in settings.made] == [None, None]
    node = [
        "machine.node.num_gpus=4",
        "machine.node.gpu_link_bytes_per_s=25GB/s",
        "machine.node.gpu_link_latency_s=3us",
    ]
    changed = split_settings(node).changed_machine(t4)
    assert changed.node is not None and changed.node.num_gpus == 4 and changed.node.nic_bytes_per_s is None


def test_what_a_measured_table_replaces_is_not_set_for_nothing():
    measured = fit_profile(lawful_samples()).profile
    for key in ("device.memory_bytes_per_s=1GB/s", "host_to_device.pinned_bytes_per_s=1GB/s", "device.launch_s=1us"):
        with pytest.raises(InputError, match="stands in place of this constant"):
            split_settings([f"machine.{key}"]).changed_machine(measured)
    assert split_settings(["machine.host.per_layer_s=1ms"]).changed_machine(measured).host.per_layer_s.value == 1e-3


def test_fields_of_a_model_are_typed():
    settings = split_settings(
        ["model.num_shared_experts=0", "model.native_bits=4", "model.tied_embeddings=true", "model.sliding_window=none"]
    )
    changed = settings.changed_model(MODEL)
    assert changed == dataclasses.replace(
        MODEL, num_shared_experts=0, native_bits="4", tied_embeddings=True, sliding_window=None
    )
    assert [one["was"] for one in settings.made] == [2, "16", False, None]
    assert split_settings(["model.moe_layers=1, 2,3"]).changed_model(MODEL).moe_layers == (1, 2, 3)
    for wrong, words in (
        ("top_k=99", "model.top_k"), ("top_k=-1", "model.top_k"), ("top_k=2.5", "not a whole number"),
        ("native_bits=5", "model.native_bits"),
        ("num_layers=100000", "4096"), ("num_layers=0", "model.num_layers"), ("tied_embeddings=maybe", "true or false"),
        ("topk=4", "did you mean 'model.top_k'"), ("name=x", "not one of"), ("hidden_size=" + "9" * 5000, "not a whole number"),
    ):  # fmt: skip
        with pytest.raises(InputError) as told:
            split_settings([f"model.{wrong}"]).changed_model(MODEL)
        assert words in str(told.value)


def test_requests_are_typed_and_not_said_twice():
    settings = split_settings(["request.concurrency=8", "request.prefill_chunk_tokens=64"])
    assert settings.changed_request(WorkloadOptions()) == WorkloadOptions(concurrency=8, prefill_chunk_tokens=64)
    with pytest.raises(InputError, match="--concurrency says it already"):
        settings.changed_request(WorkloadOptions(), {"concurrency": "--concurrency"})


@pytest.mark.parametrize(
    ("texts", "words"),
    [(["machine.host.memory_bytes"], "key=value"), (["=3"], "key=value"), (["a=1", "a=2"], "given twice"),
     (["machine.x=1", "machine.x=1"], "given twice")],
)  # fmt: skip
def test_forms_that_are_no_setting(texts, words):
    with pytest.raises(InputError, match=words):
        split_settings(texts)


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [("24GB/s", "bytes/s", 24e9), ("1 GiB/s", "bytes/s", 2**30), ("200Gbit/s", "bytes/s", 25e9), ("1e9", "bytes/s", 1e9),
     ("5µs", "s", 5e-6), ("5\N{GREEK SMALL LETTER MU}s", "s", 5e-6), (".5ms", "s", 5e-4), ("165.2TFLOPS", "FLOP/s", 165.2e12),
     ("90 %", "share", 0.9), ("0.9", "share", 0.9), ("16", "number", 16)],
)  # fmt: skip
def test_quantities(text, unit, value):
    assert parse_quantity(text, unit, "x") == value


def test_the_document_says_what_was_set(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*settings: str, text: bool = False) -> str:
        given = [word for one in settings for word in ("--set", one)]
        arguments = [
            "simulate",
            "--model",
            "tiny-moe",
            "--hardware",
            "t4",
            "--trace",
            "bundled",
            "--window",
            "12",
            *given,
        ]
        monkeypatch.setattr(sys, "argv", ["moeplan", *arguments, *([] if text else ["--json"])])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code
        return capsys.readouterr().out

    plain = json.loads(run())
    slow = json.loads(run("machine.host_to_device.pinned_bytes_per_s=1GB/s", "cache.experts_per_layer=4"))
    assert plain["set_by_user"] == []
    assert [one["key"] for one in slow["set_by_user"]] == ["machine.host_to_device.pinned_bytes_per_s"]
    cached = json.loads(run("cache.experts_per_layer=4"))
    assert slow["makespan_ns"] > cached["makespan_ns"]
    assert "set       request.concurrency=4 (was 1)" in run("request.concurrency=4", text=True)
