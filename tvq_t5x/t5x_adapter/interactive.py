"""T5X's InteractiveModel, from the checkpoints that training writes."""

from typing import Any

from t5x import interactive_model, utils


class InteractiveModel(interactive_model.InteractiveModel):
  """T5X's class of this name, which by itself reads checkpoints of an older format only.

  `train_step` makes one update of whole sequences with the model's optimizer, and saves a
  checkpoint of that older format in `output_dir`. Without a checkpoint to read, the model comes
  from the newest one there, or else from scratch.
  """

  def __init__(
    self, *, checkpoint_path: str, restore_mode: str, dtype: str | None = None, **kwargs: Any
  ):
    """Creates the model and reads the checkpoint.

    Args:
      checkpoint_path: `MODEL_DIR/checkpoint_N`, or MODEL_DIR; '' means none.
      restore_mode: 'specific' for the first, 'latest' for the second.
      dtype: of the parameters; None means as saved.
      **kwargs: as T5X's.
    """
    super().__init__(checkpoint_path='', restore_mode=restore_mode, dtype=dtype, **kwargs)
    if not checkpoint_path:
      return
    cfg = utils.RestoreCheckpointConfig(path=checkpoint_path, mode=restore_mode, dtype=dtype)
    cfg, paths = utils.get_first_valid_restore_config_and_paths([cfg])
    if not paths:
      raise FileNotFoundError(f'There is no checkpoint in {checkpoint_path}.')
    self._train_state, _ = utils.create_checkpoint_manager_and_restore(
      self._train_state_initializer, self._partitioner, cfg, paths[0], None, use_orbax=True
    )
    self._trainer.train_state = self._train_state
