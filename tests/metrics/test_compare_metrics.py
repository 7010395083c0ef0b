"""Evaluations side by side: the table, the first difference, wrong input."""

import copy
import itertools
import json
import logging
import re

import pytest
from conftest import refusal, succeed

from ddt.metrics.compare import is_evaluation, receipt_differences

SCRIPT = "scripts.compare_metrics"
METRICS = {
    "fid": 3.2,
    "sfid": 5.1,
    "inception_score": 68.0,
    "precision": 0.78,
    "recall": None,
    "reasons": {"recall": "the reference has no images"},
    "labels": {"fid": "FID-50K", "sfid": "sFID-50K"},
    "comparable": True,
    "not_comparable_because": [],
    "receipt": {
        "samples": {"path": "a.npz", "sha256": "a" * 64, "count": 50_000, "size": [256, 256], "channels": 3},
        "reference": {"path": "r.npz", "sha256": "b" * 64, "count": 10_000, "statistics": "mu, sigma of the file"},
        "features": {
            "name": "inception",
            "weights": {"path": "w.pth", "sha256": "c" * 64, "tensors_sha256": "d" * 64},
            "resize": "bilinear",
            "dtype": "float32",
            "pr_dtype": "float16",
        },
        "sampling": {
            "request": {
                "checkpoint": {"ema_sha256": "e" * 64, "step": 400_000, "autoencoder_sha256": "f" * 64},
                "guide": None,
                "sampler": {"solver": "euler", "num_steps": 250, "cfg_scale": 2.0, "cfg_interval": [0.3, 1.0]},
                "dtype": "bf16",
                "classes": "0-999",
                "seeds": "0-49",
            },
            "recompute_steps": None,
            "num_processes": 8,
            "batch_size": 64,
            "images_per_second": 11.0,
            "command": "sample.py",
            "device": "H100",
            "versions": {"torch": "2.11"},
            "date": "2026-01-01",
        },
        "versions": {"torch": "2.11"},
        "date": "2026-01-02",
    },
}
# every key that counts with another value, by decreasing effect on the numbers
CHANGES = {
    "features.name": "dinov2",
    "features.weights.tensors_sha256": "0" * 64,
    "features.resize": "bicubic",
    "features.dtype": "bfloat16",
    "reference.sha256": "1" * 64,
    "reference.statistics": "its images",
    "reference.count": 50_000,
    "samples.count": 5_000,
    "samples.size": [128, 128],
    "sampling.request.checkpoint.ema_sha256": "2" * 64,
    "sampling.request.checkpoint.step": 1,
    "sampling.request.guide": {"step": 2},
    "sampling.request.checkpoint.autoencoder_sha256": "3" * 64,
    "sampling.request.sampler.solver": "heun",
    "sampling.request.sampler.num_steps": 50,
    "sampling.request.sampler.cfg_scale": 1.5,
    "sampling.request.sampler.cfg_interval": None,
    "sampling.request.dtype": "fp32",
    "sampling.request.classes": "0-9",
    "sampling.request.seeds": "50-99",
    "features.pr_dtype": "float32",
    "samples.sha256": "4" * 64,
    "versions.torch": "2.12",
    "sampling.device": "H200",
}


def changed(**values):
    """The metrics with other values at dotted keys, in the receipt where their first part is."""
    metrics = copy.deepcopy(METRICS)
    for dotted, value in values.items():
        *parents, key = dotted.split(".")
        node = metrics["receipt"] if parents and parents[0] in metrics["receipt"] else metrics
        for parent in parents:
            node = node[parent]
        node[key] = value
    return metrics


def without(metrics, *keys):
    return {key: value for key, value in metrics.items() if key not in keys}


@pytest.fixture
def compared(tmp_path, caplog):
    """Write evaluations into folders a, b, …, compare them, and return the report."""

    def compare(*evaluations, arguments=()):
        for name, metrics in zip("abc", evaluations, strict=False):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "metrics.json").write_text(json.dumps(metrics))
        caplog.clear()
        with caplog.at_level(logging.INFO):
            folders = ",".join(str(tmp_path / name) for name, _ in zip("abc", evaluations, strict=False))
            succeed(SCRIPT, f"metrics=[{folders}]", *arguments)
        return caplog.messages[-1]

    return compare


def cells(text):
    """The table as lists of words, a line each, the ruler left out."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return [rows[0], *rows[2:]]


def lines_of(text, name):
    """The report's lines on an evaluation against the first."""
    return re.search(rf"^## {name} against a\n\n((?:- .*\n?)+)", text, re.M)[1].splitlines()


def test_table_has_known_rows_first_and_a_dash_for_what_is_missing(compared):
    other = {"new_metric": 2.0, "authenticity": 0.5, "precision": float("nan"), "fid": 3.3}
    assert cells(compared(without(METRICS, "labels"), other)) == [
        ["", "a", "b"],
        ["fid", "3.200", "3.300"],
        ["sfid", "5.100", "–"],
        ["inception_score", "68.000", "–"],
        ["precision", "0.7800", "–"],
        ["recall", "–", "–"],
        ["authenticity", "–", "0.5000"],
        ["new_metric", "–", "2.0000"],
    ]


def test_small_data_sets_compare_too(compared):
    digits = {"fd_digits": 1.5, "class_accuracy": None, "nearest_train_distance": 0.25}
    text = compared(digits, {**digits, "class_accuracy": 0.5})
    assert [row[0] for row in cells(text)] == ["", "fd_digits", "nearest_train_distance", "class_accuracy"]


def test_a_shared_label_stands_once_and_differing_ones_in_each_cell(compared):
    few = changed(**{"labels.fid": "FID-5K"})
    rows = cells(compared(METRICS, few, without(METRICS, "labels")))
    assert rows[1] == ["fid", "3.200 (FID-50K)", "3.200 (FID-5K)", "3.200 (no label)"]
    rows = cells(compared(METRICS, few))
    assert rows[2] == ["sfid (sFID-50K)", "5.100", "5.100"]


def test_published_numbers_are_last_with_measured_minus_published(compared):
    rows = cells(compared(METRICS, changed(fid=1.0), arguments=["published={fid:1.26,recall:0.65,authenticity:0.5}"]))
    assert rows[0] == ["", "a", "b", "published", "a − published", "b − published"]
    # a label beside the name would be taken for the published number's too
    assert rows[1] == ["fid", "3.200 (FID-50K)", "1.000 (FID-50K)", "1.260", "+1.940", "-0.260"]
    assert rows[5] == ["recall", "–", "–", "0.6500", "–", "–"]
    assert rows[6] == ["authenticity", "–", "–", "0.5000", "–", "–"]
    assert rows[2][3:] == ["–", "–", "–"]


def test_one_path_is_enough_with_published_numbers(tmp_path, caplog):
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS))
    with caplog.at_level(logging.INFO):
        succeed(SCRIPT, f"metrics={tmp_path}", "published={fid:1.26}")
    assert cells(caplog.messages[-1])[0] == ["", tmp_path.name, "published", f"{tmp_path.name} − published"]
    assert "give at least two" in refusal(SCRIPT, f"metrics={tmp_path}")


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/a/metrics.json", "runs/b/metrics.json"], ["a", "b"]),
        (["runs/a/samples/metrics.json", "runs/b/samples/metrics.json"], ["a", "b"]),
        (["runs/a/metrics.json", "runs/a/shared/metrics.json"], ["a", "a/shared"]),
        (["runs/a/few.json", "runs/a/many.json"], ["few.json", "many.json"]),
    ],
)
def test_columns_have_the_path_parts_that_tell_them_apart(tmp_path, caplog, paths, names):
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(json.dumps(METRICS))
    with caplog.at_level(logging.INFO):
        succeed(SCRIPT, f"metrics=[{','.join(str(tmp_path / path) for path in paths)}]")
    assert cells(caplog.messages[-1])[0] == ["", *names]


def test_the_weightier_of_two_differences_is_first():
    for weighty, light in itertools.pairwise(CHANGES.items()):
        alone = differences(METRICS, changed(**dict([weighty])))
        both = differences(METRICS, changed(**dict([light, weighty])))
        assert alone == both[:1], weighty
        assert both[0].startswith("b differs from a first in: ")
        assert both[1].startswith("then in: ")
        assert len(both) == 2


def test_a_difference_is_told_in_words_with_both_values(compared):
    lines = lines_of(compared(METRICS, changed(**CHANGES, fid=3.3)), "b")
    assert lines[0] == "- numbers: fid +0.1; equal: sfid, inception_score, precision"
    assert lines[1] == "- b differs from a first in: features: inception in a, dinov2 in b"
    assert "- then in: weights of the features: dddddddddddd… in a, 000000000000… in b" in lines
    assert "- then in: number of samples: 50,000 in a, 5,000 in b" in lines
    assert "- then in: guidance interval: [0.3, 1.0] in a, none in b" in lines
    assert "- then in: versions of the evaluation (torch): 2.11 in a, 2.12 in b" in lines
    assert len(lines) == 1 + len(CHANGES)


def test_each_is_held_against_the_first(compared):
    text = compared(METRICS, changed(**{"samples.count": 5}, fid=4.2), changed(**{"features.resize": "none"}, fid=2.2))
    assert lines_of(text, "c")[0].startswith("- numbers: fid -1;")
    assert lines_of(text, "c")[1:] == [
        "- c differs from a first in: resizing before the features: bilinear in a, none in c"
    ]
    assert lines_of(text, "b")[1:] == ["- b differs from a first in: number of samples: 50,000 in a, 5 in b"]


def test_paths_dates_speeds_and_batch_sizes_are_no_reasons(compared):
    other = changed(
        **{
            "samples.path": "b.npz",
            "features.weights.path": "v.pth",
            "features.weights.sha256": "9" * 64,  # the same tensors, written anew
            "sampling.num_processes": 1,
            "sampling.batch_size": 1,
            "sampling.images_per_second": 2.0,
            "sampling.command": "other",
            "sampling.date": "2027-01-01",
            "sampling.network_calls_an_image": {"encoder": 250},
            "reference.made": {"batch_size": 8, "command": "b", "date": "2027-01-01", "path": "b"},
        }
    )
    other["receipt"]["date"] = "2027-01-01"
    one = changed(**{"reference.made": {"batch_size": 64}, "sampling.network_calls_an_image": {"encoder": 500}})
    lines = lines_of(compared(one, other), "b")
    assert lines[0] == "- all numbers that both have are equal"
    assert lines[1].startswith("- receipts are equal")
    assert len(lines) == 2


def differences(first, other):
    return receipt_differences(("a", "b"), first, other)


def test_differences_of_hashes_batch_sizes_and_long_values():
    other = changed(**{"features.weights.sha256": "9" * 64})
    del other["receipt"]["features"]["weights"]["tensors_sha256"]  # so that the file's hash decides
    assert differences(METRICS, other)[:1] == [
        "b differs from a first in: weights of the features (sha256): cccccccccccc… in a, 999999999999… in b"
    ]
    one, two = (changed(**{"features.batch_size": size}) for size in (64, 128))  # of a classifier's training
    assert "features (batch_size): 64 in a, 128 in b" in differences(one, two)[0]
    seeds = ",".join(str(2 * k) for k in range(500))
    one, two = (changed(**{"sampling.request.seeds": f"{seeds},{end}"}) for end in (7000, 8000))
    assert re.search(r"seeds: ….{20}7000 in a, ….{20}8000 in b", differences(one, two)[0])


def test_what_is_not_recorded_is_not_called_a_difference():
    older = changed()
    del older["receipt"]["features"]["dtype"], older["receipt"]["sampling"]
    lines = differences(older, METRICS)
    assert lines[0] == "what both receipts record is equal"
    assert lines[1].endswith("alone, which may differ too: arithmetic of the features, sampling")
    bare = without(METRICS, "receipt")
    assert differences(bare, METRICS) == ["no receipt in a: differences of the two are not known"]
    assert "no receipt in a and b" in differences(bare, bare)[0]


def test_obstacles_are_listed_by_file(compared):
    text = compared(METRICS, changed(comparable=False, not_comparable_because=["too few", "too small"]))
    assert text.endswith("## Not comparable with published numbers\n\n- b: too few\n- b: too small")
    assert "- b: its metrics.json gives no reason" in compared(METRICS, changed(comparable=False))
    assert "Not comparable" not in compared(METRICS, METRICS)


def test_out_gets_the_same_and_nothing_else_is_written_over(compared, tmp_path):
    out = tmp_path / "new" / "table.md"
    for _ in range(2):
        text = compared(METRICS, METRICS, arguments=[f"out={out}"])
        assert out.read_text(encoding="utf-8") == f"{text}\n"
    out.write_text("mine")
    arguments = [f"metrics=[{tmp_path / 'a'},{tmp_path / 'b'}]", f"out={out}"]
    assert "exists and says something else" in refusal(SCRIPT, *arguments)
    assert out.read_text() == "mine"


def test_wrong_input_is_one_line_that_names_the_key(tmp_path):
    good, other = tmp_path / "good.json", tmp_path / "other.json"
    for path in (good, other):
        path.write_text(json.dumps(METRICS))
    (tmp_path / "empty").mkdir()
    cases = {
        (f"metrics=[{good}]",): "give at least two",
        ("metrics=[]", "published={fid:1}"): "give at least two",
        (f"metrics=[{good},{tmp_path}/none.json]",): r"none\.json: no such file; .* in quotes: 'metrics=\[\"a,b",
        (f"metrics=[{good},{tmp_path}/empty]",): "empty: the folder has no metrics.json",
        (f"metrics=[{good},{tmp_path}/empty/../good.json]",): "names the same file twice",
        (f"metrics=[{good},{other}]", "published={fit:1}"): r"published\.fit: no such metric; did you mean fid\?",
        (f"metrics=[{good},{other}]", "published={fid:low}"): r"published\.fid=low: is not a number",
        (f"metrics=[{good},{other}]", "published={fid:true}"): r"published\.fid=True: is not a number",
        (f"metrics=[{good},{other}]", "published={fid:null}"): r"published\.fid=None: is not a number",
        (f"metrics=[{good},{other}]", "published={}"): "published={}: name a number",
        (f"metrics=[{good},{other}]", f"out={tmp_path}/table.txt"): r"table\.txt: give a \.md file",
        (f"metrics=[{good},{other}]", "outs=x.md"): "outs: no such setting; did you mean out",
        (): "metrics: not set",
    }
    for name, content, message in (("cut", "{", "damaged or no JSON"), ("list", "[]", "holds no settings")):
        (tmp_path / f"{name}.json").write_text(content)
        cases[f"metrics=[{good},{tmp_path}/{name}.json]",] = rf"{name}\.json: {message}"
    for arguments, message in cases.items():
        lines = refusal(SCRIPT, *arguments)
        assert re.search(message, lines), lines
        assert "\n" not in lines
    assert not list(tmp_path.glob("*.txt"))


def test_other_json_is_no_evaluation():
    assert is_evaluation(METRICS)
    assert is_evaluation({"fd_digits": None, "labels": None})
    receipt = {"samples": 50, "images_per_second": 2.0}
    for content in (3, {}, receipt, {"fid": "3"}, {"fid": True}, {"fid": 3, "labels": [1]}, {"fid": 3, "receipt": "x"}):
        assert not is_evaluation(content)


def test_paths_with_a_comma_go_in_quotes(tmp_path, caplog):
    for name in ("a, b", "c d"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps(METRICS))
    with caplog.at_level(logging.INFO):
        succeed(SCRIPT, f'metrics=["{tmp_path}/a, b",{tmp_path}/c d]')
    assert cells(caplog.messages[-1])[0] == ["", "a, b", "c d"]
