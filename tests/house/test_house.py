"""The house: who may import whom, and that what is packaged is what is there."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = {
    "diffalign.pipelines": "pipelines",
    "diffalign.rewards": "rewards",
    "diffalign.scripts": "scripts",
}

# room -> prefixes of diffalign that it must not import
SURFACE = ("cli",)
FORBIDDEN = {
    "diffalign/core": ("",),
    "diffalign/algorithms": (
        *("pipelines", "rewards", "training", "methods", "evaluation", "shapes", "data"),
        *SURFACE,
    ),
    "diffalign/data": ("pipelines", "rewards", "training", "methods", "evaluation", *SURFACE),
    "diffalign/evaluation": ("training", "methods", "rewards", *SURFACE),
    "diffalign/judges": (
        *("pipelines", "rewards", "training", "methods", "evaluation", "algorithms", "data"),
        *("config", "lora", *SURFACE),
    ),
    "diffalign/training": ("shapes", "methods", *SURFACE),
    "diffalign/methods": ("shapes", "tuning", *SURFACE),
    "diffalign/methods/online": ("methods.preference", "methods.distillation", "methods.dcgen"),
    "diffalign/methods/preference": ("methods.online", "methods.distillation", "methods.dcgen"),
    "diffalign/methods/distillation": ("methods.online", "methods.preference", "methods.dcgen"),
    "diffalign/methods/dcgen": ("methods.online", "methods.preference", "methods.distillation"),
    "diffalign/autoencoders": ("pipelines", "rewards", "methods", "tuning", *SURFACE),
    "diffalign/schedulers": (
        *("pipelines", "rewards", "training", "methods", "evaluation", "algorithms", "data"),
        *("config", "tuning", "quantization", *SURFACE),
    ),
    "diffalign/quantization": (
        *("pipelines", "rewards", "training", "methods", "evaluation", "algorithms", "data"),
        *("config", "tuning", "schedulers", *SURFACE),
    ),
    "diffalign/latents": (
        *("pipelines", "rewards", "training", "methods", "evaluation", "algorithms", "data"),
        *("config", "tuning", "schedulers", "quantization", *SURFACE),
    ),
    "diffalign/acceleration": (
        *("rewards", "training", "methods", "evaluation", "algorithms", "data", "config"),
        *("tuning", "schedulers", "shapes", *SURFACE),
    ),
    "diffalign/optimisation": (
        *("training", "methods", "rewards", "algorithms", "schedulers", "shapes", *SURFACE),
    ),
    "diffalign/web": (
        *("pipelines", "rewards", "training", "methods", "evaluation", "algorithms", "data"),
        *("config", "serving", "acceleration", *SURFACE),
    ),
    "diffalign/serving": (
        *("rewards", "training", "methods", "evaluation", "algorithms", "data", "config"),
        *("tuning", "schedulers", "shapes", *SURFACE),
    ),
    "diffalign/composition": SURFACE,
    "diffalign/tuning": ("training", "methods", "rewards", "algorithms", "shapes", *SURFACE),
    "pipelines": ("rewards", "training", "methods", "evaluation", "algorithms", "data", "config"),
    "rewards": (
        *("pipelines", "training", "methods", "evaluation", "algorithms", "data", "config"),
        *("lora", "serving"),
    ),
}
# files at the bottom of the house -> all that they may import of it
ALLOWED = {
    "diffalign/types.py": (),
    "diffalign/diffusion/paths.py": (),
    "diffalign/core/seeds.py": (),
    "diffalign/core/precision.py": (),
    "diffalign/geneval/rules.py": (),
    "diffalign/config/checks.py": ("core.errors", "core.nearest"),
    "diffalign/config/fields.py": (),
    "diffalign/config/base.py": ("config.checks", "config.fields", "config.model", "core.text"),
    "diffalign/config/model.py": ("config.checks", "config.fields"),
    "diffalign/config/methods.py": ("config.checks", "core.nearest"),
    "diffalign/config/algorithms.py": ("config.checks", "config.base", "config.online"),
    "diffalign/config/fdfo.py": ("config.checks", "config.algorithms", "config.online"),
    "diffalign/config/online.py": (
        *("config.checks", "config.fields", "config.base", "config.algorithms"),
    ),
    "diffalign/config/preference.py": ("config.checks", "config.fields", "config.base"),
    "diffalign/config/distillation.py": ("config.checks", "config.fields", "config.base"),
    "diffalign/config/latents.py": (
        *("config.checks", "config.fields", "config.base", "config.model"),
    ),
    "pipelines/dcgen.py": (),
    "diffalign/config/files.py": ("config.checks", "core"),
    "diffalign/config/loading.py": ("scripts", "config", "core"),
    "diffalign/lora/policies.py": ("core.errors",),
    "diffalign/lora/files.py": ("core", "lora"),
    "diffalign/lora/formats.py": ("core", "lora"),
    "diffalign/lora/configuration.py": ("core",),
    "diffalign/lora/names.py": (),
    "diffalign/lora/stacks.py": ("core", "lora"),
    "diffalign/lora/source.py": ("core",),
    "diffalign/core/errors.py": (),
    "diffalign/core/files.py": ("core.errors",),
    "diffalign/core/locks.py": ("core.errors", "core.files"),
    "diffalign/core/interruption.py": (),
    "diffalign/core/processes.py": ("core",),
    "diffalign/shapes/world.py": ("geneval.rules",),
    "diffalign/shapes/prompts.py": ("geneval.rules", "shapes.world"),
    "diffalign/shapes/verifier.py": ("geneval.rules", "shapes.world"),
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
            allowed = room == "diffalign/core" and name.startswith("core")
            wrong = name.startswith(FORBIDDEN[room]) and not allowed
            assert not wrong, f"{path.relative_to(ROOT)} imports {name}"


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
