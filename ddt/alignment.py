"""Alignment of a hidden layer to a frozen feature extractor (REPA). The settings are named, the loss is not built
yet.
"""

from ddt.errors import UserError


class REPA:
    """Alignment to DINOv2 features as the published models were trained (method.md 1 and 3). Not available yet:
    raises UserError.

    Args:
        target: the timm model whose patch tokens are aligned to.
        align_depth: encoder block (1-based) whose output is aligned.
        weight: of the alignment loss beside the flow-matching loss.
        projector_depth: linear layers of the projector.
    """

    def __init__(self, target: str, align_depth: int, weight: float, projector_depth: int) -> None:
        raise UserError(
            "alignment=repa_dinov2_b: this version cannot align to DINOv2 yet; train without by alignment=none"
        )
