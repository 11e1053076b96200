"""Our optax optimizers as T5X's `optimizer_def`."""

from typing import Any

import jax
from jax.sharding import PartitionSpec
from t5x import optimizers as t5x_optimizers

from tvq_t5x.common import named_arrays
from tvq_t5x.training.optimizer_axes import optimizer_axes


class OptaxWrapper(t5x_optimizers.OptaxWrapper):
  """T5X's wrapper, for any optax state.

  T5X's own has rules for some states only; those of Adafactor and of `optax.partition` are not
  among them.
  """

  def derive_logical_axes(self, optimizer: Any, param_logical_axes: Any) -> Any:
    """Logical axes of the parameters and of the optimizer's state.

    Args:
      optimizer: `t5x.optimizers.Optimizer` of arrays or shapes.
      param_logical_axes: tree of PartitionSpecs of logical axes.

    Returns:
      An Optimizer whose leaves are PartitionSpecs; None for scalars.
    """
    axes = {name: tuple(spec) for name, spec in named_arrays.leaves_of(param_logical_axes).items()}
    state = optimizer.state.param_states
    names = optimizer_axes(state, named_arrays.leaves_of(optimizer.target), axes)
    specs = jax.tree.map(lambda x, names: PartitionSpec(*names) if x.ndim else None, state, names)
    return optimizer.replace(
      target=param_logical_axes, state=optimizer.state.replace(step=None, param_states=specs)
    )
