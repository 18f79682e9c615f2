"""What every method must do. A plug-in's author subclasses `MethodConformance` in a test of his own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import pytest
from torch import Tensor

from edit_cli.config.schema import SettingError
from edit_cli.editors.base import Context, EditorConfig
from edit_cli.edits import store as edit_store
from edit_cli.edits.edit import Edit
from edit_cli.errors import RejectedRequest, UsageError
from edit_cli.lm.heads.kinds import KINDS
from edit_cli.lm.model import LM
from edit_cli.requests import EditRequest
from edit_cli.testing.parts import embedded_lm, facts, likelihoods, linear_twin, packaged_method, same_bits, snapshot

MODELS = {"Conv1D": embedded_lm, "Linear": linear_twin}


@dataclass
class Made:
    """An edit of `wanted`, with the model's weights before and after it was made, and the answers before it."""

    edit: Edit
    wanted: list[EditRequest]
    weights: dict[str, Tensor]
    after_editing: dict[str, Tensor]
    attached: int
    answers: tuple[list[float], list[str]]


def answers(lm: LM, wanted: Sequence[EditRequest]) -> tuple[list[float], list[str]]:
    """(−log P of the new answers, what the model writes instead)."""
    return likelihoods(lm, wanted), lm.generate([request.text for request in wanted], 4)


class MethodConformance:
    """Tests of one method on the embedded model, with projections of both orientations. Say which:

        class TestMine(MethodConformance):
            name, settings = "mine", ("method.layer=3",)

    Attributes:
        name: as in `method=NAME`.
        settings: KEY=VALUE, as on the command line.
        plugins: packages to be named; none where yours is installed.
        config_dir: a folder of configurations of yours.

    Override the fixture `context` for a method that needs examples, and `method` for one that is built otherwise.
    """

    name: ClassVar[str]
    settings: ClassVar[Sequence[str]] = ()
    plugins: ClassVar[Sequence[str]] = ()
    config_dir: ClassVar[str | Path | None] = None

    @pytest.fixture(scope="class")
    @classmethod
    def method(cls) -> Any:
        """The method with its settings."""
        return packaged_method(cls.name, *cls.settings, plugins=cls.plugins, config_dir=cls.config_dir)

    @pytest.fixture(scope="class")
    @classmethod
    def context(cls, method: Any, lm: LM) -> Context:
        """What a command would hand to the editor: of one method on one model."""
        return Context()

    @pytest.fixture(scope="class", params=MODELS)
    @classmethod
    def lm(cls, request: pytest.FixtureRequest) -> LM:
        return MODELS[request.param]()

    @pytest.fixture(autouse=True)
    def _taken_off(self, lm: LM) -> Iterator[None]:
        """What a failing test has left attached stands in no other's way."""
        yield
        while lm.attached:
            lm.detach()

    @pytest.fixture(scope="class")
    @classmethod
    def made(cls, method: Any, lm: LM, context: Context) -> Made:
        wanted = facts(2)
        before, untouched = answers(lm, wanted), snapshot(lm)
        edit = method.begin(lm, context).edit(wanted)
        return Made(edit, wanted, untouched, snapshot(lm), len(lm.attached), before)

    def test_making_an_edit_leaves_the_model_bit_for_bit(self, made: Made) -> None:
        assert same_bits(made.after_editing, made.weights)
        assert made.attached == 0

    def test_the_new_answers_become_likelier(self, made: Made, lm: LM) -> None:
        with lm.edited(made.edit):
            after, _ = answers(lm, made.wanted)
        assert all(new < old for new, old in zip(after, made.answers[0], strict=True))

    def test_taking_the_edit_off_is_exact(self, made: Made, lm: LM) -> None:
        lm.attach(made.edit)
        lm.detach()
        assert same_bits(snapshot(lm), made.weights)
        assert answers(lm, made.wanted) == made.answers

    def test_saved_and_loaded_it_answers_the_same(self, made: Made, lm: LM, tmp_path: Path) -> None:
        edit_store.save(made.edit, tmp_path / "edit", lm, made.wanted, {})
        with lm.edited(made.edit):
            expected = answers(lm, made.wanted)
        edit_store.attach(tmp_path / "edit", lm)
        assert answers(lm, made.wanted) == expected
        lm.detach()
        assert same_bits(snapshot(lm), made.weights)

    def test_a_sequence_goes_on_from_what_was_saved(
        self, made: Made, method: Any, lm: LM, context: Context, tmp_path: Path
    ) -> None:
        """The same edits again are the same bits, and so is the next one after a new start with the saved ones."""
        later = facts(2, start=2)
        unbroken = method.begin(lm, context)
        first = unbroken.edit(made.wanted)
        assert same_bits(first.state()[0], made.edit.state()[0])
        edit_store.save(first, tmp_path / "first", lm, made.wanted, {})
        with lm.edited(first):
            expected = unbroken.edit(later)
        resumed, saved = method.begin(lm, context), edit_store.load(tmp_path / "first", lm)
        resumed.recall(saved)
        with lm.edited(saved):
            found = resumed.edit(later)
        assert same_bits(found.state()[0], expected.state()[0])

    def test_a_request_that_cannot_be_edited_is_rejected(self, method: Any, lm: LM, context: Context) -> None:
        untouched = snapshot(lm)
        (fact,) = facts(1)
        with pytest.raises(RejectedRequest):
            method.begin(lm, context).check(replace(fact, target_new="  "))
        assert same_bits(snapshot(lm), untouched) and not lm.attached

    def test_models_of_other_kinds_are_refused(self, method: Any) -> None:
        for kind in set(KINDS) - set(method.editor.heads):
            with pytest.raises(UsageError):
                method.editor.refuse_kind(kind, "another model")

    def test_settings_of_another_type_are_refused_by_name(self, method: Any) -> None:
        if not isinstance(config := method.config, EditorConfig):
            pytest.skip("its settings are checked elsewhere")
        for field in fields(config):
            if field.init and get_type_hints(type(config))[field.name] is not Any:
                with pytest.raises(SettingError, match=field.name):
                    replace(config, **{field.name: object()})
