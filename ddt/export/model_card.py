"""The model card of an export: what people read before they use a model, with the front matter of a
model hub.
"""

import json
from typing import Any

from ddt.checkpoint.convert import DOWNSAMPLING
from ddt.metrics.compare import numbers_of
from ddt.pictures import imagenet_synsets, readable

PAPER = "https://arxiv.org/abs/2504.05741"
IMAGENET = "ILSVRC/imagenet-1k"
DATASETS = {"ddt.data.images.FashionMNIST": "zalando-datasets/fashion_mnist"}  # their names on the hub
SHOWN_CLASSES = 20
USAGE = {
    "hub": """import ddt

model = ddt.load_model("{name}")  # this folder, or owner/name on the hub
```

```bash
python sample.py ckpt={name} num_samples=16 out=samples""",
    "diffusers": """from ddt.pipeline import DDTPipeline

pipeline = DDTPipeline.from_pretrained("{name}")  # this folder, or owner/name on the hub
images = pipeline(class_labels=[0, 1], seeds=[0, 1]).images""",
}


def image_size(config: dict[str, Any]) -> int | None:
    """Return the pixels a side of a checkpoint's images, where its config tells."""
    side = config["latent_shape"][1]
    if "source" not in config["autoencoder"]:
        return side
    stated = config.get("run", {}).get("data", {}).get("image_size")
    return stated or (side * DOWNSAMPLING if "source" in config else None)


def dataset(config: dict[str, Any]) -> str | None:
    """Return the hub's name of the data set that a model was trained on, where it is known."""
    known = DATASETS.get(config.get("run", {}).get("data", {}).get("_target_", ""))
    return IMAGENET if config["class_names"] == imagenet_synsets() else known


def front_matter(config: dict[str, Any], license: str | None, library: str) -> str:
    """Return the YAML that the hub reads."""
    from huggingface_hub import ModelCardData

    found = dataset(config)
    tags = ["ddt", "diffusion", "flow-matching", "class-conditional", "image-generation", "arxiv:2504.05741"]
    card = ModelCardData(
        library_name=library,
        pipeline_tag="unconditional-image-generation",  # the hub's nearest: it has none for classes
        license=license,
        datasets=None if found is None else [found],
        tags=tags,
    )
    return f"---\n{card.to_yaml()}\n---"


def table(rows: dict[str, Any]) -> str:
    """Return a table of two columns, without the rows of which nothing is known."""
    lines = [f"| {key} | {value} |" for key, value in rows.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines])


def classes_line(config: dict[str, Any]) -> str:
    """Return the number of classes and the first of their names."""
    names = readable(config["class_names"])
    shown = ", ".join(names[:SHOWN_CLASSES])
    return f"{len(names)}: {shown}{', …' if len(names) > SHOWN_CLASSES else ''}"


def training(config: dict[str, Any]) -> str:
    """Return what a model was trained on and how, as far as its checkpoint tells."""
    size = image_size(config)
    common = {"classes": classes_line(config), "resolution": None if size is None else f"{size}×{size}"}
    if "run" not in config:
        source = config.get("source", {})
        return table({"published file": source.get("file"), "its SHA-256": source.get("sha256"), **common}) + (
            "\n\nThe file does not say what it was trained on, for how long, or with what seed." if source else ""
        )
    run = config["run"]
    data, trainer, optimizer = run["data"], run["trainer"], run["optimizer"]
    step, batch = config["step"], trainer["global_batch_size"]
    return table(
        {
            "data": f"`{data['_target_']}`, fingerprint `{data['fingerprint']}`",
            **common,
            "steps": f"{step:,} of {batch} images each, {step * batch:,} images seen",
            "seed": run["seed"],
            "optimizer": f"`{optimizer['_target_']}`, learning rate {optimizer['lr']} ({trainer['lr_schedule']})",
            "precision": trainer["mixed_precision"],
            "alignment": run["alignment"].get("_target_"),
            "started from": run.get("init_from"),
        }
    )


def metrics_section(metrics: dict[str, Any] | None) -> str:
    """Return the table of an evaluation, each number by what it may be called, and whether it
    compares with others.
    """
    if metrics is None:
        return "Not measured for this card."
    labels, numbers = metrics["labels"], numbers_of(metrics)
    rows = [f"| {labels[name]} | {'–' if value is None else f'{value:.4f}'} |" for name, value in numbers.items()]
    request = metrics["receipt"]["sampling"]["request"]
    sampler = ", ".join(f"{key} {value}" for key, value in request["sampler"].items() if value is not None)
    reasons = "; ".join(metrics["not_comparable_because"])
    verdict = (
        "These compare with published numbers."
        if metrics["comparable"]
        else f"No comparison with published numbers: {reasons}."
    )
    guide = "" if request["guide"] is None else f" Guided away from the weights `{request['guide']['ema_sha256']}`."
    return "\n".join(
        ["| metric | value |", "|---|---|", *rows, "", verdict, f"Drawn with {sampler}, {request['dtype']}.{guide}"]
    )


def model_card(
    name: str,
    form: str,
    config: dict[str, Any],
    parameters: int,
    metrics: dict[str, Any] | None,
    license: str | None,
    picture: str | None,
) -> str:
    """Return the text of README.md.

    Args:
        name: of the folder. form: "hub" or "diffusers". config: the export's, with its receipt
        under `export`.
        parameters: of the network. metrics: content of a metrics.json of these weights. license: as
        the hub calls it.
        picture: file of a grid of samples.
    """
    network = {key: value for key, value in config["network"].items() if not key.startswith("_")}
    kind = config["network"]["_target_"].rpartition(".")[2]
    size = image_size(config)
    autoencoder = config["autoencoder"].get("source", "none: it draws pixels")
    receipt = config["export"]
    stated = "" if license is None else f"`{license}`, as stated by whoever exported this model."
    sections = [
        front_matter(config, license, "diffusers" if form == "diffusers" else "ddt"),
        f"# {name}",
        f"A Decoupled Diffusion Transformer ([paper]({PAPER})) that draws {'' if size is None else f'{size}×{size} '}"
        f"images of {len(config['class_names'])} classes.",
        *([f"![samples of this model]({picture})"] if picture else []),
        f"## Use\n\n```python\n{USAGE[form].format(name=name)}\n```",
        "The code is that of the project that exported this model (`pip install` its repository; the package `ddt` of "
        "PyPI is another one).",
        "## Network\n\n"
        + table(
            {
                "kind": kind,
                "parameters": f"{parameters:,}",
                **network,
                "latents": "×".join(map(str, config["latent_shape"])),
                "autoencoder": autoencoder,
            }
        ),
        f"## Trained on\n\n{training(config)}",
        "## Sampler\n\nWhat it draws with unless told otherwise:\n\n"
        + table({key: "null" if value is None else value for key, value in config["sampler"].items()}),
        f"## Metrics\n\n{metrics_section(metrics)}",
        f"## Receipt\n\n```json\n{json.dumps(receipt, indent=2)}\n```",
        f"## Licence\n\n{stated or 'Not stated: ask whoever shared this model.'}",
    ]
    return "\n\n".join(sections) + "\n"
