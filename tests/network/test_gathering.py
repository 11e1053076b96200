"""A kernel gathered from devices is the kernel, in as many steps as it takes."""

import itertools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import partitioning as nn_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tvq_t5x.network import gathering, sequence, xla

RULES = (('batch', 'data'), ('embed', 'data'), ('mlp', 'model'))


def network(*sizes):
  """A mesh of TPUs that lie on the points of a grid, neighbors of the last axis side by side."""
  places = itertools.product(*map(range, sizes))
  devices = [types.SimpleNamespace(coords=place) for place in places]
  return types.SimpleNamespace(
    axis_names=('data', 'model'),
    devices=np.array(devices).reshape(-1, 1),
    shape={'data': len(devices), 'model': 1},
  )


@pytest.mark.parametrize(
  'sizes, steps',
  [
    ((4, 4, 2), (32,)),  # Few enough.
    ((4, 4, 4), (4, 16)),
    ((4, 4, 8), (8, 16)),
    ((8, 8, 8), (8, 8, 8)),
    ((8, 8, 1), (64,)),  # The compiler gathers in two dimensions as it should.
  ],
)
def test_steps_follow_the_lines_of_the_network(sizes, steps):
  assert gathering.steps_of(network(*sizes), 'data') == steps


def test_devices_that_are_not_in_line_or_have_no_place_gather_at_once():
  mesh = network(4, 4, 4)
  mesh.devices = np.random.default_rng(0).permutation(mesh.devices)
  assert gathering.steps_of(mesh, 'data') == (64,)
  mesh = Mesh(np.array(jax.devices('cpu')[:1]).reshape(1, 1), ('data', 'model'))
  assert gathering.steps_of(mesh, 'data') == (1,)


def cpu_mesh(data, model):
  devices = jax.devices('cpu')
  if len(devices) < data * model:
    pytest.skip('XLA_FLAGS is set in the environment, without 8 CPU devices')
  return Mesh(np.array(devices[: data * model]).reshape(data, model), ('data', 'model'))


@pytest.mark.parametrize('at', [0, 1])
@pytest.mark.parametrize(
  'model, steps', [(1, (8,)), (1, (2, 4)), (1, (4, 2)), (1, (2, 2, 2)), (2, (2, 2))]
)
def test_in_steps_the_array_is_whole(model, steps, at):
  mesh = cpu_mesh(int(np.prod(steps)), model)
  x = jax.random.normal(jax.random.key(0), (16, 24))
  spec = PartitionSpec(*[None] * at, 'data')
  shared = jax.device_put(x, NamedSharding(mesh, spec))
  found = jax.jit(lambda x: gathering.in_steps(x, at, mesh, 'data', steps))(shared)
  assert found.sharding.is_fully_replicated or model > 1
  np.testing.assert_array_equal(found, x)


def test_the_gradient_of_what_was_gathered_in_steps(monkeypatch):
  monkeypatch.setattr(gathering, 'steps_of', lambda *args: (2, 2))
  mesh, axes = cpu_mesh(4, 2), ('mlp', 'embed')
  kernel, x = (
    jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(6, 8), (5, 8)])
  )

  def loss(kernel, x, gather):
    return jnp.sum(jnp.sin(jnp.einsum('BD,VD->BV', x, gather(kernel))))

  @jax.jit
  def shared(kernel, x):
    with nn_partitioning.axis_rules(RULES), sequence.shared_by(mesh, RULES):
      return jax.value_and_grad(lambda *xs: loss(*xs, lambda k: gathering.gather(axes, k)), (0, 1))(
        kernel, x
      )

  with jax.set_mesh(mesh):
    placed = jax.device_put(kernel, NamedSharding(mesh, PartitionSpec('model', 'data')))
    value, gradients = shared(placed, x)
    text = shared.lower(placed, x).as_text()
  assert len(re.findall(r'all_gather"?\(', text)) == 2
  expected, theirs = jax.value_and_grad(lambda *xs: loss(*xs, lambda k: k), (0, 1))(kernel, x)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  for a, b in zip(gradients, theirs, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow  # Compiles for TPUs.
def test_64_chips_gather_without_sums(tpus):
  devices = tpus('v4:4x4x4')
  mesh = Mesh(
    np.array(sorted(devices, key=lambda d: tuple(d.coords))).reshape(-1, 1), ('data', 'model')
  )

  def project(x, kernel):
    with (
      nn_partitioning.axis_rules(RULES),
      sequence.shared_by(mesh, RULES),
      xla.training_gradients(),
    ):
      return x @ gathering.gather(('embed', 'mlp'), kernel)

  of_batch = NamedSharding(mesh, PartitionSpec('data'))
  x = jax.ShapeDtypeStruct((64 * 256, 1024), jnp.bfloat16, sharding=of_batch)
  kernel = jax.ShapeDtypeStruct((1024, 2048), jnp.bfloat16, sharding=of_batch)
  with jax.set_mesh(mesh):
    lowered = (
      jax.jit(project, out_shardings=of_batch).trace(x, kernel).lower(lowering_platforms=('tpu',))
    )
    text = lowered.compile().as_text()
  assert ' all-reduce(' not in text
  assert len(re.findall(r' all-gather(?:-start)?\(', text)) == 2
