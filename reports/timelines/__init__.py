"""Timelines: lanes drawn on a page, Perfetto files, who waited for whom, what was in memory."""
