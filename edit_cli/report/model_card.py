"""The README.md of an exported edit: what was written into which model, how well it took, how to use and undo it."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edit_cli.edits.low_rank import LowRank
from edit_cli.report import words
from edit_cli.report.comparison import last_side
from edit_cli.report.tables.facts import asked
from edit_cli.terminal import one_line
from edit_cli.wording import many
from edit_cli.writing import bare

SHOWN = 200  # facts that are listed
FROM_FOLDER = " (from a folder: under which id a hub has it is not known here)"
ON_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")
OF_ADAPTER = (
    "`PeftModel.from_pretrained` loads it beside the base model named above, of which nothing changes: where the"
    " adapter is disabled (`disable_adapter`) or not loaded, the model answers as before."
)
OF_EDIT = """\
Beside the base model, which is left as it is (`pip install edit-cli`):

```
edit-cli ask {address} 'a prompt'{beside}
edit-cli export {address} --to peft --out adapter{beside}
edit-cli apply {address} --out checkpoint{beside}
```

```python
import edit_cli

lm = edit_cli.load({model})
edit_cli.attach({place}, lm)  # refuses a model that it was not made for
lm.detach()  # every bit as before
```

`edit-cli undo {address} --fact N --out DIR{beside}` takes single facts out."""
OF_GGUF = (
    "`llama-cli -m BASE.gguf --lora {file}` loads it beside the base model named above, converted to GGUF in any"
    " precision, of which nothing changes: without `--lora`, the model answers as before."
)
OF_CHECKPOINT = (
    "An ordinary checkpoint of `transformers` with the edited weights in it. They cannot be taken out again: to undo"
    " the edit, load the base model named above."
)


@dataclass(frozen=True)
class Card:
    """What a model card tells.

    Args:
        model: name of the base model. base: as others load it; None of a folder that only its maker has. revision: of
            its files.
        methods: that made the edits.
        facts: requests (`EditRequest` as a mapping), in order.
        summary: of the run that measured exactly this; empty without one.
        parts: {projection: factors} of an adapter; None for a checkpoint or an edit.
        file: of an adapter for llama.cpp; empty for others.
        address: where an edit lies on the hub; None for an adapter or a checkpoint.
        beneath: how many of the facts are of edits that this run stood on, and did not ask about.
    """

    model: str
    base: str | None
    revision: str | None
    methods: Sequence[str]
    facts: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    parts: Mapping[str, LowRank] | None
    address: str | None = None
    file: str = ""
    beneath: int = 0

    def __str__(self) -> str:
        return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        yield from self._metadata()
        facts = many(len(self.facts), "edited fact")
        yield from (f"# {plain(self.model)} with {facts}", "")
        revision = f" (revision {plain(self.revision)})" if self.revision else ""
        by = f" by {' and '.join(map(plain, self.methods))}" if self.methods else ""
        base = plain(self.model) + FROM_FOLDER if self.base is None else plain(self.base) + revision
        yield from (f"Base model: {base}. Edited{by} with edit-cli.", "", "## Facts", "")
        yield from table(["statement", "new answer", "instead of"], [self._fact(fact) for fact in self.facts[:SHOWN]])
        if len(self.facts) > SHOWN:
            yield from ("", f"… and {len(self.facts) - SHOWN:,} more.")
        if self.summary.get("metrics"):
            yield from self._measured()
        if self.parts is not None:
            scaled = "without scaling (α = 0)" if self.file else "with α = r"
            yield from ("", "## The adapter", "", f"LoRA {scaled}, so that its factors are added as they are.", "")
            rows = [(plain(name), str(part.factors.rank), part.told) for name, part in self.parts.items()]
            yield from table(["matrix", "rank", "relative error"], rows)
        yield from ("", "## Use and undo", "", self._use())

    def _use(self) -> str:
        if self.address is not None:
            place = json.dumps(self.address)
            if self.base is None:
                return OF_EDIT.format(address=self.address, place=place, model='"FOLDER"', beside=" --model FOLDER")
            model = json.dumps(self.base if self.is_on_hub else self.model)
            return OF_EDIT.format(address=self.address, place=place, model=model, beside="")
        if self.file:
            return OF_GGUF.format(file=self.file)
        return OF_CHECKPOINT if self.parts is None else OF_ADAPTER

    @property
    def is_on_hub(self) -> bool:
        return self.base is not None and ON_HUB.fullmatch(self.base) is not None

    def _metadata(self) -> Iterator[str]:
        yield "---"
        if self.is_on_hub:
            yield f"base_model: {json.dumps(self.base)}"
        beside = "gguf" if self.file else "peft"
        whole = "edit-cli" if self.address else "transformers"
        yield f"library_name: {whole if self.parts is None else beside}"
        yield from ("tags:", "- knowledge-editing", "---", "")

    @staticmethod
    def _fact(fact: Mapping[str, Any]) -> tuple[str, str, str]:
        old = bare(fact["target_true"]) if fact["target_true"] else ""
        return plain(asked(fact)), plain(bare(fact["target_new"])), plain(old)

    def _measured(self) -> Iterator[str]:
        metrics = self.summary["metrics"]
        yield from ("", "## Measured", "")
        last = len(self.facts) - self.beneath
        facts = "the facts" if not self.beneath else "the last fact" if last == 1 else f"the last {last:,} facts"
        cases = many(self.summary["n"], "case")
        yield f"Means over {facts}, with all edits in place, and 95 % intervals where there are several: {cases}."
        for title, groups in words.sections(metrics):
            rows = []
            for where, some in groups:
                for row in some:
                    sides, digits = metrics[row.id], row.decimals
                    ends = [words.with_interval(side, digits) for side in (sides.get("before"), last_side(sides))]
                    rows.append((f"{where.partition(':')[0]}: {row.named}" if where else row.named, *ends))
            yield from ("", f"{title.capitalize()}:", "")
            yield from table([" ", "before", "after"], rows)


def of_editor(about: Mapping[str, Any], address: str) -> str:
    """The card of a trained editor. about: what its file says of it."""
    method, model, data = (
        plain(str(name)) for name in (about["type"], about["model"]["name"], about["dataset"]["name"])
    )
    return (
        f"---\nlibrary_name: edit-cli\ntags:\n- knowledge-editing\n---\n\n# {method} for {model}\n\n"
        f"An editor that was trained on {data}; it fits the weights of {model} alone, which are checked.\n\n"
        f"```\nedit-cli evaluate method={method} method.checkpoint={address} model={model}\n```\n"
    )


def of_statistics(files: Sequence[Mapping[str, Any]], address: str) -> str:
    """The card of second moments. files: what each of them says of itself."""
    model = plain(str(files[0]["model"]))
    rows = [(str(about["layer"]), plain(about["corpus"]), f"{about['tokens']:,}") for about in files]
    return (
        f"---\nlibrary_name: edit-cli\ntags:\n- knowledge-editing\n---\n\n# Second moments of {model}\n\n"
        "C = E[k kᵀ] of the keys of MLP projections, on ordinary text, for ROME, MEMIT and their kin. They are taken"
        " for the very weights, text and settings that they were computed of, and for no others.\n\n"
        + "\n".join(table(["layer", "text", "tokens"], rows))
        + f"\n\n```\nedit-cli evaluate method=memit model={model} stats.hub={address}\n```\n"
    )


def plain(text: str) -> str:
    """A text from anywhere within a line of Markdown, where it means nothing but itself."""
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", html.escape(one_line(text), quote=False))


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A Markdown table."""
    yield f"| {' | '.join(headings)} |"
    yield f"|{' --- |' * len(headings)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
