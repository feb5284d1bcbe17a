"""GRACE-MoE's published figures (arXiv 2509.25041).

Modelled: tables as printed, and what is known of cells that are not reproduced. Ignored: how they are reproduced (`papers.grace_moe`).
"""

from __future__ import annotations

CITATION = "GRACE-MoE, arXiv 2509.25041: A100, 2 nodes x 2, NVLink, 25 Gb/s between nodes; mean of three models"
MODELS = ("olmoe-1b-7b", "deepseek-v2-lite", "qwen3-30b-a3b")
INGREDIENTS = (
    "+ hierarchical exchange",
    "+ grouping",
    "+ one copy, weighted",
    "+ copies, weighted",
    "+ copies, nearest first",
)
# Change against Occult in per cent (the paper's table 1).
TABLE: dict[str, tuple[float, ...]] = {
    "all-to-all time": (-35.19, -48.33, -44.52, -44.91, -50.57),
    "cross-node traffic": (-35.64, -50.67, -41.62, -41.84, -52.11),
    "intra-node traffic": (100.13, 47.10, 76.33, 78.41, 57.22),
    "GPU idle": (-49.88, -4.78, -6.18, -26.86, -25.66),
    "load standard deviation": (0.02, 90.03, 51.32, 31.92, 39.35),
}
# What single ingredients change, model by model, in per cent of the rung before (section 6.3).
GROUPED, NEAREST = "grouping, of the hierarchical exchange", "nearest first, of weighted"
STEPS: dict[tuple[str, str], tuple[float, float, float]] = {
    (GROUPED, "all-to-all time"): (-18.56, -17.96, -24.69),
    (GROUPED, "cross-node traffic"): (-19.21, -16.72, -34.77),
    (GROUPED, "intra-node traffic"): (-22.35, -15.00, -42.15),
    (NEAREST, "all-to-all time"): (-9.47, -8.10, -13.69),
    (NEAREST, "cross-node traffic"): (-12.12, -12.42, -29.40),
}
# OLMoE under the hierarchical exchange, by how groups are made: milliseconds of exchanges, idle time, end to end (table 2).
GROUPINGS: dict[str, tuple[float, float, float]] = {
    "uniform": (3494.02, 501.69, 6328.03), "sizes by 0.15": (2846.38, 506.93, 5698.10), "sizes free": (2825.81, 617.16, 5747.50),
}  # fmt: skip
# Time of Occult over GRACE's, end to end.
SPEEDUPS = {"olmoe-1b-7b": 1.45, "deepseek-v2-lite": 1.31, "qwen3-30b-a3b": 1.31}
DRAWN = "routing is drawn alike for all models, from topics; published, models differ more"
IDLE_NOTE = (
    "idle time follows the deviation of load here; published, it falls by 1 point with one copy, where the deviation falls by 39, and "
    "by 20 with several, where it falls by another 19"
)
NOTES = {
    ("intra-node traffic", 1): (
        "published, grouping keeps more of a token's experts on one GPU of the node, and copies then bring 10 points of traffic "
        "back inside nodes; in the drawn routing both are nearly equal, so their order is not reproduced"
    ),
    (
        "intra-node traffic",
        3,
    ): "more copies are made here than one; published, both ways of copying move nearly as much",
    ("GPU idle", 2): IDLE_NOTE,
    ("GPU idle", 3): IDLE_NOTE,
    ("GPU idle", 4): IDLE_NOTE,
    (
        "load standard deviation",
        3,
    ): "one drift for all models and layers; several copies even out more here than published",
    (
        "load standard deviation",
        4,
    ): "one drift for all models and layers; copies planned on the first half even out more than published",
}
STEP_NOTES = {GROUPED: DRAWN, NEAREST: DRAWN}
GROUP_NOTES = {
    (
        "GPU idle",
        "uniform",
    ): "published, OLMoE's groups of equal size idle as long as grouped ones; of three models, half as long",
    ("GPU idle", "sizes free"): "groups of free sizes differ more in the drawn routing than in OLMoE's",
}
SPEEDUP_NOTE = (
    "a layer's time outside exchanges is known for OLMoE only and taken for all models, which one engine runs; the others must spend more, "
    "since the published speed-up is lower though exchanges fall alike; other draws change speed-ups by up to 0.16"
)
