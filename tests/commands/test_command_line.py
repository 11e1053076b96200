"""What the commands share: what C++ libraries print while they load."""

import os
import signal
import subprocess
import sys

_PRINTED = """\
WARNING: All log messages before absl::InitializeLog() is called are written to STDERR
I0000 00:00:1795655232.868908   22445 cudart_stub.cc:31] Could not find cuda drivers.
E0000 00:00:1795655313.902054   24690 cuda_platform.cc:52] failed call to cuInit: INTERNAL: none
"""


def _run(*lines, encoding='utf-8'):
  program = '\n'.join(
    (
      'import os',
      'from tvq_t5x.commands import command_line',
      f'printed = {_PRINTED!r}.encode()',
      'with command_line.quiet_imports():',
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


def test_what_a_terminal_can_not_show_is_replaced():
  shown = "print('caf\\u00e9 \\udcff \\ufffd')"
  done = _run("  command_line.prepare(['sample'])", shown, encoding='ascii')
  assert (done.returncode, done.stdout) == (0, 'caf? ? ?\n')
