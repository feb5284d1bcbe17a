"""Plans carry what they were made of: read back elsewhere, with the originals gone, they say the same; what was changed is noticed."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.api.load import bundled_trace_path
from moeplan.base.errors import InputError
from moeplan.cli import main
from moeplan.specs.catalog import MODELS_FOLDER
from moeplan.specs.machines.profile import Profile, profile_to_json
from moeplan.specs.machines.profile_file import list_hardware, load_hardware
from moeplan.specs.models.load import list_models, load_model
from moeplan.specs.provenance import machine_of, made_of, model_of
from moeplan.specs.schedules.parallel import load_ep_preset
from moeplan.traces.content import check_recording, recording_sha256
from moeplan.traces.format import load_recording, load_trace, save_profile, save_trace
from moeplan.traces.recording import LoadProfile

SLOW_LINK = 1.5e9  # bytes per second; the bundled machine of this name has eight times as much


def slow(profile: Profile) -> Profile:
    """Return a machine whose link to the host is slow, by the same name."""
    link = profile.host_to_device
    pinned = dataclasses.replace(link.pinned_bytes_per_s, value=SLOW_LINK, citation="measured by hand, with care")
    return dataclasses.replace(profile, host_to_device=dataclasses.replace(link, pinned_bytes_per_s=pinned))


@pytest.fixture
def moeplan(monkeypatch, capsys):
    def run(folder: Path, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["moeplan", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        shown = capsys.readouterr()
        return int(stop.value.code or 0), shown.out, shown.err

    return run


def own_things(folder: Path, *, machine: str) -> list[str]:
    """Write a model, a machine and a recording of one's own; return the options that name them."""
    folder.mkdir()
    config = json.loads((MODELS_FOLDER / "tiny-moe.json").read_text()) | {"vocab_size": 300}
    (folder / "mine.json").write_text(json.dumps(config))
    (folder / f"{machine}.json").write_text(profile_to_json(slow(load_hardware(machine))))
    return ["--model", "mine.json", "--hardware", f"{machine}.json", "--trace", "mine.safetensors"]


def test_an_offload_plan_is_read_elsewhere_with_the_originals_gone(moeplan, tmp_path):
    home, away = tmp_path / "home", tmp_path / "away"
    case = own_things(home, machine="t4")
    away.mkdir()
    (home / "mine.safetensors").write_bytes(bundled_trace_path().read_bytes())
    status, _, said = moeplan(home, "plan", *case, "--window", "12", "--memory", "436MiB", "-o", "../away/p.json")
    assert status == 0, said
    (home / "mine.safetensors").rename(away / "moved.safetensors")
    (home / "mine.json").unlink()
    (home / "t4.json").unlink()
    document = json.loads((away / "p.json").read_text())
    assert (
        document["machine"]["profile"]["host_to_device"]["pinned_bytes_per_s"]["citation"]
        == "measured by hand, with care"
    )
    # The figures of the page are those of one's own machine, not of the bundled one with its name.
    status, _, said = moeplan(
        away, "report", "p.json", "--trace", "moved.safetensors", "-o", "r.html", "--timeline", "t.json"
    )
    assert status == 0, said
    assert "measured by hand, with care" in (away / "r.html").read_text()
    status, _, said = moeplan(away, "emit", "p.json", "--target", "llamacpp", "-o", "files")
    assert status == 0 and "for mine," in (away / "files" / "NOTES.txt").read_text(), said
    # Another recording of the same model is named, and so is a plan without what it was made of.
    recording = load_trace(bundled_trace_path())
    flipped = dataclasses.replace(
        recording, experts=recording.experts[:, :, ::-1], source="flipped by hand", weights=None
    )
    save_trace(flipped, away / "flipped.safetensors")
    status, _, said = moeplan(away, "report", "p.json", "--trace", "flipped.safetensors", "-o", "f.html")
    assert (status, said.count("\n")) == (2, 1) and "flipped by hand" in said and "--trace" in said
    old = {key: value for key, value in document.items() if key not in ("model", "machine")}
    (away / "old.json").write_text(json.dumps(old))
    for command in (
        ["report", "old.json", "--trace", "moved.safetensors"],
        ["emit", "old.json", "--target", "llamacpp"],
    ):
        status, _, said = moeplan(away, *command, "-o", "o")
        assert (status, said.count("\n")) == (2, 1) and "before plans carried their model" in said
    assert not (away / "o").exists() and not (away / "f.html").exists()


def test_an_expert_parallel_plan_is_read_elsewhere_with_the_originals_gone(moeplan, tmp_path):
    home, away = tmp_path / "home", tmp_path / "away"
    case = own_things(home, machine="h800-sxm")
    away.mkdir()
    model = load_model("tiny-moe")
    for seed, name in enumerate(("mine", "other")):
        counts = np.random.default_rng(seed).integers(1, 1000, (model.num_moe_layers, model.num_experts))
        loads = LoadProfile(counts=counts, model="tiny-moe", layer_ids=model.moe_layers, source=f"drawn {seed}", licence="",
                            top_k=model.top_k)  # fmt: skip
        save_profile(loads, (home if name == "mine" else away) / f"{name}.safetensors")
    ranks = ["--mode", "ep", "--nodes", "1", "--ranks-per-node", "2"]
    status, _, said = moeplan(home, "plan", *case, *ranks, "-o", "../away/p.json")
    assert status == 0, said
    for path in home.iterdir():
        path.rename(away / "mine.safetensors") if path.suffix == ".safetensors" else path.unlink()
    status, _, said = moeplan(away, "report", "p.json", "--trace", "mine.safetensors", "-o", "r.html")
    assert status == 0 and "measured by hand, with care" in (away / "r.html").read_text(), said
    document = json.loads((away / "p.json").read_text())
    document["best"]["schedule"] = load_ep_preset("ep").to_dict()  # tensor parallelism is best for so small a model
    (away / "ep.json").write_text(json.dumps(document))
    status, _, said = moeplan(away, "emit", "ep.json", "--target", "sglang", "-o", "files")
    assert status == 0 and "for mine," in (away / "files" / "NOTES.txt").read_text(), said
    status, _, said = moeplan(away, "report", "p.json", "--trace", "other.safetensors", "-o", "o.html")
    assert (status, said.count("\n")) == (2, 1) and "drawn 1" in said and "drawn 0" in said


@pytest.mark.parametrize("model", list_models())
def test_every_bundled_model_comes_back(model):
    document = json.loads(json.dumps(made_of(load_model(model), load_hardware("t4"))))
    assert model_of(document) == load_model(model)


@pytest.mark.parametrize("machine", list_hardware())
def test_every_bundled_machine_comes_back(machine):
    document = json.loads(json.dumps(made_of(load_model("tiny-moe"), load_hardware(machine))))
    assert machine_of(document) == load_hardware(machine)


PLAIN = made_of(load_model("tiny-moe"), load_hardware("t4"))


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all plain values of a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [leaf for key, one in items for leaf in leaves(one, (*path, key))]
    return found if isinstance(value, (dict, list)) else [path]


@given(st.sampled_from(leaves(json.loads(json.dumps(PLAIN)))), st.sampled_from([None, 7, -1.5, "other", [], {}, True]))
def test_whatever_is_changed_by_hand_is_noticed(path, value):
    document = json.loads(json.dumps(PLAIN))
    part = document
    for key in path[:-1]:
        part = part[key]
    if type(part[path[-1]]) is type(value) and part[path[-1]] == value:
        return
    part[path[-1]] = value
    with pytest.raises(InputError, match=f"plan: {path[0]}"):
        (model_of if path[0] == "model" else machine_of)(document)


def test_a_recording_is_its_values_and_not_its_names(tmp_path):
    trace = load_trace(bundled_trace_path())
    renamed = dataclasses.replace(trace, source="elsewhere", model="x", licence="", metadata={})
    save_trace(renamed, tmp_path / "renamed.safetensors")
    assert recording_sha256(load_recording(tmp_path / "renamed.safetensors")) == recording_sha256(trace)
    changed = {
        "experts": np.where(np.arange(trace.num_tokens)[:, None, None] == trace.num_tokens - 1, trace.experts[:, :, ::-1], trace.experts),
        "position": trace.position + np.int32(1),
        "layer_ids": tuple(layer + 1 for layer in trace.layer_ids),
        "num_experts": trace.num_experts + 1,
        "predicted": None,
    }  # fmt: skip
    hashes = {recording_sha256(dataclasses.replace(trace, **{name: value})) for name, value in changed.items()}
    assert len(hashes | {recording_sha256(trace)}) == len(changed) + 1


@pytest.mark.parametrize("document", [{}, {"provenance": 3}, {"provenance": {"trace": {"sha256": 5}}}])
def test_a_plan_that_does_not_know_its_recording_is_one_line(document):
    with pytest.raises(InputError, match="before plans knew their recording"):
        check_recording(document, load_trace(bundled_trace_path()), "bundled")
