"""Detection of parts: what systems print of well-known machines becomes those machines, and what cannot be seen is listed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.base.errors import InputError
from moeplan.base.units import GIB, KIB, MIB
from moeplan.specs.machines import detect as module
from moeplan.specs.machines.catalogue import cpu_parts, gpu_parts
from moeplan.specs.machines.detect import Detected, detect
from moeplan.specs.machines.notation import check_parts, describe_parts, parse_parts

DIMM = """Handle 0x0040, DMI type 17, 92 bytes
Memory Device
\tTotal Width: 64 bits
\tData Width: {width} bits
\tSize: 16 GB
\tForm Factor: DIMM
\tLocator: DIMM_A1
\tType: {kind}
\tType Detail: Synchronous Unbuffered (Unregistered)
\tSpeed: 5600 MT/s
\tManufacturer: Samsung
\tConfigured Memory Speed: {speed} MT/s
\tConfigured Voltage: 1.1 V
"""
EMPTY = "Handle 0x0042, DMI type 17, 92 bytes\nMemory Device\n\tSize: No Module Installed\n\tType: Unknown\n\tSpeed: Unknown\n"
ROCM = """
================= ROCm System Management Interface ================
GPU[0]\t\t: VRAM Total Memory (B): {bytes}
GPU[0]\t\t: VRAM Total Used Memory (B): 27848704
GPU[0]\t\t: Card series: \t\t{name}
GPU[0]\t\t: Card model: \t\t0x0c34
GPU[0]\t\t: Card vendor: \t\tAdvanced Micro Devices, Inc. [AMD/ATI]
===================== End of ROCm SMI Log =========================
"""
LSPCI = "01:00.0 VGA compatible controller: {}\n01:00.1 Audio device: NVIDIA Corporation AD102 High Definition Audio Controller (rev a1)\n"


def cpuinfo(name: str, sockets: int, cores: int, flags: str = "fpu vme sse avx2", threads: int = 2) -> str:
    """Return /proc/cpuinfo of a machine with `cores` on each of its sockets."""
    blocks = [
        f"processor\t: {number}\nvendor_id\t: GenuineIntel\nmodel name\t: {name}\nphysical id\t: {socket}\nsiblings\t: {threads * cores}\n"
        f"core id\t\t: {core}\ncpu cores\t: {cores}\nflags\t\t: {flags}\n"
        for number, (_, socket, core) in enumerate(
            (t, s, c) for t in range(threads) for s in range(sockets) for c in range(cores)
        )
    ]
    return "\n".join(blocks)


@pytest.fixture
def computer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Return what sees a computer whose programs print the given texts."""

    def see(cpu: str | None, mem_gib: float | None = 62.7, **programs: str) -> Detected:
        if cpu is not None:
            (tmp_path / "cpuinfo").write_text(cpu, encoding="utf-8")
        if mem_gib is not None:
            (tmp_path / "meminfo").write_text(
                f"MemTotal:       {int(mem_gib * GIB / KIB)} kB\nMemFree: 1 kB\n", encoding="utf-8"
            )

        def run(*command: str) -> str | None:
            if command[0] == "sysctl":
                return programs.get(command[-1].replace(".", "_"))
            return programs.get(command[0].replace("-", "_"))

        monkeypatch.setattr(module, "_run", run)
        return detect(tmp_path)

    return see


def test_a_desktop_with_rights(computer) -> None:  # type: ignore[no-untyped-def]
    seen = computer(
        cpuinfo("AMD Ryzen 9 7950X 16-Core Processor", 1, 16), nvidia_smi="NVIDIA GeForce RTX 4090, 24564, 4, 16\n",
        dmidecode="# dmidecode 3.5\nSMBIOS 3.3.0 present.\n\n" + (DIMM.format(kind="DDR5", speed=6000, width=64) + "\n" + EMPTY) * 2,
    )  # fmt: skip
    assert describe_parts(seen.parts) == "rtx-4090 + ryzen-9-7950x + ddr5-6000x2:62GiB + pcie-4.0x16"
    assert seen.parts.gpu.memory_bytes == 24564 * MIB and seen.parts.threads is None
    assert seen.unseen == ["the disk's rate: add disk:7GB/s"]


def test_two_sockets_many_cards_and_no_rights(computer) -> None:  # type: ignore[no-untyped-def]
    seen = computer(
        cpuinfo("Intel(R) Xeon(R) Platinum 8480+", 2, 56), 1007.5,
        nvidia_smi="NVIDIA H100 80GB HBM3, 81559, 5, 16\n" * 8,
    )  # fmt: skip
    assert describe_parts(seen.parts) == "h100-sxm5-80gb + 2 x xeon-platinum-8480 + ddr5-4800x16:1007GiB + pcie-5.0x16"
    assert any("7 more cards" in line for line in seen.unseen) and any(
        "dmidecode needs rights" in line for line in seen.unseen
    )


@pytest.mark.parametrize(
    ("name", "gib", "expected"),
    [("Radeon RX 7900 XTX", 24, "rx-7900-xtx"), ("AMD Instinct MI210", 64, "mi210"), ("AMD Radeon RX 9060 XT", 8, "rx-9060-xt-8gb"),
     ("AMD Radeon PRO W7800", 48, "radeon-pro-w7800-48gb")],
)  # fmt: skip
def test_rocm_smi_tells_cards_and_sizes(computer, name: str, gib: int, expected: str) -> None:  # type: ignore[no-untyped-def]
    seen = computer(
        cpuinfo("AMD Ryzen 9 5950X 16-Core Processor", 1, 16),
        rocm_smi=ROCM.format(name=name, bytes=gib * GIB - 16 * MIB),
    )
    assert seen.parts.gpu.name == expected and seen.parts.gpu.memory_bytes == gib * GIB - 16 * MIB


def test_rocm_smi_of_a_shared_chip(computer) -> None:  # type: ignore[no-untyped-def]
    soldered = DIMM.format(kind="LPDDR5", speed=8000, width=32) * 8
    seen = computer(cpuinfo("AMD RYZEN AI MAX+ 395 w/ Radeon 8060S", 1, 16), 93.9, dmidecode=soldered,
                    rocm_smi=ROCM.format(name="Radeon 8060S Graphics", bytes=GIB // 2))  # fmt: skip
    assert seen.parts.gpu.name == "strix-halo-96gb" and seen.parts.memory is None
    assert seen.parts.cpu is not None and seen.parts.cpu.name == "ryzen-ai-max-395-cpu"


@pytest.mark.parametrize(
    ("line", "expected", "said"),
    [
        ("NVIDIA Corporation AD102 [GeForce RTX 4090] (rev a1)", "rtx-4090", None),
        ("Advanced Micro Devices, Inc. [AMD/ATI] Navi 31 [Radeon RX 7900 XT/7900 XTX/7900 GRE/7900M] (rev c8)", None,
         "rx-7900-xt, rx-7900-xtx, rx-7900-gre"),
        ("Advanced Micro Devices, Inc. [AMD/ATI] Navi 21 [Radeon RX 6900 XT] (rev c0)", "rx-6900-xt", None),
        ("Intel Corporation DG2 [Arc A770] (rev 08)", "arc-a770", None),
        ("NVIDIA Corporation AD106M [GeForce RTX 4070 Max-Q / Mobile] (rev a1)", "rtx-4070-mobile", None),
        ("ASPEED Technology, Inc. ASPEED Graphics Family (rev 52)", None, "none was recognised"),
        ("Intel Corporation Raptor Lake-S GT1 [UHD Graphics 770] (rev 04)", None, "UHD Graphics 770"),
    ],
)  # fmt: skip
def test_lspci_names_chips(computer, line: str, expected: str | None, said: str | None) -> None:  # type: ignore[no-untyped-def]
    seen = computer(cpuinfo("AMD Ryzen 9 5950X 16-Core Processor", 1, 16), lspci=LSPCI.format(line))
    assert (seen.parts.gpu.name if seen.parts.gpu is not None else None) == expected
    if said is not None:
        assert any(said in text for text in seen.unseen), seen.unseen


def test_a_virtual_machine_is_not_sixteen_sockets(computer) -> None:  # type: ignore[no-untyped-def]
    text = cpuinfo("AMD EPYC 7763 64-Core Processor", 16, 1, "fpu hypervisor avx2", threads=1)
    seen = computer(text)
    assert seen.parts.sockets == 1 and seen.parts.threads == 16 and seen.parts.memory.channels == 8
    assert any("16 are shown" in line for line in seen.unseen) and any(
        "virtual machine" in line for line in seen.unseen
    )


def test_apple_chips_are_asked_of_sysctl(computer) -> None:  # type: ignore[no-untyped-def]
    seen = computer(None, None, machdep_cpu_brand_string="Apple M2 Ultra\n", hw_memsize=f"{64 * GIB}\n")
    assert describe_parts(seen.parts) == "apple-m2-ultra-64gb"
    assert any("GPU cores" in line for line in seen.unseen)


def test_unknown_parts_are_listed_or_refused(computer) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match="Loongson"):
        computer(cpuinfo("Loongson-3A6000", 1, 4), nvidia_smi="NVIDIA Imaginary 1, 4096, 3, 16\n")
    arm = "processor\t: 0\nBogoMIPS\t: 2000.00\nCPU implementer\t: 0x41\nCPU part\t: 0xd4f\n"
    seen = computer(arm, nvidia_smi="NVIDIA GH200 480GB, 97871, [N/A], [N/A]\nbroken")
    assert seen.parts.gpu.name == "gh200-96gb" and seen.parts.pcie is None
    assert any("processor's name" in line for line in seen.unseen)


def test_what_cannot_be_is_left_out_and_said(computer) -> None:  # type: ignore[no-untyped-def]
    seen = computer(cpuinfo("AMD Ryzen 9 5950X 16-Core Processor", 1, 16), nvidia_smi="NVIDIA GeForce RTX 3090, 24576, 5, 16\n",
                    dmidecode=DIMM.format(kind="DDR5", speed=6000, width=64) * 2)  # fmt: skip
    assert seen.parts.pcie is None and seen.parts.memory is None and seen.parts.gpu.name == "rtx-3090"
    assert len([line for line in seen.unseen if "not possible" in line]) == 2
    fine = computer(cpuinfo("AMD Ryzen 9 5950X 16-Core Processor", 1, 16), nvidia_smi="NVIDIA GeForce RTX 3090, 24576, 4, 16\n",
                    dmidecode=DIMM.format(kind="DDR5", speed=6000, width=64) * 2)  # fmt: skip
    assert fine.parts.pcie == "4.0x16" and fine.parts.memory is None


@given(
    st.sampled_from(sorted(name for name, part in gpu_parts().items() if part.backend == "cuda" and not part.unified_memory)),
    st.sampled_from(sorted(name for name in cpu_parts() if not name.endswith("-cpu"))), st.integers(1, 2),
    st.integers(0, 24), st.text(max_size=60),
)  # fmt: skip
def test_whatever_is_printed_becomes_possible_parts(
    name: str, cpu: str, sockets: int, modules: int, noise: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        part = cpu_parts()[cpu]
        texts = {
            "nvidia-smi": f"{name}, {gpu_parts()[name].memory_bytes // MIB}, 4, 16\n{noise}",
            "dmidecode": DIMM.format(kind=part.memory.upper(), speed=part.max_mt_per_s, width=64) * modules + noise,
        }
        patch.setattr(module, "_run", lambda *command: texts.get(command[0]))
        files = {"cpuinfo": cpuinfo(cpu, sockets, 2), "meminfo": "MemTotal: 65536000 kB\n"}
        patch.setattr(module.Path, "read_text", lambda self, **_: files[self.name])
        seen = detect(Path("/nowhere"))
    check_parts(seen.parts)
    assert parse_parts(describe_parts(seen.parts)).cpu is part
