"""Help and completion, made from the files in conf/ and the classes of settings as they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from textwrap import TextWrapper

from edit_cli.config import catalog
from edit_cli.config.schema import Key, keys

COMMANDS = {
    "evaluate": "Edit facts, ask before and after, take each edit back; a table of what the edits did.",
    "edit": "Edit one fact, or a file of facts, and keep the edit.",
    "sequential": "Edit batch after batch without taking anything back; a table and a curve.",
    "trace": "Find the layers that carry facts, by causal tracing; a heat map, and layers to edit.",
    "inspect": "Look at feed-forward layers as key-value memories, and at what an edit changed in them; a page.",
    "train-editor": "Train an editor that learns ahead of time; curves, and a checkpoint that the others find.",
    "calibrate": "Find the layer and the radius for a method that remembers prompts (GRACE, MELO).",
    "tune": "Find settings of a method for any model: tries many on facts put aside, and keeps the best.",
    "precompute-stats": "Compute the second moments that some methods need, ahead of time.",
    "prepare": "Make records for trained editors of your questions: answers to write, other wordings; a file.",
    "doctor": "Examine a model: its layout, which methods work on it, and a file of settings for it.",
}
CONFIGURED = tuple(COMMANDS)
OTHERS = {
    "show-config": "Show every setting of a method, a data set, a model, a protocol, …, with what it takes.",
    "ls": "List methods, data sets, models, corpora, metrics or runs.",
    "show": "Show a run: its table, or one case with the answers before and after.",
    "compare": "Put several runs side by side: a table, differences, published numbers, a figure.",
    "report": "Write a page to look at: tables, figures, every case, settings; several runs side by side.",
    "ask": "Ask a model with and without an edit, side by side.",
    "edits": "List saved edits: facts, kind, size, and what each stands on.",
    "undo": "Take facts out of a saved edit; the others stay.",
    "apply": "Bake a weight edit into a plain transformers checkpoint.",
    "export": "Write a weight edit for other programs: an adapter for PEFT or llama.cpp, or a checkpoint; with a card.",
    "push": "Send an edit, a checkpoint, a trained editor or statistics to the Hugging Face hub.",
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
    "inspect": (
        "edit-cli inspect limit=200",
        "edit-cli inspect model=gpt2 corpus=wikitext 'protocol.layers=[0,5,11]' edit=runs/edit/facts/gpt2/rome",
    ),
    "train-editor": (
        "edit-cli train-editor method=mend model=tiny-gpt2 dataset=world",
        "edit-cli train-editor method=mend dataset=world method.edits=5 method.training.steps=300",
    ),
    "calibrate": (
        "edit-cli calibrate dataset=counterfact dataset.split=tune",
        "edit-cli calibrate model=gpt2-xl limit=200 'layers=[30,35,40]'",
    ),
    "tune": (
        "edit-cli tune method=memit trials=20",
        "edit-cli tune method=memit model=hf model.id=/path/to/model dataset.path=records.json budget=2h",
    ),
    "precompute-stats": (
        "edit-cli precompute-stats method=memit model=gpt2-xl corpus=wikipedia",
        "edit-cli precompute-stats model=gpt-j-6b 'layers=[3,4,5]' stats.documents=20000",
    ),
    "prepare": (
        "edit-cli prepare dataset.path=questions.jsonl out=records.jsonl 'templates=[\"Say: {}\"]'",
        "edit-cli prepare model=bart-base dataset.path=questions.jsonl out=records.jsonl"
        " there=Helsinki-NLP/opus-mt-en-de back=Helsinki-NLP/opus-mt-de-en",
    ),
    "doctor": (
        "edit-cli doctor model=hf model.id=/path/to/folder",
        "edit-cli doctor model=gpt2-xl 'methods=[rome,memit,grace]' --out gpt2-xl.yaml",
    ),
}
FLAGS = {
    "-m, --multirun": "run every combination of values given with commas: -m method=rome,memit",
    "--retry-failed": "with -m: of the same sweep, run only the jobs that have failed or not ended",
    "--dry-run": "say what would be done, what is there and missing, memory and time; load and write nothing",
    "--cfg job": "print all settings and do nothing",
    "--config-dir DIR": "take configurations of your own from DIR/method, DIR/model, …",
    "plugins=[PACKAGE]": "use methods, data sets and metrics of a package of yours that is not installed as a plug-in",
    "--help": "this text",
}
WIDTH = 96
LONGEST = 44  # characters of a key with its default, beside which there is room for a sentence


def welcome() -> str:
    """Ten lines for whoever typed nothing but the program's name."""
    wanted = {
        EXAMPLES["evaluate"][0]: "edit, ask before and after; a table",
        "edit-cli edit dataset.path=FILE": "edit facts of your own",
    }
    return "\n".join(
        [
            "Usage: edit-cli COMMAND [KEY=VALUE]...",
            "",
            "Edit facts in language models, and measure what the edits did.",
            "",
            *_section("Begin with", wanted),
            *wrapped(f"Commands: {', '.join(COMMANDS | OTHERS)}", later="  "),
            *wrapped(
                "`edit-cli --help` tells what they do, `edit-cli COMMAND --help` their settings, `edit-cli ls methods`"
                " what there is."
            ),
        ]
    )


def overview() -> str:
    """What edit-cli can do, with what, and two examples."""
    lines = [
        "Usage: edit-cli COMMAND [KEY=VALUE]...",
        "",
        "Edit facts in language models, and measure what the edits did.",
        "",
    ]
    lines += _section("Commands", COMMANDS | OTHERS)
    lines += _catalog()
    lines += ["Examples:", *(f"  {EXAMPLES[name][0]}" for name in ("evaluate", "edit")), ""]
    lines += wrapped(
        "`edit-cli COMMAND --help` tells a command's settings. `--install-completion` sets up completion in this shell."
    )
    return "\n".join(lines)


def command(name: str, overrides: Sequence[str] = ()) -> str:
    """One command: examples, and its settings with those of the options that `overrides` choose."""
    lines = [
        f"Usage: edit-cli {name} [KEY=VALUE]...",
        "",
        COMMANDS[name],
        "",
        "Examples:",
        *(f"  {text}" for text in EXAMPLES[name]),
        "",
        *_section("Chosen by name", _chosen_by_name(name)),
    ]
    for prefix, _, target in catalog.targets(name, overrides):
        if target is not None and target.startswith(catalog.LIGHT):
            title = f"Settings of {prefix.rstrip('.')}" if prefix else "Settings"
            lines += settings(title, keys(catalog.class_at(target), prefix))
    lines += wrapped(
        "${KEY} is the value of another setting. `edit-cli show-config KIND/NAME` lists the settings of a method, a"
        " data set, …, `edit-cli show-config stats` those of second moments."
    )
    lines += ["", *_section("Options", FLAGS)]
    return "\n".join(lines).rstrip()


def settings(title: str, found: Iterable[Key]) -> list[str]:
    """A section with every key as it is typed, what it is for, and what it takes."""
    rows = {key.written: key.told for key in found}
    width = min(max(map(len, rows), default=0), LONGEST)
    lines = [f"{title}:"]
    for name, text in rows.items():
        if len(name) > width:
            lines += [f"  {name}"]
            name = ""
        lines += wrapped(text, f"  {name:<{width}}  ", " " * (width + 4))
    return [*lines, ""]


def complete(name: str, earlier: Sequence[str], incomplete: str) -> list[str]:
    """Completions of a KEY=VALUE of command `name`. bash gives `method=me` as three words, other shells as one."""
    *before, word = _rejoined([*earlier, incomplete])
    groups = catalog.choices(name)
    known = catalog.keys(name, [override for override in before if "=" in override])
    if not word and before and (before[-1] in known or before[-1] in groups):
        word = f"{before[-1]}="  # whose sign bash takes for an empty word
    key, equals, value = word.partition("=")
    if not equals:
        return _keys(word, groups, known)
    written = word.removesuffix(incomplete) if incomplete != word else ""
    return [found.removeprefix(written) for found in _values(key, value, groups, known)]


def listed(incomplete: str, words: Iterable[str]) -> list[str]:
    """The ways in which a list with commas can go on."""
    chosen, comma, last = incomplete.rpartition(",")
    return [f"{chosen}{comma}{word}" for word in words if word.startswith(last)]


def _rejoined(words: Sequence[str]) -> list[str]:
    """Words of the command line, with those together that bash parts at their `=`."""
    found: list[str] = []
    for word in words:
        if found and (word == "=" or found[-1].endswith("=")):
            found[-1] += word
        else:
            found.append(word)
    return found


def _keys(word: str, groups: Sequence[str], known: Mapping[str, Sequence[str]]) -> list[str]:
    """The keys that begin so, as far as their next dot. Where there is one alone, ways to go on stand beside it: shells
    put a space behind the only word that there is.
    """
    depth = word.count(".") + 1
    shown = [".".join(key.split(".")[:depth]) + ("." if key.count(".") >= depth else "=") for key in (*groups, *known)]
    found = list(dict.fromkeys(one for one in shown if one.startswith(word)))
    if len(found) != 1:
        return found
    if found[0].endswith("."):
        return _keys(found[0], groups, known)
    key = found[0].removesuffix("=")
    return [f"{key}=", *(_values(key, "", groups, known) or [f"{key}=VALUE"])]


def _values(key: str, value: str, groups: Sequence[str], known: Mapping[str, Sequence[str]]) -> list[str]:
    """The ways in which `key=value` can go on; in a sweep, what stands before the last comma stays."""
    words = [entry.name for entry in catalog.entries(key)] if key in groups else known.get(key, ())
    words = [] if list(words) == ["null"] else words  # it takes more than that, which nobody can list
    before, bracket, inside = value.rpartition("[")
    if bracket and "]" not in inside:
        return [f"{key}={before}{found}" for found in _in_brackets(inside, words)]
    return [f"{key}={found}" for found in listed(value, words)]


def _in_brackets(inside: str, words: Iterable[str]) -> list[str]:
    """The ways in which a list in brackets can go on. Where there is one alone, a comma stands beside its end."""
    chosen, comma, last = inside.rpartition(",")
    options = [word[1:-1] for word in words if word.startswith(f"[{last}")]
    options = [word for word in options if word not in chosen.split(",")]
    return [f"[{chosen}{comma}{word}{end}" for word in options for end in ("]," if len(options) == 1 else "]")]


def _catalog() -> list[str]:
    """The names of all methods, data sets and models."""
    lines: list[str] = []
    for kind in ("methods", "datasets", "models"):
        group = catalog.GROUPS[kind]
        found = ", ".join(entry.name for entry in catalog.entries(group))
        lines += [f"{kind.capitalize()} ({group}=NAME; `edit-cli ls {kind}`):", *wrapped(found, "  "), ""]
    return lines


def _chosen_by_name(command: str) -> dict[str, str]:
    """{`method=NAME`: where its names and settings are told} of a command's groups."""
    lists = {group: kind for kind, group in catalog.GROUPS.items()}
    return {
        f"{group}=NAME": f"{len(catalog.entries(group))}: `edit-cli ls {lists[group]}`; settings of one:"
        f" `edit-cli show-config {'' if group == 'method' else f'{group}/'}NAME`"
        for group in catalog.choices(command)
        if group in lists
    }


def _section(title: str, rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows), default=0)
    lines = [f"{title}:"]
    for name, text in rows.items():
        lines += wrapped(text, f"  {name:<{width}}  ", " " * (width + 4)) or [f"  {name}"]
    return [*lines, ""]


def wrapped(text: str, first: str = "", later: str | None = None) -> Sequence[str]:
    """Lines of `text`; names with hyphens stay whole."""
    later = first if later is None else later
    return TextWrapper(WIDTH, initial_indent=first, subsequent_indent=later, break_on_hyphens=False).wrap(text)
