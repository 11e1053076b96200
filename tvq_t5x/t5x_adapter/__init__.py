"""What T5X's programs need besides the model object; all modules here import T5X.

Optimizer and trainer, data of training and evaluation, export, InteractiveModel, paths. Once a gin
file imports any of them, as those in `gin/runs/` do, T5X's programs refuse misspelled macros and
scopes and values of a wrong type.
"""

# `gin.finalize` makes its checks once it is imported.
from tvq_t5x.gin_support import checks  # noqa: F401
