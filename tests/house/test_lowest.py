"""The lowest versions that are promised are the lowest versions that are tested."""

from __future__ import annotations

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from house import ROOT, project


def test_the_pinned_floor_is_the_promised_one() -> None:
    pinned = {}
    for line in (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, equals, version = line.partition("==")
            assert equals, line
            pinned[canonicalize_name(name)] = Version(version)
    for text in project()["project"]["dependencies"]:
        need = Requirement(text)
        (floor,) = (Version(one.version) for one in need.specifier if one.operator == ">=")
        found = pinned[canonicalize_name(need.name)]
        # The first release of the promised series that can be installed and does not contradict the others.
        assert found >= floor and found.release[: len(floor.release)] == floor.release, (text, found)
