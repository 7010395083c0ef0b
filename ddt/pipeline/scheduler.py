"""`DDTScheduler`: a sampler's settings as a diffusers component; the pipeline takes the steps."""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

from diffusers import ConfigMixin, SchedulerMixin

from ddt.sampling.settings import SamplerSettings


class DDTScheduler(SchedulerMixin, ConfigMixin):
    """`SamplerSettings` as a diffusers component."""

    code: ClassVar[Callable[[], str]]  # returns the text of this class's file in a shared folder

    def __init__(self, **settings: Any) -> None:
        arguments = inspect.signature(SamplerSettings).bind(**settings)
        arguments.apply_defaults()
        self.register_to_config(**arguments.arguments)

    # by which diffusers knows what a config may hold
    __init__.__signature__ = inspect.signature(SamplerSettings.__init__)  # type: ignore[attr-defined]

    def settings(self) -> dict[str, Any]:
        """Return the arguments of `SamplerSettings`."""
        return {name: self.config[name] for name in SamplerSettings.__dataclass_fields__}
