"""What a process of ``benchmarks.procgen`` can come to. A module of its own, which such a process imports quickly."""

import os
from typing import Any


def end(connection: Any, run: str, plan: Any) -> None:
    if run == "dies":
        os._exit(9)
    connection.send("the reason" if run == "fails" else "")
