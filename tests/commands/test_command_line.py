"""What the commands share: streams, exit codes, and what C++ libraries print while they load."""

import os
import signal
import subprocess
import sys

import pytest

from tvq_t5x.commands import command_line
from tvq_t5x.common import interrupts

_PRINTED = """\
WARNING: All log messages before absl::InitializeLog() is called are written to STDERR
I0000 00:00:1795655232.868908   22445 cudart_stub.cc:31] Could not find cuda drivers.
E0000 00:00:1795655313.902054   24690 cuda_platform.cc:52] failed call to cuInit: INTERNAL: none
"""


def _run(*lines, encoding='utf-8'):
  program = '\n'.join(
    (
      'import os',
      'from tvq_t5x.common import quiet',
      f'printed = {_PRINTED!r}.encode()',
      'with quiet.imports():',
      *lines,
    )
  )
  return subprocess.run(
    [sys.executable, '-c', program],
    capture_output=True,
    text=True,
    check=False,
    env={**os.environ, 'PYTHONIOENCODING': encoding},
  )


def test_what_libraries_log_while_they_load_is_left_out():
  done = _run('  os.write(2, printed)', "os.write(2, b'I0000 after\\n')")
  assert (done.returncode, done.stderr) == (0, 'I0000 after\n')


def test_the_last_words_of_a_library_that_aborts_are_seen():
  done = _run('  os.write(2, printed + b"F0000 why\\n")', '  os.abort()')
  assert (done.returncode, done.stderr) == (-signal.SIGABRT, 'F0000 why\n')


def test_an_import_that_fails_is_seen():
  done = _run('  os.write(2, b"E0000 why\\n")', '  raise ImportError("missing")')
  assert done.returncode == 1
  assert done.stderr.startswith('E0000 why\nTraceback')
  assert done.stderr.endswith('ImportError: missing\n')


def _command(tmp_path, *lines):
  """The arguments that run a command whose main function has these lines."""
  path = tmp_path / 'command.py'
  head = [
    'import os, sys, time',
    'from absl import app, logging',
    'from tvq_t5x.commands import command_line',
    'from tvq_t5x.common import quiet',
    'def main(args):',
    '  command_line.prepare(args)',
  ]
  end = ["if __name__ == '__main__':", '  command_line.start(main)']
  path.write_text('\n'.join([*head, *(f'  {line}' for line in lines), *end]))
  return [sys.executable, str(path)]


def _in_shell(command, redirected, **env):
  text = ' '.join([*command, redirected])
  return subprocess.run(
    text, shell=True, capture_output=True, text=True, env={**os.environ, **env}, check=False
  )


@pytest.mark.parametrize('closed', ['>&-', '2>&-', '<&-', '>&- 2>&- <&-'])
def test_files_do_not_take_the_place_of_closed_streams(tmp_path, closed):
  path = tmp_path / 'file'
  command = _command(
    tmp_path,
    f'file = open({str(path)!r}, "w")',
    'print("out"); print("err", file=sys.stderr); logging.error("log"); os.write(2, b"raw")',
    'file.write(str(file.fileno() > 2))',
    'return 3',
  )
  done = _in_shell(command, closed)
  assert done.returncode == 3 and 'Traceback' not in done.stderr
  assert path.read_text() == 'True'
  if closed == '>&-':
    assert 'err' in done.stderr and 'log' in done.stderr


def test_closed_output_is_no_success(tmp_path):
  done = _in_shell(_command(tmp_path, 'print("out"); return 0'), '>&-')
  assert done.returncode == 1 and done.stderr.startswith('error: the output can not be written')
  assert _in_shell(_command(tmp_path, 'return 0'), '>&-').returncode == 0


@pytest.mark.parametrize('length', [1, 100_000])
def test_output_that_can_not_be_written_is_an_error_on_a_line(tmp_path, length):
  done = _in_shell(_command(tmp_path, f'print("x" * {length})'), '>/dev/full')
  assert done.returncode == 1
  assert done.stderr.startswith('error: ') and 'No space left on device' in done.stderr
  assert done.stderr.count('\n') == 1


def test_nobody_has_to_read_the_errors(tmp_path):
  command = _command(tmp_path, 'logging.error("log"); return command_line.fail("x", 2)')
  assert _in_shell(command, '2>/dev/full').returncode == 2


def test_who_has_seen_enough_gets_no_error(tmp_path):
  command = _command(tmp_path, 'for _ in range(10_000): print("x" * 100)')
  assert _in_shell(command, '| head -n 1').stderr == ''


@pytest.mark.parametrize('encoding', ['ascii', 'latin-1', 'cp1252'])
def test_characters_that_a_terminal_lacks_are_shown_as_codes(tmp_path, encoding):
  command = _command(tmp_path, r'print("a\u4e2d"); logging.error("\u4e2d"); return 0')
  done = _in_shell(command, '', PYTHONIOENCODING=encoding, LC_ALL='POSIX')
  assert done.returncode == 0 and done.stdout == 'a\\u4e2d\n' and '\\u4e2d' in done.stderr


@pytest.mark.parametrize('flag', ['--help', '--helpfull', '-help'])
def test_help_is_no_failure(tmp_path, flag):
  done = _in_shell(_command(tmp_path), flag)
  assert done.returncode == 0 and '[flags]' in done.stdout


@pytest.mark.parametrize('argument', ['--hlep', 'x', '--verbosity=x', '--gin.A=b'])
def test_mistakes_are(tmp_path, argument):
  done = _in_shell(_command(tmp_path), argument)
  assert done.returncode == 2 and argument.partition('=')[0].strip('-') in done.stderr


@pytest.mark.parametrize('importing', [False, True])
def test_ctrl_c_ends_with_a_line(tmp_path, importing):
  lines = ['print("ready", flush=True); time.sleep(60)']
  if importing:
    lines = ['with quiet.imports():', f'  {lines[0]}']
  command = _command(
    tmp_path, 'import signal', 'signal.signal(2, signal.default_int_handler)', *lines
  )
  process = subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
  )
  assert process.stdout.readline() == 'ready\n'
  os.killpg(process.pid, signal.SIGINT)  # As a terminal does: to all that were started.
  _, err = process.communicate()
  assert (process.returncode, err) == (130, 'error: interrupted\n')


_COMMANDS = ('train', 'evaluate', 'sample', 'plan', 'train_vocab')


def _importing(tmp_path, command, module, **how):
  """A command that is in the middle of the import of a module, which takes Ctrl-C for its own."""
  lines = ['import time', 'print("ready", flush=True)', 'try: time.sleep(60)', 'except: pass']
  (tmp_path / module).mkdir()
  (tmp_path / module / '__init__.py').write_text('\n'.join(lines))
  process = subprocess.Popen(
    [sys.executable, '-m', f'tvq_t5x.{command}'],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env={**os.environ, 'PYTHONPATH': str(tmp_path)},
    **how,
  )
  assert process.stdout is not None and process.stdout.readline() == 'ready\n'
  return process


@pytest.mark.parametrize('command', _COMMANDS)
@pytest.mark.parametrize('module', ['etils', 'absl'])
def test_ctrl_c_ends_with_a_line_from_the_first_import_on(tmp_path, command, module):
  # As in the foreground: a shell ignores it for those behind.
  in_front = {'preexec_fn': lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
  process = _importing(tmp_path, command, module, **in_front)
  process.send_signal(signal.SIGINT)
  _, err = process.communicate()
  assert (process.returncode, err) == (130, 'error: interrupted\n')


def test_ctrl_c_that_is_ignored_stays_ignored_during_imports(tmp_path):
  behind = {'preexec_fn': lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)}
  process = _importing(tmp_path, 'train', 'absl', **behind)
  process.send_signal(signal.SIGINT)
  process.terminate()
  assert process.wait() == -signal.SIGTERM


@pytest.mark.parametrize('ending', ['import atexit; atexit.register(wait)', ''])
def test_ctrl_c_while_python_ends(tmp_path, ending):
  command = _command(
    tmp_path,
    'import signal',
    'signal.signal(2, signal.default_int_handler)',
    'def wait(): print("ready", flush=True); time.sleep(60)',
    ending or 'wait()',
  )
  process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  assert process.stdout is not None and process.stdout.readline() == 'ready\n'
  process.send_signal(signal.SIGINT)
  _, err = process.communicate()
  assert (process.returncode, err) == (130, 'error: interrupted\n')


@pytest.mark.parametrize(
  ('program', 'arguments', 'expected'),
  [
    (['-c', 'import tvq_t5x'], ['-c'], False),
    (['file.py', 'tvq_t5x.train'], ['file.py', 'tvq_t5x.train'], False),
    (['-m', 'tvq_t5x.train'], ['-m'], True),
    (['-X', 'dev', '-Im', 'tvq_t5x.train', 'a', 'b'], ['-m', 'a', 'b'], True),
    (['-Imtvq_t5x.train', 'a'], ['-m', 'a'], True),
    (['-m', 'other', 'tvq_t5x.train'], ['-m', 'tvq_t5x.train'], False),
  ],
)
def test_only_a_command_changes_what_ctrl_c_does(monkeypatch, program, arguments, expected):
  monkeypatch.setattr(sys, 'argv', arguments)
  monkeypatch.setattr(sys, 'orig_argv', [sys.executable, *program])
  assert interrupts.is_command('tvq_t5x') == expected


def test_no_folder_for_temporary_files_is_needed(tmp_path):
  lines = [
    'import tempfile',
    'def nowhere(): raise FileNotFoundError(2, "No usable temporary directory found")',
    'tempfile._get_default_tempdir = nowhere',
  ]
  command = _command(tmp_path, 'import tempfile; print(tempfile.gettempdir())')
  path = tmp_path / 'command.py'
  path.write_text('\n'.join([*lines, path.read_text()]))
  done = _in_shell(command, '')
  assert (done.returncode, done.stdout, done.stderr) == (0, '.\n', '')


def test_what_a_library_asks_for_is_a_line(tmp_path):
  done = _in_shell(_command(tmp_path, 'raise OSError("set MPLCONFIGDIR")'), '')
  assert (done.returncode, done.stderr) == (1, 'error: set MPLCONFIGDIR\n')


@pytest.mark.parametrize(
  ('before', 'shown'),
  [
    ('pass', True),
    ('logging.set_verbosity(logging.ERROR)', False),
    ('import logging as std; std.basicConfig()', False),
  ],
)
def test_the_log_is_shown_from_python_unless_it_is_set_up(before, shown):
  lines = [
    'from absl import logging',
    'from tvq_t5x.commands import command_line',
    before,
    'command_line.log_if_nobody_does()',
    'command_line.log_if_nobody_does()',
    # The log shows INFO of this package's files only.
    f'exec(compile("logging.info(1234567)", {command_line.__file__!r}, "exec"))',
  ]
  done = subprocess.run(
    [sys.executable, '-c', '\n'.join(lines)], capture_output=True, text=True, check=True
  )
  assert done.stderr.count('1234567') == shown
