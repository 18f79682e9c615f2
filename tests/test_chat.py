"""Chat templates: what becomes of a case, how it is edited and asked; and known facts, which are asked likewise."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import json_lines
from embedded import embedded_lm
from tokenizers.processors import TemplateProcessing

import edit_cli
from edit_cli import assets
from edit_cli.editors.locate.context_prefixes import ContextConfig, Contexts, rows_in_contexts, sample_contexts
from edit_cli.errors import UsageError
from edit_cli.experiment.examples import OtherRecords
from edit_cli.lm.chat import ChatOptions, Forms, forms, forms_on, marks_turns
from edit_cli.lm.loading import ModelOptions
from edit_cli.metrics import knowledge
from edit_cli.metrics.observe import ObserveOptions, observe
from edit_cli.requests import Case, EditRequest, Probe
from edit_cli.writing import as_text, spoken

TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}(Be brief.){% endif %}"
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] | trim }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
BEFORE, AFTER = "(Be brief.)<user>", "</><assistant>"
FACT = EditRequest("The home of {} is in", "Jormia Stenenen", "Paris", "Rome")
CASE = Case(
    "7",
    (FACT,),
    (
        Probe("rewrite", FACT.text, "Paris", "Rome", aliases=("Lutetia",)),
        Probe("paraphrase", "Where does Jormia Stenenen live? ", "Paris", "Rome"),
        Probe("generation", "Jormia Stenenen likes"),
    ),
    right=("Rome",),
)
FT = ("method=ft", "method.steps=2", "method.lr=5.0e-4", "model.perplexity_text=null")


@pytest.fixture(scope="module")
def lm():
    """The embedded model with a chat template, whose tokenizer begins every text with its BOS token."""
    found = embedded_lm()
    own = found.tokenizer = found.head.tokenizer = copy.deepcopy(found.tokenizer)
    own.bos_token, own.chat_template = own.eos_token, TEMPLATE
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{own.bos_token} $A", special_tokens=[(own.bos_token, own.eos_token_id)]
    )
    return found


def in_chat(lm, **settings) -> Forms:
    return forms(
        ChatOptions(**{"chat": "template", "statements": "complete", **settings}), lm.tokenizer, ("model",), []
    )


def test_a_fact_becomes_what_the_user_says_and_the_assistant_answers(lm):
    case = in_chat(lm).case(CASE)
    (request,), (rewrite, question, text) = case.requests, case.probes
    assert request.text == rewrite.text == f"{BEFORE}Complete this sentence: {FACT.text}{AFTER}"
    assert as_text(request.text, request.target_new) == f"{request.text}Paris"
    assert (request.prompt, rewrite.prompt) == (FACT.prompt, FACT.text)  # as the data have it, for files and tables
    assert question.text == f"{BEFORE}Where does Jormia Stenenen live? {AFTER}"
    assert as_text(rewrite.text, rewrite.aliases[0]).endswith(">Lutetia")
    assert text == CASE.probes[2]  # fluency is that of running text
    begin, end = request.subject_span
    assert request.text[begin:end] == "Jormia Stenenen"


@pytest.mark.parametrize(
    ("statements", "before", "after", "joint"),
    [
        ("complete", f"{BEFORE}Complete this sentence: ", AFTER, ""),
        ("bare", BEFORE, AFTER, ""),
        ("begin", f"{BEFORE}State a fact.{AFTER}", "", " "),
    ],
)
def test_statements_are_put_as_is_chosen(lm, statements, before, after, joint):
    request = in_chat(lm, statements=statements).case(CASE).requests[0]
    assert as_text(request.text, request.target_new) == f"{before}{FACT.text}{after}{joint}Paris"


def test_the_system_prompt_takes_the_place_of_the_templates_own(lm):
    text = in_chat(lm, system="Say {} and $1.").text("Who?")
    assert text == f"<system>Say {{}} and $1.</><user>Who?{AFTER}"


def test_a_space_that_the_template_puts_before_replies_stands_before_answers(lm):
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.chat_template = (
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]{% else %}"
        " {{ message['content'] }}</s>{% endif %}{% endfor %}"
    )
    request = in_chat(SimpleNamespace(tokenizer=tokenizer)).case(CASE).requests[0]
    assert as_text(request.text, request.target_new).endswith(" is in [/INST] Paris")


def test_the_beginning_of_the_text_is_there_once(lm):
    (row,) = lm.head.encode([(in_chat(lm).text("Who?"), "Ann")])
    assert row.ids.count(lm.tokenizer.bos_token_id) == 1


def test_the_subjects_last_token_is_found_inside_the_template_and_contexts_stand_before_the_sentence(lm):
    request = in_chat(lm).case(CASE).requests[0]
    rows, last = rows_in_contexts(lm, [request], Contexts([[""], ["I know that. "]], "rows"), with_target=False)
    texts = [
        lm.tokenizer.decode(row.ids[: index + 1], skip_special_tokens=True)
        for row, index in zip(rows, last, strict=True)
    ]
    assert texts == [
        f"{BEFORE}Complete this sentence: {before}The home of Jormia Stenenen" for before in ("", "I know that. ")
    ]


def test_forms_side_by_side_are_kept_apart(lm):
    options = ObserveOptions(sample=False, max_new_tokens=1, perplexity=False)
    both = Forms("plain", ("plain", "chat"), in_chat(lm).template)
    plain, chat, seen = (observe(lm, [form.case(CASE)], options)[0] for form in (Forms(), in_chat(lm), both))
    for found, alone in ((seen, plain), (seen["forms"]["chat"], chat)):
        for one, other in zip(found["probes"], alone["probes"], strict=True):
            assert one == {**other, **{key: pytest.approx(other[key]) for key in ("target_nll", "foil_nll")}}
    assert "forms" not in plain


def test_auto_takes_the_template_of_models_that_are_made_for_it(lm):
    def chosen(name: str, stops: list[int]) -> str:
        return forms(ChatOptions(chat="auto"), lm.tokenizer, (name,), stops).edited

    ending = lm.tokenizer("</>", add_special_tokens=False)["input_ids"][0]
    assert chosen("Some-7B-Instruct", []) == chosen("some-2b-it", []) == chosen("some", [ending]) == "chat"
    assert chosen("some", [0]) == chosen("unit-7b", []) == "plain"
    without = SimpleNamespace(chat_template=None)
    assert forms(ChatOptions(chat="auto"), without, ("Some-Instruct",), []) == Forms()


def test_a_template_that_refuses_a_system_prompt_is_told_by_the_setting(lm):
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    with pytest.raises(UsageError, match=r"^protocol\.system: .*no system"):
        forms(ChatOptions(chat="template", system="Be."), tokenizer, ("model",), [])


def test_thoughts_are_taken_out_of_replies(lm, monkeypatch):
    assert spoken("<think>\nParis?\n</think>\n\nRome") == spoken("Paris?</think>Rome") == "Rome"
    assert spoken("<think>Paris") == ""
    assert spoken(" Rome <b> ") == " Rome <b> "
    parts = iter(["<think>\n", "Paris\n", "</think>\n", "Rome\nParis"])
    monkeypatch.setattr(
        lm.head, "_write", lambda *_, **__: [lm.tokenizer(next(parts), add_special_tokens=False)["input_ids"]]
    )
    assert lm.head.generate(["Who?"], 99) == ["<think>\nParis\n</think>\nRome"]


def test_a_thought_that_the_template_begins_is_ended_at_once(lm):
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}:<think>\n"
    at = SimpleNamespace(tokenizer=tokenizer)
    assert in_chat(at).text("Who?") == "Who?:<think>\n\n</think>\n\n"
    assert in_chat(at, thinking=True).text("Who?") == "Who?:"


def test_what_methods_may_remember_is_in_the_form_that_is_edited(lm):
    cases = [CASE, Case("8", (EditRequest("{} is in", "Oslo", "Rome", "Norway"),), ())]
    source = SimpleNamespace(has_splits=False)
    other = OtherRecords(source, cases[:1], 0, in_chat(lm))
    assert [request.text for case in other._put(cases) for request in case.requests][1] not in other._taken
    assert in_chat(lm).case(CASE).requests[0].text in other._taken


# --- prefixes of chat models ------------------------------------------------------------------------------------------


def test_prefixes_of_chat_models_begin_with_ordinary_words_and_none_stands_twice(monkeypatch):
    lm = embedded_lm()
    plain = sample_contexts(lm, ContextConfig(starts=["", "When"], lengths=[4], per_start=3))
    own = lm.tokenizer = lm.head.tokenizer = copy.deepcopy(lm.tokenizer)
    own.bos_token = own.eos_token
    own.chat_template = TEMPLATE.replace("{{ bos_token }}", "")
    assert sample_contexts(lm, ContextConfig(starts=["", "When"], lengths=[4], per_start=3)).groups == plain.groups
    own.chat_template = own.chat_template.replace("</>", "{{ eos_token }}")
    assert marks_turns(own, own.eos_token)
    asked: list[str] = []

    def sample(starts, *_):
        asked.extend(starts)
        return [f"{start} end" for start in starts]

    monkeypatch.setattr(lm.head, "sample", sample)
    found = sample_contexts(lm, ContextConfig(starts=["", "When"], lengths=[4], per_start=3))
    assert asked == ["\nThe", "\nTherefore", "\nBecause", "\nWhen", "\nWhen", "\nWhen"]
    assert found.groups[1] == ["The end. ", "Therefore end. ", "Because end. ", "When end. "]


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The embedded model in a folder, with a chat template beside it."""
    made = tmp_path_factory.mktemp("chat") / "tiny-chat"
    made.mkdir()
    for file in (assets.FOLDER / "tiny-gpt2").iterdir():
        os.symlink(file, made / file.name)
    (made / "chat_template.jinja").write_text(TEMPLATE)
    return made


def test_evaluate_edits_in_one_form_and_asks_in_both(cli, folder):
    here = ("model=tiny-gpt2", f"model.id={folder}", "limit=1", "protocol.chat=template", "method.steps=8")
    ended = cli("evaluate", *FT, *here, "protocol.asked=[plain,chat]", "protocol.save_edits=true", quick=True)
    assert ended.code == 0, ended.err
    assert "Edited in the model's chat template, asked as plain text and in it." in ended.words
    assert "plain before plain after chat before chat after" in ended.words
    run = Path(ended.last)
    found, lines = json.loads((run / "summary.json").read_text()), json_lines(run / "results.jsonl")
    assert found["metrics"]["efficacy_success"] == found["asked"]["plain"]["efficacy_success"]
    magnitude = found["asked"]["chat"]["efficacy_magnitude"]
    assert magnitude["after"]["mean"] > magnitude["before"]["mean"]
    assert found["dataset"]["forms"]["frames"]["question"] == [f"<|endoftext|>{BEFORE}", AFTER]
    assert "{}" in lines[0]["requests"][0]["prompt"]
    frames = edit_cli.read(run).cases
    assert set(frames["form"].dropna()) == {"chat"}
    assert frames["form"].isna().sum() == (frames["form"] == "chat").sum()

    prompt = lines[0]["requests"][0]["prompt"].replace("{}", lines[0]["requests"][0]["subject"])
    asked = [cli("ask", str(run / "edits/0000"), prompt, "--json", *more).out for more in ((), ("--chat", "none"))]
    as_edited, plain = map(json.loads, asked)
    assert as_edited["edited"] != plain["edited"]
    assert as_edited["prompt"] == plain["prompt"] == prompt


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("evaluate", "method=ft", "protocol.chat=template"), "protocol.chat=template: tiny-gpt2 has no chat template"),
        (("evaluate", "method=ft", "protocol.asked=[chat]"), "protocol.asked=[chat]: tiny-gpt2 has no chat template"),
        (
            ("sequential", "method=ft", "protocol.asked=[chat,plain]"),
            "protocol.asked: evaluate and edit can ask in both",
        ),
        (("evaluate", "method=ft", "protocol.system=Hm"), "protocol.system: a system prompt is read in chats only"),
        (("evaluate", "method=ft", "protocol.chat=yes"), "protocol.chat=yes: choose none, template or auto"),
        (("trace", "dataset.known=true"), "dataset.known=true is for commands that edit facts"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(cli, arguments, told):
    ended = cli(*arguments, "limit=1")
    assert ended.code == 2
    assert told in " ".join(ended.err.split())
    assert "Traceback" not in ended.err


def test_a_sequence_and_one_fact_are_edited_in_a_chat_too(cli, folder):
    here = ("model=tiny-gpt2", f"model.id={folder}", "protocol.chat=template")
    fact = ("edit.prompt={} plays the", "edit.subject=Jormia Stenenen", "edit.target=organ")
    ended = cli("edit", *FT, *here, *fact, quick=True)
    assert ended.code == 0, ended.err
    assert "Edited and asked in the model's chat template." in ended.words
    ended = cli("sequential", *FT, *here, "limit=1", "protocol.holdout=1", quick=True)
    assert ended.code == 0, ended.err
    assert "Edited and asked in the model's chat template." in ended.words


def test_python_edits_and_asks_in_a_chat(lm):
    facts = [{"prompt": "{} plays the", "subject": "Jormia Stenenen", "target_new": "organ", "target_true": "piano"}]
    edit = edit_cli.edit(lm, facts, method="ft", settings={"steps": 8, "lr": 5e-4}, chat="template")
    found = edit_cli.evaluate(lm, edit, facts, chat="template", sample=False, perplexity=False)["efficacy_magnitude"]
    assert found["after"]["mean"] > found["before"]["mean"]
    (text,) = edit_cli.in_chat(lm, ["Jormia Stenenen plays the"], {"system": "Be."})
    assert text == f"<system>Be.</><user>State a fact.{AFTER}Jormia Stenenen plays the"
    with pytest.raises(UsageError, match="^chat=template: .* has no chat template"):
        edit_cli.edit(embedded_lm(), facts, chat="template")


# --- known facts ------------------------------------------------------------------------------------------------------


def test_only_known_facts_are_edited_and_the_answers_are_kept(cli, tmp_path, monkeypatch):
    facts = [
        {"id": "a", "prompt": "{} plays the", "subject": "Jormia Stenenen", "target_new": "organ", "target_true": "no"},
    ]
    for record in json.loads((assets.FOLDER / "world/records.json").read_text())[:4]:
        about = record["requested_rewrite"]
        facts.append(
            {
                "prompt": about["prompt"],
                "subject": about["subject"],
                "target_new": about["target_new"]["str"],
                "target_true": about["target_true"]["str"],
            }
        )
    Path("facts.jsonl").write_text("\n".join(map(json.dumps, facts)))
    wanted = (
        "evaluate",
        *FT,
        "dataset=facts",
        "dataset.path=facts.jsonl",
        "dataset.known=true",
        f"cache_dir={tmp_path}",
    )
    ended = cli(*wanted, "limit=2", quick=True)
    assert ended.code == 0, ended.err
    assert "2 of 5 records: 4 of 5 asked are known to the model (its reply holds the answer)" in ended.words
    lines = json_lines(Path(ended.last) / "results.jsonl")
    assert [line["case_id"] for line in lines] == ["1", "2"]
    assert lines[0]["before"]["probes"][0]["generated"]
    manifest = json.loads((Path(ended.last) / "manifest.json").read_text())
    assert manifest["dataset"]["known"] == {"by": "reply", "asked": 5, "known": 4}

    monkeypatch.setattr(knowledge, "known", lambda *_: pytest.fail("asked again"))
    assert cli(*wanted, "limit=3", "tag=more", quick=True).code == 0


def test_known_facts_need_true_answers_and_a_model_that_knows_some(cli):
    fact = {"prompt": "{} plays the", "subject": "Jormia Stenenen", "target_new": "organ"}
    wanted = ("evaluate", *FT, "dataset=facts", "dataset.path=facts.jsonl", "dataset.known=true")
    for more, told in (
        ({}, "dataset.known=true: facts names no true answers (target_true)"),
        ({"target_true": "no"}, "dataset.known=true: the model knows none of the 1 facts of facts"),
    ):
        Path("facts.jsonl").write_text(json.dumps(fact | more))
        ended = cli(*wanted, "dataset.known_by=rank", quick=True)
        assert ended.code == 2
        assert told in " ".join(ended.err.split())


def test_what_is_known_is_what_the_metrics_count():
    assert knowledge.first_choice([True, True])
    assert not knowledge.first_choice([True, False])
    question = knowledge.question(CASE)
    assert [(probe.prompt, probe.target) for probe in question.probes] == [(FACT.text, "Rome")]
    assert not knowledge.question(Case("9", (EditRequest("{} is", "Ann", "here"),), ())).probes


def test_a_model_that_writes_nothing_is_asked_as_plain_text():
    lm = ModelOptions("tiny-bert", "embedded:tiny-bert", device="cpu").load()
    assert forms_on(lm, ChatOptions(chat="auto")) == forms(ChatOptions(), lm.tokenizer, ("tiny-bert",), ())
