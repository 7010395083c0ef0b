"""Imports run one way: import-linter holds the layers of ddt/, this file the commands above, and
that help and refusals wait for no import of torch.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

COMMANDS = [ROOT / f"{name}.py" for name in ("train", "sample", "evaluate")]
COMMANDS += sorted((ROOT / "scripts").rglob("*.py"))
REPORTS = {"scripts.benchmark.run", *(f"scripts.studies.{name}.report" for name in ("guidance", "sharing", "sweep"))}


def imported(path):
    """The modules that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_import_ddt_and_their_own_folder_alone(path):
    folder = ".".join(path.parent.relative_to(ROOT).parts)
    for module in imported(path):
        assert module.split(".")[0] not in ("train", "sample", "evaluate"), module
        if path.stem == "plot_report" and module in REPORTS:  # it draws what the others write
            continue
        if module.startswith("scripts"):
            assert folder.startswith("scripts."), module
            assert module.startswith((folder, "scripts.studies.study")), module


def test_an_upward_import_is_noticed(tmp_path):
    """The contracts hold for this tree, and fail where ddt.flow imports ddt.training, a layer
    imports ddt.cli, or a new module imports Hydra.
    """
    linter = Path(sys.executable).with_name("lint-imports")
    for name in ("ddt", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, tmp_path / name)

    def lint():
        return subprocess.run([linter, "--no-cache"], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert lint().returncode == 0
    planted = {"flow": "ddt.training.ema", "training.run": "ddt.cli", "model.new": "hydra"}
    for module, imported_module in planted.items():
        with (tmp_path / "ddt" / f"{module.replace('.', '/')}.py").open("a") as file:
            file.write(f"\nimport {imported_module}\n")
    done = lint()
    assert done.returncode == 1
    for module, imported_module in planted.items():
        assert f"ddt.{module} -> {imported_module}" in done.stdout


# --- what costs seconds is imported for work, not for help or a mistake

HEAVY = ("torch", "torchvision", "diffusers", "timm", "accelerate", "matplotlib", "wandb", "gradio", "sklearn")
CALLS = """
import contextlib, importlib, io, json, sys
from hydra.core.global_hydra import GlobalHydra
heavy, calls = json.load(sys.stdin)
for module, *arguments in calls:
    said = io.StringIO()
    sys.argv = [module, *arguments]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            importlib.import_module(module).main()
        end = ""
    except SystemExit as exit_:
        end = exit_.code or ""
    GlobalHydra.instance().clear()
    print(json.dumps([str(end), said.getvalue(), sorted(set(heavy) & set(sys.modules))]))
"""
# of each command a value of a setting that needs no torch, and what the refusal begins with
REFUSED = {
    "train": ["trainer.ema_decay=2"],
    "sample": ["num_steps=x", "ckpt=x"],
    "evaluate": ["features=none", "samples=x", "reference=y"],
    "scripts.cache_latents": ["shard_size=0", "data=folder", "data.root=.", "out=new"],
    "scripts.compare_metrics": ["published=x", "metrics=x"],
    "scripts.convert_checkpoint": ["resolution=300", "released=x", "out=new"],
    "scripts.estimate": ["gpus=0"],
    "scripts.export": ["format=x", "ckpt=x", "out=new"],
    "scripts.latent_statistics": ["batch_size=0", "autoencoder=rae_mae_b", "data=folder", "data.root=.", "out=x"],
    "scripts.plot_report": ["out=x", "report=x"],
    "scripts.plot_run": ["out=x", "runs=x"],
    "scripts.posthoc_ema": ["std=9.0", "run=.", "out=new"],
    "scripts.reconstruct": ["num_images=0", "data=folder", "data.root=.", "autoencoder=rae_mae_b", "out=new"],
    "scripts.reference_statistics": ["num_images=1", "data=folder", "data.root=.", "features=dinov2", "out=x.npz"],
    "scripts.train_autoencoder": ["steps=0", "out=new"],
    "scripts.app.__main__": ["port=0"],
    "scripts.benchmark.__main__": ["num_steps=0"],
    "scripts.benchmark.kernels": ["channels=0"],
    "scripts.benchmark.ranks": ["ranks=[1]"],
    "scripts.benchmark.gpu_check": ["minutes=0", "out=new"],
    "scripts.studies.guidance.__main__": ["top=0", "ckpt=x", "reference=y", "out=new"],
    "scripts.studies.inside.__main__": ["columns=0", "ckpt=x", "out=new"],
    "scripts.studies.photos.export_efficientnet_lite0": ["out=x"],
    "scripts.studies.photos.write_photos": ["crops=x", "out=new"],
    "scripts.studies.sharing.__main__": ["repeats=0", "ckpt=x", "reference=y", "out=new"],
    "scripts.studies.sharing.fit": ["budget=0", "ckpt=x", "out=x.json"],
    "scripts.studies.sweep.__main__": ["x=seed", "sweep=x", "out=new"],
}  # fmt: skip


def call_all(calls, folder):
    """What each call of a command says in the end and before, and the heavy packages loaded by
    then, in one process.
    """
    done = subprocess.run(
        [sys.executable, "-c", CALLS], cwd=folder, input=json.dumps([HEAVY, calls]), capture_output=True, text=True,
        check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return list(map(json.loads, done.stdout.splitlines()))


def test_help_and_refusals_import_nothing_heavy(tmp_path):
    commands = [path for path in COMMANDS if "\n@command(" in path.read_text()]
    assert sorted(REFUSED) == sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in commands)
    decoder = ["decoder.depth=0", "autoencoder=rae_mae_b", "data=folder", "data.root=."]
    values = [*REFUSED.items(), ("scripts.train_autoencoder", decoder), ("train", ["data.crops=x", "data=photos"])]
    values += [("sample", ["ckpt=runs/none"]), ("scripts.export", ["ckpt=runs/none", "format=hub", "out=new"])]
    values += [
        ("evaluate", ["reference=none.npz", "samples=x"]),
        ("evaluate", ["inception_weights=x", "samples=x", "reference=y"]),
    ]
    values += [("evaluate", ["samples=none.npz", "reference=data:digits", "features=digits"])]
    values += [("evaluate", ["features.weights=none", "features=dinov2", "samples=.", "reference=."])]
    values += [
        ("train", arguments)
        for arguments in (
            ["init_from=none"], ["reference=none", "features=inception", "trainer.eval_every=5"],
            ["features=digits"], ["trainer.eval_every=5"], ["sampler.recompute=none.json"],
            ["model.depth=x"], ["optimizer.lr=x"], ["objective.t_min=x"],
            ["data.image_size=x", "data=in256", "data.root=."], ["alignment.weights=none", "data=in256", "data.root=."],
            ["data.labels=none", "data=folder", "data.root=."], ["data.class_names=none", "data=folder", "data.root=."],
        )
    ]  # fmt: skip
    values += [("scripts.convert_checkpoint", ["released=none", "out=new"]), ("scripts.estimate", ["measured=none"])]
    values += [
        ("scripts.plot_run", ["runs=none", "out=x.png"]),
        ("scripts.posthoc_ema", ["run=none", "std=0.1", "out=new"]),
    ]
    values += [("scripts.studies.sweep.__main__", ["sweep=none", "out=new"])]
    values += [
        (name, ["data.root=none", f"data={data}", "data.image_size=32", *more])
        for name, data, *more in (
            ("train", "folder"), ("train", "latents"), ("scripts.cache_latents", "folder", "out=new"),
            ("scripts.reference_statistics", "shards", "out=new.npz"), ("scripts.reconstruct", "folder", "out=new"),
        )
    ]  # fmt: skip
    # a wrong key is found before a wrong value, so it imports no more
    keys = [(name, [key]) for name in ("train", "sample") for key in ("nothing=1", "+nothing=1")]
    helps = [(name, ["--help"]) for name in (*REFUSED, "scripts.doctor")]
    calls = [*helps, *keys, *values, ("scripts.doctor", ["nothing=1"])]
    outcomes = call_all([[name, *arguments] for name, arguments in calls], tmp_path)
    for (name, arguments), (end, said, loaded) in zip(calls, outcomes, strict=True):
        assert not loaded, (name, *arguments)
        if arguments == ["--help"]:
            assert (end, said.count("\n") > 3) == ("", True), (name, said)
        elif name == "scripts.doctor":
            assert end == "2"
        else:
            key, _, value = arguments[0].strip("+").partition("=")
            assert end.startswith(value if key == "ckpt" else key), (name, *arguments, end)
    assert not list(tmp_path.iterdir())
