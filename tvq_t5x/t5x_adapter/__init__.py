"""What T5X's programs need besides the model object; all modules here import T5X.

Optimizer and trainer, data of training and evaluation, export, InteractiveModel, paths. Once a gin
file imports any of them, as those in `gin/runs/` do, T5X's programs refuse misspelled macros and
scopes and values of a wrong type.
"""

from tvq_t5x.common import jax_modes

# `gin.finalize` makes its checks once it is imported.
from tvq_t5x.gin_support import checks  # noqa: F401

jax_modes.allow_promotion()  # As the package's own commands do; T5X and flax need it, too.
