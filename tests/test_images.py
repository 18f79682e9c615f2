"""Image classifiers: images as prompts and labels as targets, held to plain computations; edits and training."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from embedded import same_bits, snapshot
from pictures import CLASSIFIERS, LABELS, SIDE, cases, classifier, noise, prompt

from edit_cli.datasets.digits import Digits
from edit_cli.editors.finetune.ft import FT, FTConfig
from edit_cli.editors.locate.memit import MEMIT
from edit_cli.editors.meta.base import TrainingConfig
from edit_cli.editors.meta.enn import ENN, ENNConfig
from edit_cli.editors.meta.episodes import EpisodeConfig
from edit_cli.editors.meta.factored_gradients import Shift, gradients, shifted
from edit_cli.editors.meta.ke import KE, KEConfig
from edit_cli.editors.meta.mend import MEND, MENDConfig
from edit_cli.editors.passes import row_losses
from edit_cli.edits import store as edit_store
from edit_cli.edits.edit import WeightDelta
from edit_cli.errors import RejectedRequest, UsageError
from edit_cli.lm.loading import ModelOptions
from edit_cli.lm.matrices import matrix_of
from edit_cli.training.loop import Training

families = pytest.mark.parametrize("family", CLASSIFIERS)
SMALL = TrainingConfig(
    steps=2, edits=2, lr=1e-3, validate_every=2, validation_edits=2, save_every=2, largest_shift=1e9, trackers=[]
)
LAYERS = [1]
DRAWN = EpisodeConfig(locality=["any", "any"])
EDITORS: dict[str, Any] = {
    "mend": lambda lm: MEND(MENDConfig(layers=LAYERS, rank=4, step_size=1e-2, draw=DRAWN, training=SMALL), lm),
    "ke": lambda lm: KE(KEConfig(layers=LAYERS, hidden=8, width=8, inner=8, others=0, draw=DRAWN, training=SMALL), lm),
    "enn": lambda lm: ENN(
        ENNConfig(layers=LAYERS, steps=3, rule="rmsprop", objective="margin", step_lr=0.0, draw=DRAWN, training=SMALL),
        lm,
    ),
}


@cache
def shared(family: str) -> Any:
    """No test here changes it."""
    return classifier(family)


@torch.no_grad()
def plain(lm: Any, pixels: np.ndarray) -> torch.Tensor:
    """Log-probabilities of the labels, from numbers that are worked out here."""
    values = (torch.from_numpy(pixels).float().permute(2, 0, 1)[None] / 255 - 0.4) / 0.3
    return lm.model(pixel_values=values).logits[0].log_softmax(-1)


@families
def test_answers_equal_a_plain_computation_whatever_the_batch(family):
    lm, images = shared(family), noise(5, SIDE[family])
    pairs = [(prompt(pixels), LABELS[i % 4].upper()) for i, pixels in enumerate(images)]
    together, alone = lm.loglikelihood(pairs), [lm.loglikelihood([pair])[0] for pair in pairs]
    for i, (pixels, batched, single) in enumerate(zip(images, together, alone, strict=True)):
        scores = plain(lm, pixels)
        assert batched.nll == pytest.approx(-scores[i % 4].item(), abs=1e-4) == pytest.approx(single.nll, abs=1e-4)
        assert batched.predicted == (int(scores.argmax()),) and batched.hits == (int(scores.argmax()) == i % 4,)
    assert lm.generate([image for image, _ in pairs], 1) == [LABELS[int(plain(lm, p).argmax())] for p in images]
    for scores, pixels in zip(lm.target_logprobs(pairs), images, strict=True):
        torch.testing.assert_close(scores[0], plain(lm, pixels), atol=1e-4, rtol=1e-4)


def test_layout_is_found():
    vit, resnet = (shared(family).layout for family in CLASSIFIERS)
    assert [(stack.name, stack.depth) for stack in vit.stacks] == [("encoder", 2)]
    assert vit.mlp_weights(1) == ("vit.layers.1.mlp.fc1.weight", "vit.layers.1.mlp.fc2.weight")
    assert [(stack.name, stack.first, stack.depth) for stack in resnet.stacks] == [("stage 1", 0, 2), ("stage 2", 2, 1)]
    assert resnet.mlp_out(2) == "resnet.encoder.stages.1.layers.0.layer.1.convolution"
    with pytest.raises(UsageError, match="layer 3 does not exist: this model has layers 0 to 2"):
        resnet.block(3)


@families
def test_gradients_and_shifts_of_convolutions_are_those_of_their_weights(family):
    """Factors against autograd; rows that meet a shifted weight against the model with that weight."""
    lm = classifier(family)
    rows = lm.head.encode([(prompt(pixels), "frog") for pixels in noise(3, SIDE[family])])
    names = [name.removesuffix(".weight") for name in lm.layout.mlp_weights(1)]
    found = gradients(lm, rows, names)
    parameters = [lm.parameter(f"{name}.weight").requires_grad_() for name in names]
    expected = torch.autograd.grad(row_losses(lm.head.answers(rows), 3).sum(), parameters)
    for name, parameter, whole in zip(names, parameters, expected, strict=True):
        torch.testing.assert_close(found[name].dense(), whole.flatten(1), atol=1e-6, rtol=1e-4)
        parameter.requires_grad_(False)
        assert lm.weight(name).shape == found[name].dense().shape
    change = 0.1 * torch.randn(3, *lm.weight(names[0]).shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        with shifted(lm, {names[0]: Shift.dense(change)}):
            each = lm.head.answers(rows).logits
        for number in range(3):
            factors = Shift.dense(change[number : number + 1]).factors()
            with lm.edited(WeightDelta({f"{names[0]}.weight": factors})):
                torch.testing.assert_close(each[number], lm.head.answers(rows).logits[number], atol=1e-5, rtol=1e-4)


@families
def test_a_label_is_flipped_and_comes_back_exactly(family, tmp_path):
    lm = classifier(family)
    (case, *_) = cases(lm)
    (request,) = case.requests
    pair, untouched = [(request.text, request.target_new)], snapshot(lm)
    before = lm.loglikelihood(pair)
    edit = FT(FTConfig(layers=[1], lr=2e-2, steps=60), lm).edit(case.requests)
    assert same_bits(snapshot(lm), untouched)
    edit_store.save(edit, tmp_path / "edit", lm, case.requests, {"name": "ft"})
    with lm.edited(edit):
        after = lm.loglikelihood(pair)
        assert lm.generate([request.text], 1) == [request.target_new]
    assert same_bits(snapshot(lm), untouched) and lm.loglikelihood(pair) == before
    edit_store.attach(tmp_path / "edit", lm)
    assert lm.loglikelihood(pair) == after
    lm.detach()
    assert same_bits(snapshot(lm), untouched)
    (told,) = edit_store.read_manifest(tmp_path / "edit")["requests"]
    assert edit_store.request_of(told) == request  # the image is in the edit


def test_steps_that_an_edit_took_are_counted():
    """As many as leave the loss above its bound; an image that has the label already takes none."""
    lm = classifier("vit")
    (case, *_) = cases(lm)
    (request,) = case.requests
    wanted, there = replace(request), replace(request, target_new=request.target_true or "")
    editor = EDITORS["enn"](lm)
    net = editor.build()
    editor.trained = lambda: net  # as it begins
    assert editor.edit([there]).info["diagnosis"]["steps"] == 0
    assert editor.edit([wanted]).info["diagnosis"]["steps"] > 0

    assert FT(FTConfig(layers=[1], lr=1e-5, steps=3), lm).edit([wanted]).info["diagnosis"]["steps"] == 3
    assert FT(FTConfig(layers=[1], stop_loss=99.0), lm).edit([wanted]).info["diagnosis"]["steps"] == 0


@families
@pytest.mark.parametrize("name", EDITORS)
def test_editors_are_trained_on_images(name, family, tmp_path):
    lm = classifier(family)
    found, untouched = cases(lm), snapshot(lm)
    editor = EDITORS[name](lm)
    told: list[dict] = []
    done = Training(editor, found, found, tmp_path, "stamp", told.append).run()
    assert done.step == 2 and all(np.isfinite(line["loss"]) for line in told if "loss" in line)
    assert same_bits(snapshot(lm), untouched)
    editor.trained = lambda: done.net
    request = found[0].requests[0]
    before = lm.loglikelihood([(request.text, request.target_new)])[0].nll
    edit = editor.edit([request])
    assert {update.rpartition(".")[2] for update in edit.updates} <= {
        "weight",
        "bias",
        "cls_token",
        "position_embeddings",
    }
    with lm.edited(edit):
        assert name == "ke" or lm.loglikelihood([(request.text, request.target_new)])[0].nll < before
    assert same_bits(snapshot(lm), untouched)


@families
def test_a_saved_model_is_loaded_as_what_it_is(family, tmp_path):
    lm = shared(family)
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    options: Any = ModelOptions(name="copy", id=str(tmp_path), device="cpu")
    assert options.read_kind() == "image" and options.outline.layout == lm.layout
    again: Any = options.load()
    pairs = [(prompt(pixels), "ship") for pixels in noise(2, SIDE[family])]
    assert again.head.labels == LABELS and again.loglikelihood(pairs) == lm.loglikelihood(pairs)


def test_what_is_no_image_of_the_right_size_is_refused_in_a_line():
    head = shared("vit").head
    whole = prompt(noise(1, 8)[0])
    for image, line in {
        "The capital of France is": "'The capital of France is' is no image: this model reads PNG and JPEG files",
        "data:image/png;base64,AAAA": "is no PNG or JPEG file, or a damaged one",
        whole[:-40]: "is no",
        whole.replace("image/png", "image/svg"): "is no image",
        prompt(noise(1, 9)[0]): "an image of 9 × 9 pixels, and the model reads 8 × 8: give images of that size",
    }.items():
        with pytest.raises(RejectedRequest, match=line) as error:
            head.encode([(image, "cat")])
        assert "\n" not in str(error.value)
    small, large = whole, prompt(noise(1, 9)[0])
    head.refuse_unfit([large, small])  # some of them can be asked
    with pytest.raises(UsageError, match="an image of 9 × 9 pixels, and the model reads 8 × 8"):
        head.refuse_unfit([large, large])
    with pytest.raises(
        RejectedRequest, match="target 'horse' is no label of this classifier, which has cat, dog, frog"
    ):
        head.encode([(whole, "horse")])
    with pytest.raises(UsageError, match="writes no texts"):
        shared("vit").sample([whole], [0], 10, 5)
    with pytest.raises(UsageError, match="MEMIT works on a causal language model, and tiny-vit is an image classifier"):
        MEMIT(MEMIT.Config(layers=[0]), shared("vit"))


def test_an_image_of_another_size_is_resized_where_the_processor_does_so():
    lm = classifier("resnet")
    lm.tokenizer.do_resize = True
    (large,) = noise(1, 64)
    small = lm.tokenizer([large], return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    with torch.no_grad():
        expected = lm.model(pixel_values=small).logits[0].log_softmax(-1)
    assert lm.loglikelihood([(prompt(large), "dog")])[0].nll == pytest.approx(-expected[1].item(), abs=1e-4)


def test_networks_read_the_labels_and_a_gray_copy():
    lm = shared("vit")
    dark, bright = (np.full((8, 8, 3), level, np.uint8) for level in (0, 255))
    ids, mask = lm.head.read("", [("cat", "ship", prompt(dark)), ("dog", "dog", prompt(bright))])
    assert ids.shape == mask.shape == (2, 2 + 8 * 8) and mask.all()
    assert ids[:, :2].tolist() == [[0, 3], [1, 1]]
    assert ids[0, 2:].unique().tolist() == [len(LABELS)] and ids[1, 2:].unique().tolist() == [len(LABELS) + 255]
    assert lm.head.words.shape[0] == len(LABELS) + 256


@pytest.mark.parametrize("model", ["tiny-vit", "tiny-resnet"])
def test_the_embedded_classifiers_tell_digits_apart(model):
    lm = ModelOptions(model, f"embedded:{model}", device="cpu").load()
    cases_of_digits = Digits("digits", others=1, shuffle_seed=0).load(100).cases
    right = [(case.requests[0].text, case.right[0]) for case in cases_of_digits]
    assert sum(score.hits[0] for score in lm.loglikelihood(right)) >= 95


def test_shifted_images_are_laid_out_as_images_usually_are():
    """One layout for all convolutions after them: with channels last, backward passes of torch's own overran memory."""
    module = torch.nn.Conv2d(2, 3, 3, padding=1)
    like = module(torch.randn(1, 2, 4, 4))
    returned = matrix_of(module).returned(matrix_of(module).leaving(like), like)
    assert returned.is_contiguous() and torch.equal(returned, like)
