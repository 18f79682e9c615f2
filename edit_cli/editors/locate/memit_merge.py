"""MEMIT-Merge (Dong et al., 2025): facts about one subject are one entry of the memory, and get one value together."""

from __future__ import annotations

from collections.abc import Sequence

from edit_cli.editors.locate.memit import MEMIT, Groups, MEMITConfig
from edit_cli.requests import EditRequest
from edit_cli.wording import many


class MEMITMerge(MEMIT[MEMITConfig]):
    """MEMIT with one key and one target state a subject.

    Facts about one subject have (nearly) the same key, so of their separate values only a mean could be written. Here
    one shift is optimized against the mean loss over all facts of the subject.
    """

    def groups(self, requests: Sequence[EditRequest]) -> Groups:
        """Requests by subject, in the order in which subjects first occur."""
        by_subject: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            by_subject.setdefault((request.subject or "").strip(), []).append(index)
        groups = list(by_subject.values())
        merged = [group for group in groups if len(group) > 1]
        if merged:
            largest = max(merged, key=len)
            self.lm.monitor.note(
                f"{len(requests)} facts are about {many(len(groups), 'subject')}:"
                f" {many(len(merged), 'value stands', 'values stand')} for several facts each, such as for"
                f" {len(largest)} about {requests[largest[0]].subject!r}"
            )
        return groups
