"""Launch configurations as data: found by device, shape and nearest rows; saved whole; searched with any measure."""

from __future__ import annotations

import itertools
import json

import pytest

from moeplan.base.errors import InputError
from moeplan.kernels import tuning
from moeplan.kernels.tuning import (
    KERNELS,
    DequantConfig,
    GroupedConfig,
    TuningKey,
    device_slug,
    find_config,
    nearest_rows,
    origin,
    save_configs,
)

KEY = TuningKey(kernel="grouped_down", weights="16", num_outputs=4096, num_inputs=14336)
SMALL = GroupedConfig(block_m=16, block_n=64, block_k=128, group_m=1, num_warps=4, num_stages=4)
LARGE = GroupedConfig(
    block_m=128, block_n=256, block_k=64, group_m=8, num_warps=8, num_stages=4, descriptors=True, programs_per_sm=1
)
SPLIT = DequantConfig(block_m=8, block_n=32, split_k=4, num_warps=2, num_stages=4, scale_first=False)
H200 = "NVIDIA H200"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEPLAN_CACHE_DIR", str(tmp_path / "cache"))


def test_rows_are_near_in_ratio():
    known = {1: SMALL, 16: SMALL, 64: LARGE, 128: LARGE}
    assert [nearest_rows(rows, known) for rows in (0, 1, 3, 4, 5, 31, 33, 90, 91, 10**6)] == [
        1,
        1,
        1,
        1,
        16,
        16,
        64,
        64,
        128,
        128,
    ]


def test_every_kernel_has_a_configuration_on_every_device():
    for kernel, rows in itertools.product(KERNELS, (1, 16, 100, 5000)):
        for weights in ("16", "8") if kernel.startswith("grouped") else ("4", "3", "2"):
            key = TuningKey(kernel=kernel, weights=weights, num_outputs=100, num_inputs=100)
            for name, capability in (("cpu", None), ("NVIDIA A100-SXM4-80GB", (8, 0)), (H200, (9, 0))):
                config = find_config(key, rows, name, capability)
                assert isinstance(config, GroupedConfig if kernel.startswith("grouped") else DequantConfig)


def test_hopper_gets_its_own_and_says_that_nobody_measured_them():
    assert isinstance(found := find_config(KEY, 512, H200, (9, 0)), GroupedConfig) and found.descriptors
    assert isinstance(found := find_config(KEY, 512, "NVIDIA L40S", (8, 9)), GroupedConfig) and not found.descriptors
    assert origin(H200, (9, 0)) == "reasoned (sm_90.json)"
    assert origin("NVIDIA L40S", (8, 9)) == "reasoned (default.json)"


def test_what_a_search_found_comes_first_for_its_shape_and_device_only():
    other = TuningKey(kernel="grouped_down", weights="16", num_outputs=4096, num_inputs=4096)
    before = find_config(other, 512, H200, (9, 0))
    path = save_configs({KEY: {512: SMALL}}, H200, note="a test")
    assert path == tuning.cache_folder() / "NVIDIA_H200.json"
    assert find_config(KEY, 512, H200, (9, 0)) == SMALL
    assert find_config(KEY, 512, "NVIDIA H100 80GB HBM3", (9, 0)) != SMALL
    assert find_config(other, 512, H200, (9, 0)) == before
    assert origin(H200, (9, 0)) == "measured (NVIDIA_H200.json)"


def test_saving_again_adds_and_replaces():
    dequant = TuningKey(kernel="dequant_down", weights="4", num_outputs=64, num_inputs=256)
    save_configs({KEY: {1: SMALL, 512: SMALL}}, H200, note="first")
    path = save_configs({KEY: {512: LARGE}, dequant: {1: SPLIT}}, H200, note="second")
    assert [find_config(KEY, rows, H200) for rows in (1, 512)] == [SMALL, LARGE]
    assert find_config(dequant, 7, H200) == SPLIT
    document = json.loads(path.read_text())
    assert {name: document[name] for name in ("schema_version", "device", "origin", "note")} == {
        "schema_version": 1, "device": H200, "origin": "measured", "note": "second",
    }  # fmt: skip
    assert list(path.parent.iterdir()) == [path]  # nothing is left beside it


def test_file_names_of_devices():
    assert device_slug("NVIDIA H200") == "NVIDIA_H200"
    assert device_slug("NVIDIA GeForce RTX 4090 (Laptop)/x") == "NVIDIA_GeForce_RTX_4090_Laptop_x"


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "[]",
        '{"schema_version": 2, "entries": []}',
        '{"schema_version": 1}',
        '{"schema_version": 1, "entries": [{"kernel": "grouped_down"}]}',
        json.dumps({"schema_version": 1, "entries": [
            {"kernel": "grouped_down", "weights": "16", "num_outputs": 1, "num_inputs": 1, "rows": {"1": {"block_m": 16}}}]}),
        json.dumps({"schema_version": 1, "entries": [
            {"kernel": "grouped_down", "weights": "16", "num_outputs": 1, "num_inputs": 1, "rows": {"1": {
                "block_m": 48, "block_n": 64, "block_k": 64, "group_m": 1, "num_warps": 4, "num_stages": 2}}}]}),
    ],
)  # fmt: skip
def test_broken_files_are_one_line(content):
    folder = tuning.cache_folder()
    folder.mkdir(parents=True)
    (folder / "NVIDIA_H200.json").write_text(content)
    with pytest.raises(InputError) as refusal:
        find_config(KEY, 1, H200)
    assert refusal.value.field == "launch configurations" and "\n" not in str(refusal.value)


def test_unknown_kernels_and_weights_are_refused():
    with pytest.raises(InputError, match="kernel"):
        find_config(TuningKey(kernel="grouped_sideways", weights="16", num_outputs=1, num_inputs=1), 1, "cpu")
    with pytest.raises(InputError, match="weights"):
        find_config(TuningKey(kernel="grouped_down", weights="4", num_outputs=1, num_inputs=1), 1, "cpu")


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(InputError) as refusal:
        save_configs({KEY: {1: SMALL}}, H200, note="", folder=blocked / "below")
    assert refusal.value.field == "output"


class TestSearch:
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")

    def test_the_fastest_right_one_wins(self):
        from moeplan.kernels.search import tune

        slow, fast, wrong, broken = (
            GroupedConfig(block_m=16, block_n=size, block_k=64, group_m=1, num_warps=4, num_stages=2)
            for size in (16, 32, 64, 128)
        )
        times = {slow: 3.0, fast: 2.0}
        ran = []

        def run(config):
            ran.append(config)
            if config == broken:
                raise RuntimeError("out of resource: shared memory")
            return self.torch.tensor(float(config == wrong))

        def measure(call):
            call()
            return times[ran[-1]]

        tuned = tune([slow, wrong, broken, fast], run, measure, lambda _, result: not result)
        assert (tuned.best, tuned.best_s) == (fast, 2.0)
        assert tuned.seconds == times
        assert tuned.refused == {wrong: "its result is wrong", broken: "RuntimeError: out of resource: shared memory"}

    def test_none_that_works_is_an_error_and_time_ends_a_search(self):
        from moeplan.kernels.search import tune

        with pytest.raises(InputError, match="none of them works"):
            tune([SMALL], lambda _: self.torch.zeros(1), lambda _: 1.0, lambda _, __: False)
        late = tune([SMALL, LARGE], lambda _: self.torch.zeros(1), lambda _: 1.0, lambda _, __: True, deadline_s=0.0)
        assert late.best == SMALL and late.refused == {LARGE: "out of time"}

    def test_candidates_fit_their_rows(self):
        from moeplan.kernels.search import candidates

        for kernel, rows, capability in itertools.product(KERNELS, (1, 8, 16, 32, 64, 512), (None, (8, 0), (9, 0))):
            for weights in ("16", "8") if kernel.startswith("grouped") else ("4", "3", "2"):
                found = candidates(
                    TuningKey(kernel=kernel, weights=weights, num_outputs=1, num_inputs=1), rows, capability
                )
                assert len(found) == len(set(found)) > 3
                for config in found:
                    tuning._check_config(config)
                    assert config.block_m <= max(2 * rows, 16)
                    if isinstance(config, GroupedConfig):
                        assert config.descriptors == (capability == (9, 0))
                    else:
                        assert config.scale_first == (rows > 16)
        with pytest.raises(InputError):
            candidates(TuningKey(kernel="x", weights="16", num_outputs=1, num_inputs=1), 1, None)
