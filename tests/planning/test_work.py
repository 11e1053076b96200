"""What is read from a compiled program: loops, products, bytes, and the parts they belong to."""

import pathlib
import re
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import util
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from programs import EIGHT_CORES, parse, program_text

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.planning import hlo, parts
from tvq_t5x.planning.collectives import Traffic
from tvq_t5x.planning.work import Work, work_of
from tvq_t5x.training import compilation, optimizers
from tvq_t5x.training.partitioning import Partitioner

# As libtpu writes it, shortened: a loop of 3, whose counter takes steps of 2, in a loop of 4, with
# a matrix product and an all-reduce in the inner one.
_LOOPS = (pathlib.Path(__file__).parent / 'loops.hlo').read_text()


def _work(text: str) -> Work:
  return work_of(parse(text), EIGHT_CORES, ['attention_0'])


def test_everything_in_a_loop_counts_as_often_as_it_runs():
  work = _work(_LOOPS)
  assert work.flops == 12 * 2 * 16 * 128 * 64
  assert work.cycles == 12 * 100
  # The two devices are cores of one chip.
  assert work.traffic == {('all-reduce', 'data'): Traffic(12, 12 * 2 * 16 * 64, 0.0, 0.0)}
  of_the_fusion, of_the_collective = 16 * 128 + 128 * 64 + 16 * 64, 2 * 16 * 64
  # Three numbers of four bytes, besides, for the counter.
  assert work.num_bytes == 12 * (2 * (of_the_fusion + of_the_collective) + 3 * 4)
  assert work.unknown_loops == 0


def test_loops_of_unknown_length_count_once_and_are_reported():
  work = _work(_LOOPS.replace(', backend_config={"known_trip_count":{"n":"4"}}', ''))
  assert work.unknown_loops == 1 and work.cycles == 3 * 100


def test_a_product_whose_batch_is_an_axis_of_the_window():
  text = program_text(
    '%left = bf16[128,64,1]{1,0,2} parameter(0)',
    '%right = bf16[8,256,128]{2,1,0} parameter(1)',
    'ROOT %c = bf16[8,256,64]{1,2,0} convolution(%left, %right), '
    'window={size=8 pad=7_7 rhs_reversal=1}, dim_labels=fb0_0oi->0fb',
  )
  assert _work(text).flops == 2 * 8 * 256 * 64 * 128


def test_a_convolution_with_strides_and_dilation_counts_what_is_not_padding():
  text = program_text(
    '%left = f32[2,5,3]{2,1,0} parameter(0)',
    '%right = f32[3,3,7]{2,1,0} parameter(1)',
    'ROOT %c = f32[2,5,7]{2,1,0} convolution(%left, %right), '
    'window={size=3 stride=2 pad=2_2 lhs_dilate=2}, dim_labels=b0f_0io->b0f',
  )
  # Positions o of 5 and k of 3 with 0 <= 2 o - 2 + k <= 8 and even: k = 0 and 2.
  positions = sum(0 <= 2 * o - 2 + k <= 8 for o in range(5) for k in (0, 2))
  assert _work(text).flops == 2 * 2 * 7 * 3 * positions


def test_a_slice_of_an_array_moves_no_more_than_the_slice():
  fusion = textwrap.dedent("""\
    %slices (all: f32[24,100], i: s32[], new: f32[1,100]) -> f32[24,100] {
      %all = f32[24,100]{1,0} parameter(0)
      %i = s32[] parameter(1)
      %new = f32[1,100]{1,0} parameter(2)
      %zero = s32[] constant(0)
      %old = f32[1,100]{1,0} dynamic-slice(%all, %i, %zero), dynamic_slice_sizes={1,100}
      %sum = f32[1,100]{1,0} add(%old, %new)
      ROOT %put = f32[24,100]{1,0} dynamic-update-slice(%all, %sum, %i, %zero)
    }

    """)
  text = program_text(
    '%all.1 = f32[24,100]{1,0} parameter(0)',
    '%i.1 = s32[] parameter(1)',
    '%new.1 = f32[1,100]{1,0} parameter(2)',
    'ROOT %f = f32[24,100]{1,0} fusion(%all.1, %i.1, %new.1), kind=kLoop, calls=%slices',
    before=fusion,
  )
  # The old row, the new one, the index, and the row that is written.
  assert _work(text).num_bytes == 400 + 400 + 4 + 400


def test_a_slice_that_is_copied_meanwhile_moves_no_more_either():
  text = program_text(
    '%all = f32[24,100] parameter(0)',
    '%start = ((f32[24,100]), f32[1,100], s32[]) slice-start(%all), slice={[3:4], [0:100]}',
    'ROOT %done = f32[1,100] slice-done(%start)',
  )
  work = _work(text)
  assert (work.num_bytes, work.bytes_without_estimate) == (400 + 400, 0)


def test_a_slice_inside_an_inner_fusion_moves_no_more_either():
  fusions = textwrap.dedent("""\
    %inner (all: f32[24,100], i: s32[]) -> f32[1,100] {
      %all = f32[24,100]{1,0} parameter(0)
      %i = s32[] parameter(1)
      %zero = s32[] constant(0)
      ROOT %old = f32[1,100]{1,0} dynamic-slice(%all, %i, %zero), dynamic_slice_sizes={1,100}
    }

    %outer (i.1: s32[], all.1: f32[24,100]) -> f32[1,100] {
      %i.1 = s32[] parameter(0)
      %all.1 = f32[24,100]{1,0} parameter(1)
      %row = f32[1,100]{1,0} fusion(%all.1, %i.1), kind=kLoop, calls=%inner
      ROOT %twice = f32[1,100]{1,0} add(%row, %row)
    }

    """)
  text = program_text(
    '%i.2 = s32[] parameter(0)',
    '%all.2 = f32[24,100]{1,0} parameter(1)',
    'ROOT %f = f32[1,100]{1,0} fusion(%i.2, %all.2), kind=kOutput, calls=%outer',
    before=fusions,
  )
  assert _work(text).num_bytes == 4 + 400 + 400


def test_a_copy_that_is_made_meanwhile_is_read_and_written_once():
  text = program_text(
    '%x = f32[24,100] parameter(0)',
    '%start = (f32[24,100], f32[24,100], u32[]) copy-start(%x)',
    'ROOT %done = f32[24,100] copy-done(%start)',
  )
  work = _work(text)
  assert (work.num_bytes, work.bytes_without_estimate) == (2 * 9600, 0)


def test_memory_that_is_only_set_aside_or_named_anew_is_not_moved():
  text = program_text(
    '%x = f32[12,100] custom-call(), custom_call_target="AllocateBuffer"',
    'ROOT %y = f32[24,100] custom-call(%x, %x), custom_call_target="ConcatBitcast"',
  )
  assert _work(text).num_bytes == 0


def test_what_the_compiler_has_no_cycles_for_is_told_apart():
  cycles = 'backend_config={"window_config":{"estimated_cycles":"70"}}'
  text = program_text(
    '%x = f32[24,100] parameter(0)',
    f'%y = f32[24,100] negate(%x), {cycles}',
    'ROOT %z = f32[2400] reshape(%y)',
  )
  work = _work(text)
  assert (work.cycles, work.num_bytes, work.bytes_without_estimate) == (70, 4 * 9600, 2 * 9600)


@pytest.mark.parametrize('condition', ['pred', 's32'])
def test_what_both_branches_do_counts(condition):
  branches = textwrap.dedent("""\
    %square {
      %a = f32[8,8] parameter(0)
      ROOT %product = f32[8,8] dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
    }

    %same {
      ROOT %b = f32[8,8] parameter(0)
    }

    """)
  names = {
    'pred': 'true_computation=%square, false_computation=%same',
    's32': 'branch_computations={%same, %square}',
  }
  text = program_text(
    f'%if = {condition}[] parameter(0)',
    '%x = f32[8,8] parameter(1)',
    f'ROOT %y = f32[8,8] conditional(%if, %x, %x), {names[condition]}',
    before=branches,
  )
  assert _work(text).flops == 2 * 8 * 8 * 8


def test_a_compiled_loop_over_eight_devices():
  mesh = Mesh(np.array(jax.devices()), ('data',))
  rows, whole = (NamedSharding(mesh, PartitionSpec(axis)) for axis in ('data', None))

  def descend(x, w):
    return jax.lax.scan(lambda w, _: (w - x.T @ (x @ w), None), w, length=5)[0]

  x, w = jnp.zeros([64, 32]), jnp.zeros([32, 16])
  compiled = jax.jit(descend, in_shardings=(rows, whole), out_shardings=whole).lower(x, w).compile()
  work = work_of(hlo.module_of(compiled), EIGHT_CORES)
  ((key, found),) = work.traffic.items()
  assert key == ('all-reduce', 'data') and found[:2] == (5, 5 * 4 * 32 * 16)
  assert work.flops == 5 * 2 * (2 * 8 * 32 * 16)
  assert work.unknown_loops == 0


@pytest.mark.parametrize(
  ('op_name', 'part'),
  [
    ('layers/attention_0/attention_0.attend/checkpoint/scores/exp', 'attention scores'),
    ('jit(step)/transpose(jvp(scores))/dot_general', 'attention scores'),
    ('layers/attention_0/attention_0.attend/values/dot_general', 'attention values'),
    ('layers/attention_0/attention_0.attend/cache/values/dot_general', 'cache'),
    ('layers/attention_0/attention_0.attend/quantizer/argmax', 'quantizer'),
    ('layers/attention_0/attention_0._project/value/BTD,DHK->BTHK/dot_general', 'projections'),
    ('layers/attention_0/norm/mul', 'norm'),
    ('layers/attention_0/attention_0.attend/add', 'attention, the rest'),
    ('jvp(Transformer)/logits/token_embedder.attend/dot_general', 'logits and loss'),
    ('jvp(Transformer)/token_embedder/gather', 'embeddings'),
    ('while/body/optimizer/mul', 'optimizer'),
    ('layers_3/layers_3._add/vmap(jit(_bernoulli))/xor', 'residuals and dropout'),
    ('while/body/add', 'other'),
  ],
)
def test_an_operation_belongs_to_the_scope_that_it_was_traced_in(op_name, part):
  assert parts.part_of(op_name, ['attention_0', 'mlp']) == part


@pytest.mark.parametrize('attention_type', ['vq', 'quadratic'])
def test_every_matrix_product_of_an_update_is_in_a_part_of_the_model(attention_type):
  model = util.small_model(optimizers.adamw(0.1), attention_type=attention_type, **util.LIGHT)
  lowered = compilation.lower_train_step(model, Partitioner(), 8, 8, 8)
  names = set(re.findall(r'loc\("([^"]*/dot_general)"', lowered.as_text(debug_info=True)))
  found = {parts.part_of(name, ['attention_0', 'mlp_0']) for name in names}
  expected = {'attention scores', 'attention values', 'projections', 'logits and loss'}
  expected |= {'cache', 'quantizer'} if attention_type == 'vq' else set()
  assert found - {'norm'} == expected  # On CPU, sums of the norms' gradients are products, too.


def test_cycles_are_those_of_the_parts_and_of_copies():
  def cycles(number, name):
    return (
      f'metadata={{op_name="jit(f)/attention_0/{name}"}}, '
      f'backend_config={{"window_config":{{"estimated_cycles":"{number}"}}}}'
    )

  joined = textwrap.dedent("""\
    %join {
      %a = bf16[8] parameter(0)
      %zero = bf16[] constant(0)
      %left = bf16[16] pad(%a, %zero), padding=0_8
      %right = bf16[16] pad(%a, %zero), padding=8_0
      ROOT %both = bf16[16] maximum(%left, %right)
    }

    """)
  text = program_text(
    '%x = bf16[8] parameter(0)',
    f'%y = bf16[8] exponential(%x), {cycles(100, "scores/exp")}',
    f'%z = bf16[16] fusion(%y), kind=kLoop, calls=%join, {cycles(30, "values/concatenate")}',
    f'%w = bf16[16] negate(%z), {cycles(7, "values/neg")}',
    f'ROOT %v = bf16[16] cosine(%w), {cycles(2**63 - 1, "values/cos")}',  # It has no estimate.
    before=joined,
  )
  assert _work(text).parts == {'attention scores': 100, 'copies': 30, 'attention values': 7}


def test_what_jax_can_not_read_of_a_later_libtpu_is_told():
  class Unreadable:
    def runtime_executable(self):
      return self

    def hlo_modules(self):
      raise jax.errors.JaxRuntimeError('INTERNAL: RET_CHECK failure')

  with pytest.raises(ConfigError, match=r'RET_CHECK failure.*pip install "jax\[tpu\]"'):
    hlo.module_of(Unreadable())
