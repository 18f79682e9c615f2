"""Where the text comes from: order drawn from a seed, identity by content, clear errors."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from edit_cli.errors import MissingError, UsageError
from edit_cli.statistics import corpora
from edit_cli.statistics.corpora import EmbeddedText, HubText, TextFile

LINES = [f"document {i}: café" for i in range(30)]


@pytest.fixture
def plain(tmp_path):
    path = tmp_path / "articles.txt"
    path.write_text("\n".join([*LINES[:10], "", "   ", *LINES[10:]]) + "\n", encoding="utf-8")
    return TextFile(str(path))


def test_a_plain_file_gives_each_line_once_in_the_seeds_order(plain):
    first = list(plain.documents(1))
    assert sorted(first) == sorted(LINES) and first != LINES
    assert list(plain.documents(1)) == first
    assert list(TextFile(plain.path).documents(1)) == first
    assert list(plain.documents(2)) != first
    assert plain.size() == 30 and plain.label == "articles"


def test_line_ends_of_another_system_and_a_missing_last_one(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo\r\nthree")
    assert sorted(TextFile(str(path)).documents(0)) == ["one", "three", "two"]


@pytest.mark.parametrize("field", ["text", "body"])
def test_jsonl(tmp_path, field):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({field: line, "n": 1}) + "\n" for line in [*LINES, "  ", "two\nlines"]))
    assert sorted(TextFile(str(path), field).documents(0)) == sorted([*LINES, "two\nlines"])


def test_identity_is_the_content(plain, tmp_path):
    moved = tmp_path / "there.txt"
    moved.write_bytes((tmp_path / "articles.txt").read_bytes())
    changed = tmp_path / "changed.txt"
    changed.write_text("other")
    assert plain.identity() == TextFile(str(moved)).identity() == TextFile(str(moved), field="unused").identity()
    assert plain.identity() != TextFile(str(changed)).identity()
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text('{"text": "a", "title": "b"}')
    assert TextFile(str(jsonl)).identity() != TextFile(str(jsonl), "title").identity()
    json.dumps(plain.identity())


@pytest.mark.parametrize(
    ("name", "content", "error", "complaint"),
    [
        ("a.txt", b"", MissingError, "holds no text"),
        ("a.txt", b"\n  \n", MissingError, "holds no text"),
        ("a.txt", b"fine\n\xff\xfe\n", MissingError, "no UTF-8 text at byte 5"),
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', MissingError, "no JSON at byte 14"),
        ("a.jsonl", b'{"title": "a"}\n', UsageError, "corpus.field=text: no such field"),
        ("a.jsonl", b'["a"]\n', UsageError, "corpus.field=text: no such field"),
        ("a.jsonl", b'{"text": 5}\n', UsageError, "corpus.field=text holds int"),
    ],
)
def test_unusable_files(tmp_path, name, content, error, complaint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=complaint) as caught:
        list(TextFile(str(tmp_path / name)).documents(0))
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_no_such_file(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(MissingError, match="corpus.path=.* cannot be read"):
            next(TextFile(str(path)).documents(0))
        with pytest.raises(MissingError, match="corpus.path=.* cannot be read"):
            TextFile(str(path)).identity()


def test_embedded_text_is_a_file_of_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "WORLD", tmp_path / "corpus.txt")
    (tmp_path / "corpus.txt").write_text("one\ntwo\n")
    embedded = EmbeddedText()
    assert sorted(embedded.documents(0)) == ["one", "two"] and embedded.size() == 2 and embedded.label == "embedded"
    assert embedded.identity() == TextFile(str(tmp_path / "corpus.txt")).identity()


# --- hub
# ----------------------------------------------------------------------------------------------------------------


class Hub:
    """Stands in for the hub: what `load_dataset` was asked for, and a real streaming data set as the answer."""

    def __init__(self, monkeypatch, rows, reachable=True):
        import datasets
        import huggingface_hub

        self.asked: list[Any] = []
        self.loaded: list[Any] = []

        def dataset_info(_, id, revision, timeout):
            self.asked.append((id, revision, timeout))
            if not reachable:
                raise ConnectionError("Name or service not known\nand much more")

        def load_dataset(*args, **kwargs):
            self.loaded.append((args, kwargs))
            return datasets.IterableDataset.from_generator(rows)

        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_hub_text_streams_and_shuffles(monkeypatch):
    hub = Hub(monkeypatch, lambda: ({"text": text, "title": "t"} for text in [*LINES, "", " \n"]))
    corpus = HubText("some/articles", subset="en", revision="abc", buffer=10)
    first = list(corpus.documents(1))
    assert sorted(first) == sorted(LINES) and first != LINES
    assert list(corpus.documents(1)) == first and list(corpus.documents(2)) != first
    assert hub.loaded[0] == (("some/articles", "en"), {"split": "train", "revision": "abc", "streaming": True})
    assert corpus.label == "articles-en" and corpus.size() is None


def test_without_a_network_the_remedy_is_said_at_once(monkeypatch):
    hub = Hub(monkeypatch, lambda: iter(()), reachable=False)
    with pytest.raises(MissingError, match="corpus.id=some/articles .*corpus=file corpus.path=FILE") as caught:
        next(HubText("some/articles").documents(0))
    assert len(hub.asked) == 1 and hub.asked[0][2] <= 5 and hub.loaded == [] and "\n" not in str(caught.value)


def test_an_identity_needs_no_network(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", types.ModuleType("datasets"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.ModuleType("huggingface_hub"))
    assert HubText("a/b", revision="1").identity() != HubText("a/b", revision="2").identity()
    assert HubText("a/b", buffer=1).identity() != HubText("a/b").identity()


def test_a_hub_field_that_does_not_exist(monkeypatch):
    Hub(monkeypatch, lambda: iter([{"body": "x", "title": "y"}]))
    with pytest.raises(UsageError, match="corpus.field=text: some/articles has the fields body, title"):
        next(HubText("some/articles").documents(0))


def test_a_connection_that_breaks_midway(monkeypatch):
    def rows():
        yield {"text": "one"}
        raise OSError("connection reset")

    Hub(monkeypatch, rows)
    texts = HubText("some/articles", buffer=1).documents(0)
    with pytest.raises(MissingError, match="the hub stopped answering .*run the same command again"):
        list(texts)


@pytest.mark.parametrize(
    ("name", "values"),
    [("embedded", {}), ("file", {"path": "a.txt"}), ("wikipedia", {}), ("wikitext", {})],
)
def test_every_yaml_fits_its_class(name, values):
    node: Any = OmegaConf.load(Path(__file__).parent.parent / "conf" / "corpus" / f"{name}.yaml")
    module, _, cls = node.pop("_target_").rpartition(".")
    assert module == "edit_cli.statistics.corpora"
    built = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(getattr(corpora, cls)), node, values))
    assert isinstance(built, corpora.Corpus)


def test_the_corpus_folder_holds_no_other_yaml():
    folder = Path(__file__).parent.parent / "conf" / "corpus"
    assert {path.stem for path in folder.glob("*.yaml")} == {"embedded", "file", "wikipedia", "wikitext"}
