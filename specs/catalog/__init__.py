"""Bundled data: configurations of published models and profiles of known machines, one JSON file each.

`models/` holds Hugging Face `config.json` contents, unchanged in meaning; `hardware/` holds profiles in which every constant
names its source; `parts/` holds what machines are put together from; `engines/` what serving engines make of it; `kernels/` what
engines' kernels take on datacentre cards. Reading and checking them is the job of `specs/models/load.py` and of `specs/machines/`.
"""

from __future__ import annotations

from pathlib import Path

MODELS_FOLDER = Path(__file__).parent / "models"
HARDWARE_FOLDER = Path(__file__).parent / "hardware"
PARTS_FOLDER = Path(__file__).parent / "parts"
ENGINES_FOLDER = Path(__file__).parent / "engines"
KERNELS_FOLDER = Path(__file__).parent / "kernels"
