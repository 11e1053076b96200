"""What devices that share sequences exchange does not grow with the sequences."""

import collections

import jax
import optax
import pytest
import seqio
from classifier_util import NUM_CLASSES
from mesh_util import SIZES

from tvq_t5x.data.classification import Format
from tvq_t5x.network.config import TransformerConfig
from tvq_t5x.network.transformer import Transformer
from tvq_t5x.planning import collectives, hlo
from tvq_t5x.training import compilation
from tvq_t5x.training.classifier import ClassifierModel
from tvq_t5x.training.models import TransformerVQModel
from tvq_t5x.training.partitioning import Partitioner

PARTS = 4

pytestmark = pytest.mark.skipif(
  len(jax.devices('cpu')) < 8, reason='XLA_FLAGS is set in the environment, without 8 CPU devices'
)


def exchanged(length, **fields):
  """Executions and bytes of each kind of collective in the program of an update."""
  config = TransformerConfig(**{**SIZES, 'num_layers': 2, **fields})
  vocabulary, optimizer = seqio.PassThroughVocabulary(config.vocab_size), optax.sgd(0.1)
  if config.bidirectional:
    model = ClassifierModel(config, Format(vocabulary, NUM_CLASSES, pair=False), optimizer)
  else:
    model = TransformerVQModel(Transformer(config), vocabulary, optimizer)
  partitioner = Partitioner(1, devices=jax.devices('cpu')[:PARTS], sequence_partitions=PARTS)
  compiled = compilation.lower_train_step(model, partitioner, 2, length, length).compile()
  module, found = hlo.Module(hlo.module_of(compiled)), collections.Counter()
  for run in module.executions():
    for x in run.computation.instructions:
      if kind := collectives.kind_of(x):
        found[kind, 'times'] += run.times
        found[kind, 'bytes'] += run.times * collectives.num_bytes(x, module)
  return found


@pytest.mark.parametrize(
  'fields',
  [
    {'codes_from_keys': True, 'replace_below': 0.5},
    pytest.param({'sublayers': ('longvq', 'mlp')}, marks=pytest.mark.slow),
    pytest.param(
      {'sublayers': ('vq', 'longvq'), 'bidirectional': True, 'num_layers': 1},
      marks=pytest.mark.slow,
    ),
  ],
  ids=['vq', 'longvq', 'encoder'],
)
def test_it_does_not_grow_with_the_length(fields):
  short, long = (exchanged(length, **fields) for length in (PARTS * 8, PARTS * 32))
  assert short == long
  # Windows, caches and states go to neighbours; parameters' gradients are added up.
  assert {kind for kind, _ in short} == {'collective-permute', 'all-reduce'}
  assert short['collective-permute', 'bytes'] > 0
