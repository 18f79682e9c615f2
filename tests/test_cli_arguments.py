"""Arguments between Typer and Hydra."""

from __future__ import annotations

from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from edit_cli.cli.hydra_launch import kinds
from edit_cli.config import overrides as arguments
from edit_cli.config.overrides import Kind, override_key, quoted, regroup, unquoted
from edit_cli.errors import UsageError

CHOSEN = ["method=memit", "corpus=file", "dataset=fever"]
KINDS = kinds("edit", CHOSEN, [])
SENTENCES_OF = [key for key, kind in KINDS.items() if kind is Kind.SENTENCE]


def test_overrides_on_both_sides_of_flags_stand_together():
    words = ["method=memit", "--cfg", "job", "limit=3", "--config-dir", "mine", "-m", "seed=1,2"]
    assert regroup(words) == [
        "--cfg",
        "job",
        "--config-dir",
        "mine",
        "-m",
        "--resolve",
        "method=memit",
        "limit=3",
        "seed=1,2",
    ]


def test_values_of_flags_may_be_joined():
    assert regroup(["--config-dir=a=b", "limit=1"]) == ["--config-dir", "a=b", "limit=1"]


SENTENCES = [
    "{} plays the",
    "it's",
    "a\\'b",
    'say "x"',
    "end\\",
    "a, b",
    "[x",
    "null",
    "3",
    "",
    "a\\b",
    "\\\\'",
    "(a:b)",
]


SENTENCES += [
    "'so'",
    '"Heroes"',
    "${seed}",
    "a ${b} \\${c} \\\\${d}",
    "true",
    "1e3",
    "中国",
    "x=y",
    "100 %",
    "choice(a,b)",
]


def composed(*arguments: str) -> list[Any]:
    """What the settings are that Hydra makes of the arguments, in order."""
    overrides = [OverridesParser.create().parse_override(override) for override in regroup(arguments, KINDS)]
    config = OmegaConf.create({str(number): override.value() for number, override in enumerate(overrides)})
    return [config[key] for key in config]


@pytest.mark.parametrize("text", SENTENCES)
@pytest.mark.parametrize("key", SENTENCES_OF)
def test_sentences_mean_themselves(key, text):
    assert composed(f"{key}={text}") == [text]


NAMES = [
    "it's",
    "a b",
    "(1)",
    "[1]",
    "a,b",
    "{x}",
    "a=b&c",
    "#1",
    "é中",
    "007",
    "1e3",
    "true",
    "a: b",
    "100%",
    "x;y",
    "~x",
    "NULL",
]
TEXT_SETTINGS = [
    "dataset.path",
    "model.id",
    "cache_dir",
    "tag",
    "method.value.kl_prompt",
    "corpus.path",
    "stats.import_npz",
]


@pytest.mark.parametrize("name", NAMES)
def test_settings_that_hold_text_are_taken_as_typed(name):
    assert composed(*(f"{key}=/d/{name}" for key in TEXT_SETTINGS)) == [f"/d/{name}"] * len(TEXT_SETTINGS)
    assert composed("tag=" + name) == [name]


def test_text_settings_may_be_null_refer_to_others_and_be_quoted():
    assert composed("model.revision=null", "seed=3", "tag=run-${1}", "dataset.path='a b'") == [None, 3, "run-3", "a b"]


def test_a_home_directory_is_filled_in_for_paths_only(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    for key in ("dataset.path", "cache_dir", "runs_dir", "run_dir", "base_edit", "model.id", "stats.import_npz"):
        assert composed(f"{key}=~/my runs") == ["/home/ada/my runs"]
    assert composed("tag=~/x", "dataset.path=~nobody-here/x") == ["~/x", "~nobody-here/x"]
    assert regroup(["--config-dir=~/mine"])[:2] == ["--config-dir", "/home/ada/mine"]


def test_lists_of_text_keep_what_looks_like_numbers():
    assert composed("dataset.ids=[007, 1e3, a]", "method.layers=[1, 2]") == [["007", "1e3", "a"], [1, 2]]
    assert composed("dataset.ids=['a, b', c]") == [["a, b", "c"]]


def test_in_a_sweep_commas_part_the_values_of_settings():
    def swept(argument: str) -> list[Any]:
        (override,) = regroup(["-m", argument], KINDS)[1:]
        found = OverridesParser.create().parse_override(override).sweep_iterator()
        return [getattr(value, "text", value) for value in found]

    assert swept("dataset.path=a (1).json,b.json") == ["a (1).json", "b.json"]
    assert swept("dataset.path='a,b',c") == ["a,b", "c"]
    assert swept("method.past_keys=choice(none,write)") == ["none", "write"]
    assert regroup(["-m", "edit.target=a,b"], KINDS)[1:] == ["edit.target='a,b'"]


@pytest.mark.parametrize("text", [*SENTENCES, *NAMES])
def test_what_was_quoted_is_shown_without_quotes(text):
    if not arguments.QUOTED.fullmatch(text):
        assert unquoted(quoted(text)) == text
    assert quoted("'a, b'") == "'a, b'"


def test_which_settings_hold_text_is_what_their_types_say():
    assert {"edit.prompt", "edit.join", "dataset.template"} <= set(SENTENCES_OF)
    assert {KINDS[key] for key in ("dataset.ids", "dataset.labels", "model.labels")} == {Kind.TEXTS}
    assert {KINDS[key] for key in ("tag", "model.dtype", "method.past_keys", "model.layout.mlp_out")} == {Kind.TEXT}
    assert {KINDS[key] for key in ("base_edit", "corpus.path", "stats.cache_dir")} == {Kind.FILE}
    assert not {"limit", "method.layers", "model.device_map", "stats.tokens", "protocol.observe"} & set(KINDS)


def test_options_of_the_users_own_and_of_sweeps_tell_what_they_take(tmp_path):
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text("defaults: [memit, _self_]\nlayers: [1]\n")
    assert kinds("evaluate", ["method=mine"], [tmp_path])["method.value.kl_prompt"] is Kind.TEXT
    assert "method.variant" in kinds("evaluate", ["method=rome,memit"], [])
    assert "method.variant" not in kinds("evaluate", ["method=memit"], [])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["limit"], "'limit' is no setting"),
        (["=3"], "names no setting"),
        (["--limit=3"], "limit=3"),
        (["--batch-size", "3"], "batch_size=VALUE"),
        (["--multrun"], "--multirun"),
        (["--cfg"], "--cfg job"),
        (["--cfg", "jobs"], "choose job"),
        (["-x"], "-x"),
    ],
)
def test_mistakes_are_named(words, told):
    with pytest.raises(UsageError, match="^.*") as caught:
        regroup(words)
    assert told in str(caught.value)


@pytest.mark.parametrize("override", ["+a.b=1", "++a.b=1", "~a.b", "a.b@c=1", "a.b=x=y"])
def test_keys_without_marks(override):
    assert override_key(override) == "a.b"
