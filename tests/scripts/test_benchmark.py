"""The plain reference agrees with the project, and the benchmark measures what it claims."""

import contextlib
import gc
import json
import math
import time
import weakref

import pytest
import torch
from conftest import inputs, refusal, small_ddt, succeed, thinned

from ddt.distributed.prepare import make_accelerator
from ddt.training.throughput import target_flops
from scripts.benchmark import parts as measured_parts
from scripts.benchmark import timing
from scripts.benchmark.parts import OurTraining, Setup, plain_gradients, plain_training
from scripts.benchmark.plain import PlainDDT, PlainTraining
from scripts.benchmark.timing import Case, Way

pytestmark = pytest.mark.usefixtures("one_thread")
BENCHMARK = "scripts.benchmark.__main__"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_matrices(monkeypatch):
    monkeypatch.setattr("scripts.benchmark.run.MATMUL_SIZE", {"cpu": 256})


def agreement(case):
    """How much the ways of a case differ; refused above rounding."""
    return timing.errors_of(case, timing.first_results(case, CPU)[0])


def setup_of(tmp_path, **changes):
    """A setup of a small network."""

    def make_model(in_channels, num_classes, **sizes):
        return small_ddt(**{**sizes, "in_channels": in_channels, "num_classes": num_classes})

    settings = dict(
        make_model=make_model, device=CPU, dtype="fp32", compile=False, latent_size=8, batch_size=3,
        sampling_batch_sizes=[2], num_steps=10, ratios=[0, 0.8], align_depth=1, records=8, folder=tmp_path,
        accelerator=make_accelerator(),
    )  # fmt: skip
    return Setup(**{**settings, **changes})


def test_the_plain_network_is_the_network(tiny):
    for model in (small_ddt(patch_size=1, depth=4), tiny):
        x, t, y = inputs(channels=model.in_channels)
        plain = PlainDDT(model)
        with torch.no_grad():
            v, hidden = plain(x, t, y, 2)
            wanted, wanted_hidden = model.forward_with_hidden(x, t, y, 2)
        torch.testing.assert_close(v, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(hidden, wanted_hidden, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("aligned", thinned([False, True], 2))
def test_a_plain_training_step_equals_ours(tmp_path, monkeypatch, aligned):
    monkeypatch.setattr(measured_parts, "TARGET", "test_vit")
    setup = setup_of(tmp_path)
    target = measured_parts.random_target(setup) if aligned else None
    ours = OurTraining(setup, setup.network(), target)
    plain, batch = plain_training(setup, ours), setup.batch(3)
    torch.testing.assert_close(plain_gradients(plain, batch), ours.gradients(batch), rtol=1e-3, atol=1e-5)
    for _ in range(3):
        ours.step(batch)
        plain.step(batch)
    mine, theirs = ours.objective.denoiser.state_dict(), plain.model.state_dict()
    start = setup.network().state_dict()
    moved = torch.cat([(mine[key] - start[key]).flatten() for key in start])
    apart = torch.cat([(mine[key] - theirs[key]).flatten() for key in start])
    assert apart.norm() < 0.02 * moved.norm()  # Adam turns a gradient near 0 into ± the learning rate
    assert moved.norm() > 0
    emas = [each.state_dict() for each in (ours.state.ema.model, plain.ema)]
    moved, other = (torch.cat([(ema[key] - start[key]).flatten() for key in start]) for ema in emas)
    assert (moved - other).norm() < 0.5 * moved.norm()  # steps of 1e-8, of which float32 keeps few digits


@pytest.mark.slow
def test_networks_of_earlier_cases_are_freed(tmp_path):
    setup = setup_of(tmp_path)
    former = weakref.ref(OurTraining(setup, setup.network(), None).objective)
    OurTraining(setup, setup.network(), None)
    gc.collect()
    assert former() is None


@pytest.mark.slow
def test_compiled_ways_agree(tmp_path, monkeypatch):
    monkeypatch.setattr(measured_parts, "TARGET", "test_vit")
    compile_module, compile_function = torch.nn.Module.compile, torch.compile
    cheap = {"options": None, "backend": "aot_eager"}  # traces as the real one does, and makes no C++
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kwargs: compile_module(self, **{**kwargs, **cheap}))
    monkeypatch.setattr(torch, "compile", lambda what, **kwargs: compile_function(what, **{**kwargs, **cheap}))
    setup = setup_of(tmp_path, compile=True, ratios=[0, 0.5])
    for part in ("training", "sampling"):
        for case in getattr(measured_parts, part)(setup):
            assert any("compiled" in name for name in case.ways)
            agreement(case)
    torch.compiler.reset()


def test_sampling_in_bf16_would_see_another_schedule(tmp_path):
    published, _ = measured_parts.sampling(setup_of(tmp_path, dtype="bf16"))
    results, _ = timing.first_results(published, CPU)
    timing.errors_of(published, results)
    results["ours 0.80"] = results["ours 0.00"]
    with pytest.raises(ValueError, match=r"ours 0\.80 is no nearer to plain 0\.80 than to plain 0\.00"):
        timing.errors_of(published, results)


@pytest.mark.slow
def test_the_largest_batch_is_the_last_that_fits(tmp_path, monkeypatch):
    from scripts.benchmark import run as benchmark

    def step(self, batch):
        if len(batch["y"]) > 16:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(OurTraining, "step", step)
    monkeypatch.setattr(PlainTraining, "step", lambda self, batch: None)
    monkeypatch.setattr(benchmark, "random_target", lambda setup: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 100))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 10)
    assert benchmark.largest_batch(setup_of(tmp_path)) == 16
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 60)
    assert benchmark.largest_batch(setup_of(tmp_path)) == 4  # twice as much would fit, and leave too little


def test_sampling_is_compared_at_each_ratio(tmp_path):
    published, always = measured_parts.sampling(setup_of(tmp_path, ratios=[0, 0.5, 0.8]))
    assert list(published.ways) == [f"{who} {ratio}" for ratio in ("0.00", "0.50", "0.80") for who in ("plain", "ours")]
    for case in (published, always):
        errors = agreement(case)
        assert max(errors.values()) < 1e-4
    shared, unshared = published.ways["ours 0.80"].call(), published.ways["ours 0.00"].call()
    assert timing.relative_error(shared, unshared) > 1e-4  # the comparison would see another schedule
    flops = {name: way.flops for name, way in published.ways.items()}
    assert flops["ours 0.80"] < flops["plain 0.80"] < flops["plain 0.00"]
    assert always.ways["plain 0.80"].flops == flops["plain 0.80"]


def case_of(**ways):
    return Case("part", "case", ways, 4, 1e-3)


def test_ways_that_disagree_are_refused():
    x = torch.ones(5)
    with pytest.raises(ValueError, match=r"part, case: ours differs from plain by 1\.0e-02, more than rounding"):
        agreement(case_of(plain=Way(lambda: x), ours=Way(lambda: 1.01 * x)))
    with pytest.raises(ValueError, match="differs from plain by nan"):
        agreement(case_of(plain=Way(lambda: x), ours=Way(lambda: math.nan * x)))
    errors = agreement(case_of(plain=Way(lambda: x), ours=Way(lambda: 2 * x, base="ours")))
    assert errors == {"plain": 0, "ours": 0}


def test_ways_take_turns_and_stop_in_time():
    calls = []
    case = case_of(**{name: Way(lambda name=name: calls.append(name)) for name in ("plain", "ours")})
    times = timing.rounds(case, CPU, repeats=3, deadline=math.inf)
    assert calls == ["plain", "ours", "ours", "plain", "plain", "ours"]
    assert {name: len(values) for name, values in times.items()} == {"plain": 3, "ours": 3}
    times = timing.rounds(case, CPU, repeats=3, deadline=time.monotonic() - 1)
    assert {name: len(values) for name, values in times.items()} == {"plain": 1, "ours": 1}


def test_a_ratio_is_the_median_of_the_rounds():
    times = {"plain": [2.0, 30.0, 4.0], "ours": [1.0, 10.0, 4.0]}
    assert timing.ratio(times, "plain", "ours") == 2


def test_rows_hold_rates_bounds_and_memory():
    entered = []

    @contextlib.contextmanager
    def context():
        entered.append(True)
        yield

    def work(size):
        return (torch.ones(size, 1000) + 1).sum()[None] / size

    plain, ours = Way(lambda: work(2000), flops=8e9), Way(lambda: work(1000), flops=2e9, context=context)
    first, second = timing.measure(case_of(plain=plain, ours=ours), CPU, 1e12, repeats=3, deadline=math.inf)
    assert (first["ratio"], first["bound"], second["bound"], second["bound_to_first"]) == (1, 1, 4, 4)
    assert len(second["times"]) == 3
    assert len(entered) == 1 + 1 + 3  # the first call, the memory, the rounds
    for row, size in ((first, 2000), (second, 1000)):
        assert row["images_per_second"] == pytest.approx(4 / row["seconds"])
        assert row["share_of_matmul"] == pytest.approx(row["flops"] / row["seconds"] / 1e12)
        assert row["peak_bytes"] == pytest.approx(2 * 4 * size * 1000, rel=0.01)  # the ones, and the sum


SMALL = ("model=nano", "latent_size=8", "batch_size=2", "num_steps=8", "ratios=[0,0.8]", "repeats=2", "align_depth=2")


@pytest.fixture
def small_target(monkeypatch):
    """A small alignment target in place of DINOv2-B."""
    monkeypatch.setattr(measured_parts, "TARGET", "test_vit")


@pytest.mark.parametrize("part", thinned(["loader", "checkpoint", "activations", "ema", "optimizer", "features"], 2))
def test_a_part_agrees_with_its_plain_reference(tmp_path, monkeypatch, part):
    monkeypatch.setattr(measured_parts, "NUM_IMAGES", 2)
    (case,) = measured_parts.PARTS[part](setup_of(tmp_path))
    agreement(case)


@pytest.mark.slow
@pytest.mark.usefixtures("small_target")
def test_an_aligned_step_counts_its_target(tmp_path):
    setup = setup_of(tmp_path)
    aligned, bare = measured_parts.training(setup)
    extra = aligned.ways["ours"].flops - bare.ways["ours"].flops
    assert extra > 3 * target_flops(measured_parts.random_target(setup), setup.image_size) > 0


@pytest.mark.usefixtures("small_target")
@pytest.mark.slow
def test_the_benchmark_writes_numbers_tables_and_a_picture(tmp_path):
    out = tmp_path / "new" / "folder"
    parts = ["forward", "training", "loader"]
    succeed(BENCHMARK, *SMALL, f"parts=[{','.join(parts)}]", "records=40", f"out={out}")
    found = json.loads((out / "benchmark.json").read_text())
    assert found["kind"] == "benchmark"
    rows = found["rows"]
    assert not [row for row in rows if "not_run" in row]
    assert list(dict.fromkeys(row["part"] for row in rows)) == parts
    (aligned,) = [row for row in rows if "aligned" in row["case"] and row["way"] == "ours"]
    (bare,) = [row for row in rows if "no alignment" in row["case"] and row["way"] == "ours"]
    assert aligned["flops"] > bare["flops"] > 0
    assert found["matmul"]["flops_per_second"] > 1e9
    assert (found["settings"]["model"], found["machine"]["threads"]) == ("nano", 1)
    said = (out / "benchmark.md").read_text()
    assert any(row.split()[1:7] == ["batch", "2,", "no", "alignment", "|", "ours"] for row in said.splitlines())
    assert (out / "benchmark.png").stat().st_size > 10_000
    assert "exists already" in refusal(BENCHMARK, *SMALL, f"out={out}")


def test_a_profile_names_the_longest_operations(tmp_path):
    succeed(BENCHMARK, *SMALL, "parts=[optimizer]", f"out={tmp_path}", "profile=true")
    assert "AdamW" in (tmp_path / "profiles" / "optimizer_a_step_ours.txt").read_text()


def test_an_error_ends_its_part_alone(tmp_path, monkeypatch):
    def broken(setup):
        yield Case("loader", "half", {"plain": Way(lambda: torch.ones(1)), "ours": Way(lambda: torch.zeros(1))}, 1, 0.1)

    monkeypatch.setitem(measured_parts.PARTS, "loader", broken)
    arguments = (*SMALL, "parts=[loader,optimizer]", f"out={tmp_path}")
    assert refusal(BENCHMARK, *arguments) == "parts failed: see the lines above"
    rows = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert "loader, half: ours differs from plain" in rows[0]["not_run"]
    assert [row["way"] for row in rows[1:]] == ["plain", "ours"]
    assert "## Not run\n\n- loader: loader, half" in (tmp_path / "benchmark.md").read_text()


def test_parts_after_the_deadline_are_not_run(tmp_path):
    succeed(BENCHMARK, *SMALL, "parts=[forward,optimizer]", "minutes=0.0001", f"out={tmp_path}")
    rows = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert [(row["part"], "out of time" in row["not_run"]) for row in rows] == [("forward", True), ("optimizer", True)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    thinned(
        [
            (["parts=[speed]"], "parts=speed: no such part; choose from forward, sampling"),
            (["parts=[]"], "parts=[]: names no part"),
            (["batch_size=0"], "batch_size=0: must be at least 1, or max"),
            (["batch_size=max"], "batch_size=max: asks for a GPU's memory"),
            (["ratios=[0.8]"], "ratios=[0.8]: must begin with 0"),
            (["ratios=[0,0.99]"], "ratios=[0.0, 0.99]: each is a share of the num_steps=50 steps"),
            (["repeats=0"], "repeats=0: must be at least 1"),
            (["minutes=0"], "minutes=0.0: must be above 0"),
            (["latent_size=9"], "latent_size=9: must be a multiple of 2"),
            (["sampling_batch_sizes=[]"], "sampling_batch_sizes=[]: give numbers"),
            (["profile=true"], "profile=true: writes tables; give out=FOLDER"),
            (["out=README.md"], "out=README.md: exists already and is not written over"),
            (["model=nano"], "align_depth=8: the encoder has 4 blocks, choose 1..4"),
            (["model=dit_b"], "model: the plain reference is a DDT whose decoder has attention"),
            (["model=nano_ditdh"], "model: the plain reference is a DDT whose decoder has attention"),
            (["model=nano", "model.decoder_hidden_size=128"], "model: the plain reference is a DDT whose decoder"),
        ],
        3,
    ),
)
def test_wrong_settings_of_the_benchmark_are_one_line(arguments, message):
    said = refusal(BENCHMARK, *arguments)
    assert said.startswith(message)
    assert "\n" not in said
