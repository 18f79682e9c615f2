"""Arguments between Typer and Hydra."""

from __future__ import annotations

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from edit_cli.arguments import override_key, quoted, regroup
from edit_cli.errors import UsageError


def test_overrides_on_both_sides_of_flags_stand_together():
    arguments = ["method=memit", "--cfg", "job", "limit=3", "--config-dir", "mine", "-m", "seed=1,2"]
    assert regroup(arguments) == [
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


TEXTS = ["{} plays the", "it's", "a\\'b", 'say "x"', "end\\", "a, b", "[x", "null", "3", "", "a\\b", "\\\\'", "(a:b)"]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_mean_themselves(text):
    (override,) = regroup([f"edit.prompt={text}"])
    assert OverridesParser.create().parse_override(override).value() == text


def test_quoted_texts_stay_as_they_are():
    assert quoted("'a, b'") == "'a, b'"


@pytest.mark.parametrize(
    ("arguments", "told"),
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
def test_mistakes_are_named(arguments, told):
    with pytest.raises(UsageError, match="^.*") as caught:
        regroup(arguments)
    assert told in str(caught.value)


@pytest.mark.parametrize("override", ["+a.b=1", "++a.b=1", "~a.b", "a.b@c=1", "a.b=x=y"])
def test_keys_without_marks(override):
    assert override_key(override) == "a.b"
