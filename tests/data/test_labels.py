"""Classes from files: the order of classes, labels of images, and what does not fit them."""

import json

import pytest
from conftest import picture, picture_folder, refusal, rows, succeed

from ddt.data.images import ImageFolder
from ddt.data.labels import FolderPlace
from ddt.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """Six pictures, flat and nested."""
    root = tmp_path / "imgs"
    (root / "deep").mkdir(parents=True)
    for k in range(6):
        picture(k).save(root / ("deep" if k % 2 else ".") / f"{k}.png")
    return root


NAMES = ["0.png", "2.png", "4.png", "deep/1.png", "deep/3.png", "deep/5.png"]
NUMBERS = [0, 2, 0, 1, 2, 2]


def written(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def labelled(root, labels=None, class_names=None):
    return FolderPlace(str(root), labels, class_names).list()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("dataset.json", {"labels": [list(pair) for pair in zip(NAMES, NUMBERS, strict=True)]}),
        ("labels.json", dict(zip(NAMES, NUMBERS, strict=True))),
        ("labels.csv", "path,label\n" + "".join(f"{n},{k}\n" for n, k in zip(NAMES, NUMBERS, strict=True))),
        ("bare.csv", "".join(f"./{n}, {k}\n" for n, k in zip(reversed(NAMES), reversed(NUMBERS), strict=True))),
    ],
)
def test_numbers_are_labels(folder, tmp_path, name, content):
    path = written(tmp_path / name, content)
    listed = labelled(folder, path)
    assert (listed.names, listed.labels.tolist(), listed.class_names) == (NAMES, NUMBERS, ["0", "1", "2"])
    names = written(tmp_path / "names.txt", "cat\ndog\n\u00e4ffle\nbird\n")
    listed = labelled(folder, path, names)
    assert (listed.labels.tolist(), listed.class_names) == (NUMBERS, ["cat", "dog", "äffle", "bird"])


def test_names_are_classes_in_natural_order_or_in_that_of_the_file(folder, tmp_path):
    classes = ["c10", "c2", "c10", "c2", "c1", "c1"]
    path = written(tmp_path / "labels.json", dict(zip(NAMES, classes, strict=True)))
    listed = labelled(folder, path)
    assert (listed.class_names, listed.labels.tolist()) == (["c1", "c2", "c10"], [2, 1, 2, 1, 0, 0])
    listed = labelled(folder, path, written(tmp_path / "names.txt", "c10\nother\nc2\nc1\n"))
    assert (listed.class_names, listed.labels.tolist()) == (["c10", "other", "c2", "c1"], [0, 2, 0, 2, 3, 3])


def test_a_list_of_classes_orders_sub_folders_and_is_part_of_the_fingerprint(tmp_path):
    root = picture_folder(tmp_path / "imgs", count=2, classes=3)
    names = written(tmp_path / "names.txt", "class2\nabsent\nclass0\nclass1\n")
    listed = labelled(root, class_names=names)
    assert (listed.class_names[1], listed.labels.tolist()) == ("absent", [2, 2, 3, 3, 0, 0])
    plain, ordered = (ImageFolder(str(root), 8, class_names=given, holdout_every=0) for given in (None, names))
    assert plain.names == ordered.names
    assert plain.fingerprint != ordered.fingerprint
    assert "1 of 4 classes have no images: absent" in ordered.hints
    assert not any("held out" in hint for hint in ordered.hints)


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ({"x.png": 0}, None, r"data.labels=.*: names x.png, which data.root=.* does not hold"),
        (dict.fromkeys(NAMES[1:], 0), None, r"data.labels=.*: gives no class to 0.png in data.root="),
        (dict.fromkeys(NAMES, 2), "a\nb\n", r"data.labels=.*: labels out of 0..1, .*names.txt: 0.png \(2\), .* 3 more"),
        (dict.fromkeys(NAMES, -1), None, r"data.labels=.*: labels out of 0"),
        (dict.fromkeys(NAMES, "c"), "a\nb\n", r"data.labels=.*: the classes c are not in data.class_names="),
        (dict.fromkeys(NAMES, 1.5), None, r"data.labels=.*: 0.png has the class 1.5; give a name or a number"),
        (dict.fromkeys(NAMES[1:], 0) | {"0.png": "a"}, None, r"data.labels=.*: holds names and numbers"),
        ({"labels": [["0.png", 0], ["0.png", 1]]}, None, r"data.labels=.*: gives 0.png two classes"),
        ({"labels": [["0.png"]]}, None, r"data.labels=.*: entry 1 is no pair"),
        ({"labels": None}, None, r"data.labels=.*: holds no labels"),
        ("{", None, r"data.labels=.*: damaged or no JSON"),
        ("5", None, r"data.labels=.*: holds no labels"),
        ('{"0.png": "cat", "0.png": "dog"}', None, r"data.labels=.*: gives 0.png two classes"),
        (dict.fromkeys(NAMES, " "), None, r"data.labels=.*: 0.png has the class ''"),
        (dict.fromkeys(NAMES, 999_999_999), None, r"data.labels=.*: has the label 999999999; labels count from 0"),
        (dict.fromkeys(NAMES, 0), "a\n\nb\n", r"data.class_names=.*: line 2 is empty"),
        (dict.fromkeys(NAMES, 0), "a\na\n", r"data.class_names=.*: names a twice"),
        (dict.fromkeys(NAMES, 0), "", r"data.class_names=.*: is empty"),
    ],
)
def test_files_that_do_not_fit_are_one_line(folder, tmp_path, labels, names, message):
    path = written(tmp_path / "labels.json", labels)
    names = None if names is None else written(tmp_path / "names.txt", names)
    with pytest.raises(UserError, match=rf"^{message}") as error:
        labelled(folder, path, names)
    assert "\n" not in str(error.value)


def test_a_csv_is_read_without_the_blanks_around_its_names(folder, tmp_path):
    lines = [f"{name},{'cat ' if k % 2 else ' cat'}" for k, name in enumerate(NAMES)]
    assert labelled(folder, written(tmp_path / "labels.csv", "\n".join(lines))).class_names == ["cat"]
    for content, message in (("a.png," + "x" * 200_000, "damaged or no CSV"), ("0.png,", "has the class ''")):
        with pytest.raises(UserError, match=message):
            labelled(folder, written(tmp_path / "labels.csv", content))


def test_a_class_of_the_folder_that_the_list_lacks_is_named(tmp_path):
    root = picture_folder(tmp_path / "imgs", count=2)
    with pytest.raises(UserError, match=r"data.class_names=.*: lacks the sub-folders class1;"):
        labelled(root, class_names=written(tmp_path / "names.txt", "class0\n"))
    with pytest.raises(UserError, match=r"data.class_names=nowhere: no such file"):
        labelled(root, class_names="nowhere")


def test_training_takes_them_and_another_order_is_another_training(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path / "labels.json", dict(zip(NAMES, NUMBERS, strict=True)))
    small = ["model.hidden_size=32", "model.depth=3", "model.encoder_depth=2", "data=folder", "data.root=imgs",
             "data.image_size=8", "data.holdout_every=0", "name=x", "trainer.global_batch_size=4",
             "trainer.max_steps=2", "trainer.preview_every=0"]  # fmt: skip
    succeed("train", *small, f"data.labels={path}")
    assert rows(tmp_path / "runs" / "x")
    moved = written(tmp_path / "moved.json", dict(zip(NAMES, NUMBERS, strict=True)))
    succeed("train", *small, f"data.labels={moved}")  # the same labels in another file: complete
    other = written(tmp_path / "other.json", dict(zip(NAMES, NUMBERS[::-1], strict=True)))
    assert "the list of images changed" in refusal("train", *small, f"data.labels={other}")
