"""What the site does with links that lead out of docs/, for mkdocs.yml.

Pages link to files of the repository, `../SECURITY.md`, as the plain file view wants it. On the
site such a file lies in `repository/`, and README.md is its first page.
"""

import pathlib
import posixpath
import re
from collections.abc import Callable

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).parents[1]
_LINK = re.compile(r'(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))')
_CODE = re.compile(r'(^```.*?^```$)', re.MULTILINE | re.DOTALL)
_README, _REPOSITORY = 'README.md', 'repository/'


def on_files(files: Files, config: MkDocsConfig) -> Files:
  """Adds README.md as the first page, and the files that pages link to."""
  left = [_README, *(f'docs/{path.name}' for path in (ROOT / 'docs').glob('*.md'))]
  seen = set(left)
  while left:
    path = left.pop()
    if not (ROOT / path).is_file():
      raise PluginError(f'A page links to {path}, which is no file of the repository.')
    if not path.startswith('docs/'):
      files.append(File.generated(config, _on_site(path), abs_src_path=str(ROOT / path)))
    left += sorted(_linked(path) - seen)
    seen |= _linked(path)
  return files


def on_page_markdown(markdown: str, page: Page, **unused: object) -> str:
  """Lets links lead to where `on_files` has put things."""
  place = page.file.src_uri

  def moved(link: str) -> str:
    return posixpath.relpath(_on_site(_resolved(_source(place), link)), posixpath.dirname(place))

  return _map_links(markdown, moved)


def _on_site(path: str) -> str:
  """The place on the site of a file of the repository."""
  if path == _README:
    return 'index.md'
  return path.removeprefix('docs/') if path.startswith('docs/') else _REPOSITORY + path


def _source(place: str) -> str:
  """The inverse of `_on_site`."""
  if place == 'index.md':
    return _README
  in_docs = not place.startswith(_REPOSITORY)
  return f'docs/{place}' if in_docs else place.removeprefix(_REPOSITORY)


def _resolved(page: str, link: str) -> str:
  return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def _linked(page: str) -> set[str]:
  """The files that a page links to, by their paths in the repository."""
  if not page.endswith('.md'):
    return set()
  found = set()
  _map_links((ROOT / page).read_text(encoding='utf-8'), lambda link: found.add(link) or link)
  return {_resolved(page, link) for link in found}


def _map_links(markdown: str, new: Callable[[str], str]) -> str:
  """Changes the links of a page that are no addresses, outside of code."""
  parts = _CODE.split(markdown)
  parts[::2] = [
    _LINK.sub(lambda match: match[1] + new(match[2]) + match[3], part) for part in parts[::2]
  ]
  return ''.join(parts)
