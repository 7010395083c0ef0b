"""Figures: one style, readable axes and bars, one legend; those of the docs from their numbers."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, refusal, succeed
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ddt.figures import STYLE, WIDTH, label_lines, log_scale, log_ticks, pyplot, tick_labels
from ddt.training.tracking import title

NUMBERS = ROOT / "docs" / "benchmarks"
KINDS = ("benchmark_b_cpu", "encoder_depth_*", "guidance_search_*", "sharing_curve_*")
REPORTS = [  # the first of each kind by default
    pytest.param(path, marks=pytest.mark.slow if number else (), id=path.stem)
    for kind in KINDS
    for number, path in enumerate(sorted(NUMBERS.glob(f"{kind}.json")))
]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are written, complete."""
    figures, write = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: figures.append(figure) or write(figure, *a, **k))
    return figures


def check_style(figure):
    """A figure in the common style, no wider than a page, with nothing cut off at its edges."""
    assert figure.get_layout_engine() is not None
    assert figure.get_figwidth() <= 1.05 * WIDTH
    assert len(figure.legends) <= 1
    shown = [axes for axes in figure.axes if axes.get_visible() and axes.axison and axes.get_label() != "<colorbar>"]
    assert not any(axes.spines[side].get_visible() for axes in shown for side in ("top", "right"))
    assert not any(axes.get_legend() for axes in shown)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    place = figure.get_tightbbox(canvas.get_renderer())  # inches, of all that is drawn
    width, height = figure.get_size_inches()
    assert min(place.x0, place.y0, width - place.x1, height - place.y1) > -0.02


@pytest.mark.parametrize("report", REPORTS)
def test_the_figures_of_the_docs_are_redrawn_from_their_numbers(drawn, tmp_path, report):
    succeed("scripts.plot_report", f"report={report}", f"out={tmp_path / 'x.png'}")
    (figure,) = drawn
    check_style(figure)
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_a_benchmarks_bars_carry_their_values_on_a_linear_axis(drawn, tmp_path):
    succeed("scripts.plot_report", f"report={NUMBERS / 'benchmark_b_cpu.json'}", f"out={tmp_path / 'x.svg'}")
    (figure,) = drawn
    rows = [row for row in json.loads((NUMBERS / "benchmark_b_cpu.json").read_text())["rows"] if "ratio" in row]
    expected = sorted(f"{row['ratio']:.2f}" for row in rows if row["way"] != row["base"])
    values = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert sorted(value.removeprefix("→ ").split(" × ")[0] for value in values) == expected
    assert "→ 30.18" in values  # a bar that is cut says so
    assert {axes.get_xscale() for axes in figure.axes} == {"linear"}
    assert all(axes.get_xlim()[0] == 0 for axes in figure.axes)
    bars = [bar for axes in figure.axes for bar in axes.patches]
    assert len(bars) == len(expected)


def test_a_file_that_is_no_report_is_refused(tmp_path):
    (tmp_path / "x.json").write_text('{"points": []}')
    arguments = (f"report={tmp_path / 'x.json'}", f"out={tmp_path / 'x.png'}")
    assert refusal("scripts.plot_report", *arguments).startswith(f"report={tmp_path / 'x.json'}: is no benchmark.json")
    assert not (tmp_path / "x.png").exists()


def test_a_benchmark_that_compares_nothing_is_refused(tmp_path):
    report, out = NUMBERS / "h100_xl.json", tmp_path / "x.png"
    assert refusal("scripts.plot_report", f"report={report}", f"out={out}").startswith(f"report={report}: compares no")


def write_run(folder, step_loss):
    folder.mkdir()
    values = [{"step": step, "loss": loss, "class_accuracy_500": 0.1 * loss} for step, loss in step_loss]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in values))


def test_runs_have_one_legend_and_equal_names_one_colour(drawn, tmp_path):
    for k, name in enumerate("abc"):
        write_run(tmp_path / name, [(1, 2.0 + k), (2, 0.5), (3, 0.3)])
    runs = ",".join(str(tmp_path / name) for name in "abc")
    out = f"out={tmp_path / 'x.png'}"
    keys = "keys=[loss,class_accuracy_500]"
    succeed("scripts.plot_run", f"runs=[{runs}]", keys, "labels=[one seed,one seed,other]", out)
    (figure,) = drawn
    check_style(figure)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one seed", "other"]
    for axes in figure.axes:
        first, second, third = [line.get_color() for line in axes.lines]
        assert first == second != third
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "linear"]
    assert [axes.get_title() for axes in figure.axes] == ["training loss", "class accuracy\nof 500 samples"]
    said = refusal("scripts.plot_run", f"runs=[{runs}]", "labels=[one]", f"out={tmp_path / 'y.png'}")
    assert said == "labels: are 1 for 3 runs; give as many"


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.02, 0.13, ["0.02", "0.05", "0.1"]),
        (20, 2100, ["20", "50", "100", "200", "500", "1,000", "2,000"]),
        (0.31, 1.3, ["0.4", "0.6", "0.8", "1"]),
        (0.4, 0.45, ["0.4", "0.41", "0.42", "0.43", "0.44", "0.45"]),
        (1e-4, 3, ["0.0001", "0.001", "0.01", "0.1", "1"]),
        (2e7, 3e9, ["2×$10^{7}$", "5×$10^{7}$", "$10^{8}$", "2×$10^{8}$", "5×$10^{8}$", "$10^{9}$", "2×$10^{9}$"]),
    ],
)
def test_ticks_of_logarithmic_axes_are_round_numbers(low, high, ticks):
    assert tick_labels(log_ticks(low, high)) == ticks


def test_a_logarithmic_axis_has_plain_numbers():
    figure, axes = pyplot().subplots()
    axes.plot([1, 2, 3], [0.43, 0.9, 1.6])
    log_scale(axes)
    figure.canvas.draw()
    labels = [label.get_text() for label in axes.get_yticklabels(which="both")]
    pyplot().close(figure)
    assert len(labels) >= 3
    assert all(re.fullmatch(r"\d(\.\d+)?", label) for label in labels)


def test_logged_values_have_titles_in_words():
    assert title("fm_loss_by_t/0.0-0.1") == "flow-matching loss, t in 0.0–0.1"
    assert title("fid_50k") == "FID\nof 50K samples"
    assert title("fd_fashion_mnist_1k") == "Fréchet distance of 1K samples,\nFashion-MNIST features"
    assert "_" not in title("some_new_value")


def test_labels_of_lines_that_end_together_do_not_cover_each_other():
    figure, axes = pyplot().subplots()
    for name, end in (("DDP", 5.31), ("FSDP", 5.34), ("none", 2.0)):
        axes.plot([1, 2], [0, end], label=name)
    label_lines(axes)
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = {text.get_text(): text.get_window_extent(renderer) for text in axes.texts}
    assert list(boxes) == ["DDP", "FSDP", "none"]
    assert not boxes["DDP"].overlaps(boxes["FSDP"])


def test_the_style_is_in_one_file():
    """No drawing code sets matplotlib's settings or font sizes, or opens figures by itself."""
    assert STYLE.is_file()
    own = re.compile(r"rcParams|matplotlib\.(use|pyplot|figure)|fontsize")
    sources = [path for folder in ("ddt", "scripts") for path in (ROOT / folder).rglob("*.py")]
    found = {path.relative_to(ROOT) for path in sources if own.search(path.read_text())}
    assert found == {Path("ddt/figures.py")}
