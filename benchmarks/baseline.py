"""Predict every pinned scenario anew and list what differs from the stored figures; store them where asked.

    python -m benchmarks.baseline [--write] [--file FILE] [--only WORD]

Exits with 1 where something differs and was not written. Modelled: the scenarios of `baselines/scenarios.py`; with `--write` the
stored file is replaced, and the list of what moved belongs into the commit that brings it; `--only` leaves scenarios whose names lack the
word as they are stored. Ignored: whether a change is right.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moeplan.base.progress import reporter
from moeplan.base.text_files import write_atomic
from moeplan.baselines.check import predict_all
from moeplan.baselines.compare import compare
from moeplan.baselines.document import Header, Pinned, read_baseline, to_text
from moeplan.baselines.judge import RULES
from moeplan.baselines.scenarios import default_scenarios

STORED = Path(__file__).parents[1] / "tests" / "baselines" / "default.json"


def main() -> int:
    """Return the exit status, after listing every difference."""
    parser = argparse.ArgumentParser(description="Compare predictions with the stored figures.")
    parser.add_argument("--write", action="store_true", help="store the figures as they are now")
    parser.add_argument("--file", type=Path, default=STORED, help="file of pinned figures")
    parser.add_argument("--only", default="", help="predict scenarios with this word in their names alone")
    given = parser.parse_args()
    stored = read_baseline(given.file) if given.file.exists() else {}
    asked = {name: Pinned(scenario=scenario, figures={}) for name, scenario in default_scenarios().items()}
    anew = predict_all(
        [one for name, one in asked.items() if given.only in name], given.file.parent, progress=reporter("baseline")
    )
    found = {name: anew.get(name) or stored[name] for name in asked if name in anew or name in stored}
    differences = compare(stored, found)
    for each in differences:
        print(each.words())
    figures = sum(len(pinned.figures) for pinned in found.values())
    print(f"{len(found)} scenarios, {figures} figures, {len(differences)} differences")
    if given.write:
        write_atomic(given.file, to_text(found, Header(rules=RULES)))
        print(f"wrote {given.file}")
    return 1 if differences and not given.write else 0


if __name__ == "__main__":
    sys.exit(main())
