"""Rules of docstrings and names: CONTRIBUTING, "How we write".

Usage: python -m benchmarks.common.language
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("diffalign", "pipelines", "rewards", "scripts", "benchmarks")
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
MAX_WORDS = 15
FIRST_WORDS = re.compile(
    r"(of|as|those|that|this|these|they|it|its|what|which|who|whether|why|how|when|where|if|from|by|in|on|at|with|"
    r"for|to|besides?|such|so|and|or|not|nothing|none|the same|the others?|only|all that)\b",
    re.I,
)
RELATIONS = {
    *("found", "known", "kept", "asked", "drawn", "there", "ours", "wanted", "chosen", "here"),
    *("told", "given", "taken", "said", "meant"),
}
"""Names that keep a relation and drop the noun."""


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and text of all docstrings, strings below assignments among them."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and node.body:
            text = ast.get_docstring(node)
            if text:
                yield node.body[0].lineno, text
        body = getattr(node, "body", None)
        for first, second in itertools.pairwise(body if isinstance(body, list) else ()):
            is_text = isinstance(second, ast.Expr) and isinstance(second.value, ast.Constant)
            is_field = isinstance(first, ast.Assign | ast.AnnAssign)
            if is_field and is_text and isinstance(second.value.value, str):
                yield second.lineno, second.value.value


def first_sentence(text: str) -> str:
    """Return the text up to its first full stop, without code."""
    text = " ".join(text.split())
    text = re.sub(r"`[^`]*`", "code", text)
    return re.split(r"(?<=[.!?])\s+(?=[A-Z(`])|(?<=:)\s", text)[0]


def faults(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield (line, rule, text) of everything in a file that breaks a rule."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for line, text in docstrings(tree):
        sentence = first_sentence(text)
        if FIRST_WORDS.match(sentence):
            yield line, "first word", sentence
        if len(sentence.split()) > MAX_WORDS:
            yield line, f"{len(sentence.split())} words", sentence
        if not sentence.rstrip().endswith((".", ":", "!", "?", ")")):
            yield line, "full stop", sentence
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.append((node.lineno, node.id))
        elif isinstance(node, ast.arg):
            names.append((node.lineno, node.arg))
        for line, name in names:
            if name.strip("_") in RELATIONS:
                yield line, "name", name


def main() -> None:
    """Print everything that breaks a rule."""
    for path in FILES:
        for line, rule, text in faults(path):
            print(f"{path.relative_to(ROOT)}:{line}: {rule}: {text}")


if __name__ == "__main__":
    main()
