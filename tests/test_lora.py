"""LoRA beside weights that accelerate keeps off the device."""

from __future__ import annotations

import pytest
from embedded import packaged_editor, world

from edit_cli.errors import UsageError
from edit_cli.lm.loading import ModelOptions

PARTS = [
    "transformer.wte",
    "transformer.wpe",
    *(f"transformer.h.{layer}" for layer in range(6)),
    "transformer.ln_f",
    "lm_head",
]
HALF = {part: "disk" if part in ("transformer.h.0", "transformer.h.5") else "cpu" for part in PARTS}


def test_an_adapter_beside_a_weight_off_the_device_is_refused_with_the_remedy(tmp_path):
    pytest.importorskip("peft")
    lm = ModelOptions("tiny-gpt2", "embedded:tiny-gpt2", device_map=HALF).load()
    kinds = [type(module) for module in lm.model.modules()]
    wanted = [world("tune")[0].requests[0]]
    with pytest.raises(UsageError) as caught:
        packaged_editor(tmp_path, "lora", "method.layers=[1,5]", "method.modules=[mlp_out]").edit(lm, wanted)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(
        "method=lora cannot train beside transformer.h.5.mlp.c_proj, which model.device_map keeps off the device"
    )
    assert "method.layers" in line and "method=ft" in line
    assert [type(module) for module in lm.model.modules()] == kinds


def test_adapters_beside_weights_on_the_device_learn_through_the_offloaded_ones(tmp_path):
    pytest.importorskip("peft")
    wanted = [world("tune")[0].requests[0]]
    settings = (
        "method.layers=[1,2]",
        "method.modules=[mlp_out]",
        "method.steps=15",
        "method.lr=5.0e-3",
        "method.dropout=0.0",
    )
    found = []
    for more in ({"device_map": HALF}, {"device": "cpu"}):
        lm = ModelOptions("tiny-gpt2", "embedded:tiny-gpt2", **more).load()
        with lm.edited(packaged_editor(tmp_path, "lora", *settings).edit(lm, wanted)):
            found.append(lm.loglikelihood([(wanted[0].text, wanted[0].target_new)])[0])
    assert all(found[0].hits) and found[0].nll == pytest.approx(found[1].nll, rel=1e-3)
