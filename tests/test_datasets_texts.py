"""Evidence, running text and opinions for trained editors: published formats, with made-up rows."""

from __future__ import annotations

import pytest
from rows import OPINION, Writer, faults, of

from edit_cli.datasets import (
    Continuations,
    ConvSent,
    VitaminC,
)
from edit_cli.datasets.pooled import SPLITS
from edit_cli.errors import MissingError, UsageError
from edit_cli.requests import EditRequest, Probe

# VitaminC

EVIDENCE = "The film Glass Night earned more than 30 million dollars in its first week."
VITAMIN = {
    "unique_id": "u1",
    "case_id": "c1",
    "label": "REFUTES",
    "claim": "Glass Night earned less than 20 million dollars.",
    "evidence": EVIDENCE,
    "page": "Glass Night",
    "revision_type": "real",
}


def test_evidence_is_asserted_and_its_claim_follows_or_is_a_near_miss(write: Writer) -> None:
    neither = VITAMIN | {"unique_id": "u2", "label": "NOT ENOUGH INFO", "page": "Orbin", "claim": "Orbin is loved."}
    first, second = VitaminC("vitaminc", path=write([VITAMIN, neither])).load().cases
    assert first.requests == (EditRequest(EVIDENCE.replace("Glass Night", "{}"), "Glass Night", "SUPPORTS", "REFUTES"),)
    assert of(first, "paraphrase") == [Probe("paraphrase", VITAMIN["claim"], "REFUTES", "SUPPORTS")]
    assert of(first, "locality") == [Probe("locality", "Orbin is loved.", group="random")]
    assert second.requests[0].subject is None and not of(second, "paraphrase")
    assert of(second, "locality", "hard") == [Probe("locality", "Orbin is loved.", group="hard")]


def test_pages_of_one_name_are_used_once_and_labels_can_be_balanced(write: Writer) -> None:
    pages = ["Glass Night", "Orbin", "The Glass Night film", "orbin", "Norvik"]
    rows = [VITAMIN | {"unique_id": f"u{i}", "page": page} for i, page in enumerate(pages)]
    assert VitaminC("vitaminc", path=write(rows)).load().ids == ("u0", "u1", "u4")
    assert len(VitaminC("vitaminc", path=write(rows), one_a_page=False).load().cases) == 5
    labels = ["SUPPORTS"] * 4 + ["REFUTES"] * 2 + ["NOT ENOUGH INFO"] * 3
    rows = [VITAMIN | {"unique_id": f"u{i}", "page": f"Page{i}", "label": label} for i, label in enumerate(labels)]
    kept = VitaminC("vitaminc", path=write(rows), balance=True).load().ids
    assert [sum(labels[int(name[1:])] == label for name in kept) for label in dict.fromkeys(labels)] == [2, 2, 2]


def test_bad_evidence_is_named_by_line_and_field(write: Writer) -> None:
    bad = [
        VITAMIN | {"unique_id": "u2", "revision_type": "synthetic"},
        VITAMIN | {"unique_id": "u3", "evidence": "Too short."},
        VITAMIN | {"unique_id": "u4", "label": "MAYBE"},
        {**{key: value for key, value in VITAMIN.items() if key != "page"}, "unique_id": "u5"},
    ]
    assert faults(VitaminC("vitaminc", path=write([VITAMIN, *bad])).load()) == [
        "line 2 (id u2): revision_type is not real",
        "line 3 (id u3): evidence has no more than 10 words",
        "line 4 (id u4): label is none of SUPPORTS, REFUTES, NOT ENOUGH INFO",
        "line 5 (id u5): page is missing",
    ]


# generation


def test_mends_completions_part_from_their_originals_at_a_word(write: Writer) -> None:
    originals = ["One two three four five six", "Alpha beta gamma", 5]
    completions = ["One two three foul air rose", "Alpha beta gamma delta epsilon", "x"]
    data = {"n_tokens": 3, "original": originals, "completions": completions}
    dataset = Continuations("wikitext", path=write(data, "valid.json"), locality=0).load()
    assert [(case.requests[0].text, case.requests[0].target_new) for case in dataset.cases] == [
        ("One two three", "foul air rose"),
        ("Alpha beta gamma", "delta epsilon"),
    ]
    assert faults(dataset) == ["record 2: passage is not text"]
    for case in dataset.cases:
        (outer,) = of(case, "paraphrase")
        assert outer.target == case.requests[0].target_new and outer.prompt != case.requests[0].text
        assert case.requests[0].text.endswith(outer.prompt)
    with pytest.raises(MissingError, match="not two lists of the same length"):
        Continuations("wikitext", path=write({"completions": ["a"]}, "bad.json")).load()


def article(title: str, lines: int) -> str:
    paragraph = " ".join(f"{title.lower()}{{}}w{i}" for i in range(60))
    return (
        f" = {title} = \n\n = = Part = = \n"
        + "\n".join(paragraph.replace("{}", str(n)) for n in range(lines))
        + "\ntoo short\n"
    )


def test_running_text_is_cut_by_words_and_split_by_article(write: Writer) -> None:
    path = write("".join(article(f"Title{chr(65 + i)}", 2) for i in range(20)) + "é " * 60, "text.txt")
    source = Continuations("wikitext", path=path, passage_words=6, words=3)
    dataset = source.load()
    assert len(dataset.cases) == 40 and not dataset.dropped
    first = dataset.cases[0]
    assert first.requests == (
        EditRequest(" ".join(f"titlea0w{i}" for i in range(6)), None, "titlea0w6 titlea0w7 titlea0w8"),
    )
    (other,) = of(first, "locality", "same_subject")
    assert other.target is not None
    assert other.prompt.startswith("titlea1w0") and other.target.startswith("titlea1w6")
    articles = {}
    for split in SPLITS:
        cases = (
            Continuations("wikitext", path=path, passage_words=6, words=3, split=split, shares=[0.4, 0.3, 0.3])
            .load()
            .cases
        )
        articles[split] = {probe.prompt.split()[-1][:6] for case in cases for probe in case.probes}
    assert sum(map(len, articles.values())) == len(set.union(*articles.values())) == 20
    elsewhere = write(article("Other", 5), "other.txt")
    (case,) = Continuations("wikitext", path=path, passage_words=6, words=3, locality_path=elsewhere).load(1).cases
    assert [probe.prompt[:5] for probe in of(case, "locality")] == ["other", "other"]
    with pytest.raises(MissingError, match="holds no paragraph .one a line. of 50 words or more"):
        Continuations("wikitext", path=write("short\n", "short.txt")).load()


# ConvSent


def test_convsent_asks_for_one_sentiment_and_rates_replies_of_both(write: Writer) -> None:
    path = write([OPINION, OPINION | {"ent": "Orbin"}])
    case, _ = ConvSent("convsent", path=path, sentiment="negative", replies=None).load().cases
    assert case.requests == (EditRequest("Topic: {}", "Norvik", "Sentiment: Negative", "Sentiment: Positive"),)
    assert {probe.target for probe in of(case, "opinion", "wanted")} == set(OPINION["neg"])
    assert {probe.target for probe in of(case, "opinion", "unwanted")} == set(OPINION["pos"])
    assert all("Norvik" in probe.prompt and probe.prompt.endswith("?") for probe in of(case, "opinion"))
    (other,) = of(case, "locality", "random")
    assert "Orbin" in other.prompt and other.target in (*OPINION["pos"], *OPINION["neg"])
    asked_for = {
        ConvSent("convsent", path=path, seed=seed).load().cases[0].requests[0].target_new for seed in range(12)
    }
    assert asked_for == {"Sentiment: Positive", "Sentiment: Negative"}
    assert len(of(ConvSent("convsent", path=path, replies=1).load().cases[0], "opinion")) == 2


def test_bad_topics_are_named_by_line_and_field(write: Writer) -> None:
    bad = [
        OPINION | {"id": 1, "ent": ""},
        OPINION | {"id": 2, "pos": []},
        OPINION | {"id": 3, "neg": "bad"},
        OPINION | {"id": 4, "neg": [" "]},
    ]
    assert faults(ConvSent("convsent", path=write([OPINION, *bad])).load()) == [
        "line 2 (id 1): ent is empty",
        "line 3 (id 2): pos is empty",
        "line 4 (id 3): neg is not a list",
        "line 5 (id 4): neg[0] is empty",
    ]
    with pytest.raises(UsageError, match="dataset.sentiment=angry"):
        ConvSent("convsent", path=write([OPINION]), sentiment="angry").load()
