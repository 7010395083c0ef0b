"""Settings of features and of measurements, parsed before torch is imported."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from ddt.config import Choice
from ddt.errors import MANY, MAX_BATCH, UserError, require, require_count
from ddt.files import check_new

if TYPE_CHECKING:
    import torch

    from ddt.data.images import Images
    from ddt.metrics.classifier import ClassifierFeatures
    from ddt.metrics.dinov2 import DINOv2
    from ddt.metrics.features import Extractor
    from ddt.metrics.inception import InceptionFeatures

PrDtype = Literal["float16", "float32"]  # of precision and recall
WEIGHTS_SHA256 = "6726825d"  # beginning of the hash of torch-fidelity's file
# ADM's graph, as several projects state it
GRAPH_SHA256 = "009d6814d1bc560d4e7b236e170e9b2d5ca6f4b57bd8037f6db05776204415c6"
WEIGHTS_NAME = f"weights-inception-2015-12-05-{WEIGHTS_SHA256}.pth"
WEIGHTS_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS_NAME}"
WEIGHTS_ADVICE = (
    f"give inception_weights=FILE, a copy of {WEIGHTS_URL} (SHA-256 {WEIGHTS_SHA256}…; "
    f"pt_inception-2015-12-05-{WEIGHTS_SHA256}.pth is the same), or ADM's classify_image_graph_def.pb "
    f"(SHA-256 {GRAPH_SHA256[:8]}…)"
)
DINOV2_L = "vit_large_patch14_dinov2.lvd142m"
DINOV2_MODELS = "vit_*_patch14_dinov2*"  # those with registers follow another rule for positions


class FeatureSettings(Protocol):
    """What a file of conf/features names; nothing is loaded before `extractor`.

    name: as in `features=`. data: the data set that the network is trained on, None for a
    pretrained one. weights_key: the setting of its file of weights, None where it reads none.
    """

    @property
    def name(self) -> str: ...

    @property
    def data(self) -> str | None: ...

    @property
    def weights_key(self) -> str | None: ...

    def extractor(self, device: "torch.device", train: "Images | None" = None) -> "Extractor":
        """Load the extractor, or train it on a data set's training images."""


def check_samples(path: Path, key: str) -> None:
    """Raise UserError naming `key` where there is nothing to measure."""
    require(
        path.exists(),
        f"{key}={path}: no such file; give an npz file, a folder of a samples.npz or of images, or a run that was "
        "sampled from",
    )


def check_features(features: FeatureSettings | None, reference: str, inception_weights: str | None) -> None:
    """Raise UserError for features=none, another reference or weights than the features', and a
    reference that is not there.
    """
    if features is None:
        raise UserError("features=none: measures nothing; choose another file of conf/features")
    require(
        features.data is None or reference == f"data:{features.data}",
        f"features={features.name} reference={reference}: the classifier is trained on this data set; give "
        f"reference=data:{features.data}",
    )
    check_weights(features, inception_weights)
    if not reference.startswith("data:"):
        check_reference_path(reference)


def check_reference_path(reference: str) -> None:
    """Raise UserError for the path of a reference where there is nothing."""
    require(
        Path(reference).exists(),
        f"reference={reference}: no such file; give ADM's reference npz of the data set, a file of "
        "scripts/reference_statistics.py, or a folder of images",
    )


def check_weights(features: FeatureSettings | None, inception_weights: str | None) -> None:
    """Raise UserError for weights of Inception without Inception, or that are not there."""
    name, key = ("none", None) if features is None else (features.name, features.weights_key)
    require(
        inception_weights is None or key == "inception_weights",
        f"inception_weights={inception_weights}: has no effect with features={name}; leave it out",
    )
    require(
        inception_weights is None or Path(inception_weights).is_file(),
        f"inception_weights={inception_weights}: no such file; {WEIGHTS_ADVICE}",
    )


@dataclasses.dataclass(frozen=True)
class InceptionSettings:
    """Settings of `features=inception`.

    weights: torch-fidelity's .pth file or ADM's .pb graph; None downloads the former.
    """

    weights: str | None = None
    batch_size: int = 64

    name: ClassVar[str] = "inception"
    data: ClassVar[None] = None
    weights_key: ClassVar[str] = "inception_weights"
    packages: ClassVar[tuple[str, ...]] = ("torch_fidelity",)

    def __post_init__(self) -> None:
        require(1 <= self.batch_size <= 10_000, f"features.batch_size={self.batch_size}: must lie in 1..10000")

    def extractor(self, device: "torch.device", train: object = None) -> "InceptionFeatures":
        """Load the network onto a device. train is not used."""
        from ddt.metrics.inception import InceptionFeatures, find_weights

        weights = find_weights() if self.weights is None else Path(self.weights)
        return InceptionFeatures(weights, self.batch_size, device)


def dinov2_advice(model: str, key: str) -> str:
    """Return how to get the weights of a DINOv2 of timm into a file."""
    name = model if "." in model else f"{model}.lvd142m"
    released = f"dinov2_vit{model.removeprefix('vit_')[:1]}14"
    return (
        f"give {key}=FILE, a copy of model.safetensors of huggingface.co/timm/{name}, or of "
        f"https://dl.fbaipublicfiles.com/dinov2/{released}/{released}_pretrain.pth"
    )


@dataclasses.dataclass(frozen=True)
class DINOv2Settings:
    """Settings of `features=dinov2`.

    weights: a local file (.safetensors, .pth, .bin); None downloads timm's own. model: a DINOv2 of
    timm without registers; distances in any but ViT-L are no FD-DINOv2.
    """

    weights: str | None = None
    batch_size: int = 64
    model: str = DINOV2_L

    name: ClassVar[str] = "dinov2"
    data: ClassVar[None] = None
    weights_key: ClassVar[str] = "features.weights"
    packages: ClassVar[tuple[str, ...]] = ("torch_fidelity", "timm")

    def __post_init__(self) -> None:
        if self.model != DINOV2_L:
            self.check_model()
        require(1 <= self.batch_size <= 10_000, f"features.batch_size={self.batch_size}: must lie in 1..10000")
        require(
            self.weights is None or Path(self.weights).is_file(),
            f"features.weights={self.weights}: no such file; {dinov2_advice(self.model, 'features.weights')}",
        )

    def check_model(self) -> None:
        """Raise UserError unless timm has the model."""
        import timm

        known = timm.list_models(DINOV2_MODELS, include_tags=True)
        require(
            self.model in known or self.model in timm.list_models(DINOV2_MODELS),
            f"features.model={self.model}: is no DINOv2 of timm without registers; choose of {', '.join(known)}",
        )

    def extractor(self, device: "torch.device", train: object = None) -> "DINOv2":
        """Load the network onto a device. train is not used."""
        from ddt.metrics.dinov2 import DINOv2

        return DINOv2(self.model, self.weights, self.batch_size, device)


@dataclasses.dataclass(frozen=True)
class ClassifierSettings:
    """How a data set's classifier is trained: AdamW, learning rate decaying linearly to 0.

    data: name of the data set. epochs: passes over its training images.
    """

    data: str
    epochs: int
    batch_size: int = 128
    learning_rate: float = 2e-3

    weights_key: ClassVar[None] = None
    packages: ClassVar[tuple[str, ...]] = ("torch_fidelity",)  # of the Fréchet distance

    def __post_init__(self) -> None:
        require_count("features.epochs", self.epochs, 1, 10_000)
        require_count("features.batch_size", self.batch_size, 1, 10_000)
        require(self.learning_rate > 0, f"features.learning_rate={self.learning_rate}: must be above 0")

    @property
    def name(self) -> str:
        """The data set's name."""
        return self.data

    def extractor(self, device: "torch.device", train: "Images | None" = None) -> "ClassifierFeatures":
        """Return the features of a classifier of `train`, which is trained at its first use."""
        from ddt.metrics.classifier import ClassifierFeatures

        assert train is not None, "a classifier is trained on a data set's images"
        return ClassifierFeatures(self, train, device)


@dataclasses.dataclass(frozen=True)
class EvaluateSettings:
    """What to measure; see conf/evaluate.yaml."""

    samples: str
    reference: str
    features: FeatureSettings | None
    inception_weights: str | None = None
    pr_dtype: PrDtype = "float16"
    num_processes: int | None = None
    out: str | None = None

    def __post_init__(self) -> None:
        check_features(self.features, self.reference, self.inception_weights)
        check_samples(Path(self.samples), "samples")


@dataclasses.dataclass(frozen=True)
class ReferenceStatisticsSettings:
    """What to write; see conf/reference_statistics.yaml."""

    data: Choice
    features: FeatureSettings | None
    out: str
    choices: dict[str, str | None]
    inception_weights: str | None = None
    split: Literal["train", "test"] = "train"
    num_images: int | None = None
    num_kept: int = 10_000
    num_processes: int | None = None

    def __post_init__(self) -> None:
        out, features = Path(self.out), self.features
        require(out.suffix == ".npz", f"out={out}: give an .npz file")
        check_new(out)
        require(
            self.num_images is None or self.num_images >= 2,
            f"num_images={self.num_images}: statistics need at least 2",
        )
        require_count("num_kept", self.num_kept, 0)
        if features is None:
            raise UserError("features=none: measures nothing; choose inception or dinov2")
        require(
            features.data is None,
            f"features={features.name}: a classifier is trained on the images themselves; give "
            f"reference=data:{features.data} to evaluate.py, which needs no file",
        )
        check_weights(features, self.inception_weights)


@dataclasses.dataclass(frozen=True)
class ReconstructSettings:
    """See conf/reconstruct.yaml. Raises UserError for values out of range, and an `out` that
    exists.
    """

    data: Choice
    autoencoder: Choice
    out: str
    split: Literal["train", "test"]
    num_images: int | None
    batch_size: int
    choices: dict[str, str | None]

    def __post_init__(self) -> None:
        require_count("num_images", self.num_images, 1, MANY, ", or null")
        require_count("batch_size", self.batch_size, 1, MAX_BATCH)
        check_new(Path(self.out))
