"""Images as records: scikit-learn's digits, CIFAR-10's binary batches, folders and lists of the user's; what is wrong
with them is told in a line each.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from pictures import classifier, noise

from edit_cli.datasets.cifar10 import RECORD, Cifar10
from edit_cli.datasets.digits import LABELS, Digits
from edit_cli.datasets.images import ImageFiles
from edit_cli.errors import MissingError, UsageError
from edit_cli.lm.pictures import packed, pixels_of
from edit_cli.monitor import Monitor


def test_digits_are_those_of_scikit_learn_in_splits_that_share_none():
    from sklearn.datasets import load_digits

    digits = load_digits()
    seen: set[str] = set()
    for split, share in {"train": 0.6, "validation": 0.2, "test": 0.2}.items():
        cases = Digits("digits", split=split, others=2).load().cases
        assert len(cases) / len(digits.target) == pytest.approx(share, abs=0.01)
        assert not seen & {case.id for case in cases}
        seen |= {case.id for case in cases}
        counts = [sum(case.right == (label,) for case in cases) for label in LABELS]
        assert min(counts) > 0.7 * max(counts)
        for case in cases[:20]:
            (request,), number = case.requests, int(case.id.removeprefix("digit-"))
            pixels = pixels_of(request.text, 1)[..., 0]
            assert np.array_equal(pixels, np.rint(digits.images[number] * 255 / 16))
            assert request.prompt == case.id and request.target_true == LABELS[digits.target[number]]
            assert request.target_new in LABELS and request.target_new != request.target_true
            rewrite, *others = case.probes
            assert (rewrite.kind, rewrite.text, rewrite.target) == ("rewrite", request.text, request.target_new)
            assert len({probe.text for probe in others} - {request.text}) == 2
            for probe in others:
                assert probe.target == LABELS[digits.target[int(probe.prompt.removeprefix("digit-"))]]
    assert len(seen) == len(digits.target)


def test_what_is_drawn_depends_on_the_seed_alone():
    first, again, other = (Digits("digits", seed=seed, others=5).load(30).cases for seed in (0, 0, 1))
    assert first == again
    assert [case.requests[0].target_new for case in first] != [case.requests[0].target_new for case in other]
    (case,) = Digits("digits", others=0, ids=[first[3].id]).load().cases
    everything = Digits("digits", others=0).load(1)
    assert len(everything.cases[0].probes) == everything.total  # itself edited, and all but itself kept
    assert case.requests == first[3].requests
    drawn = [case.requests[0] for case in Digits("digits", new_label="any", others=1).load(200).cases]
    assert 0 < sum(request.target_true is None for request in drawn) < 60


def batch(*records: tuple[int, np.ndarray]) -> bytes:
    """Records as CIFAR-10 has them: the label, then each color's plane."""
    return b"".join(bytes([label]) + pixels.transpose(2, 0, 1).tobytes() for label, pixels in records)


def test_cifar_is_read_from_its_binary_batches(tmp_path):
    images = noise(5, 32)
    (tmp_path / "test_batch.bin").write_bytes(batch((3, images[0]), (0, images[1]), (12, images[2])))
    (tmp_path / "data_batch_1.bin").write_bytes(batch((9, images[3]), (5, images[4])))
    told: list[str] = []
    monitor: Any = Monitor()
    monitor.note = told.append
    found = Cifar10("cifar10", path=str(tmp_path)).load(monitor=monitor)
    assert [case.right for case in found.cases] == [("cat",), ("airplane",)]
    for case, pixels in zip(found.cases, images, strict=False):
        assert np.array_equal(pixels_of(case.requests[0].text, 3), pixels)
    assert any("test_batch.bin, record 2 (id test_batch-2): label is above 9" in note for note in told)
    train = Cifar10("cifar10", path=str(tmp_path), split="train").load()
    assert [case.right for case in train.cases] == [("truck",), ("dog",)]


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({}, "holds no CIFAR-10 batches: give the folder cifar-10-batches-bin"),
        ({"data_batch_1": b"\x80"}, "holds no CIFAR-10 batches but pickles, which are not read"),
        ({"test_batch.bin": bytes(RECORD - 1)}, "test_batch.bin is damaged: 3,072 bytes are no whole records of 3,073"),
        ({"test_batch.bin": b""}, "test_batch.bin is damaged: 0 bytes"),
        ({"test_batch.bin": bytes(2 * RECORD)}, "all images have the same label"),
    ],
)
def test_other_folders_are_no_cifar(files, line, tmp_path):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(MissingError, match=line) as error:
        Cifar10("cifar10", path=str(tmp_path)).load()
    assert "\n" not in str(error.value)


def test_cifar_needs_a_folder(tmp_path):
    with pytest.raises(UsageError, match="dataset=cifar10 needs dataset.path"):
        Cifar10("cifar10").load()
    with pytest.raises(MissingError, match="is no folder"):
        Cifar10("cifar10", path=str(tmp_path / "absent")).load()


def folder(place, splits=("",)):
    for split in splits:
        for label in ("cat", "dog"):
            (place / split / label).mkdir(parents=True)
            for number, pixels in enumerate(noise(2, 8)):
                (place / split / label / f"{number}.png").write_bytes(packed(pixels))
    return place


def test_a_folder_of_labels_is_a_data_set(tmp_path):
    found = ImageFiles("images", path=str(folder(tmp_path))).load()
    assert [case.id for case in found.cases] == ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"]
    assert [case.requests[0].target_new for case in found.cases] == ["dog", "dog", "cat", "cat"]
    assert found.labels == ("cat", "dog") and found.prompts == "images"
    assert np.array_equal(pixels_of(found.cases[0].requests[0].text, 3), noise(1, 8)[0])


def test_a_folder_may_have_splits(tmp_path):
    place = folder(tmp_path, ("train", "test"))
    assert [len(ImageFiles("images", path=str(place), split=name).load().cases) for name in ("train", "test")] == [4, 4]
    with pytest.raises(UsageError, match="dataset.split=validation: .* has test, train"):
        ImageFiles("images", path=str(place), split="validation").load()
    (place / "loose.png").write_bytes(packed(noise(1, 8)[0]))
    with pytest.raises(MissingError, match="has loose.png: images lie in .*/LABEL/"):
        ImageFiles("images", path=str(place)).load()
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingError, match="is a folder without images"):
        ImageFiles("images", path=str(tmp_path / "empty")).load()


def test_malformed_records_of_a_list_are_named_by_line_and_field(tmp_path):
    folder(tmp_path)
    (tmp_path / "dog" / "broken.png").write_bytes(packed(noise(1, 8)[0])[:60])
    (tmp_path / "dog" / "text.png").write_text("no image")
    good = {"image": "cat/0.png", "label": "cat", "target_new": "ship", "id": "a"}
    bad = {
        2: ({"label": "cat"}, "image is missing"),
        3: ({"image": 7, "label": "cat"}, "image is not text"),
        4: ({"image": "cat/9.png", "label": "cat"}, "image cannot be read, or is no file"),
        5: ({"image": "dog/broken.png", "label": "dog"}, "image is no PNG or JPEG file, or a damaged one"),
        6: ({"image": "dog/text.png", "label": "dog"}, "image is no PNG or JPEG file, or a damaged one"),
        7: ({"image": "../cat/0.png", "label": "cat"}, "image is no file inside the list's folder"),
        8: ({"image": "/etc/hostname", "label": "cat"}, "image is no file inside the list's folder"),
        9: ({"image": "dog/0.png"}, "label is missing"),
        10: ({"image": "dog/0.png", "label": " "}, "label is empty"),
        11: ({"image": "dog/0.png", "label": "dog", "target_new": "Dog"}, "target_new is the label already"),
        12: ({"image": "dog/0.png", "label": "dog", "id": "a"}, "id occurs twice"),
        13: (["dog/0.png", "dog"], "is a list, not an object with named fields"),
    }
    path = tmp_path / "list.jsonl"
    lines = [good, *(row for row, _ in bad.values()), {"image": "dog/1.png", "label": "dog"}]
    path.write_text("\n".join(map(json.dumps, lines)))
    told: list[str] = []
    monitor: Any = Monitor()
    monitor.note = told.append
    found = ImageFiles("images", path=str(path)).load(monitor=monitor)
    assert [case.requests[0].target_new in ("ship", "cat") for case in found.cases] == [True, True]
    assert found.cases[0].requests[0].target_new == "ship"
    for number, (_, reason) in bad.items():
        assert sum(f"line {number}" in note and reason in note for note in told) == 1, (number, told)


def test_images_and_texts_are_told_apart_and_labels_must_be_known(tmp_path):
    digits, lm = Digits("digits", others=1).load(2), classifier("vit")
    with pytest.raises(UsageError, match="dataset=digits holds images, and bert reads texts: choose another"):
        digits.refuse_unfit(["zero"], "bert")
    with pytest.raises(UsageError, match=r"asks for a label \(eight, five.* has others: cat, dog.*\(not eight\)"):
        digits.refuse_unfit(lm.head.labels, lm.name, lm.head.READS)
    digits.refuse_unfit(LABELS, "tiny-vit", "images")
    place = folder(tmp_path)
    ImageFiles("images", path=str(place)).load().refuse_unfit(lm.head.labels, lm.name, lm.head.READS)
