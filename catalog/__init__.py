"""Bundled data: configurations of published models and profiles of known machines, one JSON file each.

`models/` holds Hugging Face `config.json` contents, unchanged in meaning; `hardware/` holds profiles in which every constant
names its source. Reading and checking them is `specs_io`'s job.
"""

from __future__ import annotations

from pathlib import Path

MODELS_FOLDER = Path(__file__).parent / "models"
HARDWARE_FOLDER = Path(__file__).parent / "hardware"
