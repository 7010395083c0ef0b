"""Export of checkpoints: a hub folder, a diffusers pipeline, the published key names."""

from ddt.export.export import ExportSettings, HubModel, export

__all__ = ["ExportSettings", "HubModel", "export"]
