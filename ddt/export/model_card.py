"""The model card of an export: README.md with hub metadata, network, training, metrics, receipt."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ddt.class_names import imagenet_synsets, readable
from ddt.metrics.compare import numbers_of
from ddt.tables import markdown_table
from ddt.version import project_urls

DATASETS = {"ddt.data.images.FashionMNIST": "zalando-datasets/fashion_mnist"}  # names on the hub
IMAGENET = "ILSVRC/imagenet-1k"
TASK = "unconditional-image-generation"  # the hub has no task for classes
TAGS = ["ddt", "diffusion", "flow-matching", "class-conditional", "image-generation", "arxiv:2504.05741"]
SHOWN_CLASSES = 20
PICTURE = "samples.png"
TEMPLATE = """\
---
{{ card_data }}
---

# {{ name }}

A Decoupled Diffusion Transformer ([paper](https://arxiv.org/abs/2504.05741)) that generates
{{ '%s ' % resolution if resolution }}images of {{ num_classes }} classes.
{% if picture %}
![samples of this model]({{ picture }})
{% endif %}
## Use
{% if library_name == "diffusers" %}
```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{{ name }}", trust_remote_code=True)  # or owner/name
images = pipeline(class_labels=[0, 1], seeds=[0, 1]).images
```

`pip install torch diffusers safetensors` is all it needs: the code is in this folder
(`pipeline.py`, and a `…_ddt.py` in the folder of each component that is not diffusers' own; MIT
licence), and `trust_remote_code=True` runs it. It is generated from the source of {{ project }}.
{% else %}
```python
import ddt

model = ddt.load_model("{{ name }}")  # this folder, or owner/name on the hub
```

```bash
python sample.py ckpt={{ name }} num_samples=16 out=samples
```

The code is {{ project }} (PyPI's package `ddt` is another project's).
{% endif %}
## Network

{{ network }}

## Training

{{ training }}
{% if published %}
The file does not say what it was trained on, for how long, or with what seed.
{% endif %}
## Sampler

Settings unless others are given:

{{ sampler }}

## Metrics
{% if metrics %}
{{ numbers }}

{% if metrics.comparable -%}
These compare with published numbers.
{%- else -%}
Not comparable with published numbers: {{ metrics.not_comparable_because | join("; ") }}.
{%- endif %}
Sampled with {{ sampled_with }}.
{%- if guide %} Guided away from the weights `{{ guide.ema_sha256 }}`.{% endif %}
{% else %}
Not measured for this card.
{% endif %}
## Receipt

```json
{{ receipt }}
```

## Licence

{% if license %}`{{ license }}`, as stated by whoever exported this model.
{%- else %}Not stated: ask whoever shared this model.{% endif %}
"""


def project() -> str:
    """Return the project's name, as a link where its package has an address: `Repository` of
    [project.urls] in pyproject.toml.
    """
    addresses = project_urls()
    return f"[the project DDT]({addresses['Repository']})" if "Repository" in addresses else "the project DDT"


def dataset(config: dict[str, Any]) -> str | None:
    """Return the hub's name of the training data, or None where unknown."""
    known = DATASETS.get(config.get("run", {}).get("data", {}).get("_target_", ""))
    return IMAGENET if config["class_names"] == imagenet_synsets() else known


def table(rows: dict[str, Any]) -> str:
    """Return rows as a Markdown table without a head; those without a value are left out."""
    return markdown_table(["", ""], [[key, str(value)] for key, value in rows.items() if value is not None], align="ll")


def training_rows(config: dict[str, Any], resolution: str | None) -> dict[str, Any]:
    """Return the rows of the table "Training", as far as the checkpoint's config has them."""
    names = readable(config["class_names"])
    shown = f"{len(names)}: {', '.join(names[:SHOWN_CLASSES])}{', …' if len(names) > SHOWN_CLASSES else ''}"
    common = {"classes": shown, "resolution": resolution}
    if "run" not in config:
        source = config.get("source", {})
        return {"published file": source.get("file"), "its SHA-256": source.get("sha256"), **common}
    run, step = config["run"], config["step"]
    data, trainer, optimizer = run["data"], run["trainer"], run["optimizer"]
    batch = trainer["global_batch_size"]
    return {
        "data": f"`{data['_target_']}`, fingerprint `{data['fingerprint']}`",
        **common,
        "steps": f"{step:,} of {batch} images each, {step * batch:,} images seen",
        "seed": run["seed"],
        "optimizer": f"`{optimizer['_target_']}`, learning rate {optimizer['lr']} ({trainer['lr_schedule']})",
        "precision": trainer["mixed_precision"],
        "alignment": (run.get("alignment") or {}).get("_target_"),
        "started from": run.get("init_from"),
    }


def eval_results(metrics: dict[str, Any], trained_on: str | None) -> list[EvalResult]:
    """Return the metrics of an evaluation for the hub, under their labels."""
    reference = Path(metrics["receipt"]["reference"].get("path", "reference")).name
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=trained_on or "other",
            dataset_name=trained_on or reference,
            metric_type=name,
            metric_value=value,
            metric_name=metrics["labels"][name],
        )
        for name, value in numbers_of(metrics).items()
        if value is not None and not name.endswith("_real")  # of the reference's own images
    ]


@dataclasses.dataclass(frozen=True)
class Card:
    """The parts of a model card that no checkpoint has.

    name: folder or hub id. metrics: content of a metrics.json of these weights. license: the hub's
    name of it. picture: file with a grid of samples.
    """

    name: str
    metrics: dict[str, Any] | None = None
    license: str | None = None
    picture: Path | None = None

    def write(
        self, folder: Path, library: str, config: dict[str, Any], parameters: int, image_size: int | None
    ) -> None:
        """Write README.md, and the picture it shows, into a folder; see `render`."""
        if self.picture is not None:
            shutil.copyfile(self.picture, folder / PICTURE)
        self.render(library, config, parameters, image_size).save(folder / "README.md")

    def render(self, library: str, config: dict[str, Any], parameters: int, image_size: int | None = None) -> ModelCard:
        """Return the card. library: "ddt" or "diffusers". config: the export's, with its receipt.

        parameters: of the network. image_size: pixels per side, None where unknown.
        """
        metrics = self.metrics
        network = {key: value for key, value in config["network"].items() if not key.startswith("_")}
        trained_on = dataset(config)
        resolution = None if image_size is None else f"{image_size}×{image_size}"
        results = [] if metrics is None else eval_results(metrics, trained_on)
        request = {} if metrics is None else metrics["receipt"]["sampling"]["request"]
        used = [f"{key} {value}" for key, value in request.get("sampler", {}).items() if value is not None]
        numbers = {} if metrics is None else {metrics["labels"][key]: v for key, v in numbers_of(metrics).items()}
        data = ModelCardData(
            library_name=library,
            pipeline_tag=TASK,
            license=self.license,
            datasets=None if trained_on is None else [trained_on],
            tags=TAGS,
            model_name=self.name if results else None,
            eval_results=results or None,
        )
        return ModelCard.from_template(
            data,
            template_str=TEMPLATE,
            name=self.name,
            project=project(),
            picture=None if self.picture is None else PICTURE,
            resolution=resolution,
            num_classes=len(config["class_names"]),
            network=table(
                {
                    "kind": config["network"]["_target_"].rpartition(".")[2],
                    "parameters": f"{parameters:,}",
                    **network,
                    "latents": "×".join(map(str, config["latent_shape"])),
                    "autoencoder": config["autoencoder"].get("source", "none: a model of pixels"),
                }
            ),
            training=table(training_rows(config, resolution)),
            published="run" not in config and "source" in config,
            sampler=table({key: "null" if value is None else value for key, value in config["sampler"].items()}),
            metrics=metrics,
            numbers=table({label: "–" if value is None else f"{value:.4f}" for label, value in numbers.items()}),
            sampled_with=", ".join([*used, str(request.get("dtype"))]),
            guide=request.get("guide"),
            receipt=json.dumps(config["export"], indent=2),
            license=self.license,
        )
