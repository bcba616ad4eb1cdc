"""Names of the scalings of what an SAE reads, apart from their math, so that no config loads torch.

The math is in `input_scaling.py`.
"""

from typing import Literal

InputScaling = Literal["none", "layer_norm", "constant_norm"]
