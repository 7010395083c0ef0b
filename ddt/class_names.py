"""Names of ImageNet's classes, of timm, which is imported when they are asked for."""

import functools
from typing import Any


@functools.cache
def imagenet_info() -> Any:
    """Return timm's tables of ImageNet's classes, which lie in files, read once."""
    from timm.data import ImageNetInfo

    return ImageNetInfo()


def imagenet_synsets() -> list[str]:
    """Return ImageNet's 1000 class names ("n01440764", …) in the order of the labels, from timm."""
    return imagenet_info().label_names()


@functools.cache
def imagenet_names() -> dict[str, list[str]]:
    """Return the English names of each synset of ImageNet, from timm."""
    info = imagenet_info()
    return {name: info.label_name_to_description(name, detailed=False).split(", ") for name in info.label_names()}


def synonyms(class_names: list[str]) -> list[list[str]]:
    """Return the names in timm of each class that is a synset of ImageNet; of others none."""
    return [imagenet_names().get(name, []) for name in class_names]


def readable(class_names: list[str]) -> list[str]:
    """Return class names with ImageNet's synsets replaced by their first name in timm."""
    return [names[0] if names else name for name, names in zip(class_names, synonyms(class_names), strict=True)]
