"""TPUs that a program can be compiled for without having them."""

import importlib.util
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.experimental import topologies

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.planning.network import Network


class Chip(NamedTuple):
  """Facts about the devices of one kind of TPU."""

  device: str  # What JAX calls a device: one of a chip's two cores, or a chip.
  hbm_bytes: int  # That the program of a device may take.
  hertz: float  # Of the core's clock, which the compiler's cycles are of.
  flops_per_s: float  # Peak of a device for bfloat16.
  hbm_bytes_per_s: float  # Of a device.
  link_bytes_per_s: float  # Of each link of a chip, in each direction.
  axes: int  # Of the network: 2 or 3.
  ring_len: int  # Chips along an axis, or a multiple, from which on it wraps around.
  config: str = 'default'  # libtpu's name: 'megacore' has a chip's two cores work as one device.


def _gib(value: float) -> int:
  return int(value * 2**30)


# Memory: what libtpu 0.0.42 names as available when it refuses a program that takes more. Clocks:
# those at which the chip's matrix units make the peak that Google publishes (docs.cloud.google.com/
# tpu/docs/v2 to v6e), such as 4 units of 128 x 128 on a v5e for 197 TFLOP/s. Peaks and bandwidths:
# the same pages; the links of v2 and v3 from Jouppi et al., "A domain-specific supercomputer for
# training deep neural networks" (CACM, 2020): 496 and 656 Gbit/s.
CHIPS = {
  'v2': Chip('core', _gib(7.48), 0.70e9, 22.5e12, 350e9, 62e9, axes=2, ring_len=16),
  'v3': Chip('core', _gib(15.48), 0.94e9, 61.5e12, 450e9, 82e9, axes=2, ring_len=32),
  'v4': Chip('chip', _gib(30.75), 1.05e9, 275e12, 1228e9, 50e9, 3, 4, 'megacore'),
  'v5e': Chip('chip', _gib(15.75), 1.50e9, 197e12, 819e9, 50e9, axes=2, ring_len=16),
  'v5p': Chip('chip', _gib(95.74), 1.75e9, 459e12, 2765e9, 100e9, axes=3, ring_len=4),
  'v6e': Chip('chip', _gib(31.25), 1.75e9, 918e12, 1640e9, 100e9, axes=2, ring_len=16),
}

_EXAMPLES = 'v3:8x8 (a v3-128), v4:4x4x2 (a v4-64), v5e:8x8 (64 chips) or v5p:4x4x4 (a v5p-128)'


def chip_of(topology: str) -> Chip:
  """The chip that a topology such as 'v3:8x8' is made of.

  Raises:
    ConfigError: for another name.
  """
  kind = topology.partition(':')[0]
  if kind not in CHIPS:
    raise ConfigError(
      f'--topology={topology}: give one of {", ".join(CHIPS)} and the chips along each axis of the '
      f'torus, such as {_EXAMPLES}.'
    )
  return CHIPS[kind]


def devices_of(topology: str) -> list[jax.Device]:
  """Devices to compile for; they can't run anything.

  Args:
    topology: such as 'v3:8x8'.

  Raises:
    ConfigError: without libtpu, or if it knows no such topology.
  """
  chip = chip_of(topology)
  sizes = _sizes(topology, chip)
  if importlib.util.find_spec('libtpu') is None:
    raise ConfigError(
      f'The compiler for TPUs is missing: pip install "jax[tpu]=={jax.__version__}" (no TPU is '
      'needed).'
    )
  # libtpu would else ask a metadata server for its machine, complain that it has none, whatever it
  # is, and refuse a second process.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v3-8')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  # The chips of a host: 2 x 2, or fewer.
  hosts = [min(2, n) for n in sizes][:2]
  try:
    return topologies.get_topology_desc(
      topology,
      platform='tpu',
      chip_config_name=chip.config,
      chips_per_host_bounds=[*hosts, *[1] * (3 - len(hosts))],
    ).devices
  except jax.errors.JaxRuntimeError as e:
    reason = str(e).split('\n')[0]
    raise ConfigError(f'--topology={topology}: {reason}; give such as {_EXAMPLES}.') from e


def network_of(topology: str, devices: Sequence[jax.Device]) -> Network:
  """The links between a topology's chips.

  An axis wraps around if it is as long as that of a whole pod; those of a v4 or v5p if all of them
  are multiples of 4 chips, as Google's pages on these TPUs have it.

  Args:
    topology: such as 'v3:8x8'.
    devices: `devices_of` it, in the order of the mesh.

  Raises:
    ConfigError: for another name.
  """
  chip = chip_of(topology)
  sizes = _sizes(topology, chip)
  wraps = [n % chip.ring_len == 0 for n in sizes]
  if chip.axes == 3:
    wraps = [all(wraps)] * 3
  places = tuple(tuple(device.coords[: chip.axes]) for device in devices)
  return Network(sizes, tuple(wraps), places, chip.link_bytes_per_s)


def _sizes(topology: str, chip: Chip) -> tuple[int, ...]:
  """Chips along each axis of the network.

  Raises:
    ConfigError: for another name.
  """
  shape = re.fullmatch(r'\w+:(\d+(?:x\d+)*)', topology)
  sizes = [int(n) for n in shape[1].split('x')] if shape else []
  if not sizes or min(sizes) < 1 or len(sizes) > chip.axes:
    raise ConfigError(
      f'--topology={topology}: give the chips along each of {chip.axes} axes, such as {_EXAMPLES}.'
    )
  return (*sizes, *[1] * (chip.axes - len(sizes)))
