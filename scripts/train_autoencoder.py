"""Train an autoencoder: the decoder of a frozen encoder (RAE), or a small KL autoencoder.

python scripts/train_autoencoder.py autoencoder=rae_… data=NAME [name=…]    the same command resumes
python scripts/train_autoencoder.py data=photos out=runs/photos_autoencoder
"""

from typing import TYPE_CHECKING, Any

from ddt.cli import command

if TYPE_CHECKING:
    from ddt.training.autoencoder_settings import CommandSettings
    from ddt.training.decoder.settings import DecoderSettings


def settings_of(cfg: Any) -> str:
    """Return the class of the settings: those of a decoder, where `autoencoder=` names an encoder,
    that one is trained for.
    """
    if "encoder" in cfg.autoencoder:
        return "ddt.training.decoder.settings.DecoderSettings"
    return "ddt.training.autoencoder_settings.CommandSettings"


@command("train_autoencoder", settings=settings_of)
def main(settings: "CommandSettings | DecoderSettings") -> None:
    """Compose, check, train, write."""
    settings.train()


if __name__ == "__main__":
    main()
