"""Docstrings and names are plain English: CONTRIBUTING, "How we write"."""

import pytest

from benchmarks.common.language import FILES, ROOT, faults


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_texts_are_plain(path):
    lines = [
        f"{path.relative_to(ROOT)}:{line}: {rule}: {text}" for line, rule, text in faults(path)
    ]
    assert not lines, "\n" + "\n".join(lines)
