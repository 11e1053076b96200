"""Writes the table of the settings of `TransformerConfig` into docs/model.md."""

import dataclasses
import enum
import inspect
import pathlib
import re

from tvq_t5x.network.config import TransformerConfig

PAGE = pathlib.Path(__file__).parent / 'model.md'
_BEGIN, _END = '<!-- settings: python docs/settings_table.py -->\n', '<!-- end of settings -->\n'


def table() -> str:
  """A line for each field: name, default, what it is."""
  doc = inspect.getdoc(TransformerConfig) or ''
  entries = re.split(r'\n  (?=\w+: )', '\n' + doc.partition('Attributes:\n')[2])
  texts = dict(
    re.sub(r'\s+', ' ', entry).strip().split(': ', 1) for entry in entries if entry.strip()
  )
  lines = ['| setting | default | |', '| --- | --- | --- |']
  for field in dataclasses.fields(TransformerConfig):
    text = texts[field.name]
    if inspect.isclass(field.type) and issubclass(field.type, enum.Enum):
      values = ', '.join(f"`'{member.value}'`" for member in field.type)
      text = re.sub(r'see `\w+`', values, text)
    lines.append(f'| `{field.name}` | {_default(field)} | {text} |')
  return '\n'.join(lines) + '\n'


def _default(field: dataclasses.Field) -> str:
  value = field.default
  if value is dataclasses.MISSING:
    return ''
  value = value.value if isinstance(value, enum.Enum) else getattr(value, '__name__', value)
  return f'`{value!r}`'


def page(text: str) -> str:
  """The page with the table as it is now."""
  before, _, rest = text.partition(_BEGIN)
  return before + _BEGIN + table() + _END + rest.partition(_END)[2]


if __name__ == '__main__':
  PAGE.write_text(page(PAGE.read_text(encoding='utf-8')), encoding='utf-8')
