"""Transformer-VQ: linear-time attention over vector-quantized keys, for T5X and one machine.

The names below are imported when they are first used, and none of them needs TensorFlow to be
imported; `load` imports it when it is called.
"""

from tvq_t5x.common import interrupts

if interrupts.is_command(__name__):  # What follows takes seconds to import.
  interrupts.end_at_once()

from etils import epy  # noqa: E402

with epy.lazy_api_imports(globals()):
  from tvq_t5x.generation.language_model import load
  from tvq_t5x.network.config import TransformerConfig
  from tvq_t5x.network.sampling import SamplingConfig
  from tvq_t5x.network.transformer import Transformer
  from tvq_t5x.standalone.run import Run
  from tvq_t5x.train import train_model
  from tvq_t5x.training.models import TransformerVQModel

__all__ = [
  'Run',
  'SamplingConfig',
  'Transformer',
  'TransformerConfig',
  'TransformerVQModel',
  'load',
  'train_model',
]
__version__ = '0.1.0'
