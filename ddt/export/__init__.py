"""Export of checkpoints: a hub folder, a diffusers pipeline, the published key names."""

from ddt.checkpoint.settings import ExportSettings
from ddt.export.export import HubModel, export

__all__ = ["ExportSettings", "HubModel", "export"]
