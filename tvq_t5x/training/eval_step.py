"""Metrics of sequences without training: a part of each at a time, in the memory of training."""

from tvq_t5x.network.transformer import DecoderState
from tvq_t5x.training import metrics as metrics_lib
from tvq_t5x.training.base_model import Batch, Model, Params
from tvq_t5x.training.segments import sequence_loss


def batch_metrics(
  model: Model, params: Params, batch: Batch, segment_len: int
) -> metrics_lib.Metrics:
  """Metrics of a batch of whole sequences, summed over segments with carried state.

  Args:
    model: defines the metrics.
    params: of the module.
    batch: sequences, [B, T] each.
    segment_len: tokens of each that are processed together; divides T.
  """
  return continued_metrics(model, params, None, batch, segment_len)[1]


def continued_metrics(
  model: Model,
  params: Params,
  state: DecoderState | None,
  batch: Batch,
  segment_len: int,
) -> tuple[DecoderState | None, metrics_lib.Metrics]:
  """Metrics of a batch of sequences that continue others, summed over segments.

  Args:
    model: defines the metrics.
    params: of the module.
    state: of the tokens before; None at the start of the sequences.
    batch: sequences, [B, T] each.
    segment_len: tokens of each that are processed together; divides T.

  Returns:
    The state after them, and the metrics.
  """
  _, (after, metrics) = sequence_loss(
    model, params, batch, state, None, 1.0, segment_len=segment_len
  )
  return after, metrics
