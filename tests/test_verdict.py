"""Whether an edit took: by the likelihood of its answer, and by what the model writes."""

from __future__ import annotations

import pytest

from edit_cli.metrics.verdict import of_probe, took, verdicts

OLD = {"kind": "rewrite", "prompt": "Ada plays the", "target": "violin", "foil": "flute", "foil_nll": 2.0}
NEW = {"kind": "rewrite", "prompt": "Ada plays the", "target": "violin", "foil": None, "foil_nll": None}


@pytest.mark.parametrize(
    ("known", "nll", "hits", "reply", "likely", "written"),
    [
        (OLD, 1.0, [False], "violin. And", True, True),  # likelier than the old one, though no top choice
        (OLD, 2.0, [True], "violin", False, True),  # a tie is none
        (OLD, 1.0, [True], "flute", True, False),
        (OLD, 3.0, [False], "flute", False, False),
        (OLD, None, [True], "violin", False, True),  # a wrecked model
        (NEW, 0.1, [True, True], "the violin", True, True),
        (NEW, 0.1, [True, False], "violins", False, False),
        (NEW, 0.1, [True], None, True, None),
    ],
)
def test_both_have_to_agree(known, nll, hits, reply, likely, written):
    found = of_probe({**known, "target_nll": nll, "target_hits": hits, "generated": reply})
    assert (found.likely, found.written) == (likely, written)
    assert found.took == (likely and written is not False)
    assert str(found).startswith("took" if found.took else "did not take")


def line(name: str, *replies: str, error: str | None = None) -> dict:
    probes = [{**NEW, "target_nll": 0.1, "target_hits": [True], "generated": reply} for reply in replies]
    probes.append({**NEW, "kind": "paraphrase", "target_nll": 9.0, "target_hits": [False], "generated": "no"})
    after = None if error else {"probes": probes}
    return {"case_id": name, "after": after, "error": error}


def test_every_edited_prompt_of_a_case_counts_and_no_other():
    lines = [line("a", "violin"), line("b", "violin", "flute"), line("c", error="too long")]
    assert [took(one) for one in lines] == [True, False, False]
    assert verdicts(lines) == {"n": 3, "took": 1, "failed": ["b", "c"]}
