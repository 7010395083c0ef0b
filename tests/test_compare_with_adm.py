"""The comparison with ADM's evaluator: what it runs, reads, prints and refuses; a stand-in replaces the evaluator."""

import logging
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import refusal, succeed

from ddt.errors import UserError
from ddt.metrics.reference import read_reference
from scripts import compare_with_adm

SCRIPT = "scripts.compare_with_adm"
PRINTS = {"Inception Score": "2.5", "FID": "7.0", "sFID": "9.25e+00", "Precision": "0.75", "Recall": "0.5"}
OURS = {"inception_score": 2.5, "fid": 7.0, "sfid": 9.25, "precision": 0.75, "recall": 0.5}
TOLERANCES = {"distance_tolerance": 0.002, "score_tolerance": 0.001, "share_tolerance": 0.0003, "share_images": 2}
STAND_IN = """
import pathlib, sys
reference, samples = map(pathlib.Path, sys.argv[1:])
assert pathlib.Path("classify_image_graph_def.pb").read_text() == "graph"
assert (reference.name, samples.name) == ("reference.npz", "samples.npz") and reference.is_absolute()
print("warming up TensorFlow...")
"""


@pytest.fixture
def case(tmp_path, monkeypatch):
    """Return a function that writes an evaluator with these numbers and returns the arguments of a comparison with it,
    whose other side measures `ours`.
    """
    monkeypatch.chdir(tmp_path)  # paths that are not absolute must reach the evaluator too
    images = np.zeros((8, 4, 4, 3), dtype=np.uint8)
    np.savez("samples.npz", arr_0=images, arr_1=np.zeros(8, dtype=np.int64))
    np.savez("reference.npz", arr_0=images[:4])
    (tmp_path / "graph.pb").write_text("graph")

    def make(prints=PRINTS, ours=OURS, body=""):
        said = [f'print("{label}:", "{value}")' for label, value in prints.items()]
        (tmp_path / "evaluator.py").write_text("\n".join([STAND_IN, body, *said]))
        monkeypatch.setattr(compare_with_adm, "evaluate", lambda *_: dict(ours))
        return {
            "evaluator": "evaluator.py",
            "python": sys.executable,
            "graph": "graph.pb",
            "samples": "samples.npz",
            "reference": "reference.npz",
        }

    def load(reference, node, settings, device):
        assert (settings.name, settings.weights, device) == ("inception", "graph.pb", torch.device("cpu"))
        return read_reference(tmp_path / reference, {"fid": 2, "sfid": 1}, "inception"), SimpleNamespace()

    monkeypatch.setattr(compare_with_adm, "load_reference", load)
    return make


def arguments(given):
    return [f"{key}={value}" for key, value in given.items()]


def test_agreement_is_a_table_and_status_0(case, caplog):
    ours = {**OURS, "fid": 7.0015, "precision": 0.5}  # 2 of 8 samples
    with caplog.at_level(logging.INFO):
        succeed(SCRIPT, *arguments(case(ours=ours)))
    assert "is not the evaluator.py of guided-diffusion" in caplog.text
    table = {line.split()[0]: line.split()[1:] for line in caplog.messages if "e-" in line or "e+" in line}
    assert table == {
        "inception_score": ["2.500000", "2.500000", "+0.0e+00", "2.5e-03"],
        "fid": ["7.000000", "7.001500", "+1.5e-03", "2.0e-03"],
        "sfid": ["9.250000", "9.250000", "+0.0e+00", "2.0e-03"],
        "precision": ["0.750000", "0.500000", "-2.5e-01", "2.5e-01"],
        "recall": ["0.500000", "0.500000", "+0.0e+00", "5.0e-01"],  # of 4 reference images
    }
    assert caplog.messages[-1] == "all five agree"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"fid": 7.003}, "fid"),
        ({"sfid": 9.24}, "sfid"),
        ({"inception_score": 2.503}, "inception_score"),
        ({"precision": 0.375, "recall": 1.1}, "precision, recall"),
        ({"inception_score": None, "fid": float("nan")}, "inception_score, fid"),
    ],
)
def test_a_number_too_far_off_is_named_and_ends_with_status_1(case, caplog, changed, said):
    with caplog.at_level(logging.INFO):
        assert refusal(SCRIPT, *arguments(case(ours=OURS | changed))) == f"differ by more than expected: {said}"
    marked = [line.split()[0] for line in caplog.messages if line.endswith("too far apart")]
    assert ", ".join(sorted(marked)) == ", ".join(sorted(said.split(", ")))


def test_tolerances_can_be_chosen(case):
    given = case(ours={**OURS, "fid": 7.01, "inception_score": 2.6, "recall": 0.7})
    wide = {"distance_tolerance": 0.02, "score_tolerance": 0.1, "share_tolerance": 0.3, "share_images": 0}
    compare_with_adm.compare_with_adm(**given | wide)
    with pytest.raises(UserError, match=r"expected: recall$"):
        compare_with_adm.compare_with_adm(**given | wide | {"share_tolerance": 0.1})


def test_no_score_on_both_sides_agrees(case):
    given = case(PRINTS | {"Inception Score": "nan"}, {**OURS, "inception_score": None})
    compare_with_adm.compare_with_adm(**given | TOLERANCES)


def test_wrong_input_is_one_line_that_names_the_key(case, tmp_path):
    given = case()
    np.savez("three.npz", arr_0=np.zeros((3, 4, 4, 3), dtype=np.uint8))
    np.savez("numbers.npz", mu=np.zeros(2), sigma=np.eye(2))
    np.savez("half.npz", arr_0=np.zeros((4, 4, 4, 3), dtype=np.uint8), mu=np.zeros(2), sigma=np.eye(2))
    (tmp_path / "weights.pth").write_text("")
    cases = {
        "evaluator=none.py": r"none\.py: no such file",
        "python=no-such-python": "no such program",
        "graph=none.pb": r"none\.pb: no such \.pb file",
        "graph=weights.pth": r"weights\.pth: no such \.pb file",
        "samples=none.npz": r"none\.npz: no such file",
        "reference=three.npz": "holds 3 images; give more than 3",
        "reference=numbers.npz": "arr_0 must be uint8 images",
        "reference=half.npz": "has mu, but not mu_s",
    }
    for argument, message in cases.items():
        key, value = argument.split("=")
        with pytest.raises(UserError, match=message) as error:
            compare_with_adm.compare_with_adm(**given | TOLERANCES | {key: value})
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="a tolerance is below 0"):
        compare_with_adm.compare_with_adm(**given | TOLERANCES | {"share_images": -1})
    assert "evaluator: not set" in refusal(SCRIPT)


def test_an_evaluator_that_fails_or_says_something_else_is_named(case):
    assert refusal(SCRIPT, *arguments(case(body="sys.exit(3)"))).startswith(
        "evaluator=evaluator.py: ended with status 3"
    )
    fewer = {label: value for label, value in PRINTS.items() if label != "sFID"} | {"Recall": "(0.5, 0.5)"}
    assert "printed no sFID, Recall; give" in refusal(SCRIPT, *arguments(case(fewer)))
