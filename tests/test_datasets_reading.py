"""Files that people have: JSON in several forms, tables, compressed ones; and what is said of files of another form."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edit_cli.datasets import Facts
from edit_cli.datasets.generation import Continuations
from edit_cli.errors import MissingError

Writer = Callable[..., str]
ROWS = [{"prompt": "{} lives in", "subject": f"Ada {n}", "target_new": "Oslo"} for n in range(3)]
HEADER = "prompt,subject,target_new"


def load(path: str | Path) -> list[tuple[str, str]]:
    cases = Facts("facts", path=str(path)).load().cases
    return [(case.id, case.requests[0].text) for case in cases]


def lines(rows: list[Any], **how: Any) -> str:
    return "\n".join(json.dumps(row, **how) for row in rows)


FORMS = {
    "list.json": json.dumps(ROWS),
    "indented list.json": json.dumps(ROWS, indent=2),
    "lines.jsonl": lines(ROWS),
    "indented one after another.json": lines(ROWS, indent=2),
    "wrapped.json": json.dumps({"data": ROWS}),
    "wrapped and indented.json": json.dumps({"version": 1, "split": "train", "data": ROWS}, indent=1),
    "a record a line.json": '{"data": [\n' + ",\n".join(map(json.dumps, ROWS)) + "\n]}",
    "by name.json": json.dumps({f"fact {n}": row for n, row in enumerate(ROWS)}),
    "commas.csv": "\n".join([HEADER, *(",".join(row.values()) for row in ROWS)]),
    "semicolons.csv": "\r\n".join([HEADER.replace(",", ";"), *(";".join(row.values()) for row in ROWS)]),
    "bars.csv": "\n".join([HEADER.replace(",", "|"), *("|".join(row.values()) for row in ROWS)]),
    "tabs.csv": "\n".join([HEADER.replace(",", "\t"), *("\t".join(row.values()) for row in ROWS)]),
    "tabs.tsv": "\n".join([HEADER.replace(",", "\t"), *("\t".join(row.values()) for row in ROWS)]),
    "empty cells.csv": "\n".join([f"{HEADER},,", *(",".join(row.values()) + ",,,,," for row in ROWS), ",,,", ""]),
    "numbered.csv": "\n".join([f",{HEADER}", *(f"{n}," + ",".join(row.values()) for n, row in enumerate(ROWS))]),
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", FORMS)
def test_the_same_facts_are_read_from_every_form(tmp_path: Path, name: str, packed: bool) -> None:
    raw = FORMS[name].encode()
    path = tmp_path / (f"{name}.gz" if packed else name)
    path.write_bytes(gzip.compress(raw, mtime=0) if packed else raw)
    assert load(path) == [("0", "Ada 0 lives in"), ("1", "Ada 1 lives in"), ("2", "Ada 2 lives in")]


def test_a_single_record_is_no_wrapping(write: Writer) -> None:
    row = ROWS[0] | {"neighbors": [{"prompt": "Bo lives in", "target": "Rome"}]}
    assert load(write(json.dumps(row, indent=2), "one.json")) == [("0", "Ada 0 lives in")]
    assert load(write(json.dumps(row), "one.jsonl")) == [("0", "Ada 0 lives in")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", json.dumps({"train": ROWS, "test": ROWS}), r"holds several lists of records \(train, test\)"),
        ("a.json", json.dumps({"prompt": ["{} is"], "subject": ["Ada"]}), r"holds a list a field \(prompt, subject\)"),
        ("a.json", json.dumps({"prompt": {"0": "{} is"}, "subject": {"0": "Ada"}}), "holds a list a field"),
        ("a.json", json.dumps({"data": ROWS}, indent=1)[:-20], r"is not valid JSON: .*line 1\d column"),
        ("a.json", "{'prompt': 'x'}", r"is not valid JSON: .*line 1 column 2"),
        ("a.json", lines(ROWS, indent=1)[:-3], "is not valid JSON: .*line 1[0-9]"),
        ("a.json", json.dumps({"data": [{"frage": "x", "antwort": "y"}]}), r"subject is missing \(it has 'frage', 'an"),
        ("a.txt", f"{HEADER}\n", "nor a table named .csv or .tsv: it begins with 'prompt,subject,target_new'"),
        ("a.csv", b"PK\x03\x04\x14\x00", "is a zip archive or an Excel file"),
        ("a.json", b"PAR1\x15", "is a Parquet file: save its records as JSON lines or CSV"),
        ("a.json", b"\x80\x04\x95", "is a pickle"),
        ("a.csv", "prompt".encode("utf-16"), "is UTF-16 text: save it as UTF-8"),
        ("a.json", b"\xfd7zXZ\x00", "is compressed by xz: unpack it, or use gzip"),
        ("a.json", b"version https://git-lfs.github.com/spec/v1\n", "is the pointer of a file in Git LFS"),
        ("a.json", b"<!DOCTYPE html><html>", "is a web page"),
        ("a.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0)[:-9], "is a damaged gzip file"),
        ("a.json.gz", gzip.compress(b"caf\xe9", mtime=0), r"is not UTF-8 text \(line 1\)"),
        ("a.csv", f"{HEADER}\n{{}} is,Ada,Oslo,more\n", "line 2: has more cells than the header"),
        (
            "a.csv",
            "{} is,Ada,Oslo\n{} is,Bo,Rome\n",
            r"without a header: its first line, '{} is,Ada,Oslo', .*\(prompt, sub",
        ),
        ("a.tsv", "{} is\tAda\tAda\n", "without a header"),  # before a column that is named twice
        ("a.csv", "frage;antwort\nx;y\n", "its first line, 'frage;antwort', names none of the columns"),
        ("a.jsonl", lines([["{} is", "Ada", "Oslo"]] * 2), r"each record is a list, .* named fields \(prompt, subject"),
        ("a.json", json.dumps([["{} is", "Ada", "Oslo"]]), "each record is a list, not an object with named fields"),
        ("a.json", json.dumps(["{} is", "Ada", "Oslo"]), "each record is text, not an object with named fields"),
        ("a.jsonl", "[1]\n[2]\n", "each record is a list"),
    ],
)
def test_the_message_says_what_is_wrong_with_the_form(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(MissingError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_json_lines_whose_first_line_is_broken_lose_that_line_alone(write: Writer) -> None:
    dataset = Facts("facts", path=write(f'{{"prompt": broken\n{lines(ROWS)}')).load()
    assert [str(drop) for drop in dataset.dropped] == ["line 1: is not valid JSON"]
    assert dataset.ids == ("1", "2", "3")


def test_a_table_names_where_its_rows_are(write: Writer) -> None:
    text = f"{HEADER};x\n".replace(",", ";") + "{} is;Ada;Oslo\n;;;\n{} is;;Rome\n"
    dataset = Facts("facts", path=write(text, "a.csv")).load()
    assert [str(drop) for drop in dataset.dropped] == ["line 4: subject is empty"]


def test_running_text_and_passages_are_unpacked_too(tmp_path: Path) -> None:
    paragraph = " ".join(f"word{n}" for n in range(60))
    (tmp_path / "text.txt.gz").write_bytes(gzip.compress(paragraph.encode(), mtime=0))
    (case,) = Continuations("wikitext", path=str(tmp_path / "text.txt.gz")).load().cases
    assert case.requests[0].text.startswith("word0 word1 ")
    published = {"n_tokens": 1, "original": ["A passage goes"], "completions": ["A passage goes on here"]}
    (tmp_path / "mend.json.gz").write_bytes(gzip.compress(json.dumps(published, indent=1).encode()))
    (case,) = Continuations("wikitext", path=str(tmp_path / "mend.json.gz")).load().cases
    assert (case.requests[0].text, case.requests[0].target_new) == ("A passage goes", "on here")
