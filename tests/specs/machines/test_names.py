"""Names of parts: what people, shops and operating systems write is found, and nothing else is."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moeplan.base.errors import InputError
from moeplan.base.units import GIB
from moeplan.specs.machines.catalogue import cpu_parts, find_cpu, find_gpu, gpu_parts, known_cpu, known_gpu
from moeplan.specs.machines.compose import compose_text
from moeplan.specs.machines.notation import describe_parts, is_parts, parse_parts
from moeplan.specs.machines.parts import parse_memory, settled_memory


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("NVIDIA GeForce RTX 4090", "rtx-4090"), ("NVIDIA GeForce RTX 4090 48GB", "rtx-4090-48gb"), ("4090", "rtx-4090"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"), ("A100 PCIe 40GB", "a100-pcie-40gb"), ("NVIDIA H100 80GB HBM3", "h100-sxm5-80gb"),
        ("NVIDIA RTX PRO 6000 Blackwell", "rtx-pro-6000"), ("AMD Radeon 8060S (Strix Halo, unified memory)", "strix-halo"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtx-pro-6000"), ("RTX PRO 6000 Blackwell Workstation", "rtx-pro-6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "rtx-pro-6000-max-q"), ("AI Max+ 395", "strix-halo"),
        ("Apple M4 Pro (unified memory)", "apple-m4-pro"), ("NVIDIA GeForce RTX 3090 Ti", "rtx-3090-ti"), ("H100-80GB", "h100-sxm5-80gb"),
        ("3090 Ti", "rtx-3090-ti"), ("3090ti", "rtx-3090-ti"), ("NVIDIA GeForce RTX 4070 Laptop GPU", "rtx-4070-mobile"),
        ("RTX 4060 Ti 16GB", "rtx-4060-ti-16gb"), ("RTX 4060 Ti 8GB", "rtx-4060-ti"), ("RTX 3060 12GB", "rtx-3060"),
        ("7900xtx", "rx-7900-xtx"),
        ("AMD Radeon AI PRO R9700", "radeon-ai-pro-r9700"), ("Radeon RX 7900 XTX", "rx-7900-xtx"),
        ("Intel(R) Arc(TM) A770 Graphics", "arc-a770"),
        ("Quadro RTX 6000", "quadro-rtx-6000"), ("RTX 6000 Ada", "rtx-6000-ada"), ("M2 Ultra 192GB", "apple-m2-ultra"),
        ("M2 Ultra 64GB", "apple-m2-ultra-64gb"), ("M4 Max 36GB", "apple-m4-max-32-core"),
        ("M2 Ultra (60-core GPU)", "apple-m2-ultra-60-core"),
        ("MacBook Pro M4 Max 64GB", "apple-m4-max-64gb"), ("DGX Spark", "gb10"),
        ("NVIDIA GeForce RTX 4090 D", "rtx-4090-d"), ("M40 24GB", "tesla-m40-24gb"),
        ],
)  # fmt: skip
def test_cards_are_found_as_people_write_them(text: str, name: str) -> None:
    assert find_gpu(text).name == name


PROCESSORS = {
    "2x AMD EPYC 9355 (16 threads used)": "epyc-9355", "Intel(R) Xeon(R) Gold 6454S": "xeon-gold-6454s", "Epyc 9654": "epyc-9654",
    "AMD Ryzen 9 7950X 16-Core Processor": "ryzen-9-7950x", "2x Xeon 8480+": "xeon-platinum-8480", "i9-13900K": "core-i9-13900k",
    "13th Gen Intel(R) Core(TM) i9-13900K": "core-i9-13900k", "5950x": "ryzen-9-5950x", "9800x3d": "ryzen-7-9800x3d",
    "Intel(R) Xeon(R) CPU E5-2680 v4 @ 2.40GHz": "xeon-e5-2680-v4", "E5-2690v4": "xeon-e5-2690-v4", "Xeon w9-3495X": "xeon-w9-3495x",
    "AMD Ryzen Threadripper PRO 5975WX 32-Cores": "threadripper-pro-5975wx", "AMD EPYC 7763 64-Core Processor": "epyc-7763",
    "AMD RYZEN AI MAX+ 395 w/ Radeon 8060S": "ryzen-ai-max-395-cpu", "Intel(R) Core(TM) Ultra 9 285K": "core-ultra-9-285k",
    "AMD Ryzen 7 5700G with Radeon Graphics": "ryzen-7-5700g", "Xeon 6980P": "xeon-6980p",
        "Ampere Altra Max M128-30": "ampere-altra-max-m128",
    "NVIDIA Grace GB10 (20 Arm cores)": "gb10-cpu", "Apple M4 Pro (unified memory)": "apple-m4-pro-cpu", "Graviton4": "graviton4",
}  # fmt: skip


def test_processors_are_found_as_people_write_them() -> None:
    for text, name in PROCESSORS.items():
        assert find_cpu(text).name == name, text


@given(
    st.sampled_from(sorted(gpu_parts())),
    st.sampled_from(["laptop", "super", "max-q", "d", "sxm", "7gb", "x2", "titan"]),
)
def test_a_word_more_is_never_ignored(name: str, word: str) -> None:
    found = known_gpu(f"{name} {word}")
    assert found is None or found.name != name or word in name, found


@given(st.sampled_from(sorted(cpu_parts())), st.sampled_from(["plain", "spaces", "upper", "together"]))
def test_spelling_does_not_matter(name: str, how: str) -> None:
    spelt = {"plain": name, "spaces": name.replace("-", " "), "upper": name.upper(), "together": name.replace("-", "")}[
        how
    ]
    assert known_cpu(spelt) is cpu_parts()[name]


@pytest.mark.parametrize(
    ("text", "shared"),
    [("7900X", "core-i9-7900x or ryzen-9-7900x"), ("7600", "rx-7600 or core-i5-7600 or ryzen-5-7600")],
)
def test_a_number_that_several_parts_have_names_them(text: str, shared: str) -> None:
    with pytest.raises(InputError, match=shared):
        parse_parts(text)


def test_unified_memory_is_written_behind_the_name() -> None:
    parts = parse_parts("M2 Ultra 64GB")
    assert (
        parts.gpu is not None and parts.gpu.memory_bytes == 64 * GIB and describe_parts(parts) == "apple-m2-ultra-64gb"
    )
    assert parse_parts(describe_parts(parts)) == parts
    for text, words in (
        ("M2 Ultra 100GB", "64, 128, 192"),
        ("m4-max + ddr5-5600x2:64GiB", "of its own|has its own"),
        ("m4-max + xeon-6980p", "of its own"),
    ):
        with pytest.raises(InputError, match=words):
            parse_parts(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("7950z", "ryzen-9-7950x"),
        ("RTX 6000", "quadro-rtx-6000, rtx-6000-ada, rtx-pro-6000"),
        ("rtx 4091", "rtx-4090"),
        ("Xeon E5-2681 v4", "xeon-e5-2680-v4"),
    ],
)
def test_an_unknown_name_names_the_nearest(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse_parts(text)


MACHINES = {
    "2x3090": "2 x rtx-3090", "2× RTX 3090": "2 x rtx-3090", "3090 x2": "2 x rtx-3090", "dual RTX 3090": "2 x rtx-3090",
    "4090 laptop + 64GB DDR5": "rtx-4090-mobile + ddr5-5600x2:64GiB", "RTX 5080 notebook": "rtx-5080-mobile",
    "8xH200": "8 x h200-sxm", "4x RTX PRO 6000 96GB": "4 x rtx-pro-6000", "RTX 6000 Pro Blackwell 96GB": "rtx-pro-6000",
    "ASUS Ascent GX10": "gb10", "Framework Desktop (Ryzen AI Max+ 395, 128GB)": "strix-halo", "GMKtec EVO-X2 64GB": "strix-halo-64gb",
    "5090 + TR Pro 7975WX": "rtx-5090 + threadripper-pro-7975wx", "5090 + dual EPYC Milan 7763": "rtx-5090 + 2 x epyc-7763",
    "RTX 5090, 9950X, 64GB DDR5-6000": "rtx-5090 + ryzen-9-9950x + ddr5-6000x2:64GiB",
    "3090 and 5950X with 128GB DDR4": "rtx-3090 + ryzen-9-5950x + ddr4-3200x2:128GiB",
    "5090 + 9950X + 64GB": "rtx-5090 + ryzen-9-9950x + ddr5-5600x2:64GiB", "5090 + 128 GB RAM": "rtx-5090 + ddr5-5600x2:128GiB",
    "5090 + EPYC 9355 + 12x64GB DDR5-6400 ECC RDIMM": "rtx-5090 + epyc-9355 + ddr5-6400x12:768GiB",
    "5090 + EPYC 7763 + 8x 64GB DDR4 3200": "rtx-5090 + epyc-7763 + ddr4-3200x8:512GiB",
    "5090 + EPYC 9355 + 12-channel DDR5-4800 768GB": "rtx-5090 + epyc-9355 + ddr5-4800x12:768GiB",
    "5090 + EPYC 9355 + 1TB DDR5": "rtx-5090 + epyc-9355 + ddr5-6400x12:1024GiB",
    "5090 + 14900K + 4x48GB DDR5-5600": "rtx-5090 + core-i9-14900k + ddr5-5600x2:192GiB",
    "5090 + 14900K + 1x32GB DDR5-5600": "rtx-5090 + core-i9-14900k + ddr5-5600x1:32GiB",
    "5090 + ddr5-6000x2:64GB": "rtx-5090 + ddr5-6000x2:64GiB", "5090 + DDR5 6000MT/s CL30 2ch 96GB": "rtx-5090 + ddr5-6000x2:96GiB",
    "5090 + PCIe Gen4 x8": "rtx-5090 + pcie-4.0x8", "5090 + PCIe 4.0": "rtx-5090 + pcie-4.0x16", "4060 + gen3": "rtx-4060 + pcie-3.0x8",
    "3090 + NVMe 7 GB/s": "rtx-3090 + disk:7GB/s", "3090 + 3.5GB/s SSD": "rtx-3090 + disk:3.5GB/s",
    "2x3090 + NVLink": "2 x rtx-3090 + nvlink:56.25GB/s", "8x H100 + nvlink": "8 x h100-sxm5-80gb",
}  # fmt: skip


@pytest.mark.parametrize("text", MACHINES)
def test_machines_are_read_as_people_write_them(text: str) -> None:
    parts = parse_parts(text)
    assert describe_parts(parts) == MACHINES[text] and is_parts(text)
    assert parse_parts(MACHINES[text]) == parts


@given(
    st.sampled_from(["ddr4", "ddr5"]),
    st.sampled_from([(1, 16), (2, 32), (4, 32), (8, 64), (12, 96)]),
    st.sampled_from([4800, 5200]),
    st.permutations(["kind", "speed", "size"]),
    st.sampled_from([" ", ", "]),
    st.booleans(),
)
def test_memory_is_the_same_however_it_is_written(
    kind: str, sticks: tuple[int, int], speed: int, order: list[str], between: str, modules: bool
) -> None:
    """Whatever stands first, and with the modules counted as with their sum where the channels are said."""
    count, gib = sticks
    size = f"{count}x{gib}GB" if modules else f"{count * gib} GB {count}-channel"
    written = {"kind": kind.upper(), "speed": f"{speed}", "size": size}
    found = parse_memory(between.join(written[one] for one in order) + " RAM")
    assert (
        found is not None
        and found.capacity_bytes == count * gib * GIB
        and (found.kind, found.mt_per_s) == (kind, speed)
    )
    cpu = cpu_parts()["epyc-9355"]
    settled = settled_memory(found, cpu, 1)
    assert settled.channels == count and not settled.assumed


def test_what_is_not_said_of_memory_is_said_to_be_assumed() -> None:
    said = compose_text("5090 + EPYC 9355 + 384GB").description
    assert "ddr5 at 6400 million transfers a second" in said and "12 channels of memory" in said
    assert "assumed" not in compose_text("5090 + EPYC 9355 + 12x32GB DDR5-4800").description
    assert "channels of memory" in compose_text("5090 + 9950X + 64GB DDR5-6000").description


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("5090 + 64GB DDR5-6000 turbo", "turbo"), ("5090 + 64GB 128GB DDR5", "twice"), ("5090 + 64GB + 32GB", "named twice"),
        ("5090 + DDR6-9000", "catalogue"), ("5090 + nvme", "rate is not said"), ("5090 + 2 x pcie-4.0x8", "not counted"),
        ("4 x 3090 + nvlink", "joins two cards"), ("2 x 4090 + nvlink", "no connector"), ("3090 + nvlink", "joins several"),
        ("0x64GB DDR5 + 5090", "nothing"), ("M3 Ultra + 512GB", "apple-m3-ultra-512gb"), ("5090 with a 9950Z", "9950"),
        ("2x DGX Spark", "joined by a network"),
    ],
)  # fmt: skip
def test_what_is_half_said_is_one_line(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        parse_parts(text)
    assert "\n" not in str(error.value)


FRAGMENTS = (
    "rtx-4090", "2x", "dual ", " x2", "64GB", "2x32GB", "DDR5", "6000MHz", " and ", " with ", ", ", "12-channel", "nvlink", "NVMe", "gen4",
    "4090", " + ", "+", "x:memory=", "24GiB", "0GiB", "9e99GiB", "bandwidth=", "936GB/s", "1.2.3GB/s", "fp16=", "71TFLOPS",
    "1.2.3TFLOPS", ".TFLOPS", "9" * 400 + "TFLOPS", "fp8=", "pcie=", "4.0x16", "pcie-", "x16", "9.0x1", "disk:", "7GB/s", "ddr5-6000x2",
    ":64GiB", ":", "ddr5-", "x0", "x99", "2 x ", "99 x ", "0 x ", " × ", "ryzen-9-7950x", "m4-max", "64gb", "GiB", "9999gb", "(", "\n",
    "\x00", "é", "\uff18", "²", ",", "=", "backend=", "foo", "inf", "AI Max+ 395", "8480+",
)  # fmt: skip


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=9))
@example(["64gb", "²", "8480+", "GiB"])
@example(["x:memory=", "24GiB", ",", "bandwidth=", "936GB/s", ",", "fp16=", "1.2.3TFLOPS"])
@example(["x:memory=", "24GiB", ",", "bandwidth=", "936GB/s", ",", "fp16=", "9" * 400 + "TFLOPS"])
def test_whatever_is_written_is_a_machine_or_one_line(pieces: list[str]) -> None:
    try:
        parts = parse_parts("".join(pieces))
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
    else:
        assert (
            parse_parts(describe_parts(parts)) == parts or parts.gpu is None or parts.gpu.source == "given by the user"
        )
