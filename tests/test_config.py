"""From configuration to typed objects."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from edit_cli.config.build import build, plain_containers, settings
from edit_cli.editors.locate.memit import MEMIT
from edit_cli.errors import UsageError
from edit_cli.experiment.settings import Settings
from edit_cli.experiment.setup import method_of
from edit_cli.statistics.moments import MomentStore

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


def config(method: dict) -> DictConfig:
    return OmegaConf.create({"method": method, "stats": STATS})


def test_nested_parts_are_built_and_numbers_converted():
    method = method_of(config(MEMIT_NODE).method)
    assert method.editor is MEMIT
    found: Any = method.config
    assert found.layers == [1, 2]
    assert isinstance(found.layers, list)
    assert isinstance(found.covariance_weight, float)
    assert (found.value.steps, found.value.lr) == (5, 0.5)
    assert found.moments.documents == 7


def test_fields_that_are_left_out_keep_their_defaults():
    assert build(OmegaConf.create({"_target_": STATS["_target_"], "documents": 7})) == MomentStore(documents=7)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"layrs": [1]}, "unknown key method.layrs; did you mean layers?"),
        ({"value": {"stepps": 1}}, "unknown key method.value.stepps; did you mean steps?"),
        ({"layers": 3}, "method.layers=3: give a list of whole numbers"),
        ({"layers": ["a"]}, "method.layers=['a']: give a list of whole numbers"),
        ({"layers": [1, 1]}, "method.layers=[1, 1]: 1 occurs twice"),
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
        method_of(config(MEMIT_NODE | change).method)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_keys_behind_an_interpolation_are_named_where_they_stand():
    broken = OmegaConf.create({"method": MEMIT_NODE, "stats": STATS | {"documents": "many"}})
    with pytest.raises(UsageError, match=r"stats\.documents=many: give a whole number from 1 up or null"):
        method_of(broken.method)


def test_a_field_without_value_or_default_is_named():
    with pytest.raises(UsageError, match=r"method\.layers has no value"):
        method_of(config({"_target_": MEMIT_NODE["_target_"]}).method)


def test_settings_are_typed_and_the_rest_is_left_alone():
    top = {"_target_": "edit_cli.experiment.settings.Settings"}
    found = settings(OmegaConf.create({**top, "limit": "3", "tag": 7, "anything": {"else": 1}}))
    assert found == Settings(limit=3, tag="7")
    for bad in (0, -1, "x", ""):
        with pytest.raises(UsageError, match=r"^limit="):
            settings(OmegaConf.create({**top, "limit": bad}))


def test_plain_containers_keep_missing_values_and_name_broken_references():
    assert plain_containers(OmegaConf.create({"a": "${b}", "b": 1, "c": "???"})) == {"a": 1, "b": 1, "c": "???"}
    with pytest.raises(UsageError, match="nothing"):
        plain_containers(OmegaConf.create({"a": "${nothing}"}))
