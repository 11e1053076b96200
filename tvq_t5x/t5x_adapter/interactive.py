"""T5X's InteractiveModel, from the checkpoints that training writes."""

import copy
from typing import Any

from t5x import interactive_model, utils

from tvq_t5x.t5x_adapter import paths
from tvq_t5x.t5x_adapter.optimizer import OptaxWrapper
from tvq_t5x.training.models import TransformerVQModel


class InteractiveModel(interactive_model.InteractiveModel):
  """T5X's class of this name, which by itself reads checkpoints of an older format only.

  `train_step` makes one update of whole sequences with the model's optimizer, and saves a
  checkpoint of that older format in `output_dir`. Without a checkpoint to read, the model comes
  from the newest one there, or else from scratch.
  """

  def __init__(
    self,
    *,
    model: TransformerVQModel,
    checkpoint_path: str,
    restore_mode: str,
    output_dir: str,
    dtype: str | None = None,
    **kwargs: Any,
  ):
    """Creates the model and reads the checkpoint.

    Args:
      model: of the checkpoint; without an `optimizer_wrapper`, it gets ours.
      checkpoint_path: `MODEL_DIR/checkpoint_N`, or MODEL_DIR; '' means none.
      restore_mode: 'specific' for the first, 'latest' for the second.
      output_dir: where T5X writes.
      dtype: of the parameters; None means as saved.
      **kwargs: as T5X's.

    Raises:
      ConfigError: if the checkpoint is of another vocabulary.
    """
    if model.optimizer_wrapper is None:
      model = copy.copy(model)
      model.optimizer_wrapper = OptaxWrapper
    # T5X looks there anyhow, and fails at what it finds unless it was told.
    super().__init__(
      model=model,
      output_dir=output_dir,
      checkpoint_path=output_dir,
      restore_mode='latest',
      dtype=dtype,
      **kwargs,
    )
    if not checkpoint_path:
      return
    path = paths.absolute(checkpoint_path)
    cfg = utils.RestoreCheckpointConfig(path=path, mode=restore_mode, dtype=dtype)
    cfg, found = utils.get_first_valid_restore_config_and_paths([cfg])
    if not found:
      raise FileNotFoundError(f'There is no checkpoint in {checkpoint_path}.')
    paths.trained(str(found[0]), model)
    self._train_state, _ = utils.create_checkpoint_manager_and_restore(
      self._train_state_initializer, self._partitioner, cfg, found[0], None, use_orbax=True
    )
    self._trainer.train_state = self._train_state
