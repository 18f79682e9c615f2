"""Help and completion, made from the files in conf/ as they are."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import TextWrapper

from edit_cli.config import catalog

COMMANDS = {
    "evaluate": "Edit facts, ask before and after, take each edit back; a table of what the edits did.",
    "edit": "Edit one fact, or a file of facts, and keep the edit.",
    "sequential": "Edit batch after batch without taking anything back; a table and a curve.",
    "trace": "Find the layers that carry facts, by causal tracing; a heat map, and layers to edit.",
    "train-editor": "Train an editor that learns ahead of time; curves, and a checkpoint that the others find.",
    "calibrate": "Find the layer and the radius for a method that remembers prompts (GRACE, MELO).",
    "precompute-stats": "Compute the second moments that some methods need, ahead of time.",
}
CONFIGURED = tuple(COMMANDS)
OTHERS = {
    "ls": "List methods, models, datasets, metrics or runs.",
    "show": "Show a run: its table, or one case with the answers before and after.",
    "compare": "Put several runs side by side: a table, differences, published numbers, a figure.",
    "apply": "Bake a weight edit into a plain transformers checkpoint.",
    "env": "Show versions and devices.",
}
EXAMPLES = {
    "evaluate": (
        "edit-cli evaluate method=memit dataset=counterfact",
        "edit-cli evaluate -m method=rome,memit,ft limit=50",
    ),
    "edit": (
        "edit-cli edit method=rome edit.prompt='{} plays the' edit.subject='Jormia Stenenen' edit.target=organ",
        "edit-cli edit method=memit dataset=facts dataset.path=facts.jsonl",
    ),
    "sequential": (
        "edit-cli sequential method=rome dataset=counterfact protocol.batch_size=1",
        "edit-cli sequential method=memit limit=200 protocol.batch_size=20 'protocol.checkpoints=[20,100,200]'",
    ),
    "trace": (
        "edit-cli trace dataset=counterfact limit=50",
        "edit-cli trace model=gpt2-xl dataset=known_facts limit=100",
    ),
    "train-editor": (
        "edit-cli train-editor method=mend model=tiny-gpt2 dataset=world",
        "edit-cli train-editor method=mend dataset=world method.edits=5 method.training.steps=300",
    ),
    "calibrate": (
        "edit-cli calibrate dataset=counterfact dataset.split=tune",
        "edit-cli calibrate model=gpt2-xl limit=200 'layers=[30,35,40]'",
    ),
    "precompute-stats": (
        "edit-cli precompute-stats method=memit model=gpt2-xl corpus=wikipedia",
        "edit-cli precompute-stats model=gpt-j-6b 'layers=[3,4,5]' stats.documents=20000",
    ),
}
SETTINGS = {
    "evaluate": {
        "limit=N": "use the first N records; null for all",
        "protocol.batch_size=N": "facts edited together: a number, all, or auto",
        "protocol.order_seed=N": "shuffle the facts",
        "protocol.save_edits=true": "keep every edit",
    },
    "edit": {
        "edit.prompt='{} plays the'": "the statement up to its answer; {} stands for the subject",
        "edit.subject=NAME": "what the fact is about",
        "edit.target=ANSWER": "the new answer",
        "edit.target_true=ANSWER": "the old one, to compare with (may be left out)",
        "edit.join=none": "nothing stands before the answer; space: a space; else as docs/datasets.md says",
        "dataset.path=FILE": "several facts: JSON lines, JSON or CSV with prompt, subject, target_new",
        "base_edit=DIR": "edit on top of an earlier edit",
        "must_take=true": "exit code 5 unless every fact took",
    },
    "sequential": {
        "limit=N": "use the first N records; null for all",
        "protocol=sme": "edit mistakes only, one at a time, in folds: SR, GR, ER, TrainR, TestR (default: lifelong)",
        "protocol.batch_size=N": "facts edited together in a step",
        "protocol.checkpoints=[1,10,100]": "after how many facts all of them are asked about again",
    },
    "trace": {
        "limit=N": "use the first N records; null for all",
        "protocol.kinds=[hidden,mlp,attn]": "what is restored",
        "protocol.window=N": "layers whose MLP or attention outputs are restored together",
        "protocol.noise=X": (
            "noise on the subject, in standard deviations of its embeddings (protocol.noise_std: as it is)"
        ),
    },
    "train-editor": {
        "limit=N": "train on the first N records; null for all",
        "method.training.steps=N": (
            "optimiser steps (method.training.*: learning rate, precision, early stopping, trackers, …)"
        ),
        "method.edits=N": "facts that are edited together",
        "splits.train=NAME": "which split of the data set to learn from (splits.validation=NAME: to stop early by)",
        "cache_dir=DIR": "where trained editors are kept",
    },
    "calibrate": {
        "limit=N": "use the first N records; null for all",
        "layers=[3,4]": "layers; without it, all",
        "modules=[mlp_in]": "whose keys: mlp_in, mlp_out, or names in a block",
        "side=output": "read them where they leave the module (MELO), not where they enter it (GRACE)",
    },
    "precompute-stats": {
        "layers=[3,4]": "layers; without it, those that the method uses on this model",
        "corpus=NAME": "text: " + "NAMES",
        "stats.documents=N": "how much of it (stats.tokens=N or auto, likewise)",
    },
}
PLACES = {
    "tag=NAME": "add NAME to the run's directory, to keep several side by side",
    "run_dir=DIR": "put the run elsewhere",
    "overwrite=true": "replace the run that lies there instead of continuing it",
}
FLAGS = {
    "-m, --multirun": "run every combination of values given with commas: -m method=rome,memit",
    "--cfg job": "print all settings and do nothing",
    "--config-dir DIR": "take configurations of your own from DIR/method, DIR/model, …",
    "--help": "this text",
}
WIDTH = 96


def overview() -> str:
    """What edit-cli can do, with what, and two examples."""
    lines = [
        "Usage: edit-cli COMMAND [KEY=VALUE]...",
        "",
        "Edit facts in language models, and measure what the edits did.",
        "",
    ]
    lines += _section("Commands", COMMANDS | OTHERS)
    lines += _groups("methods", "datasets", "models")
    lines += ["Examples:", *(f"  {EXAMPLES[name][0]}" for name in ("evaluate", "edit")), ""]
    lines += _wrapped(
        "`edit-cli COMMAND --help` tells a command's settings. `--install-completion` sets up completion in this shell."
    )
    return "\n".join(lines)


def command(name: str) -> str:
    """One command: examples, settings, what there is to choose from."""
    lines = [
        f"Usage: edit-cli {name} [KEY=VALUE]...",
        "",
        COMMANDS[name],
        "",
        "Examples:",
        *(f"  {text}" for text in EXAMPLES[name]),
        "",
    ]
    texts = {key: text.replace("NAMES", ", ".join(catalog.names("corpus"))) for key, text in SETTINGS[name].items()}
    lines += _groups(
        *(() if name in ("trace", "calibrate") else ("methods",)),
        *(() if name == "precompute-stats" else ("datasets",)),
        "models",
    )
    lines += _section("Settings", texts | ({} if name in ("precompute-stats", "calibrate") else PLACES))
    lines += _section("Options", FLAGS)
    return "\n".join(lines).rstrip()


def complete(name: str, earlier: Sequence[str], incomplete: str) -> list[str]:
    """Completions of a KEY=VALUE of command `name`. bash gives `method=me` as three words, other shells as one."""
    groups = list(catalog.GROUPS.values())
    before, key, value = "", "", incomplete
    if earlier[-1:] == ["="] and len(earlier) > 1:
        key = earlier[-2]
    # after `method=`, whose last word is taken for an option's
    elif not incomplete and earlier and earlier[-1] in groups:
        key = earlier[-1]
    elif "=" in incomplete:
        key, _, value = incomplete.partition("=")
        before = f"{key}="
    if not key:
        return [f"{word}=" for word in [*groups, *catalog.keys(name)] if word.startswith(value)]
    chosen, comma, last = value.rpartition(",")
    return [
        f"{before}{chosen}{comma}{word}"
        for word in (catalog.names(key) if key in groups else ())
        if word.startswith(last)
    ]


def _groups(*kinds: str) -> list[str]:
    lines: list[str] = []
    for kind in kinds:
        group = catalog.GROUPS[kind]
        found = catalog.entries(group)
        if kind == "models":  # many, and their names say it all
            text = ", ".join(entry.name for entry in found)
            lines += [f"Models ({group}=NAME):", *_wrapped(text, "  "), ""]
        else:
            lines += _section(f"{kind.capitalize()} ({group}=NAME)", {entry.name: entry.summary for entry in found})
    return lines


def _section(title: str, rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows), default=0)
    lines = [f"{title}:"]
    for name, text in rows.items():
        lines += _wrapped(text, f"  {name:<{width}}  ", " " * (width + 4)) or [f"  {name}"]
    return [*lines, ""]


def _wrapped(text: str, first: str = "", later: str | None = None) -> Sequence[str]:
    """Lines of `text`; names with hyphens stay whole."""
    later = first if later is None else later
    return TextWrapper(WIDTH, initial_indent=first, subsequent_indent=later, break_on_hyphens=False).wrap(text)
