"""Writes docs/reference: every key, from the classes that hold the settings and the files in conf/.

python -m tools.reference
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from edit_cli.cli import help as help_texts
from edit_cli.config import catalog, registry, source
from edit_cli.config.schema import UNSET, Key, defaults, describe, documented, hints, part_of
from edit_cli.experiment.protocol import Asked

DOCS = Path(__file__).parent.parent / "docs"
FOLDER = DOCS / "reference"
NAMES = (*catalog.GROUPS.values(), "protocol")  # groups of which an option is chosen
COMMAND = ""  # the group of a command's own keys
PAGES = {
    "method": "methods",
    "dataset": "datasets",
    "protocol": "protocols",
    "stats": "statistics",
    COMMAND: "commands",
}
TOLD = ("model.name", "model.made_for")  # what a table of models says anyway, or follows from its id
TRAINING = "training"  # the group of keys that has a page of its own
MADE = "<!-- made by `python -m tools.reference`; change the classes of settings instead -->"
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Shared:
    """A group of keys that several classes have: told once, in a section of its own.

    heading: the keys that it stands under. page: where its section is. prefix: of its keys there.
    """

    cls: type
    heading: str
    page: str
    prefix: str


@dataclass(frozen=True)
class GroupRow:
    """A shared group as one row of a table, with the keys whose defaults are others here."""

    key: Key
    shared: Shared
    departures: tuple[Key, ...]


@dataclass(frozen=True)
class Option:
    """A class of settings with what a file says of it: `method=memit`, or a command's own settings."""

    group: str
    name: str
    cls: type
    values: Values

    @property
    def heading(self) -> str:
        """What its section is called; texts stand on a page with other things."""
        return f"corpus={self.name}" if self.group == "corpus" else self.name

    @property
    def prefix(self) -> str:
        return f"{self.group}." if self.group else ""

    @cached_property
    def rows(self) -> list[Key | GroupRow]:
        return list(_rows(self.cls, self.prefix, self.values))

    @cached_property
    def keys(self) -> dict[str, Key]:
        """Its keys one by one, those of shared groups included."""
        return {key.name: key for key in _flat(self.cls, self.prefix, self.values)}

    @property
    def own(self) -> tuple[bool, int, str]:
        """Sorts options of one class: the one that the class was written for first, then by how little they say."""
        target = registry.BUILT_IN[registry.METHODS].get(self.name, "")
        usual = {key.name: key for key in _flat(self.cls, self.prefix, defaults(self.cls))}
        differing = sum(key != usual.get(name) for name, key in self.keys.items())
        return not target.startswith(f"{self.cls.__module__}:"), differing, self.name


# --- from classes to rows ---------------------------------------------------------------------------------------------


@cache
def options(group: str) -> tuple[Option, ...]:
    """What may be chosen of a group."""
    found = []
    for name in catalog.names(group):
        if (cls := source.class_of(catalog.target_of(group, name))) is not None:
            node = OmegaConf.merge(*map(OmegaConf.load, catalog.files_of(group, name)))
            values = OmegaConf.to_container(source.with_defaults(node), resolve=False)
            found.append(Option(group, name, cls, {str(key): value for key, value in values.items()}))  # type: ignore
    return tuple(found)


@cache
def parts(command: str) -> dict[str, Option]:
    """{group: what a command itself says of it}: its own settings, its protocol, second moments."""
    return {
        (group := prefix.rstrip(".")): Option(group, command, cls, defaults(cls))
        for prefix, name, target in catalog.targets(command)
        if name == command and target is not None and (cls := source.class_of(target)) is not None
    }


@cache
def shared() -> dict[type, Shared]:
    """The groups of keys that stand in several places."""
    places: dict[type, dict[tuple[type, str], str]] = {}

    def look(group: str, cls: type, prefix: str = "") -> None:
        for key, part, _ in _fields(cls, prefix, defaults(cls)):
            if part is not None:
                places.setdefault(part, {})[cls, key.name] = group
                look(group, part, f"{key.name}.")

    for option in _all():
        look(option.group, option.cls)
    found = {}
    for part, keys in places.items():
        if len(keys) > 1:
            names = sorted({name for _, name in keys}, key=lambda name: (name.count("."), name))
            group = next(iter(keys.values()))
            prefix = f"{group}.{names[0]}." if len(names) == 1 else "…"
            page = TRAINING if names == [TRAINING] else PAGES[group]
            found[part] = Shared(part, ", ".join(names), page, prefix)
    return found


def _all() -> Iterator[Option]:
    for group in NAMES:
        yield from options(group)
    for command in help_texts.CONFIGURED:
        yield from parts(command).values()


def _rows(cls: type, prefix: str, values: Values) -> Iterator[Key | GroupRow]:
    """Keys of a class; shared groups as one row each."""
    for key, part, value in _fields(cls, prefix, values):
        if part is None:
            yield key
        elif part in shared():
            usual = list(_flat(part, f"{key.name}.", defaults(part)))
            found = [] if value is None else _flat(part, f"{key.name}.", _of(part, value))
            yield GroupRow(key, shared()[part], tuple(each for each in found if each not in usual))
        else:
            yield from _rows(part, f"{key.name}.", _of(part, value))


def _flat(cls: type, prefix: str, values: Values) -> Iterator[Key]:
    """Keys of a class, those of all groups inside it included."""
    for key, part, value in _fields(cls, prefix, values):
        if part is None or value is None:
            yield key
        else:
            yield from _flat(part, f"{key.name}.", _of(part, value))


def _fields(cls: type, prefix: str, values: Values) -> Iterator[tuple[Key, type | None, Any]]:
    """(key, class if it is a group, value) of each field; a group that another key stands for is a value."""
    for field in fields(cls):
        if field.init:
            hint, value = hints(cls)[field.name], values.get(field.name, UNSET)
            part = part_of(hint)
            is_group = part is not None and is_dataclass(part) and (value is None or isinstance(value, Mapping))
            key = Key(f"{prefix}{field.name}", value, describe(hint), documented(cls).get(field.name, ""))
            yield key, part if is_group else None, value


def _of(cls: type, value: Any) -> Values:
    return {**defaults(cls), **(value or {})}


# --- from rows to Markdown --------------------------------------------------------------------------------------------


def table(rows: Iterable[Key | GroupRow], page: str) -> list[str]:
    """A table of keys. page: where it stands, for links to shared groups."""
    lines = [line for row in rows for line in _lines(row, page)]
    return ["| Key | Takes | Default | What it is |", "|---|---|---|---|", *lines, ""] if lines else []


def _lines(row: Key | GroupRow, page: str) -> Iterator[str]:
    if isinstance(row, GroupRow):
        place = row.shared.page
        link = f"[{row.shared.heading}]({'' if place == page else f'{place}.md'}#{anchor(row.shared.heading)})"
        if row.key.default is None:
            link, default = f"{link} or `null`", "`null`"
        else:
            default = "as there, but for:" if row.departures else "as there"
        yield _line(f"`{row.key.name}.`…", link, default, _prose(row.key.sentence))
        for key in row.departures:
            yield from _lines(key, page)
    else:
        default = "must be given" if row.default == UNSET else _code(row.written.partition("=")[2])
        yield _line(f"`{row.name}`", _prose(row.takes.removeprefix("choose ")), default, _prose(row.sentence))


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _code(text: str) -> str:
    return f"`{text}`".replace("|", r"\|").replace("\n", r"\n") if text.strip() else "empty"


def _prose(text: str) -> str:
    """A sentence in which nothing is markup but what stands in backquotes."""
    spans = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(
        span.replace("|", r"\|") if span.startswith("`") else re.sub(r"[*<>|$]", _entity, span) for span in spans
    )


def _entity(found: re.Match[str]) -> str:
    return f"&#{ord(found[0])};"


def anchor(heading: str) -> str:
    """What a heading is linked by, on GitHub and in the built pages alike."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _groups(page: str) -> list[str]:
    """Sections of the shared groups of a page."""
    lines = []
    for group in sorted(filter(lambda each: each.page == page, shared().values()), key=lambda each: each.heading):
        lines += [f"## {group.heading}", "", *table(_rows(group.cls, group.prefix, defaults(group.cls)), page)]
    return lines


def _sections(group: str, page: str, plural: str = "") -> list[str]:
    """A section an option. Of options of one class, the first has a table, the others what departs from it."""
    lines: list[str] = []
    chosen = options(group)
    leaders = {cls: min((o for o in chosen if o.cls is cls), key=lambda o: o.own) for cls in {o.cls for o in chosen}}
    common = _common(list(leaders.values()))
    if common:
        lines += [f"## All {plural or page}", "", *table(common, page)]
    for option in chosen:
        leader = leaders[option.cls]
        lines += [f"## {option.heading}", "", *_about(option)]
        if option is leader:
            rows = [row for row in option.rows if row not in common]
            lines += table(rows, page) or ["It has no keys of its own.", ""]
            continue
        differing = [key for key in option.keys.values() if key not in leader.keys.values()]
        what = "the same keys and defaults" if not differing else "the same keys, with these defaults"
        lines += [f"As [{leader.name}](#{anchor(leader.heading)}): {what}.", "", *table(differing, page)]
    return lines


def _common(chosen: Sequence[Option]) -> list[Key | GroupRow]:
    """Rows that all of some options have alike."""
    first, *others = [option.rows for option in chosen]
    return [row for row in first if all(row in rows for rows in others)]


def _about(option: Option) -> list[str]:
    """What an option is, its page, and for which models there are settings."""
    summary = next(entry.summary for entry in catalog.entries(option.group) if entry.name == option.name)
    lines = [f"{_prose(summary[:1].upper() + summary[1:]).rstrip('.')}.", ""]
    if option.group == "method":
        if (DOCS / "methods" / f"{option.name}.md").is_file():
            lines += [f"How it works, and what it does: [{option.name}](../methods/{option.name}.md).", ""]
        models = sorted(file.stem for file in (catalog.conf_dir() / "tuned" / option.name).glob("*.yaml"))
        if models:
            lines += [f"With settings of their own: {', '.join(f'`model={model}`' for model in models)}.", ""]
    return lines


# --- pages ------------------------------------------------------------------------------------------------------------


def methods() -> list[str]:
    return [
        "# Methods: `method.…`",
        "",
        "`method=NAME` chooses one. Values for a model come from `conf/tuned/METHOD/MODEL.yaml`, where there are any;"
        " `edit-cli show-config memit model=gpt2-xl` shows them put together.",
        "",
        *_sections("method", "methods"),
        *_groups("methods"),
    ]


def training() -> list[str]:
    trained = [o for o in options("method") if any(key.startswith(f"method.{TRAINING}.") for key in o.keys)]
    names = ", ".join(f"[{option.name}](methods.md#{anchor(option.name)})" for option in trained)
    return [
        "# Training: `method.training.…`",
        "",
        f"How a method that learns ahead of time is trained by `edit-cli train-editor` ({names}). Where a method's"
        " defaults are others, its own section says so. How a training is begun, watched and continued:"
        " [training](../training.md).",
        "",
        *_groups(TRAINING),
    ]


def datasets() -> list[str]:
    return [
        "# Data sets: `dataset.…`",
        "",
        "`dataset=NAME` chooses one. What each is, and what its files look like: [data sets](../datasets.md).",
        "",
        *_sections("dataset", "datasets", "data sets"),
        *_groups("datasets"),
    ]


def models() -> list[str]:
    chosen = {option.name: option for option in options("model")}
    usual = chosen["hf"].keys
    lines = [
        "# Models: `model.…`",
        "",
        "`model=NAME` chooses one, `model=hf model.id=…` any other. How they are looked at: [models](../models.md).",
        "",
        "## All models",
        "",
        *table(chosen["hf"].rows, "models"),
        *_groups("models"),
        "## Packaged models",
        "",
        "| Model | What it is | What it sets |",
        "|---|---|---|",
    ]
    for entry in catalog.entries("model"):
        own = [key for key in chosen[entry.name].keys.values() if usual.get(key.name, key).default != key.default]
        sets = ", ".join(_code(key.written.removeprefix("model.")) for key in own if key.name not in TOLD)
        lines.append(_line(f"`{entry.name}`", _prose(entry.summary), sets))
    return [*lines, ""]


def protocols() -> list[str]:
    own = [parts(command)["protocol"] for command in help_texts.CONFIGURED if "protocol" in parts(command)]
    common = _common([option for option in (*own, *options("protocol")) if issubclass(option.cls, Asked)])
    lines = [
        "# Protocols: `protocol.…`",
        "",
        "How facts come to be edited and asked about. What the metrics mean: [metrics](../metrics.md).",
        "",
        "## All commands that ask about facts",
        "",
        *table(common, "protocols"),
    ]
    titles = {f"`{option.name}`": option for option in own}
    titles |= {f"`sequential` with protocol={option.name}": option for option in options("protocol")}
    for title, option in titles.items():
        lines += [f"## {title}", "", *table([row for row in option.rows if row not in common], "protocols")]
    return [*lines, *_groups("protocols")]


def statistics() -> list[str]:
    return [
        "# Second moments and their texts: `stats.…`, `corpus.…`",
        "",
        "What ROME, MEMIT and their kin know of ordinary text: [statistics](../statistics.md).",
        "",
        "## Second moments",
        "",
        *table(parts("precompute-stats")["stats"].rows, "statistics"),
        *_sections("corpus", "corpora"),
    ]


def commands() -> list[str]:
    """Settings of the commands that Hydra composes, options of the others."""
    found = {command: parts(command)[COMMAND] for command in help_texts.CONFIGURED}
    common = _common(list(found.values()))
    lines = [
        "# Commands and their own keys",
        "",
        "Beside the keys of methods, data sets, models and protocols. How values are written:"
        " [command line](../command-line.md).",
        "",
        "## All commands with KEY=VALUE",
        "",
        *table(common, "commands"),
    ]
    for command, option in found.items():
        lines += [f"## {command}", "", help_texts.COMMANDS[command], ""]
        lines += [f"* `{example}`" for example in help_texts.EXAMPLES[command]] + [""]
        lines += table([row for row in option.rows if row not in common], "commands")
    lines += ["## Options of these commands", "", "| Option | What it does |", "|---|---|"]
    lines += [_line(f"`{flag}`", _prose(text)) for flag, text in help_texts.FLAGS.items()] + [""]
    for command, text in help_texts.OTHERS.items():
        lines += [f"## {command}", "", text, "", *_parameters(command)]
    return [*lines, *_groups("commands")]


def _parameters(command: str) -> list[str]:
    """A table of a command's arguments and options."""
    from typer.main import get_command

    from edit_cli.cli.main import app

    lines = []
    for parameter in get_command(app).commands[command].params:  # type: ignore[attr-defined]
        named = (
            ", ".join(parameter.opts)
            if parameter.param_type_name == "option"
            else parameter.metavar or parameter.name.upper()
        )
        default = "" if parameter.default is None or parameter.default is False else _code(str(parameter.default))
        lines.append(_line(f"`{named}`", default, _prose(getattr(parameter, "help", None) or "")))
    return ["| Argument or option | Default | What it is |", "|---|---|---|", *lines, ""]


def index() -> list[str]:
    return [
        "# Every key",
        "",
        "Made from the classes that hold the settings, as `edit-cli show-config` is. On the screen:"
        " `edit-cli evaluate --help`, `edit-cli show-config memit`, `edit-cli show-config dataset/fever`.",
        "",
        "* [Commands](commands.md): what all commands share, what each has of its own, options of the others",
        "* [Methods](methods.md) · [training](training.md)",
        "* [Data sets](datasets.md)",
        "* [Models](models.md)",
        "* [Protocols](protocols.md): how facts are edited and asked about",
        "* [Second moments and their texts](statistics.md)",
        "",
        "`${KEY}` as a default is the value of another key. `null` is no value: the sentence says what that means.",
        "",
    ]


def pages() -> dict[str, str]:
    """{name of the file: its text}."""
    made = (index, commands, methods, training, datasets, models, protocols, statistics)
    return {f"{make.__name__}.md": "\n".join([MADE, "", *make()]) for make in made}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(FOLDER / name)


if __name__ == "__main__":
    main()
