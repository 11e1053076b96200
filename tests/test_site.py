"""The pages: links lead somewhere in the plain view of files, and the site is built of them."""

import html.parser
import pathlib
import re
import subprocess
import sys
import urllib.parse

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [*sorted((ROOT / 'docs').glob('*.md')), *sorted(ROOT.glob('*.md'))]
_LINK = re.compile(r'\]\(([^)\s]+)\)')
_CODE = re.compile(r'^```.*?^```$', re.MULTILINE | re.DOTALL)


def _text(path):
  return _CODE.sub('', path.read_text(encoding='utf-8'))


def _anchors(path):
  """Of its headings, as GitHub makes them."""
  titles = re.findall(r'^#+ (.*)$', _text(path), re.MULTILINE)
  return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in titles}


@pytest.mark.quick
@pytest.mark.parametrize('page', PAGES, ids=lambda path: path.name)
def test_links_lead_to_files(page):
  for link in _LINK.findall(_text(page)):
    place, _, anchor = link.partition('#')
    if ':' in place:
      continue
    target = (page.parent / place).resolve() if place else page
    assert target.exists(), link
    assert target.is_relative_to(ROOT), link
    assert not anchor or anchor in _anchors(target), link


@pytest.mark.quick
def test_every_page_is_in_the_navigation():
  def pages(entry):
    if isinstance(entry, str):
      return {entry}
    return set().union(*map(pages, entry.values() if isinstance(entry, dict) else entry))

  nav = pages(yaml.safe_load((ROOT / 'mkdocs.yml').read_text())['nav'])
  assert nav == {path.name for path in (ROOT / 'docs').glob('*.md')} | {'index.md'}


class _Site(html.parser.HTMLParser):
  """The links and the anchors of a page."""

  def __init__(self, path):
    super().__init__()
    self.links, self.anchors = set(), set()
    self.feed(path.read_text(encoding='utf-8'))

  def handle_starttag(self, tag, attrs):
    found = dict(attrs)
    self.anchors |= {found[x] for x in ('id', 'name') if x in found}
    self.links |= {found[x] for x in ('href', 'src') if found.get(x)}


@pytest.mark.slow
def test_the_site_is_built(tmp_path):
  pytest.importorskip('mkdocs', reason='mkdocs is not installed: the site')
  command = [sys.executable, '-m', 'mkdocs', 'build', '--strict', '-q', '-d', str(tmp_path)]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  pages = {path: _Site(path) for path in tmp_path.rglob('*.html') if path.name != '404.html'}
  names = {path.name for path in pages}
  assert {'index.html', 'api.html', 'own_data.html', 'long_context.html', 'SECURITY.html'} <= names
  for path, page in pages.items():
    for link in page.links:
      parts = urllib.parse.urlsplit(link)
      if not parts.scheme and not parts.netloc:
        target = (path.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else path
        assert target.is_relative_to(tmp_path) and target.exists(), f'{path.name}: {link}'
        if parts.fragment and target in pages:
          anchors = pages[target].anchors
          assert urllib.parse.unquote(parts.fragment) in anchors, f'{path.name}: {link}'
  api = (tmp_path / 'api.html').read_text()
  for name in ('train_model', 'LanguageModel', 'TransformerConfig', 'repeat', 'ema_decay'):
    assert f'{name}' in api
