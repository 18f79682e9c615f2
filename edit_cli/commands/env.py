"""`env`: what runs would be made with here."""

from __future__ import annotations

from typing import Any

from edit_cli.console import Screen
from edit_cli.report.tables.run import plain_table
from edit_cli.report.tables.texts import Text
from edit_cli.runs.environment import environment


def run(as_json: bool) -> int:
    """Print versions, devices and the state of the checkout."""
    found, screen = environment(), Screen()
    if as_json:
        screen.json(found)
        return 0
    table = plain_table("", "")
    table.show_header = False
    for name, value in found.items():
        for index, line in enumerate(_lines(value)):
            table.add_row(Text(name if index == 0 else "", style="bold"), Text(line))
    screen.show(table)
    return 0


def _lines(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [f"{key} {part}" for key, part in value.items()]
    return [str(part) for part in value] if isinstance(value, list) else ["none" if value is None else str(value)]
