"""Selection, formats, downloads, reference texts and the YAML files: what all sources share."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import edit_cli.datasets
from edit_cli.config.build import build as built
from edit_cli.config.source import with_defaults
from edit_cli.datasets import Facts, Remote
from edit_cli.datasets.counterfact import CounterFact
from edit_cli.datasets.records import snippets as snippets_module
from edit_cli.datasets.records.files import File
from edit_cli.datasets.records.snippets import elements, texts_of
from edit_cli.errors import MissingError, UsageError
from edit_cli.monitor import Monitor

CONF = Path(__file__).parent.parent / "conf" / "dataset"


def fact(number: int, **more: Any) -> dict[str, Any]:
    return {"id": number, "prompt": "{} lives in", "subject": f"Ada {number}", "target_new": "Oslo", **more}


@pytest.fixture
def five(tmp_path: Path) -> str:
    """Five rows, the third of them bad."""
    rows = [fact(number) for number in (10, 11, 12, 13, 14)]
    rows[2]["target_new"] = ""
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


class Notes(Monitor):
    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


# selection


def test_limit_counts_usable_records_in_file_order_and_is_recorded(five: str) -> None:
    dataset = Facts("facts", path=five).load(3)
    assert dataset.ids == ("10", "11", "13")
    assert dataset.describe() == {
        "name": "facts",
        "source": five,
        "sha256": hashlib.sha256(Path(five).read_bytes()).hexdigest(),
        "records_total": 5,
        "records_dropped": 1,
        "records_selected": 3,
        "limit": 3,
        "offset": 0,
        "shuffle_seed": None,
        "split": None,
        "ids_sha256": hashlib.sha256(b"10\n11\n13").hexdigest(),
    }
    assert Facts("facts", path=five).load(99).ids == ("10", "11", "13", "14")
    assert Facts("facts", path=five, offset=2).load(1).ids == ("13",)


def test_shuffling_depends_on_the_seed_alone_and_comes_before_offset_and_limit(five: str) -> None:
    def ids(limit: int | None, **options: Any) -> tuple[str, ...]:
        return Facts("facts", path=five, **options).load(limit).ids

    orders = {ids(None, shuffle_seed=seed) for seed in range(8)}
    assert len(orders) > 1 and all(sorted(order) == ["10", "11", "13", "14"] for order in orders)
    assert ids(2, shuffle_seed=3, offset=1) == ids(None, shuffle_seed=3)[1:3]


def test_explicit_ids_are_taken_in_their_order(five: str) -> None:
    assert Facts("facts", path=five, ids=["14", "10"]).load().ids == ("14", "10")
    with pytest.raises(MissingError, match=r"no usable record 12, 77; line 3 \(id 12\): target_new is empty"):
        Facts("facts", path=five, ids=["10", "12", "77"]).load()


@pytest.mark.parametrize(
    ("options", "limit", "message"),
    [
        ({}, 0, "limit=0"),
        ({}, -4, "limit=-4"),
        ({"offset": -1}, None, "dataset.offset=-1"),
        ({"offset": 4}, None, "has 4 usable records"),
        ({"ids": ["10"], "offset": 1}, None, "leave out dataset.offset"),
        ({"ids": ["10"], "shuffle_seed": 0}, None, "leave out dataset.offset"),
        ({"ids": ["10", "10"]}, None, "10 occurs twice"),
    ],
)
def test_selections_that_make_no_sense_are_refused(
    five: str, options: dict[str, Any], limit: int | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Facts("facts", path=five, **options).load(limit)


def test_every_dropped_row_is_reported_once_by_line_and_field(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    lines = [json.dumps(fact(1)), json.dumps(fact(1)), "{broken", "[]", "", json.dumps(fact(3, subject=""))]
    path.write_text("\n".join(lines))
    notes = Notes()
    dataset = Facts("facts", path=str(path)).load(monitor=notes)
    expected = [
        "line 2 (id 1): id occurs twice; the first record with it is used",
        "line 3: is not valid JSON",
        "line 4: is a list, not an object with named fields",
        "line 6 (id 3): subject is empty",
    ]
    assert dataset.total == 5 and [str(drop) for drop in dataset.dropped] == expected
    assert notes.notes[0].startswith("facts: dropped 4 of 5 records: ")
    assert [note.removeprefix("  dropped ") for note in notes.notes[1:]] == expected


def test_many_dropped_rows_are_summed_up(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(json.dumps(fact(number, target_new="" if number else "Oslo")) for number in range(60)))
    notes = Notes()
    Facts("facts", path=str(path)).load(monitor=notes)
    assert notes.notes[0] == "facts: dropped 59 of 60 records: target_new is empty (59)"
    assert len(notes.notes) == 22 and notes.notes[-1] == "  … and 39 more"


def test_repeated_and_contradictory_edits_are_told(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    targets = ("Oslo", "Oslo", "Rome")
    path.write_text(
        "\n".join(json.dumps(fact(1, id=str(number), target_new=target)) for number, target in enumerate(targets))
    )
    notes = Notes()
    assert len(Facts("facts", path=str(path)).load(monitor=notes).cases) == 3
    assert notes.notes == [
        "facts: 1 of 3 records asks again for an edit of an earlier record (id 1)",
        "facts: 1 of 3 records asks for another answer to the prompt of an earlier record (id 2)",
    ]


# formats


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"", "is empty"),
        ("a.json", b" \n", "is empty"),
        ("a.json", b"[]", "holds no usable record: expected prompt, subject, target_new"),
        ("a.json", b'[{"prompt": ', "is not valid JSON"),
        ("a.json", b"[" * 100_000, "is not valid JSON"),
        ("a.json", b'"text"', "neither a JSON list"),
        ("a.json", b'{"rows": [1]}', "holds no usable record: expected .*; line 1: subject is missing"),
        ("a.json", b"[1, null]", "record 0: is a number, not an object"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": "caf\xe9"}', r"is not UTF-8 text \(line 2\)"),
        (
            "a.csv",
            b"frage,antwort\nx,y\n",
            r"'frage,antwort', names none of the columns .* \(prompt, subject, target_new; ",
        ),
        ("a.csv", b"prompt,prompt\nx,y\n", "names a column twice"),
        ("a.csv", b"prompt,subject,target_new\n", "holds no usable record"),
    ],
)
def test_a_file_of_another_form_gets_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MissingError, match=message) as caught:
        Facts("facts", path=str(tmp_path / name)).load()
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="dataset.path=.*none.json: no such file"):
        Facts("facts", path=str(tmp_path / "none.json")).load()
    with pytest.raises(MissingError, match="is a folder"):
        Facts("facts", path=str(tmp_path)).load()


def test_other_line_separators_inside_a_json_text_do_not_split_it(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text(json.dumps(fact(1, target_new="O\u2028slo"), ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert Facts("facts", path=str(path)).load().cases[0].requests[0].target_new == "O\u2028slo"


# downloads


@pytest.fixture
def host() -> Iterator[tuple[str, list[str]]]:
    """A local host that serves one fact under /facts.json; its address and the paths it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            body = json.dumps([fact(1)]).encode()
            if not self.path.endswith("facts.json"):
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(body) + (5 if "torn" in self.path else 0)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_a_published_file_is_fetched_once_checked_and_announced(host: tuple[str, list[str]], tmp_path: Path) -> None:
    url, asked = f"{host[0]}/facts.json", host[1]
    body = json.dumps([fact(1)]).encode()
    published = Remote(url, "CC0", len(body), hashlib.sha256(body).hexdigest())
    notes = Notes()
    for _ in range(2):
        dataset = Facts("facts", published=published, cache_dir=str(tmp_path)).load(monitor=notes)
        assert dataset.ids == ("1",) and dataset.source == url
    assert asked == ["/facts.json"]
    assert len(notes.notes) == 1 and url in notes.notes[0] and "license: CC0" in notes.notes[0]
    (cached,) = (tmp_path / "downloads").iterdir()
    cached.write_text("[1]")
    with pytest.raises(MissingError, match="is a damaged copy of .*: delete it"):
        Facts("facts", published=published, cache_dir=str(tmp_path)).load()


@pytest.mark.parametrize(
    ("path", "more", "message"),
    [
        ("/facts.json", {"sha256": "0" * 64}, "has the sha256 .* instead of 0000"),
        ("/facts.json", {"bytes": 3}, "bytes instead of 3"),
        ("/torn/facts.json", {}, "bytes instead of"),
        ("/none.json", {}, "answered 404"),
    ],
)
def test_what_is_not_the_published_file_is_not_kept(
    host: tuple[str, list[str]], tmp_path: Path, path: str, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(MissingError, match=f"{message}.*; give a local copy: dataset.path=FILE"):
        Facts("facts", published=Remote(host[0] + path, **more), cache_dir=str(tmp_path)).load()
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_a_url_as_path_is_read_too(host: tuple[str, list[str]], tmp_path: Path) -> None:
    assert Facts("facts", path=f"{host[0]}/facts.json", cache_dir=str(tmp_path)).load().ids == ("1",)


def test_without_a_network_the_message_says_what_was_sought_where_and_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*args: Any, **options: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    source = CounterFact(
        "counterfact", published=Remote("https://host.invalid/counterfact.json"), cache_dir=str(tmp_path)
    )
    sought = r"https://host\.invalid/counterfact\.json is not in the cache \(.*downloads.*\)"
    with pytest.raises(
        MissingError, match=sought + r" and host\.invalid cannot be reached .*; give a local copy: dataset.path=FILE"
    ):
        source.load()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MissingError, match="HF_HUB_OFFLINE forbids downloads"):
        source.load()


def test_a_cache_that_cannot_be_written_is_one_line(host: tuple[str, list[str]], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MissingError, match="the download broke off"):
        Facts("facts", path=f"{host[0]}/facts.json", cache_dir=str(tmp_path / "file")).load()


@pytest.mark.parametrize("path", ["hub:owner", "hub:owner/name:a:b", "hub:owner/-name:a.json", "https://[bad"])
def test_addresses_of_another_form_are_refused(path: str) -> None:
    with pytest.raises(UsageError, match="dataset.path="):
        Facts("facts", path=path).load()


class Hub:
    """Stands in for the hub's client: one dataset repository with the given files."""

    def __init__(self, tmp_path: Path, names: list[str], online: bool = True) -> None:
        self.folder, self.names, self.online = tmp_path, names, online

    def dataset_info(self, repo: str, revision: str | None, timeout: float) -> Any:
        if not self.online:
            raise OSError("no route")
        siblings = [{"rfilename": name} for name in self.names]
        return OmegaConf.create({"siblings": siblings, "sha": "c0ffee", "card_data": {"license": "mit"}})

    def download(self, repo: str, name: str, *, local_files_only: bool = False, **options: Any) -> str:
        from huggingface_hub.errors import LocalEntryNotFoundError

        if not (self.folder / name).is_file():
            raise LocalEntryNotFoundError("not cached")
        return str(self.folder / name)


def use_hub(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.download)


def test_the_only_data_file_of_a_hub_dataset_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data.json").write_text(json.dumps([fact(1)]))
    use_hub(monkeypatch, Hub(tmp_path, ["README.md", "data.json"]))
    notes = Notes()
    assert Facts("facts", path="hub:owner/name").load(monitor=notes).source == "hub:owner/name@c0ffee:data.json"
    assert notes.notes == ["Reading data.json of the hub's dataset owner/name (license: mit)"]
    use_hub(monkeypatch, Hub(tmp_path, ["data.json", "more.csv"]))
    with pytest.raises(
        UsageError, match="has 2 data files .*data.json, more.csv.*name one: dataset.path=hub:owner/name:FILE"
    ):
        Facts("facts", path="hub:owner/name").load()


def test_without_the_hub_its_cache_is_used_or_missed_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data.json").write_text(json.dumps([fact(1)]))
    use_hub(monkeypatch, Hub(tmp_path, [], online=False))
    assert Facts("facts", path="hub:owner/name:data.json").load().ids == ("1",)
    with pytest.raises(MissingError, match="none.json is not in the hub's cache and the hub cannot be reached"):
        Facts("facts", path="hub:owner/name:none.json").load()
    with pytest.raises(MissingError, match="cannot be reached .* to list its files"):
        Facts("facts", path="hub:owner/name").load()
    use_hub(monkeypatch, Hub(tmp_path, ["none.json"]))  # the connection is lost between the listing and the file
    with pytest.raises(MissingError, match="none.json is not in the hub's cache and the hub cannot be reached"):
        Facts("facts", path="hub:owner/name:none.json").load()


# reference texts


def snippet(relation: str, target: str, *texts: str) -> dict[str, Any]:
    return {"relation_id": relation, "target_id": target, "samples": [{"name": "n", "text": text} for text in texts]}


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_a_json_list_is_streamed_whatever_the_chunk(tmp_path: Path, chunk: int) -> None:
    values = [snippet("P1", "Q1", 'a "quoted" ], text', "ü😀"), {}, [], {"a": [1, 2, {"b": "]"}]}]
    for number, text in enumerate((json.dumps(values), json.dumps(values, indent=2, ensure_ascii=False))):
        path = tmp_path / f"{number}.json"
        path.write_text(text, encoding="utf-8")
        assert list(elements(path, chunk)) == values


@pytest.mark.parametrize("index_above", [0, 1 << 30])
def test_texts_are_found_by_key_read_directly_or_through_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index_above: int
) -> None:
    monkeypatch.setattr(snippets_module, "INDEX_ABOVE", index_above)
    path = tmp_path / "snippets.json"
    path.write_text(json.dumps([snippet("P1", "Q1", "a", "b"), snippet("P1", "Q2", "c"), snippet("P1", "Q1", "d")]))
    keys = {("P1", "Q1"), ("P9", "Q9")}
    for _ in range(2):
        assert texts_of(keys, File(path, "s"), str(tmp_path / "cache"), Monitor()) == {("P1", "Q1"): ("a", "b", "d")}
    indexes = list((tmp_path / "cache").rglob("*.sqlite"))
    assert len(indexes) == (1 if index_above == 0 else 0)
    path.write_text(json.dumps([snippet("P1", "Q1", "another text")]))
    assert texts_of(keys, File(path, "s"), str(tmp_path / "cache"), Monitor()) == {("P1", "Q1"): ("another text",)}


@pytest.mark.parametrize("index_above", [0, 1 << 30])
@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[1]",
        '[{"relation_id": "P1"}]',
        '[{"relation_id": 1, "target_id": 2, "samples": [{"text": 5}]}]',
        '[{"re',
        "[",
    ],
)
def test_snippets_of_another_form_get_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, index_above: int
) -> None:
    monkeypatch.setattr(snippets_module, "INDEX_ABOVE", index_above)
    path = tmp_path / "snippets.json"
    path.write_text(content)
    with pytest.raises(MissingError, match="dataset.snippets: s is not a JSON list of the form"):
        texts_of({("P1", "Q1")}, File(path, "s"), str(tmp_path / "cache"), Monitor())
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("*.sqlite"))


# configuration


def build(name: str, **overrides: Any) -> Any:
    """What the command line does with a dataset's YAML."""
    node = with_defaults(OmegaConf.load(CONF / f"{name}.yaml"))
    top = OmegaConf.create({"cache_dir": "cache", "model": {"records": None}, "dataset": node})
    return built(OmegaConf.merge(top, {"dataset": overrides}).dataset)


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_yaml_builds_its_class_and_shows_a_command(path: Path) -> None:
    source = build(path.stem, path=None)
    assert source.name == path.stem
    header = path.read_text(encoding="utf-8").splitlines()
    assert header[0].startswith("# ") and header[1].startswith("#   edit-cli ") and f"dataset={path.stem}" in header[1]


def test_numbers_on_the_command_line_are_ids(five: str) -> None:
    assert build("facts", path=five, ids=[14, 11]).load().ids == ("14", "11")


def test_a_truth_value_on_the_command_line_is_the_true_target() -> None:
    assert build("zsre_alt").target == "alt" and build("zsre_alt", target=True).target == "true"


def test_the_published_files_are_checked_where_a_checksum_is_known() -> None:
    source = build("counterfact")
    assert (
        isinstance(source.published, Remote)
        and source.published.bytes == 45_108_470
        and len(source.published.sha256) == 64
    )
    assert isinstance(source.published_snippets, Remote) and len(source.published_snippets.sha256) == 64


def test_the_public_names_are_found_lazily() -> None:
    assert all(getattr(edit_cli.datasets, name).__name__ == name for name in edit_cli.datasets.__all__)
    with pytest.raises(AttributeError):
        _ = edit_cli.datasets.Unknown
