"""Make all checkpoints of Shapes in the order of their dependencies.

Usage:

    python -m diffalign.scripts.shapes.everything                                    # a night on two CPU cores
    python -m diffalign.scripts.shapes.everything --device cuda --jobs 3             # minutes on one GPU

A complete checkpoint is skipped; delete its folder to make it again. Every stage is a process of its own and resumes an
interrupted one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from diffalign.core.errors import UsageError
from diffalign.scripts.shapes.build import forget_places
from diffalign.shapes import CHECKPOINTS

PYTHON = (sys.executable, "-m")
BASES = ("sd3", "flux", "sd")


@dataclass(frozen=True)
class Stage:
    """One checkpoint: its folder, the commands that make it, and the stages before it."""

    name: str
    folder: Path
    commands: tuple[tuple[str, ...], ...]
    needs: tuple[str, ...] = ()


def base_stage(family: str, *, out: Path, work: Path, device: str) -> Stage:
    """Return the stage of a base model, of the autoencoders ("vae"), or of "clip"."""
    name = f"shapes-{family}"
    # The bases share an autoencoder, which is a part of their checkpoints.
    folder = work / "vae" if family == "vae" else out / name
    command = ("diffalign.scripts.shapes.train", family, f"--work={work}", f"--out={folder}")
    needs = ("shapes-vae",) if family in BASES else ()
    return Stage(name, folder, ((*PYTHON, *command, f"--device={device}"),), needs)


def student_stage(name: str, base: str, *, out: Path, work: Path, merge: tuple[str, ...]) -> Stage:
    """Return the stage of a few-step student: distil its base, then merge the LoRA."""
    recipe = f"distill-{base}"
    run = work / recipe
    train = (
        *("diffalign", "train", recipe),
        *(f"--model.name={out / base}", f"--output_dir={run}"),
    )
    finish = (
        *("diffalign", "merge", f"--model={out / base}", f"--lora={run / 'lora'}"),
        *(f"--scheduler={run / 'scheduler'}", f"--output_dir={out / name}", *merge),
    )
    return Stage(name, out / name, ((*PYTHON, *train), (*PYTHON, *finish)), needs=(base,))


def stages(*, out: Path, work: Path, device: str) -> list[Stage]:
    """Return all stages in order."""
    folders = {"out": out, "work": work}
    return [
        base_stage("vae", device="cpu", **folders),
        base_stage("clip", device="cpu", **folders),
        *(base_stage(family, device=device, **folders) for family in BASES),
        base_stage("dc", device="cpu", **folders),
        student_stage(
            "shapes-flux-schnell", "shapes-flux", merge=("--fold_guidance=3.5",), **folders
        ),
        student_stage("shapes-sd-lcm", "shapes-sd", merge=(), **folders),
    ]


def is_whole(folder: Path) -> bool:
    """Return whether a checkpoint is complete. Complete folders are renamed into place."""
    return any((folder / file).is_file() for file in ("model_index.json", "config.json"))


def make(stage: Stage) -> None:
    """Run the commands of a stage, unless its checkpoint is complete.

    Raises:
        UsageError: a command failed; its output is above.
    """
    if is_whole(stage.folder):
        print(f"{stage.name}: already made", flush=True)
        return
    for command in stage.commands:
        print(f"{stage.name}: {' '.join(command)}", flush=True)
        code = subprocess.run(command, check=False).returncode
        if code:
            raise UsageError(
                f"{stage.name}: {' '.join(command)} ended with {code}. Read its output above; the same command resumes."
            )
    if stage.folder.is_dir():
        forget_places(stage.folder)


def make_all(plan: list[Stage], *, jobs: int) -> None:
    """Run the stages after those that they need, at most `jobs` at a time."""
    waves: list[list[Stage]] = []
    done: set[str] = set()
    remaining = list(plan)
    while remaining:
        wave = [stage for stage in remaining if done.issuperset(stage.needs)]
        waves.append(wave)
        done |= {stage.name for stage in wave}
        remaining = [stage for stage in remaining if stage not in wave]
    with ThreadPoolExecutor(jobs) as pool:
        for wave in waves:
            for result in [pool.submit(make, stage) for stage in wave]:
                result.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=CHECKPOINTS,
        help="folder of the checkpoints; default: %(default)s",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/shapes"),
        help="folder of runs; default: %(default)s",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda; default: %(default)s")
    parser.add_argument("--jobs", type=int, default=1, help="stages that run at the same time")
    parser.add_argument(
        "--only", nargs="+", default=None, metavar="NAME", help="checkpoints to make; default: all"
    )
    args = parser.parse_args()
    plan = stages(out=args.out, work=args.work, device=args.device)
    if args.only is not None:
        unknown = sorted(set(args.only) - {stage.name for stage in plan})
        if unknown:
            names = ", ".join(stage.name for stage in plan)
            parser.error(f"--only={' '.join(unknown)}: no such checkpoint. Choose from {names}.")
        plan = [
            replace(stage, needs=tuple(set(stage.needs) & set(args.only)))
            for stage in plan
            if stage.name in args.only
        ]
    try:
        make_all(plan, jobs=args.jobs)
    except UsageError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
