"""Edits, checkpoints and statistics on a hub: the hub's own client talks to a stand-in of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from conftest import invoke
from embedded import embedded_lm, same_bits, snapshot
from fake_hub import TOKEN, Hub, Repo
from safetensors.torch import save_file

import edit_cli
from edit_cli.editors.meta import checkpoints
from edit_cli.edits import store as edit_store
from edit_cli.edits.edit import Factors, WeightDelta
from edit_cli.errors import MissingError, UsageError
from edit_cli.experiment.parcel import parcel, portable
from edit_cli.experiment.saved_edits import Base
from edit_cli.files.hub import Address, here
from edit_cli.lm.model_files import Source, resolve
from edit_cli.requests import EditRequest
from edit_cli.statistics.moments import MomentStore

OUT = "transformer.h.{}.mlp.c_proj.weight"
FACT = EditRequest("{} plays the", "Ada Lund", "violin", "organ")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in, with a token for it, and a cache of the client's that is empty."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with Hub().running() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


def delta(layer: int) -> WeightDelta:
    generator = torch.Generator().manual_seed(layer)
    left, right = (torch.randn(*size, generator=generator) for size in ((128, 1), (1, 512)))
    return WeightDelta({OUT.format(layer): Factors(0.1 * left, 0.1 * right)}, by_fact={"keys": right.T.clone()})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of a user's: an edit on top of another one, with places of this machine in their manifests."""
    lm, folder = embedded_lm(), tmp_path_factory.mktemp("push")
    about = {"name": "memit", "moments": {"cache_dir": str(folder / "cache"), "documents": 40}, "layers": [1]}
    edit_store.save(delta(1), folder / "a", lm, [FACT], about)
    with lm.edited(delta(1)):
        edit_store.save(delta(2), folder / "b", lm, [FACT], {**about, "checkpoint": str(folder)}, folder / "a")
    (folder / "b" / "log.txt").write_text(str(folder))
    return folder


@pytest.fixture
def there(saved, hub, monkeypatch, cache_dir):
    monkeypatch.chdir(saved)
    monkeypatch.setenv("COLUMNS", "200")
    return SimpleNamespace(run=lambda *words: invoke(cache_dir, *words), hub=hub, folder=saved)


def test_an_edit_goes_there_and_back(there):
    ended = there.run("push", "b", "hub:ada/organ", "--private", "--message", "Two facts")
    assert (ended.code, ended.last) == (0, "hub:ada/organ"), ended.err
    repo = there.hub.repos["ada/organ"]
    assert repo.private and repo.messages == ["Two facts"]
    _, files = repo.branches["main"][-1]
    one = ("edit.json", "edit.safetensors", "facts.safetensors")
    assert sorted(files) == sorted(["README.md", *one, *(f"base/{name}" for name in one)])
    told = " ".join(ended.err.split())
    assert "not sent: log.txt" in told and "7 files" in told and "a private repository" in told
    assert all(name in ended.out for name in files)  # what goes there, before it goes
    for name, held in files.items():
        assert str(there.folder).encode() not in held and b"cache_dir" not in held, name
    card = files["README.md"].decode()
    assert "| Ada Lund plays the | violin | organ |" in card and "library_name: edit-cli" in card
    assert "edit-cli ask hub:ada/organ" in card and 'edit_cli.attach("hub:ada/organ", lm)' in card
    assert "takes single facts out" in card
    lm, local = embedded_lm(), embedded_lm()
    before = snapshot(lm)
    edit_cli.attach("hub:ada/organ", lm)
    attached = snapshot(lm)
    lm.detach(), lm.detach()
    assert same_bits(before, snapshot(lm))
    edit_store.attach("b", local)
    assert same_bits(attached, snapshot(local)) and not same_bits(attached, before)
    local.detach(), local.detach()
    listed = there.run("edits", "hub:ada/organ", "--json")
    assert [row["id"] for row in json.loads(listed.out)] == [
        edit_store.read_manifest(name)["id"] for name in ("b/base", "b")
    ]
    asked = there.run("apply", "hub:ada/organ", "--out", str(there.folder / "baked"))
    assert asked.code == 0, asked.err
    again = there.run("push", "b", "hub:ada/organ")
    assert again.code == 3 and "hub:ada/organ: the name is taken: choose another one, or add a commit" in again.error
    more = there.run("push", "a", "hub:ada/organ:older", "--update", "--revision", "old")
    assert more.code == 0 and "older/edit.json" in repo.branches["old"][-1][1], more.err
    assert here("hub:ada/organ@old:older", ("edit.json",)).joinpath("edit.json").is_file()


def test_an_edit_of_a_model_in_a_folder_says_that_its_receiver_names_one(there):
    edit_store.save(delta(1), "own", embedded_lm(), [FACT], {"name": "memit"})
    about = json.loads(Path("own/edit.json").read_text())
    about["base_model"] |= {"name": "mine", "id": str(there.folder)}
    Path("own/edit.json").write_text(json.dumps(about))
    ended = there.run("push", "own", "hub:ada/own")
    assert ended.code == 0, ended.err
    card = there.hub.repos["ada/own"].branches["main"][-1][1]["README.md"].decode()
    assert "edit-cli ask hub:ada/own 'a prompt' --model FOLDER" in card and 'edit_cli.load("FOLDER")' in card


def test_nothing_is_sent_that_is_only_to_be_shown(there):
    ended = there.run("push", "b", "hub:ada/organ", "--dry-run")
    assert (ended.code, there.hub.asked) == (0, []) and "base/edit.safetensors" in ended.out
    assert "nothing was sent" in ended.err


def _no_token(patch, hub):
    patch.delenv("HF_TOKEN")


def _wrong_token(patch, hub):
    patch.setenv("HF_TOKEN", "hf_wrong")


def _offline(patch, hub):
    patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nobody listens


def _as_it_is(patch, hub):
    pass


@pytest.mark.parametrize(
    ("words", "prepare", "code", "told"),
    [
        (("push", "b", "hub:ada/x"), _no_token, 3, "hub:ada/x: the hub takes nothing without a token: log in with"),
        (("push", "b", "hub:ada/x"), _wrong_token, 3, "hub:ada/x: the hub does not know the token: log in"),
        (("push", "b", "hub:ada/x"), _offline, 3, "hub:ada/x: the hub cannot be reached (ConnectError)"),
        (("push", "b", "hub:ada/x", "--update"), _as_it_is, 3, "hub:ada/x: the hub has no such repository"),
        (("push", "b", "hub:bob/x"), _as_it_is, 3, "hub:bob/x: the hub does not let this token do that"),
        (("push", "b", "hub:ada"), _as_it_is, 2, "hub:ada: write hub:owner/name"),
        (("push", "b", "ada/x"), _as_it_is, 2, "ada/x: write hub:owner/name"),
        (("push", "b", "hub:ada/x:../y"), _as_it_is, 2, "write hub:owner/name"),
        (("push", ".", "hub:ada/x"), _as_it_is, 3, ". is nothing that could be sent: no edit (edit.json)"),
        (("push", "nowhere", "hub:ada/x"), _as_it_is, 3, "nowhere is no folder"),
        (("edits", "hub:ada/x"), _as_it_is, 3, "hub:ada/x: the hub has no such repository (if it is private, log in"),
        (("edits", "hub:ada/x"), _offline, 3, "hub:ada/x: the hub cannot be reached (ConnectError); try again, or"),
        (("edits", "hub:ada/y@none"), _as_it_is, 3, "hub:ada/y@none: the repository has no such revision"),
        (("edits", "hub:ada/y"), _as_it_is, 3, "hub:ada/y holds none of edit.json"),
        (("edits", "hub:ada"), _as_it_is, 2, "hub:ada: write hub:owner/name"),
    ],
)
def test_what_the_hub_has_against_it_is_one_line(there, monkeypatch, words, prepare, code, told):
    there.hub.repos["ada/y"] = Repo(branches={"main": [("a" * 40, {"other.txt": b""})]})
    prepare(monkeypatch, there.hub)
    ended = there.run(*words)
    assert ended.code == code and told in ended.error, ended.err


def test_an_edit_that_was_changed_is_not_sent(there, tmp_path):
    folder = tmp_path / "e"
    edit_store.save(delta(1), folder, embedded_lm(), [FACT], {"name": "memit"})
    file = folder / "edit.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    ended = there.run("push", str(folder), "hub:ada/x")
    assert ended.code == 3 and "was changed after it was saved" in ended.error and not there.hub.asked


def test_steps_of_a_sequence_are_no_edits_by_themselves(there, tmp_path):
    lm = embedded_lm()
    for number in (0, 1):
        about = {"name": "memit", "made": {"seconds": 1.0, "step": number}}
        edit_store.save(delta(1), tmp_path / "edits" / f"{number:05d}", lm, [FACT], about)
    for step in ("00000", "00001"):
        ended = there.run("push", str(tmp_path / "edits" / step), "hub:ada/x")
        assert ended.code == 2 and "one of the steps of a sequence" in ended.error
    whole = there.run("push", str(tmp_path), "hub:ada/x")
    assert whole.code == 2 and "holds 2 saved edits: name one of them" in whole.error


def test_a_checkpoint_goes_without_logs_and_places_and_is_found_as_a_model(there, tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "_name_or_path": str(folder)}))
    (folder / "tokenizer.json").write_text('{"a": "/root"}')
    (folder / "README.md").write_text(f"Base model: {folder}. Edited.")
    (folder / "log.txt").write_text(str(folder))
    save_file({"x": torch.ones(2)}, folder / "model.safetensors")
    ended = there.run("push", str(folder), "hub:ada/edited")
    assert ended.code == 0 and "not sent: log.txt" in " ".join(ended.err.split()), ended.err
    _, files = there.hub.repos["ada/edited"].branches["main"][-1]
    assert sorted(files) == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert json.loads(files["config.json"]) == {"model_type": "gpt2", "_name_or_path": "checkpoint"}
    assert files["README.md"] == b"Base model: checkpoint. Edited." and files["tokenizer.json"] == b'{"a": "/root"}'
    url = there.hub.url
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    commit = there.hub.repos["ada/edited"].branches["main"][-1][0]
    assert resolve("hub:ada/edited", None) == Source("ada/edited", commit, False)
    assert Base("hub:ada/edited").options(there.folder / "a").name == "edited"
    with pytest.raises(MissingError, match="a model is a whole repository"):
        resolve("hub:ada/edited:inside", None)


def test_a_trained_editor_goes_there_and_is_found_by_its_address(there, tmp_path):
    net, folder = torch.nn.Linear(2, 3), tmp_path / "editor"
    about = {"type": "mend", "base": "b", "recipe": {"rank": 8}, "model": {"name": "tiny-gpt2"}}
    checkpoints.save(folder, net, {**about, "dataset": {"name": "world", "source": str(tmp_path / "w.json")}})
    (folder / "curve.png").write_bytes(b"")
    ended = there.run("push", str(folder), "hub:ada/editors:mend")
    assert ended.code == 0 and "not sent: curve.png" in " ".join(ended.err.split()), ended.err
    tensors, told = checkpoints.load(checkpoints.here("hub:ada/editors:mend"))
    assert torch.equal(tensors["weight"], net.weight) and told["dataset"]["source"] == "w.json"
    named = {**about, "recipe": {"counterfactual": str(tmp_path)}, "dataset": {"name": "world"}}
    checkpoints.save(folder, net, named)
    refused = there.run("push", str(folder), "hub:ada/other")
    assert refused.code == 2 and "its recipe, by which it is looked up, names a folder" in refused.error


def test_places_in_what_an_edit_remembers_are_left_out_and_it_is_whole(tmp_path):
    lm = embedded_lm()
    first, second = delta(1), delta(2)
    first.info["command"] = f"train model.id={tmp_path} limit=3"
    edit_store.save(first, tmp_path / "a", lm, [FACT], {"name": "ft"})
    with lm.edited(first):
        edit_store.save(second, tmp_path / "b", lm, [FACT], {"name": "ft"}, tmp_path / "a")
    for name, held in parcel(tmp_path / "b", Address("ada/x")).files.items():
        file = tmp_path / "c" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(held.read_bytes() if isinstance(held, Path) else held)
    edit_store.verify(tmp_path / "c")
    manifest = edit_store.read_manifest(tmp_path / "c" / "base")
    assert manifest["state"]["info"]["command"] == f"train model.id={tmp_path.name} limit=3"
    assert manifest["id"] != edit_store.read_manifest(tmp_path / "a")["id"]


def test_statistics_are_taken_from_a_hub_where_they_are_missing(there, tmp_path, monkeypatch):
    lm, some = embedded_lm(), dict[str, Any](tokens=600, documents=None)
    own = MomentStore(cache_dir=str(tmp_path / "own"), **some)
    moment = own.second_moment(lm, 1)
    ended = there.run("push", str(moment.path.parent), "hub:ada/stats")
    assert ended.code == 0, ended.err
    card = there.hub.repos["ada/stats"].branches["main"][-1][1]["README.md"].decode()
    assert "# Second moments of tiny-gpt2" in card and "stats.hub=hub:ada/stats" in card and "| 1 | embedded |" in card
    other = MomentStore(cache_dir=str(tmp_path / "other"), hub="hub:ada/stats", **some)
    other.require("tiny-gpt2", [1])
    with monkeypatch.context() as patch:
        patch.setattr(MomentStore, "_compute", lambda *_: pytest.fail("it was computed"))
        found = other.second_moment(lm, 1)
    assert torch.equal(found.matrix, moment.matrix) and found.path.read_bytes() == moment.path.read_bytes()
    unlike = MomentStore(cache_dir=str(tmp_path / "third"), hub="hub:ada/stats", tokens=700, documents=None)
    assert not unlike.second_moment(lm, 1).cached  # of other settings: computed


def test_places_of_this_machine_are_left_out_and_texts_stay(tmp_path):
    place = str(tmp_path / "gone" / "model")
    told = {"cache_dir": "~/x", "id": place, "starts": ["and/or", "1/2 of"], "facts": [[place, "x"]], "n": 3}
    assert portable(told) == {"id": "model", "starts": ["and/or", "1/2 of"], "facts": [[place, "x"]], "n": 3}
    assert portable(f"edit-cli train-editor model.id={place} limit=3") == "edit-cli train-editor model.id=model limit=3"
    assert portable("see https://huggingface.co/docs and /nowhere/at/all") == (
        "see https://huggingface.co/docs and /nowhere/at/all"
    )


def test_addresses():
    assert Address.parse("hub:a/b@v1.0:c/d", "") == Address("a/b", "v1.0", "c/d")
    assert str(Address("a/b", "v1", "c")) == "hub:a/b@v1:c" and Address("a/b", folder="c").inside("x") == "c/x"
    for wrong in ("hub:a", "hub:a/b:/etc", "hub:a/b@..", "a/b", "hub:a/b/c"):
        with pytest.raises(UsageError, match="write hub:owner/name"):
            Address.parse(wrong, "")
    assert here(Path("x/y"), ()) == Path("x/y")
