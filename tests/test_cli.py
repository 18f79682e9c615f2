"""What a person types, and what they get: help, lists, completion, exit codes of wrong input."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from edit_cli.cli import help as help_texts
from edit_cli.cli.options import complete_metrics
from edit_cli.config import catalog, sketch, source
from edit_cli.config.schema import describe, is_texts, leaves

pytestmark = pytest.mark.thin(4)

ROOT = Path(__file__).parent.parent


def packaged_examples() -> list[str]:
    """Every command that help or a configuration's head shows."""
    shown = [example for examples in help_texts.EXAMPLES.values() for example in examples]
    for file in sorted(catalog.conf_dir().rglob("*.yaml")):
        shown += re.findall(r"^#   (edit-cli .+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return list(dict.fromkeys(shown))


def test_help_names_everything_there_is_and_two_examples(cli):
    ended = cli("--help")
    assert ended.code == 0
    for group in ("method", "dataset", "model"):
        assert all(name in ended.out for name in catalog.names(group))
    assert ended.out.count("\n  edit-cli ") == 2


@pytest.mark.parametrize("command", help_texts.CONFIGURED)
def test_every_command_explains_itself(cli, command):
    ended = cli(command, "--help", "limit=3")
    assert ended.code == 0
    assert help_texts.COMMANDS[command] in ended.out
    assert ended.out.count(f"  edit-cli {command}") == 2
    assert cli(command, "-h").out == ended.out


@pytest.mark.parametrize("command", help_texts.OTHERS)
def test_the_other_commands_have_help_too(cli, command):
    ended = cli(command, "--help")
    assert ended.code == 0
    assert "Usage: edit-cli" in ended.out


def test_without_a_command_it_is_said_where_to_begin_and_the_exit_code_says_bad_usage(cli):
    ended = cli()
    assert ended.code == 2
    assert "Usage: edit-cli COMMAND" in ended.out and "edit-cli evaluate method=memit" in ended.out
    assert len(ended.out.splitlines()) <= 14 and "edit-cli --help" in ended.out


@pytest.mark.parametrize("arguments", [["--help"], ["evaluate", "--help"], ["ls", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    heavy = ("torch", "transformers", "hydra", "omegaconf", "numpy", "rich", "datasets")
    code = (
        "import sys\nfrom edit_cli.cli.main import app\n"
        f"try:\n    app({arguments!r}, prog_name='edit-cli')\nexcept SystemExit:\n    pass\n"
        f"sys.stderr.write(' '.join(sorted(set({heavy!r}) & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "Usage" in done.stdout


@pytest.mark.thin(3)
@pytest.mark.parametrize("example", packaged_examples())
def test_examples_compose_and_build(example):
    """Every example in help and in the heads of configurations is a command that works as far as no file is read."""
    import hydra

    from edit_cli.cli.hydra_launch import kinds
    from edit_cli.config.build import build, register_resolvers
    from edit_cli.config.composed import Composed
    from edit_cli.config.overrides import regroup
    from edit_cli.experiment.setup import method_of

    words = shlex.split(example)
    command, arguments = words[1], regroup(words[2:], kinds(words[1], words[2:], []))
    overrides = [word for word in arguments if "=" in word and not word.startswith("-")]
    if "-m" in arguments:
        overrides = [re.sub(r"^([\w.]+=[^,\[]+),.*", r"\1", word) for word in overrides]
    register_resolvers()
    with hydra.initialize_config_module("edit_cli.conf", version_base="1.3"):
        config = hydra.compose(command, overrides)
    if command == "tune":  # what is searched needs no value
        chosen = {"method": next(word.partition("=")[2] for word in overrides if word.startswith("method="))}
        composed = Composed("tune", config, chosen)
        composed.settings.refuse(composed)
    for group in ("model", "method", "dataset", "stats"):
        inline = group == "dataset" and command == "edit" and config.edit.prompt is not None
        if group in config and not inline and not (group == "method" and command == "precompute-stats"):
            (method_of if group == "method" else build)(config[group])


WRONG = [
    ("evaluate method=memitt", 2, "did you mean memit?"),
    ("evaluate method=zzz", 2, "there are: "),
    ("evaluate metod=memit", 2, "unknown key metod; did you mean method?"),
    ("evaluate method.layrs=[1]", 2, "did you mean method.layers?"),
    ("evaluate +method.layrs=[1]", 2, "unknown key method.layrs; did you mean layers?"),
    ("evaluate method=ft method.stepz=3", 2, "did you mean method.steps?"),
    ("evaluate -m method=ft,memit method.stepz=3", 2, "did you mean method.steps?"),
    ("evaluate method=rome method.radius=3", 2, "unknown key method.radius here; it belongs to method=grace"),
    ("sequential protocol=sme protocol.batch_size=3", 2, "it belongs to protocol=lifelong"),
    (
        "evaluate method=rome model=tiny-bert dataset=world_claims",
        2,
        "ROME works on a causal language model, and tiny-bert is",
    ),
    ("train-editor method=mend dataset=counterfact", 2, "splits.train=train: embedded world has test, tune"),
    (
        "train-editor method=mend dataset=world splits.train=validation",
        2,
        "splits.validation=validation is what is trained on",
    ),
    (
        "train-editor method=mend dataset=world method.training.lr=nan",
        2,
        "method.training.lr=nan: give a number above 0",
    ),
    ("evaluate -m method=rome,none method.layers=[1]", 2, "not every method of the sweep has it"),
    ("evaluate protocol=sme", 2, "evaluate has one protocol, so there is none to choose"),
    ("evaluate cache_dir=", 2, "cache_dir= is empty: give a file or a folder"),
    ("evaluate run_dir=", 2, "run_dir= is empty"),
    ("evaluate --dryrun", 2, "did you mean --dry-run?"),
    ("edit method=rome edit.promt='{}is'", 2, "unknown key edit.promt; did you mean edit.prompt?"),
    ("edit method=rome edit.subjct=A,B", 2, "unknown key edit.subjct; did you mean edit.subject?"),
    ("edit edit.prompt=x edit.target=y dataset.path=facts.jsonl", 2, "edit.prompt and dataset.path both say"),
    ("doctor methods=[none] --out .", 2, "out=. is a folder"),
    ("evaluate batch_size=3", 2, "did you mean protocol.batch_size?"),
    ("evaluate foo.bar=1", 2, "unknown key foo.bar; there are: "),
    ("evaluate ~nothing", 2, "unknown key nothing"),
    ("evaluate +foo=1", 2, "unknown key foo"),
    ("evaluate ++foo.bar=1", 2, "unknown key foo.bar"),
    ("train-editor +splits.tets=x", 2, "unknown key splits.tets"),
    ("evaluate model.batch_tokens=0", 2, "model.batch_tokens=0: give a whole number from 1 up"),
    ("evaluate model.batch_tokens=-5", 2, "model.batch_tokens=-5: give a whole number from 1 up"),
    ("evaluate model.max_memory={0:-1}", 2, "model.max_memory={0: -1}: give bytes, or a size with a unit"),
    ("evaluate method.layers=[1,1]", 2, "method.layers=[1, 1]: 1 occurs twice"),
    ("evaluate seed=99999999999999999999999", 2, "give a whole number from 0 to 4,294,967,295"),
    ("evaluate method=ft method.lr=nan", 2, "method.lr=nan"),
    ("trace protocol.noise_seed=-1", 2, "protocol.noise_seed=-1"),
    ("calibrate layers=[1,1]", 2, "layers=[1, 1]: 1 occurs twice"),
    ("calibrate layers=x", 2, "layers=x: give a list of whole numbers"),
    ("calibrate layers=[17]", 2, "layer 17"),
    ("precompute-stats layers=[1,1]", 2, "layers=[1, 1]: 1 occurs twice"),
    ("evaluate dataset.path=/nowhere/it's_[1](a).json", 3, "dataset.path=/nowhere/it's_[1](a).json: no such file"),
    ("evaluate ~dataset", 2, "~dataset: `evaluate` cannot do without"),
    ("evaluate model=null", 2, "model=null names no option"),
    ("evaluate @x=1", 2, "@x=1 names no option"),
    ("evaluate protocol.observe=null", 2, "protocol.observe=None: this is a group of settings"),
    ("evaluate model.max_memory=[1]", 2, "model.max_memory=[1]: give settings in braces"),
    ("train-editor splits=null", 2, "splits=None: this is a group of settings"),
    ("edit edit=null", 2, "edit=None: this is a group of settings"),
    ("edit edit.prompt= edit.target=y", 2, "edit.prompt is empty"),
    ("evaluate +limit=3", 2, "write limit=VALUE"),
    ("evaluate limit=[1", 2, "cannot read limit=[1"),
    ("evaluate limit", 2, "'limit' is no setting"),
    ("evaluate limit=0", 2, "limit=0"),
    ("evaluate limit=x", 2, "limit=x: give a whole number"),
    ("evaluate limit=${nothing}", 2, "nothing"),
    ("evaluate method=memit,rome", 2, "add -m"),
    ("evaluate --config-dir /nowhere", 2, "no such folder"),
    ("evaluate protocol.batch_size=0", 2, "protocol.batch_size=0"),
    ("evaluate protocol.batch_size=some", 2, "protocol.batch_size=some"),
    ("evaluate protocol.observe.max_new_tokens=0", 2, "protocol.observe.max_new_tokens"),
    ("evaluate model=gpt2 method=memit", 2, "method.layers has no value"),
    ("evaluate model=hf", 2, "model.id has no value"),
    ("evaluate model.corpus=nothing", 2, "choose one by corpus=NAME"),
    ("evaluate dataset=facts", 2, "dataset.path has no value"),
    ("evaluate dataset.path=/nowhere.json", 3, "dataset.path=/nowhere.json"),
    ("evaluate model.id=/nowhere", 3, "model.id=/nowhere"),
    ("evaluate model.perplexity_text=/nowhere limit=1", 3, "model.perplexity_text=/nowhere"),
    ("evaluate method.layers=[17] limit=1", 2, "layer 17"),
    ("edit", 2, "nothing to edit"),
    ("edit edit.prompt=x", 2, "edit.target has no value"),
    ("edit edit.target=x", 2, "edit.prompt has no value"),
    ("edit edit.prompt={}x edit.target=y", 2, "edit.subject has no value"),
    ("edit edit.prompt=x edit.subject=z edit.target=y", 2, "edit.prompt does not contain the subject"),
    ("edit edit.prompt={}x edit.subject= edit.target=y", 2, "edit.subject is empty"),
    ("edit edit.prompt={}{} edit.subject=z edit.target=y", 2, "edit.prompt holds more than one slot"),
    ("edit edit.prompt=x edit.target=", 2, "edit.target is empty"),
    ("edit edit.prompt=x edit.target=y edit.target_true=y", 2, "edit.target equals target_true"),
    ("edit edit.prompt=x edit.target=y edit.join=comma", 2, "edit.join is neither none nor space"),
    ("edit edit.prompt={}x edit.subject=a edit.target=b base_edit=/nowhere", 3, "/nowhere is no edit directory"),
    ("sequential protocol.checkpoints=[0]", 2, "protocol.checkpoints=[0]"),
    ("sequential protocol.sample=0", 2, "protocol.sample=0"),
    ("precompute-stats layers=[17]", 2, "layer 17"),
    ("precompute-stats layers=x", 2, "layers=x: give a list"),
    ("precompute-stats method=ft", 2, "needs no second moments"),
    ("precompute-stats run_dir=x", 2, "cache_dir=DIR"),
    ("show nowhere", 3, "nowhere"),
    ("ls metricss", 2, "did you mean metrics?"),
    ("ls runs", 3, "no run has been made"),
    ("apply nowhere --out x", 3, "nowhere is no edit directory"),
]


@pytest.mark.parametrize(("command", "code", "told"), WRONG, ids=[command for command, _, _ in WRONG])
def test_wrong_input_gets_one_clear_line(cli, command, code, told):
    ended = cli(*command.split(" "))
    assert ended.code == code
    errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert told in errors[0]
    assert "Traceback" not in ended.err + ended.out
    assert "HYDRA_FULL_ERROR" not in ended.err + ended.out
    assert not list(Path.cwd().rglob("results.jsonl")) or all(
        path.stat().st_size == 0 for path in Path.cwd().rglob("results.jsonl")
    )


def test_an_unknown_command_is_answered_with_the_near_one(cli):
    ended = cli("evaluat")
    assert ended.code == 2
    assert "evaluate" in ended.err


def test_cfg_job_prints_the_resolved_settings_and_runs_nothing(cli):
    ended = cli("evaluate", "method=rome", "--cfg", "job", "limit=7", "cache_dir=/c")
    assert ended.code == 0
    assert "limit: 7" in ended.out
    assert "cache_dir: /c/stats" in ended.out
    assert "edit_cli.editors.locate.rome.ROME" in ended.out
    assert "${" not in ended.out
    assert not list(Path.cwd().iterdir())


def test_show_config_tells_default_purpose_and_bounds_of_every_setting(cli):
    ended = cli("show-config", "rome")
    assert ended.code == 0
    assert "method.variant=original" in ended.out
    rows = {row["name"]: row for row in json.loads(cli("show-config", "dataset/fever", "--json").out)}
    assert (rows["dataset.flips"]["default"], rows["dataset.flips"]["takes"]) == (1.0, "a number from 0 to 1")
    assert rows["dataset.published.url"]["default"].startswith("http")
    assert all(row["sentence"] for row in rows.values())
    assert "method.layers=[13, 14, 15, 16, 17]" in cli("show-config", "memit", "model=gpt2-xl").out
    for what in ("stats", "protocol/sme", "model/tiny-gpt2", "corpus/file"):
        assert f"{what.partition('/')[0]}." in cli("show-config", what).out
    for wrong, told in (("fevr", "there is no such method"), ("datasets/x", "did you mean dataset?")):
        ended = cli("show-config", wrong)
        assert (ended.code, told in ended.err) == (2, True)
    ended = cli("show-config", "memit", "--plugin", "nudges")
    assert ended.code == 2 and "there is no option --plugin" in ended.err


@pytest.mark.parametrize("command", help_texts.CONFIGURED)
def test_help_is_of_settings_and_leaves_the_catalog_to_ls(cli, command):
    lines = cli(command, "--help").out.splitlines()
    assert next(i for i, line in enumerate(lines) if line.startswith("Settings")) < 16
    assert not any("Meng et al." in line for line in lines)  # what options are, `ls` tells
    shown = {line.split("=NAME")[0].strip() for line in lines if "=NAME  " in line}
    assert shown == set(catalog.choices(command)) & set(catalog.GROUPS.values())


def test_help_lists_the_settings_of_chosen_options(cli):
    assert "method.covariance_weight" not in cli("evaluate", "--help").out
    assert "method.covariance_weight=auto" in cli("evaluate", "method=memit", "--help").out
    assert "protocol.folds=3" in cli("sequential", "protocol=sme", "--help").out
    assert "protocol.save_edits=false" in cli("evaluate", "-h").out


def test_options_of_ones_own_bring_the_defaults_of_their_class(cli, tmp_path):
    (tmp_path / "mine" / "method").mkdir(parents=True)
    file = tmp_path / "mine" / "method" / "gentle.yaml"
    file.write_text("_target_: edit_cli.editors.locate.memit.MEMIT\nlayers: [1]\n")
    ended = cli("evaluate", "method=gentle", "method.covariance_weight=5", "--config-dir", "mine", "--cfg", "job")
    assert (ended.code, "covariance_weight: 5" in ended.out, "past_keys: none" in ended.out) == (0, True, True)


def test_a_model_brings_its_corpus_unless_another_is_chosen(cli):
    assert "edit_cli.statistics.corpora.EmbeddedText" in cli("evaluate", "--cfg", "job").out
    assert "edit_cli.statistics.corpora.EmbeddedText" not in cli("evaluate", "corpus=wikitext", "--cfg", "job").out
    assert "wikimedia/wikipedia" in cli("evaluate", "model=gpt2-xl", "--cfg", "job").out


def test_published_settings_are_picked_up_and_the_command_line_wins(cli):
    assert "covariance_weight: 20000.0" in cli("evaluate", "model=gpt2-xl", "--cfg", "job").out
    assert "covariance_weight: 5" in cli("evaluate", "model=gpt2-xl", "method.covariance_weight=5", "--cfg", "job").out


def test_configurations_of_ones_own(cli, tmp_path):
    (tmp_path / "mine" / "method").mkdir(parents=True)
    file = tmp_path / "mine" / "method" / "gentle.yaml"
    file.write_text("defaults: [ft, _self_]\nlayers: [1]\nlr: 1.0e-4\n")
    ended = cli("evaluate", "method=gentle", "--config-dir", "mine", "--cfg", "job")
    assert ended.code == 0
    assert "lr: 0.0001" in ended.out
    unknown = cli("evaluate", "method=gentl", "--config-dir", "mine")
    assert (unknown.code, "did you mean gentle?" in unknown.err) == (2, True)
    file.rename(file.with_name("memit.yaml"))
    hidden = cli("evaluate", "--config-dir", "mine", "--cfg", "job")
    assert (hidden.code, "give yours another name" in hidden.err) == (2, True)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((["method=mem"]), {"method=memit", "method=memit-merge"}),
        ((["-m", "method=rome,mem"]), {"method=rome,memit", "method=rome,memit-merge"}),
        ((["method", "=", "mem"]), {"memit", "memit-merge"}),
        ((["meth"]), {"method=", "method."}),
        ((["lim"]), {"limit=", "limit=VALUE"}),  # one word alone would get a space behind it
        ((["protocol.b"]), {"protocol.batch_size=", "protocol.batch_size=all", "protocol.batch_size=auto"}),
        ((["protocol.ch"]), {f"protocol.chat={word}" for word in ("", "none", "template", "auto")}),
        ((["protocol.chat", "=", "t"]), {"template"}),
        ((["protocol.chat", ""]), {"none", "template", "auto"}),  # bash, behind its `=`
        ((["method", "=", "grace", "method.r"]), {"method.radius=", "method.replace="}),
        ((["method=rome", "method.v"]), {"method.value.", "method.variant="}),
        ((["method.value.kl_po"]), {f"method.value.kl_position={word}" for word in ("", "subject", "last")}),
        ((["model", "=", "gemma"]), {"gemma-3-1b", "gemma-3-270m", "gemma-3-4b"}),
        ((["dataset=zsre_qa", "dataset.known"]), {"dataset.known=", "dataset.known_by="}),
        ((["limit=1"]), set()),
        ((["trackers=[t"]), {"trackers=[tensorboard]", "trackers=[trackio]"}),
        ((["trackers=[tensorboard,t"]), {"trackers=[tensorboard,trackio]", "trackers=[tensorboard,trackio,"}),
        ((["trackers", "=", "[wan"]), {"[wandb]", "[wandb,"}),
        ((["trackers=[wandb]"]), {"trackers=[wandb]"}),
        ((["protocol.asked="]), {f"protocol.asked={word}" for word in ("[plain]", "[chat]", "null")}),
        ((["-m", "protocol.asked=[plain],[c"]), {"protocol.asked=[plain],[chat]", "protocol.asked=[plain],[chat,"}),
        (
            (["method=lora", "method.modules=[mlp_in,"]),
            {f"method.modules=[mlp_in,{word}]" for word in ("mlp_out", "attn_out")},
        ),
        ((["protocol.downstream=[w"]), {"protocol.downstream=[world_choice]", "protocol.downstream=[world_choice,"}),
    ],
)
def test_completion_of_settings(words, expected):
    assert set(help_texts.complete("evaluate", words[:-1], words[-1])) == expected


def test_completion_of_lists_of_options():
    assert help_texts.complete("doctor", [], "methods=[rome,mal") == ["methods=[rome,malmen]", "methods=[rome,malmen,"]
    assert help_texts.complete("trace", [], "protocol.kinds=[hidden,m") == [
        "protocol.kinds=[hidden,mlp]", "protocol.kinds=[hidden,mlp,"
    ]  # fmt: skip
    assert help_texts.complete("train-editor", ["method=mend"], "method.training.trackers=[ml")[0].endswith("[mlflow]")


def test_completion_of_a_command_s_protocol():
    assert help_texts.complete("sequential", ["protocol=sme"], "protocol.fo") == [
        "protocol.folds=",
        "protocol.fold_seed=",
    ]
    assert help_texts.complete("sequential", [], "protocol=") == ["protocol=lifelong", "protocol=sme"]
    assert "protocol=" not in help_texts.complete("evaluate", [], "")  # which has its own


@pytest.mark.parametrize("command", help_texts.CONFIGURED)
def test_what_source_tells_of_keys_is_what_the_classes_have(command):
    for prefix, option, target in catalog.targets(command):
        if target is not None:
            cls = source.class_of(target)
            assert cls is not None
            assert set(sketch.keys(target, prefix)) == {key for key, _ in leaves(cls, prefix)}, option


@pytest.mark.parametrize("group", ["method", "dataset", "corpus", "protocol"])
def test_what_source_tells_of_an_option_is_what_its_class_has(group):
    for option in catalog.names(group):
        target = catalog.target_of(group, option)
        cls = source.class_of(target)
        assert target is not None
        assert cls is not None
        hinted, told = dict(leaves(cls)), sketch.keys(target)
        assert set(told) == set(hinted), option
        for key, words in told.items():
            takes = describe(hinted[key])
            such = [word for word in words if word not in takes and word.startswith("[")]  # which a list may hold
            assert not such or is_texts(hinted[key]), f"{option}: {key}"
            told_too = [word.strip("[]") for word in words if word not in such]
            assert all(re.search(rf"\b{re.escape(word)}\b", takes) for word in told_too), f"{option}: {key}"


def test_completion_of_lists_with_commas():
    assert complete_metrics("score,efficacy_su") == ["score,efficacy_success"]
    assert help_texts.listed("rome-zsre,mend-zsre-", ["rome-zsre", "mend-zsre", "mend-zsre-hard"]) == [
        "rome-zsre,mend-zsre-hard"
    ]


def test_completion_answers_the_shell_and_imports_nothing_heavy():
    environment = os.environ | {
        "_EDIT_CLI_COMPLETE": "complete_bash",
        "COMP_WORDS": "edit-cli evaluate method = rome method.var",
        "COMP_CWORD": "5",
    }
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "edit_cli.cli.main"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [f"method.variant={word}" for word in ("", "original", "r", "p")]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "edit_cli.config.sketch" in imported
    assert not imported & {"torch", "numpy", "transformers", "hydra", "omegaconf"}


@pytest.mark.parametrize("what", ["methods", "models", "datasets", "metrics"])
def test_lists_are_the_files_there_are(cli, what):
    ended = cli("ls", what, "--json")
    rows = json.loads(ended.out)
    if what == "metrics":
        assert {"efficacy_success", "perplexity"} <= {row["id"] for row in rows}
        assert all(row["definition"] for row in rows)
    else:
        assert [row["name"] for row in rows] == catalog.names(catalog.GROUPS[what])
        assert all(row["summary"] for row in rows)
    plain = cli("ls", what)
    assert plain.code == 0
    assert all(row.get("name", row.get("id")) in plain.out for row in rows)


def test_env_tells_versions(cli):
    found = json.loads(cli("env", "--json").out)
    assert {"edit-cli", "python", "torch"} <= set(found["versions"])
    assert found["devices"]
    assert found["versions"]["torch"] in cli("env").out


def test_version(cli):
    from edit_cli import __version__

    assert cli("--version").out == f"edit-cli {__version__}\n"
