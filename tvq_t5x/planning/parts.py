"""Which part of the model an instruction belongs to, by the scopes that it was traced in."""

import re
from collections.abc import Collection

COPIES = 'copies'
OTHER = 'other'

# Parts by the scopes that they have, the first that fits; `jax.named_scope`s and Flax modules. The
# inner ones come first: keys are normalized in a projection, and values summed in a cache.
_SCOPES = (
  ('cache', {'cache'}),
  ('attention scores', {'scores'}),
  ('attention values', {'values'}),
  ('quantizer', {'quantizer'}),
  ('state-space layer', {'ssm'}),
  ('norm', {'norm', 'final_norm'}),
  ('logits and loss', {'logits', 'loss'}),
  (
    'projections',
    {
      *('query', 'key', 'value', 'gate', 'distance', 'out'),
      *('shared', 'reset', 'candidate', 'update', 'wi', 'wo'),
    },
  ),
  ('embeddings', {'token_embedder'}),
  ('optimizer', {'optimizer'}),
)
_RESIDUAL = re.compile(r'layers(_\d+)?\._add')


def part_of(op_name: str, sublayers: Collection[str]) -> str:
  """The part, from 'jit(step)/transpose(jvp(Transformer))/layers/attention_0/gate/dot_general'.

  Args:
    op_name: scopes and operation, as JAX notes them in a program.
    sublayers: names of a layer's sublayers, such as 'attention_0'.

  Returns:
    A part; of what is in a sublayer and in no part of it, its kind, such as 'attention, the rest'.
  """
  words = set(re.findall(r'[\w.]+', op_name))
  for part, scopes in _SCOPES:
    if words & scopes:
      return part
  if any(map(_RESIDUAL.fullmatch, words)):
    return 'residuals and dropout'
  for name in sublayers:
    if name in words:
      return re.sub(r'_\d+$', '', name) + ', the rest'
  return OTHER
