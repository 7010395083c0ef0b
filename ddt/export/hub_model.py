"""`HubModel`: a checkpoint with the methods that people know from huggingface_hub.

The network itself knows nothing of paths (`ddt.model`), so these are not methods of `DDT`.
"""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin

from ddt.checkpoint import folder as ckpt
from ddt.errors import require
from ddt.export.export import Card, open_source, write_hub
from ddt.model import Denoiser


class HubModel(ModelHubMixin):
    """A network with the checkpoint it comes from: `from_pretrained`, `save_pretrained` and
    `push_to_hub`.

    Args:
        model: the network, whose weights are saved as they are now.
        checkpoint: the run, checkpoint or export that tells all else: autoencoder, sampler,
        classes.
    """

    def __init__(self, model: Denoiser, checkpoint: str | Path) -> None:
        self.model, self.checkpoint = model, ckpt.find_checkpoint(checkpoint)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Write the folder of a hub (`ddt.export.export`); raise UserError where there are files
        already.

        kwargs: as huggingface_hub's `ModelHubMixin.save_pretrained`.
        """
        folder = Path(save_directory)
        require(
            not folder.exists() or (folder.is_dir() and not any(folder.iterdir())),
            f"{folder}: holds files already and is not written over; choose another folder",
        )
        return super().save_pretrained(folder, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        source = open_source(self.checkpoint, "hub")
        write_hub(save_directory, source, self.model.state_dict(), Card(save_directory.name))

    @classmethod
    def _from_pretrained(cls, *, model_id: str, revision: str | None, **kwargs: Any) -> "HubModel":
        """Load a folder, or a model of the hub at a revision; kwargs are what huggingface_hub
        passes besides.
        """
        folder = ckpt.find_checkpoint(model_id if revision is None else f"{model_id}@{revision}")
        return cls(ckpt.load_model(folder), folder)
