"""The reference of all keys: as the code has them, and nothing that a command composes is left out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import hydra
import pytest
from omegaconf import OmegaConf

from edit_cli.cli.help import CONFIGURED, OTHERS
from edit_cli.config import catalog
from edit_cli.config.build import register_resolvers
from tools.reference import FOLDER, pages


def test_the_pages_are_made_from_the_code_as_it_is():
    committed = {file.name: file.read_text(encoding="utf-8") for file in FOLDER.glob("*.md")}
    made = pages()
    assert made.keys() == committed.keys()
    assert [name for name in made if made[name] != committed[name]] == [], "run `make reference` and commit the pages"


def page(name: str) -> str:
    return (FOLDER / f"{name}.md").read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    return re.split(rf"^## {re.escape(heading)}$", text, maxsplit=1, flags=re.MULTILINE)[1].partition("\n## ")[0]


def rows(text: str) -> dict[str, str]:
    """{key: default as it is shown} of the tables of a text."""
    return {key: shown for key, shown in re.findall(r"^\| `([^`]+)`…? \| [^|]* \| `?([^|]*?)`? \|", text, re.MULTILINE)}


def leaves(composed: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """(key, value as it is written) of what Hydra composed; what another key stands for is a value."""
    for key, value in composed.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        elif key != "_target_":
            yield f"{prefix}{key}", value


@pytest.mark.parametrize(
    ("method", "groups"),
    [("memit", {"methods": ["value", "context"]}), ("mend", {"methods": ["draw"], "training": ["training"]})],
)
def test_a_method_s_section_and_the_groups_it_names_are_what_hydra_composes(method, groups):
    register_resolvers()
    with hydra.initialize_config_module("edit_cli.conf", version_base="1.3"):
        config = hydra.compose("train-editor", [f"method={method}", "model=hf"])
    told: dict[str, str] = {}
    for name, headings in groups.items():
        for heading in headings:
            told |= rows(section(page(name), heading))
    told |= rows(section(page("methods"), method))
    composed: Any = OmegaConf.to_container(config.method, resolve=False)
    found = dict(leaves(composed, "method."))
    assert {key for key in told if not key.endswith(".")} == set(found)
    plain = {key: str(value).lower() for key, value in found.items() if isinstance(value, int | float)}
    assert {key: shown for key, shown in told.items() if key in plain} == plain


def test_every_option_and_every_command_has_a_section():
    for group, name in {"method": "methods", "dataset": "datasets"}.items():
        assert all(f"\n## {option}\n" in page(name) for option in catalog.names(group))
    assert all(f"| `{model}` |" in page("models") for model in catalog.names("model"))
    assert all(f"\n## {command}\n" in page("commands") for command in (*CONFIGURED, *OTHERS))
    assert "`--against`" in section(page("commands"), "compare")
