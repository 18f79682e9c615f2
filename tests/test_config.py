"""From configuration to typed objects."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from edit_cli.config.build import Settings, build, plain_containers, settings
from edit_cli.editors.finetune.ft import FT
from edit_cli.editors.locate.memit import MEMIT
from edit_cli.errors import UsageError

MEMIT_NODE = {
    "_target_": "edit_cli.editors.locate.memit.MEMIT",
    "layers": [1, 2],
    "covariance_weight": 3,
    "value": {"steps": 5, "lr": "5e-1"},
    "moments": "${stats}",
}
STATS = {
    "_target_": "edit_cli.statistics.moments.MomentStore",
    "corpus": {"_target_": "edit_cli.statistics.corpora.EmbeddedText"},
    "documents": 7,
}


def config(method: dict) -> OmegaConf:
    return OmegaConf.create({"method": method, "stats": STATS})


def test_nested_parts_are_built_and_numbers_converted():
    editor = build(config(MEMIT_NODE).method)
    assert isinstance(editor, MEMIT)
    assert editor.layers == [1, 2]
    assert isinstance(editor.layers, list)
    assert isinstance(editor.covariance_weight, float)
    assert (editor.config.value.steps, editor.config.value.lr) == (5, 0.5)
    assert editor.config.moments.documents == 7


def test_fields_that_are_left_out_keep_their_defaults():
    assert build(config({"_target_": "edit_cli.editors.finetune.ft.FT", "layers": [0]}).method) == FT(layers=[0])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"layrs": [1]}, "unknown key method.layrs; did you mean layers?"),
        ({"value": {"stepps": 1}}, "unknown key method.value.stepps; did you mean steps?"),
        ({"layers": 3}, "method.layers=3: give a list of whole numbers"),
        ({"layers": ["a"]}, "method.layers=['a']: give a list of whole numbers"),
        ({"covariance_weight": "much"}, "method.covariance_weight=much: give a number"),
        ({"value": 3}, "method.value=3: this is a group"),
        ({"layers": "???"}, "method.layers has no value"),
        ({"covariance_weight": "${nothing}"}, "method.covariance_weight"),
        ({"use_covariance": "perhaps"}, "true or false"),
        ({"_target_": "os.system"}, "only classes inside edit_cli"),
        ({"_target_": "edit_cli.editors.locate.memit.Nothing"}, "there is no such class"),
        ({"_target_": "edit_cli.nowhere.Nothing"}, "there is no such class"),
        ({"_target_": "edit_cli.config.build.build"}, "there is no such class"),
    ],
)
def test_what_cannot_be_built_is_named(change, told):
    with pytest.raises(UsageError) as caught:
        build(config(MEMIT_NODE | change).method)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_keys_behind_an_interpolation_are_named_where_they_stand():
    broken = OmegaConf.create({"method": MEMIT_NODE, "stats": STATS | {"documents": "many"}})
    with pytest.raises(UsageError, match=r"stats\.documents=many: give a whole number or null"):
        build(broken.method)


def test_a_field_without_value_or_default_is_named():
    with pytest.raises(UsageError, match=r"method\.layers has no value"):
        build(config({"_target_": "edit_cli.editors.finetune.ft.FT"}).method)


def test_settings_are_typed_and_the_rest_is_left_alone():
    found = settings(OmegaConf.create({"limit": "3", "tag": "a", "anything": {"else": 1}}))
    assert found == Settings(limit=3, tag="a")
    for bad in (0, -1, "x", ""):
        with pytest.raises(UsageError, match=r"^limit="):
            settings(OmegaConf.create({"limit": bad}))


def test_plain_containers_keep_missing_values_and_name_broken_references():
    assert plain_containers(OmegaConf.create({"a": "${b}", "b": 1, "c": "???"})) == {"a": 1, "b": 1, "c": "???"}
    with pytest.raises(UsageError, match="nothing"):
        plain_containers(OmegaConf.create({"a": "${nothing}"}))
