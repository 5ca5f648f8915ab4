"""Print the lowest versions that pyproject.toml allows, as constraints of pip."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def lowest(project: dict) -> list[str]:
    """Return `name==version` for every requirement with a lower bound, extras included."""
    extras = project["optional-dependencies"].values()
    requirements = [*project["dependencies"], *(r for extra in extras for r in extra)]
    bounds = (re.match(r"([\w.-]+)>=([\w.]+)", requirement) for requirement in requirements)
    return sorted({"==".join(bound.groups()) for bound in bounds if bound})


if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    print("\n".join(lowest(project)))
