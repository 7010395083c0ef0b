"""Train an autoencoder: the decoder of a frozen encoder (RAE), or a small KL autoencoder.

python scripts/train_autoencoder.py autoencoder=rae_… data=NAME [name=…]    the same command resumes
python scripts/train_autoencoder.py data=photos out=runs/photos_autoencoder
"""

from typing import TYPE_CHECKING, Any

from ddt.cli import command

if TYPE_CHECKING:
    from ddt.training.autoencoder import CommandSettings
    from ddt.training.decoder.run import DecoderSettings


def settings_of(cfg: Any) -> str:
    """Return the class of the settings: those of a decoder, where `autoencoder=` chooses an encoder
    that one is trained for.
    """
    from ddt.config import locate

    of_decoder = locate(cfg.autoencoder._target_).trains_decoder
    return "ddt.training.decoder.run.DecoderSettings" if of_decoder else "ddt.training.autoencoder.CommandSettings"


@command("train_autoencoder", settings=settings_of)
def main(settings: "CommandSettings | DecoderSettings") -> None:
    """Compose, check, train, write."""
    settings.train()


if __name__ == "__main__":
    main()
