"""Files that are written: whole or not at all, links followed, devices and pipes written to, places tried beforehand."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from moeplan.base.errors import InputError
from moeplan.base.text_files import check_outputs, output_folder, part_folder, write_atomic, written_aside

PARTS = ".moeplan-part"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- devices, pipes, links -----------------------------------------------------------------------------------------------


def test_a_device_is_written_to_and_stays_a_device(tmp_path: Path) -> None:
    device = tmp_path / "null"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        device.write_bytes(b"probe")  # a file system may be mounted so that devices do not work
    except OSError:
        device = Path(os.devnull)
    before = os.stat(device)
    check_outputs({"--output": device, "--report": device})
    write_atomic(device, "gone")
    after = os.stat(device)
    assert stat.S_ISCHR(after.st_mode) and (after.st_ino, after.st_rdev) == (before.st_ino, before.st_rdev)


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_outputs({"--output": pipe})  # does not wait for a reader
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    write_atomic(pipe, "through")
    reader.join(20)
    assert got == ["through"] and stat.S_ISFIFO(os.stat(pipe).st_mode) and names(tmp_path) == ["pipe"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_followed_and_stays_a_link(tmp_path: Path, exists: bool) -> None:
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "plan.json", tmp_path / "plan.json"
    if exists:
        target.write_text("old")
    link.symlink_to(Path("there") / "plan.json")
    write_atomic(link, "new")
    assert link.is_symlink() and target.read_text() == "new" and not target.is_symlink()
    assert names(tmp_path / "there") == ["plan.json"]


def test_a_full_device_is_one_line() -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with pytest.raises(InputError, match="no space left"):
        write_atomic("/dev/full", "x" * 100)
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_output_to_the_file_that_stdout_goes_to_keeps_both(tmp_path: Path) -> None:
    code = "from moeplan.base.text_files import write_atomic; print('one'); write_atomic('/dev/stdout', 'two\\n'); print('three')"
    with open(tmp_path / "all", "wb") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True, timeout=120)
    assert (tmp_path / "all").read_text() == "one\ntwo\nthree\n"


def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path: Path) -> None:
    secret = tmp_path / "plan.json"
    secret.write_text("old")
    secret.chmod(0o600)
    write_atomic(secret, "new")
    assert (secret.read_text(), stat.S_IMODE(secret.stat().st_mode)) == ("new", 0o600)


# --- before the work -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", [".", "", "folder", "absent/plan.json", "file/plan.json", "x" * 300, "a\0b", "loop", "/proc/plan.json"]
)
def test_places_are_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    before = names(tmp_path)
    with pytest.raises(InputError, match=r"--report = .*cannot be written") as told:
        check_outputs({"--output": "plan.json", "--report": path})
    assert "\n" not in str(told.value) and names(tmp_path) == before


@pytest.mark.parametrize("name", ["plan.json", "./plan.json", "link.json", "hard.json", "link/plan.json"])
def test_outputs_overwrite_neither_inputs_nor_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("plan.json").write_text("mine")
    Path("link.json").symlink_to("plan.json")
    os.link("plan.json", "hard.json")
    Path("link").symlink_to(".")
    with pytest.raises(InputError, match="would overwrite the plan"):
        check_outputs({"--output": name}, {"the plan": "plan.json", "--model": "tiny-moe", "--trace": None})
    with pytest.raises(InputError, match="is the same file as --output"):
        check_outputs({"--output": "plan.json", "--report": name})
    with pytest.raises(InputError, match="is the same file as --output"):  # not there yet
        check_outputs({"--output": "new.json", "--report": "link/new.json"})
    check_outputs({"--output": name, "--report": None}, {"--trace": "other"})
    assert Path("plan.json").read_text() == "mine"


def test_a_folder_for_output_is_made_or_refused(tmp_path: Path) -> None:
    assert output_folder(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        with pytest.raises(InputError, match="no folder can be made there"):
            output_folder(tmp_path / place)


# --- parts ---------------------------------------------------------------------------------------------------------------

_KILLED = """
import os, signal, sys
from moeplan.base.text_files import part_folder, written_aside
with written_aside("plan.json") as file, part_folder("trace.safetensors") as folder:
    file.write(b"half"); file.flush()
    (folder / "0").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_parts_of_a_killed_run_are_cleaned_by_the_next(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _KILLED], cwd=tmp_path, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL and len(names(tmp_path)) == 2
    (tmp_path / f"notes{PARTS}").write_text("not ours: another name")
    write_atomic(tmp_path / "other.json", "whole")
    assert names(tmp_path) == [f"notes{PARTS}", "other.json"]


def test_parts_that_are_being_written_stay(tmp_path: Path) -> None:
    with written_aside(tmp_path / "a") as file, part_folder(tmp_path / "b") as folder:
        file.write(b"first")
        write_atomic(tmp_path / "c", "second")
        check_outputs({"--output": tmp_path / "a"})
        assert Path(file.name).exists() and folder.is_dir()
        with written_aside(tmp_path / "a") as again:  # one target, two writers: the last one counts
            again.write(b"third")
    assert names(tmp_path) == ["a", "c"] and (tmp_path / "a").read_text() == "first"


def test_long_names_have_parts(tmp_path: Path) -> None:
    for name in ("x" * 255, "é" * 127):
        write_atomic(tmp_path / name, "whole")
        assert (tmp_path / name).read_text() == "whole"
