"""The notebook runs from top to bottom and prints what it shows."""

from __future__ import annotations

import contextlib
import io
import json
from typing import Any

from house import ROOT

NOTEBOOK = ROOT / "examples/notebook/faster_link.ipynb"


def test_cells_print_what_the_notebook_shows() -> None:
    document = json.loads(NOTEBOOK.read_text("utf-8"))
    cells = [cell for cell in document["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 4
    names: dict[str, Any] = {}
    for cell in cells:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name} {cell['id']}", "exec"), names)
        assert printed.getvalue() == "".join(line for output in cell["outputs"] for line in output["text"])
