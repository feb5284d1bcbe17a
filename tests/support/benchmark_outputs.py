"""Output of benchmark tools as they print it."""

from __future__ import annotations

import json


def nvbandwidth(**changes: object) -> str:
    cases = [
        {
            "name": "host_to_device_memcpy_ce",
            "status": "Passed",
            "bandwidth_matrix": [["55.63", "54.10"]],
            "sum": 109.73,
        },
        {"name": "device_to_host_memcpy_ce", "status": "Passed", "bandwidth_matrix": [["50.00", "49.00"]]},
        {
            "name": "host_to_device_bidirectional_memcpy_ce",
            "status": "Passed",
            "bandwidth_matrix": [["40.00", "39.00"]],
        },
        {"name": "device_to_host_bidirectional_memcpy_ce", "status": "Waived"},
        {"name": "device_to_device_memcpy_read_ce", "status": "Passed", "bandwidth_matrix": [["N/A", "390.1"]]},
    ]
    return json.dumps({"nvbandwidth": {"version": "0.8", "CUDA Runtime Version": 12080, "testcases": cases} | changes})
