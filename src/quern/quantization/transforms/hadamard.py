"""Random signs and a block Hadamard transform on the input side (Tseng et al. 2024 (QuIP#), arXiv 2402.04396, section 3).

The weights of linears that share an input are rotated with it; the model rotates its activations by the same signs when it
runs, in n log n additions. Embedding, norms and head stay as they are.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from quern.core.errors import UserError
from quern.core.recipe_parts import ROTATION
from quern.core.recipe_parts import Transform as Settings
from quern.core.seeds import generator
from quern.core.stacking import Traits
from quern.quantization.transforms.base import TRANSFORMS, InputRotation
from quern.rotation.rotation import pack_signs


@TRANSFORMS.add(ROTATION)
class Hadamard(InputRotation):
    """Signs are drawn from the run's seed, for each block and group of linears anew, or are all positive."""

    traits = Traits(
        restores=frozenset({"even columns"}),
        acts="turns weights and the Hessian alike, behind all scaling, wherever the recipe names it",
    )

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        if settings.strength is not None:
            raise UserError(f"transform {ROTATION} rotates all the way and takes no strength; remove the key")

    def signs(self, columns: int, seed: int, *place: object) -> Tensor:
        if self.settings.random_signs is False:
            return pack_signs(np.zeros(columns, bool))
        negative = generator(seed, "input signs", *place).integers(0, 2, columns, dtype="uint8")
        return pack_signs(negative.astype(bool))
