"""Images of a set: classes, seeds, ranges, noise."""

import pytest
import torch

from ddt.class_names import imagenet_synsets
from ddt.draws import noise_of
from ddt.errors import UserError
from ddt.generation.image_set import image_set, read_numbers, write_numbers


def test_num_samples_interleaves_the_classes():
    images = image_set(num_classes=10, num_samples=7, classes=[3, 1, 4])
    assert images.classes == [3, 1, 4, 3, 1, 4, 3]
    assert images.seeds == list(range(7))
    assert len(set(image_set(10, num_samples=50, seed=1).seeds) & set(image_set(10, num_samples=50).seeds)) == 0


def test_fifty_thousand_are_fifty_of_each_class_in_no_groups():
    images = image_set(1000, num_samples=50_000)
    assert [images.classes.count(k) for k in (0, 500, 999)] == [50, 50, 50]
    assert images.classes[:1000] == list(range(1000))
    assert len(set(images.seeds)) == 50_000


def test_every_seed_with_every_class():
    images = image_set(num_classes=3, seeds=[5, 9])
    pairs = [(0, 5), (1, 5), (2, 5), (0, 9), (1, 9), (2, 9)]
    assert list(zip(images.classes, images.seeds, strict=True)) == pairs
    assert image_set(3, num_samples=6, seeds=[5, 9]) == images
    assert image_set(3, seeds=5, classes=2).classes == [2]
    assert image_set(3).seeds == sorted(list(range(8)) * 3)


def test_random_classes_are_a_function_of_the_seed():
    images = image_set(1000, num_samples=200, classes="random")
    assert len(set(images.classes)) > 150
    assert image_set(1000, seeds="50-99", classes="random").classes == images.classes[50:100]


@pytest.mark.parametrize(
    ("value", "numbers"),
    [
        (7, [7]),
        ("0-4", [0, 1, 2, 3, 4]),
        ("1, 5, 9-11", [1, 5, 9, 10, 11]),
        ([3, 1], [3, 1]),
        (["0-2", 8], [0, 1, 2, 8]),
        ("4-4", [4]),
    ],
)
def test_numbers_are_lists_or_ranges(value, numbers):
    assert read_numbers("seeds", value) == numbers
    assert read_numbers("seeds", write_numbers(numbers)) == numbers
    assert write_numbers([*range(50_000)]) == "0-49999"
    assert write_numbers([3, 4, 5, 9, 1]) == "3-5,9,1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": "1-10"}, r"classes=\[10\]: the model has classes 0\.\.9"),
        ({"classes": []}, r"classes=\[\]: name at least one"),
        ({"classes": [1, 2, 1]}, r"classes=\[1,2,1\]: names a number twice"),
        ({"classes": "cat"}, "classes=cat: cat is no class and no whole number"),
        ({"seeds": [-1]}, r"seeds=\[-1\]: a seed must lie in 0"),
        ({"seeds": [2**32]}, r"seeds=\[4294967296\]"),
        ({"seeds": [3, "1-4"]}, r"seeds=\[3,1-4\]: names a number twice"),
        ({"seeds": "9-5"}, "seeds=9-5: 9-5 runs backwards"),
        ({"seeds": "0-99999999"}, "is longer than 1000000 numbers"),
        ({"seeds": ["1.5"]}, "1.5 is no whole number"),
        ({"seeds": "1,,2"}, "is no whole number"),
        ({"seed": 3}, "seed=3: numbers the images of num_samples= alone"),
        ({"num_samples": 7, "seeds": [1]}, r"num_samples=7: disagrees with seeds= and classes=, which make 10 images"),
        ({"num_samples": 7, "seeds": "0-3", "classes": "random"}, "num_samples=7: disagrees .* make 4 images"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"num_samples": 4, "seed": 5000}, "seed=5000: must lie in 0..4292"),
    ],
)
def test_impossible_sets_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        image_set(10, **arguments)


def test_noise_of_an_image_is_its_own_generator():
    expected = torch.randn((2, 4, 4), generator=torch.Generator().manual_seed(11))
    assert torch.equal(noise_of([3, 11], (2, 4, 4))[1], expected)


NAMES = ["cat", "dog", "0-9", "a, b", "10", "4", "twin", "twin"]


@pytest.mark.parametrize(
    ("value", "classes"),
    [("dog", [1]), (["dog", 0], [1, 0]), ("cat, dog", [0, 1]), (["a, b", "cat"], [3, 0]), ("0-2", [0, 1, 2])],
)
def test_classes_are_names_or_numbers(value, classes):
    assert image_set(len(NAMES), 5, classes=value, class_names=NAMES).classes[: len(classes)] == classes


def test_classes_of_imagenet_are_named_in_english_or_by_a_unique_beginning(caplog):
    def chosen(*names):
        return image_set(1000, 1, classes=list(names), class_names=imagenet_synsets()).classes[0]

    for name in ("golden retriever", "Golden Retriever", "n02099601"):
        assert chosen(name) == 207
    assert chosen("Tinca tinca") == 0  # the second name of the tench
    assert not caplog.messages
    with caplog.at_level("INFO"):
        assert chosen("golden ret") == 207
    assert caplog.messages == ["classes=[golden ret]: golden ret is class 207 (golden retriever)"]
    for name, message in (
        ("crane", r"crane is the name of 2 classes, 134 \(crane\), 517 \(crane\)"),
        ("goldf", r"goldf is the name of 2 classes, 1 \(goldfish\), 11 \(goldfinch\); give more of it"),
        ("goldem retriever", r"no class and no whole number; did you mean golden retriever\?"),
    ):
        with pytest.raises(UserError, match=message):
            chosen(name)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("dgo", r"classes=dgo: dgo is no class and no whole number; did you mean dog\?"),
        (
            ["cat", "rhinoceros"],
            r"classes=\[cat,rhinoceros\]: rhinoceros is no class and no whole number; choose from ",
        ),
        ("twin", r"classes=twin: twin is the name of 2 classes, 6 \(twin\), 7 \(twin\); give more of it, or a number"),
        (["cat", 0], "names a number twice"),
        (10, r"classes=\[10\]: the model has classes 0\.\.7 \(they are counted from 0, whatever their names\)"),
    ],
)
def test_a_class_that_cannot_be_is_named(value, message):
    with pytest.raises(UserError, match=message):
        image_set(len(NAMES), 5, classes=value, class_names=NAMES)


def test_a_number_is_never_the_name_of_another_class(caplog):
    assert image_set(len(NAMES), 1, classes=[4], class_names=NAMES).classes == [4]
    assert "4 is the class named 10; the one named 4 is 5" in caplog.text
    caplog.clear()
    image_set(3, 1, classes=[1], class_names=["0", "1", "2"])
    assert not caplog.text


def test_a_thousand_names_are_not_all_told():
    with pytest.raises(UserError) as error:
        image_set(1000, 1, classes="cat", class_names=[f"n{k:08d}" for k in range(1000)])
    assert "(1000 in all)" in str(error.value)
    assert len(str(error.value)) < 1000
