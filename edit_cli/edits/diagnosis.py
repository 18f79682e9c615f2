"""What an editor knows of how its edit went, and what it says to the user."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NotRequired, TypedDict

from edit_cli.wording import many

NEGLIGIBLE, PARTLY = 0.1, 0.8  # shares of the wanted change
# An update's norm, in those of the weight that it is added to. A hundred facts at once come to 1.3 on the embedded
# model and disturb little.
LARGE = 3.0


class Diagnosis(TypedDict):
    """values: that were sought. reached: of these, good enough. taken: of these, found by an earlier run. written: the
    share of the wanted change that the update makes. size: the largest update, in norms of its weight. keys: what to
    turn for more reached and for more written values, and against an update that is too large. steps: down the gradient
    that it took.
    """

    values: NotRequired[int]
    reached: NotRequired[int]
    taken: NotRequired[int]
    written: NotRequired[float]
    size: NotRequired[float]
    steps: NotRequired[int]
    keys: NotRequired[dict[str, str]]


def told(found: Sequence[Diagnosis]) -> str | None:
    """One line about these edits, of which each is one batch: what came of them and, where it is little or too much,
    the key to turn. None where no editor had anything to say.
    """
    keys = {name: key for each in found for name, key in each.get("keys", {}).items()}
    sizes = [each["size"] for each in found if "size" in each]
    parts: list[str] = []

    def say(what: str, key: str, turn: bool = True) -> None:
        parts.append(f"{what} ({keys[key]})" if turn and key in keys else what)

    values, reached = sum(each.get("values", 0) for each in found), sum(each.get("reached", 0) for each in found)
    if values:
        say(f"{reached:,} of {many(values, 'target value')} reached", "reached", reached < values)
    if taken := sum(each.get("taken", 0) for each in found):
        parts.append(f"an earlier run had found {taken:,} of them, and that time is not counted here")
    shares = [(each["written"], each.get("values", 1)) for each in found if "written" in each]
    if shares:
        share = sum(part * weight for part, weight in shares) / sum(weight for _, weight in shares)
        small = "NEGLIGIBLE: " if share < NEGLIGIBLE else ""
        say(f"{small}{100 * share:.0f} % of the wanted change was written", "written", share < PARTLY)
    large = [size for size in sizes if size > LARGE]
    if large:
        edits = f"{many(len(large), 'edit is', 'edits are')} up to {max(large):.1f} times as large as the weight"
        say(f"may disable the model: {edits}", "size")
    elif sizes and not max(sizes):
        parts.append("NEGLIGIBLE: no weight was changed")
    return f"{'; '.join(parts)}." if parts else None
