"""Docstrings and names are plain English: CONTRIBUTING, "How we write"."""

import ast
import itertools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("diffalign", "pipelines", "rewards", "scripts", "benchmarks")
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
PLAIN: tuple[str, ...] = (
    "benchmarks",
    "diffalign/__init__",
    "diffalign/algorithms",
    "diffalign/autoencoders",
    "diffalign/cli",
    "diffalign/config",
    "diffalign/core",
    "diffalign/data",
    "diffalign/diffusion",
    "diffalign/geneval",
    "diffalign/latents",
    "diffalign/methods/dcgen",
    "diffalign/methods/online/forward_update",
    "diffalign/methods/online/health",
    "diffalign/methods/online/rollout",
    "diffalign/methods/online/trainer",
    "diffalign/methods/online/trajectory_update",
    "diffalign/methods/preference/precompute",
    "diffalign/methods/preference/trainer",
    "diffalign/methods/preference/update",
    "diffalign/quantization",
    "diffalign/schedulers",
    "diffalign/shapes/__init__",
    "diffalign/shapes/autoencoder",
    "diffalign/shapes/prompts",
    "diffalign/shapes/text",
    "diffalign/shapes/world",
    "diffalign/training/budget",
    "diffalign/training/caches",
    "diffalign/training/checkpoint",
    "diffalign/training/cost",
    "diffalign/training/denoise",
    "diffalign/training/forecast",
    "diffalign/training/inputs",
    "diffalign/training/memory",
    "diffalign/training/order",
    "diffalign/training/pace",
    "diffalign/training/rerun",
    "diffalign/training/run_folder",
    "diffalign/training/sums",
    "diffalign/training/trackers",
    "diffalign/training/trainer",
    "diffalign/tuning",
    "diffalign/types",
    "pipelines",
    "rewards",
    "scripts/launching",
    "scripts/shapes/autoencoder",
    "scripts/shapes/build",
    "scripts/shapes/clip",
    "scripts/shapes/everything",
    "scripts/shapes/measure",
    "scripts/train_",
)
"""Rooms whose texts hold; the others follow."""
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


def docstrings(tree):
    """All docstrings of a module with their lines, strings below assignments among them."""
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


def first_sentence(text):
    """The text up to its first full stop, without code."""
    text = " ".join(text.split())
    text = re.sub(r"`[^`]*`", "code", text)
    return re.split(r"(?<=[.!?])\s+(?=[A-Z(`])|(?<=:)\s", text)[0]


def faults(path):
    """What breaks a rule in one file: (line, rule, text)."""
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
            names.append(node.id)
        elif isinstance(node, ast.arg):
            names.append(node.arg)
        for name in names:
            if name.strip("_") in RELATIONS:
                yield node.lineno, "name", name


HELD = [p for p in FILES if p.relative_to(ROOT).as_posix().startswith(PLAIN or ("-",))]


@pytest.mark.parametrize("path", HELD, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_texts_are_plain(path):
    lines = [
        f"{path.relative_to(ROOT)}:{line}: {rule}: {text}" for line, rule, text in faults(path)
    ]
    assert not lines, "\n" + "\n".join(lines)


if __name__ == "__main__":
    for path in FILES:
        for line, rule, text in faults(path):
            print(f"{path.relative_to(ROOT)}:{line}: {rule}: {text}")
