"""Options and arguments of the command line, each written once. What only one command has stands with the command."""

from __future__ import annotations

from inspect import Parameter
from pathlib import Path
from typing import Annotated

import typer

from edit_cli.cli import help as help_texts
from edit_cli.config import catalog


def _complete(context: typer.Context, incomplete: str) -> list[str]:
    return help_texts.complete(
        context.info_name or "", [*(context.params.get("overrides") or ()), *context.args], incomplete
    )


def complete_metrics(incomplete: str) -> list[str]:
    from edit_cli.report.measures import measures

    return help_texts.listed(incomplete, measures())


Json = Annotated[bool, typer.Option("--json", help="machine-readable")]
Overrides = Annotated[list[str] | None, typer.Argument(autocompletion=_complete, metavar="[KEY=VALUE]...")]
Plugins = Annotated[
    list[str] | None,
    typer.Option("--plugin", help="a package of yours whose metrics and edits are used; may be repeated"),
]
Wanted = Annotated[bool, typer.Option("--help", "-h", is_eager=True)]
EditDir = Annotated[
    Path, typer.Argument(help="directory of an edit, or of a run with saved edits; hub:owner/name[:folder]: one there")
]
Out = Annotated[Path, typer.Option(help="folder for what is written; must not exist or be empty")]
Runs = Annotated[list[str], typer.Argument(help="directories of runs, folders of them, or patterns ('runs/*/memit*')")]
Against = Annotated[
    str | None, typer.Option(help="run, or its name in the table, that the others are paired with, case by case")
]
Published = Annotated[
    str | None,
    typer.Option(
        help="published tables beside it, such as rome-counterfact, with commas between them",
        autocompletion=lambda incomplete: help_texts.listed(incomplete, catalog.published()),
    ),
]
ModelName = Annotated[
    str | None, typer.Option(help="name in conf/model, or a folder, if not the one the edit was made for")
]
DeviceMap = Annotated[
    str | None, typer.Option(help="how to spread a model that is too large for one device, such as auto")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="run code that comes with the model: only if you trust it")
]


def option(name: str, annotation: object, default: object) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


# which model an edit is put on: the fields of experiment.saved_edits.Base
BASE = (
    option("model", ModelName, None),
    option("device_map", DeviceMap, None),
    option("trust_remote_code", TrustRemoteCode, False),
)
PLUGIN = option("plugin", Plugins, None)
