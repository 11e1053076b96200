"""What devices exchange: bytes, groups in all of XLA's notations, and seconds, computed by hand."""

import pathlib
import textwrap

import pytest
from programs import EIGHT_CORES, SQUARE, parse, program_text

from tvq_t5x.planning import collectives, hlo
from tvq_t5x.planning.collectives import Layout, Traffic
from tvq_t5x.planning.network import Network
from tvq_t5x.planning.work import work_of

pytestmark = pytest.mark.quick

_LOOPS = (pathlib.Path(__file__).parent / 'loops.hlo').read_text()
_ADD = textwrap.dedent("""\
  %add {
    %a = f32[] parameter(0)
    %b = f32[] parameter(1)
    ROOT %sum = f32[] add(%a, %b)
  }

  """)
# Eight chips in a row, in a ring, and in two rings of four.
_ROW, _RING = (
  Network((8,), (wraps,), tuple((x,) for x in range(8)), 100.0, 0.0) for wraps in (False, True)
)
_TORUS = Network((2, 4), (False, True), tuple((x, y) for x in (0, 1) for y in range(4)), 100.0, 0.0)
_ALL = [list(range(8))]


def _traffic(text, layout=EIGHT_CORES):
  module = hlo.Module(parse(text))
  return collectives.traffic_of(module.executions(), module, layout)


@pytest.mark.parametrize(
  ('shape', 'start', 'num_bytes'),
  [
    ('(f32[100], f32[800])', 'all-gather-start(%x), dimensions={0}', 8 * 400),
    ('f32[800]', 'all-gather(%x), dimensions={0}', 8 * 400),
    ('f32[25]', 'reduce-scatter(%x), dimensions={0}, to_apply=%add', 400),
    ('(f32[100], f32[100])', 'collective-permute-start(%x), source_target_pairs={{0,1}}', 400),
    ('f32[100]', 'all-reduce-start(%x), to_apply=%add', 400),
  ],
)
def test_a_collective_has_the_bytes_of_the_whole_array(shape, start, num_bytes):
  kind = start.partition('(')[0].removesuffix('-start')
  lines = ['%x = f32[100] parameter(0)', f'%start = {shape} {start}']
  if '-start' in start:
    lines.append(f'ROOT %done = {shape.split(" ")[-1].strip(")")} {kind}-done(%start)')
  traffic = _traffic(program_text(*lines, before=_ADD))
  ((key, found),) = traffic.items()
  assert key[0] == kind and found[:2] == (1, num_bytes)
  # Whether it has a start and an end of its own.
  assert found.asynchronous_seconds == (found.seconds if '-start' in start else 0.0)


def test_a_collective_that_goes_on_in_other_fusions_counts_once():
  def gather(number, flag):
    flags = f'"flag_start":"{flag}","flag_end":"{flag}"'
    return (
      f'%gather.{number} = f32[800] all-gather(%x.{number}), channel_id=1, dimensions={{0}}, '
      'replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true, '
      f'backend_config={{"async_collective_fusion_config":{{{flags}}}}}'
    )

  fusions = textwrap.dedent(f"""\
    %begin (x.1: f32[100]) -> (f32[100], f32[800]) {{
      %x.1 = f32[100] parameter(0)
      {gather(1, -1)}
      ROOT %start = (f32[100], f32[800]) custom-call(%gather.1), \
    custom_call_target="AsyncCollectiveStart"
    }}

    %beside (x.2: f32[100], all.2: f32[800], y: f32[10]) -> (f32[100], f32[800], f32[10]) {{
      %x.2 = f32[100] parameter(0)
      %all.2 = f32[800] parameter(1)
      {gather(2, 2)}
      %y = f32[10] parameter(2)
      %minus = f32[10] negate(%y)
      ROOT %out = (f32[100], f32[800], f32[10]) tuple(%x.2, %gather.2, %minus)
    }}

    %end (x.3: f32[100], all.3: f32[800]) -> f32[800] {{
      %x.3 = f32[100] parameter(0)
      %all.3 = f32[800] parameter(1)
      {gather(3, 2)}
      ROOT %done = f32[800] custom-call(%gather.3, %all.3), \
    custom_call_target="AsyncCollectiveDone"
    }}

    """)
  text = program_text(
    '%x = f32[100] parameter(0)',
    '%y.1 = f32[10] parameter(1)',
    '%a = (f32[100], f32[800]) fusion(%x), kind=kCustom, calls=%begin',
    '%x.a = f32[100] get-tuple-element(%a), index=0',
    '%all.a = f32[800] get-tuple-element(%a), index=1',
    '%b = (f32[100], f32[800], f32[10]) fusion(%x.a, %all.a, %y.1), kind=kLoop, calls=%beside',
    '%x.b = f32[100] get-tuple-element(%b), index=0',
    '%all.b = f32[800] get-tuple-element(%b), index=1',
    'ROOT %c = f32[800] fusion(%x.b, %all.b), kind=kCustom, calls=%end',
    before=fusions,
  )
  work = work_of(parse(text), EIGHT_CORES)
  # Three of four chips' bytes, by two links.
  assert work.traffic == {('all-gather', 'data'): Traffic(1, 3200, 12.0, 12.0)}
  # Read and written by the collective, and by the negation.
  assert work.num_bytes == 400 + (400 + 3200) + 2 * 40
  assert work.bytes_without_estimate == 2 * 40


@pytest.mark.parametrize(
  ('groups', 'expected'),
  [
    ('{{0,2},{1,3}}', [[0, 2], [1, 3]]),
    ('[2,4]<=[8]', [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ('[2,4]<=[4,2]T(1,0)', [[0, 2, 4, 6], [1, 3, 5, 7]]),
    ("mesh['d'=4,'m'=2] {'d'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
    ("mesh['d'=4,'m'=2] {'m'}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
    ("mesh['d'=4,'m'=2] {'d':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ('{}', [[0, 1, 2, 3, 4, 5, 6, 7]]),
  ],
)
def test_groups_in_all_notations(groups, expected):
  named = 'use_global_device_ids=true, channel_id=1, '
  text = program_text(
    '%x = f32[100] parameter(0)',
    f'ROOT %y = f32[100] all-reduce(%x), replica_groups={groups}, {named}to_apply=%add',
    before=_ADD,
  )
  (x,) = (x for c in parse(text).computations for x in c.instructions if x.opcode == 'all-reduce')
  assert collectives.groups_of(x, 8) == expected


def test_traffic_is_told_apart_by_the_axes_of_the_mesh():
  lines = [
    f'%y{i} = f32[100] all-reduce(%x), replica_groups={groups}, to_apply=%add'
    for i, groups in enumerate(['{{0,2,4,6},{1,3,5,7}}', '{{0,1},{2,3},{4,5},{6,7}}', '{}'])
  ]
  text = program_text(
    '%x = f32[100] parameter(0)', *lines, 'ROOT %z = f32[] constant(0)', before=_ADD
  )
  found = _traffic(text, Layout({'data': 4, 'model': 2}, SQUARE))
  assert set(found) == {('all-reduce', axes) for axes in ('data', 'model', 'data x model')}


def test_the_time_of_a_loop_is_that_of_its_bodies():
  text = _LOOPS.replace('{{0,1}}', '{{0,2},{4,6},{1,3},{5,7}}')
  found = _traffic(text)['all-reduce', 'data']
  # Half of 2,048 bytes to the other chip and, as a sum, half of them back; the other core of both
  # chips does the same over the same link; 12 times.
  assert found.seconds == pytest.approx(12 * 2 * (2 * 1024 / 100))


@pytest.mark.parametrize(
  ('network', 'groups', 'seconds'),
  [
    # Seven eighths of 800 bytes go to the chip at the end by one link, in a ring by two.
    (_ROW, _ALL, 7.0),
    (_RING, _ALL, 3.5),
    # And by three in the torus.
    (_TORUS, _ALL, 7 / 3),
    # Halves of a ring are rows of four.
    (_RING, [[0, 1, 2, 3], [4, 5, 6, 7]], 6.0),
    # Every other chip: both groups use the same links.
    (_ROW, [[0, 2, 4, 6], [1, 3, 5, 7]], 6.0 * 14 / 8),
    # One ring of the torus, and the pairs that lie across.
    (_TORUS, [[0, 1, 2, 3], [4, 5, 6, 7]], 3.0),
    (_TORUS, [[0, 4], [1, 5], [2, 6], [3, 7]], 4.0),
    # The cores of one chip, and all cores of four, to each of which it is sent once.
    (SQUARE, [[0, 1], [2, 3], [4, 5], [6, 7]], 0.0),
    (SQUARE, _ALL, 6.0 / 2),
  ],
)
def test_seconds_of_a_gather(network, groups, seconds):
  assert network.gather_seconds(groups, 800) == pytest.approx(seconds)


@pytest.mark.parametrize(
  ('network', 'seconds'),
  [
    # Four chips send half of their 800 bytes across the middle: 1,600 by one link, or by two.
    (_ROW, 16.0),
    (_RING, 8.0),
    # The longer axis of the torus: 800 bytes across the middle of each ring, by two links.
    (_TORUS, 4.0),
    # Four cores by two links.
    (SQUARE, 8.0),
  ],
)
def test_seconds_of_an_all_to_all(network, seconds):
  assert network.exchange_seconds(_ALL, 800) == pytest.approx(seconds)


def _permutations(pairs):
  lines = [
    f'%y{i} = f32[100] collective-permute(%x), source_target_pairs={{{text}}}'
    for i, text in enumerate(pairs)
  ]
  return program_text('%x = f32[100] parameter(0)', *lines, 'ROOT %z = f32[] constant(0)')


@pytest.mark.parametrize(
  ('network', 'pairs', 'seconds'),
  [
    # To the neighbor: 400 bytes a link; the last one's way to the first is the other direction.
    (_RING, [1], 4.0),
    (_ROW, [1], 4.0),
    # Both directions at once take no longer; twice the same one does.
    (_RING, [1, -1], 4.0),
    (_RING, [1, 1], 8.0),
    # Two on: each link has two.
    (_RING, [2], 8.0),
  ],
)
def test_seconds_of_permutations(network, pairs, seconds):
  texts = [','.join(f'{{{i},{(i + step) % 8}}}' for i in range(8)) for step in pairs]
  (found,) = _traffic(_permutations(texts), Layout({'data': 8}, network)).values()
  assert found.seconds == pytest.approx(seconds)


def test_what_is_small_takes_the_time_of_its_way():
  slow = Network((8,), (True,), tuple((x,) for x in range(8)), 1e12, hop_seconds=1.0)
  assert slow.gather_seconds(_ALL, 800) == 4.0
  text = _permutations(['{0,3}'])
  (found,) = _traffic(text, Layout({'data': 8}, slow)).values()
  assert found.seconds == 3.0


def test_a_way_turns_from_axis_to_axis_and_takes_the_shorter_side_of_a_ring():
  assert _TORUS.route(0, 7) == [((0, 0), 0, 1), ((1, 0), 1, -1)]
  assert _TORUS.route(7, 7) == []
