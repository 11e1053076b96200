"""Programs in XLA's notation, for the tests of what is read from compiled ones."""

from jaxlib import xla_client

from tvq_t5x.planning import hlo
from tvq_t5x.planning.collectives import Layout
from tvq_t5x.planning.network import Network

# Four chips in a square, of two cores each, as a v3-8.
SQUARE = Network(
  shape=(2, 2),
  wraps=(False, False),
  places=tuple((x, y) for x in (0, 1) for y in (0, 1) for _ in range(2)),
  link_bytes_per_s=100.0,
  hop_seconds=0.0,
)
EIGHT_CORES = Layout({'data': 8, 'model': 1}, SQUARE)


def parse(text: str) -> hlo.ProgramProto:
  """A program as the compiler returns one."""
  module = xla_client.hlo.hlo_module_from_text(text)
  return hlo.ProgramProto.FromString(module.as_serialized_hlo_module_proto())


def program_text(*lines: str, before: str = '') -> str:
  """A program of these instructions, after other computations."""
  body = '\n'.join(f'  {line}' for line in lines)
  return f'HloModule m\n\n{before}ENTRY %main {{\n{body}\n}}\n'
