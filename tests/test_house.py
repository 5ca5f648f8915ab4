"""The house: who may import whom, and that what is packaged is what is there."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {
    "diffalign.pipelines": "pipelines",
    "diffalign.rewards": "rewards",
    "diffalign.scripts": "scripts",
}

# room -> prefixes of diffalign that it must not import
FORBIDDEN = {
    "diffalign/algorithms": ("pipelines", "rewards", "training", "evaluation", "shapes", "data"),
    "diffalign/data": ("pipelines", "rewards", "training", "evaluation"),
    "diffalign/bench": ("cli", "commands"),
    "diffalign/evaluation": ("training", "rewards", "cli", "commands"),
    "diffalign/training": ("cli", "commands", "shapes", "bench"),
    "diffalign/schedulers": (
        *("pipelines", "rewards", "training", "evaluation", "algorithms", "data", "config"),
        *("tuning", "quantization", "commands", "cli", "bench"),
    ),
    "diffalign/quantization": (
        *("pipelines", "rewards", "training", "evaluation", "algorithms", "data", "config"),
        *("tuning", "schedulers", "commands", "cli", "bench"),
    ),
    "diffalign/latents": (
        *("pipelines", "rewards", "training", "evaluation", "algorithms", "data", "config"),
        *("tuning", "schedulers", "quantization", "commands", "cli", "bench"),
    ),
    "diffalign/tuning": ("training", "rewards", "algorithms", "shapes", "commands", "cli", "bench"),
    "pipelines": ("rewards", "training", "evaluation", "algorithms", "data", "config"),
    "rewards": ("pipelines", "training", "evaluation", "algorithms", "data", "config", "lora"),
}
# files at the bottom of the house -> all that they may import of it
ALLOWED = {
    "diffalign/types.py": (),
    "diffalign/noise.py": (),
    "diffalign/seeds.py": (),
    "diffalign/precision.py": (),
    "diffalign/geneval.py": (),
    "diffalign/config/checks.py": ("errors",),
    "diffalign/config/schema.py": ("config.checks",),
    "diffalign/config/preference.py": ("config.checks", "config.schema"),
    "diffalign/config/distillation.py": ("config.checks", "config.schema"),
    "diffalign/config/latents.py": ("config.checks", "config.schema"),
    "pipelines/dcgen.py": (),
    "diffalign/config/loading.py": ("scripts", "config"),
    "diffalign/lora.py": ("errors",),
    "diffalign/lora_formats.py": ("errors",),
    "diffalign/errors.py": (),
    "diffalign/processes.py": ("errors",),
    "diffalign/shapes/world.py": ("geneval",),
    "diffalign/shapes/prompts.py": ("geneval", "shapes.world"),
    "diffalign/shapes/verifier.py": ("geneval", "shapes.world"),
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return {name.removeprefix("diffalign.") for name in found if name.startswith("diffalign.")}


@pytest.mark.parametrize("room", FORBIDDEN)
def test_rooms_keep_to_their_doors(room):
    for path in (ROOT / room).rglob("*.py"):
        for name in imports(path):
            assert not name.startswith(FORBIDDEN[room]), f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("file", ALLOWED)
def test_the_bottom_of_the_house_stands_alone(file):
    for name in imports(ROOT / file):
        assert name.startswith(ALLOWED[file] or ("-",)), f"{file} imports {name}"


def test_draccus_has_one_user():
    users = [
        p.relative_to(ROOT).as_posix()
        for top in ("diffalign", "pipelines", "rewards", "scripts")
        for p in (ROOT / top).rglob("*.py")
        if "draccus"
        in {
            n
            for node in ast.walk(ast.parse(p.read_text()))
            if isinstance(node, ast.Import)
            for n in (a.name for a in node.names)
        }
    ]
    assert users == ["diffalign/config/loading.py"]


def test_packages_are_those_of_the_tree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    found = {
        ".".join(p.parent.relative_to(ROOT).parts)
        for p in (ROOT / "diffalign").rglob("__init__.py")
    }
    for package, folder in ROOMS.items():
        found |= {
            ".".join((package, *p.parent.relative_to(ROOT / folder).parts))
            for p in (ROOT / folder).rglob("__init__.py")
        }
    assert listed == found


def test_files_stay_readable():
    for top in ("diffalign", "pipelines", "rewards", "scripts"):
        for path in (ROOT / top).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 500, path


def test_nothing_needs_torchvision():
    for top in ("diffalign", "pipelines", "rewards", "scripts"):
        for path in (ROOT / top).rglob("*.py"):
            assert "torchvision" not in path.read_text(), path
