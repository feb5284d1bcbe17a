"""How often a report's cache was hit, where it says so: a fact that stands in place of what published locality would give.

    placement.hit_rate   a share (0.741) or per cent (74.1)
    note                 "hit 74.1 %", "74 % hits"

Modelled: as many experts of a layer held as are hit so often by choices that prefer none. Ignored: what was hit in prompts.
"""

from __future__ import annotations

import re

from .rows import Report

_IN_NOTE = re.compile(
    r"\bhit(?: rate|s)?(?: of| at|:)? ([0-9]{1,3}(?:\.[0-9]+)?) ?%|([0-9]{1,3}(?:\.[0-9]+)?) ?% hits?\b", re.IGNORECASE
)


def stated_hits(report: Report) -> float | None:
    """Return the share of choices that a report's cache held while it decoded, None where it is not said."""
    if not report.decodes:
        return None
    share = report.number("placement", "hit_rate")
    if share is not None:
        share = share / 100 if share > 1 else share
    else:
        found = _IN_NOTE.search(str(report.row.get("note") or ""))
        share = float(found[1] or found[2]) / 100 if found is not None else None
    return share if share is not None and 0 < share <= 1 else None
