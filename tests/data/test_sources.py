"""Where documents are from, by their names."""

import numpy as np
import pytest

from moe.data import sources


@pytest.mark.parametrize(
  ('names', 'by', 'expected'),
  [
    (['a.py', 'b.md', 'c/d.py'], 'suffix', ['.py', '.md', '.py']),
    (['a/x.py', 'b/y.py', 'z.py', 'a/b/w.py'], 'folder', ['a/', 'b/', './', 'a/']),
    (['a.py', 'b.py'], 'file', ['a.py', 'b.py']),
    (['a.jsonl#0', 'a.jsonl#1', 'b.jsonl.gz#0'], 'suffix', ['.jsonl', '.jsonl', '.jsonl.gz']),
    (['a.jsonl#0', 'b.jsonl#12'], 'file', ['a.jsonl', 'b.jsonl']),
    (['a.jsonl#0', 'a.jsonl#1'], '', ['all text', 'all text']),
    (['a.txt#end'], '', ['all text']),
    (['', ''], '', ['all text', 'all text']),
    (['x#y.py', 'z.py'], 'file', ['x#y.py', 'z.py']),
  ],
)
def test_documents_are_told_apart(names, by, expected):
  found = sources.group(names, np.ones(len(names), np.int64))
  assert found.by == by
  assert [found.names[i] for i in found.of_document] == expected


def test_the_smallest_of_many_are_one():
  names, sizes = [f'{i}.py' for i in range(30)], np.arange(30)
  found = sources.group(names, sizes)
  assert found.names == [*(f'{i}.py' for i in range(29, 18, -1)), sources.OTHERS]
  assert len(found.names) == sources.MOST
  assert [found.names[i] for i in found.of_document] == [sources.OTHERS] * 19 + [f'{i}.py' for i in range(19, 30)]


def test_names_that_are_no_text():
  found = sources.group(['a\udcff.py', 'b.py'], np.array([1, 2]))
  assert found.names == ['b.py', r'a\udcff.py']
