"""Modes of JAX that users may have set for code of their own."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def usual() -> Iterator[None]:
  """JAX as this package, flax and optax compute with it, whatever the environment says.

  That is without JAX_ENABLE_X64, by which numbers would have 64 bits here and there, and without
  JAX_NUMPY_RANK_PROMOTION and JAX_NUMPY_DTYPE_PROMOTION, by which JAX refuses usual expressions.
  """
  with (
    jax.enable_x64(False),
    jax.numpy_rank_promotion('allow'),
    jax.numpy_dtype_promotion('standard'),
  ):
    yield


def allow_promotion() -> None:
  """Undoes JAX_NUMPY_RANK_PROMOTION and JAX_NUMPY_DTYPE_PROMOTION for a whole program."""
  jax.config.update('jax_numpy_rank_promotion', 'allow')
  jax.config.update('jax_numpy_dtype_promotion', 'standard')
