"""Report of an acceleration: what is in force, what is not and why, and what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.acceleration.rules import Dropped
from diffalign.acceleration.schedule import Schedule
from diffalign.core.errors import UsageError
from diffalign.core.files import write_text

if TYPE_CHECKING:
    from diffalign.acceleration.checking import Reference
    from diffalign.acceleration.declared import Declared
    from diffalign.acceleration.undo import Undo

PLAN = "acceleration.json"
"""Name of a plan's file in a pipeline's folder."""
FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """Settings of an acceleration that a folder stores.

    Attributes:
        pipeline: class of the pipeline.
        denoiser: fingerprint of the denoiser's weights, before and after quantisation.
        scheduler: class of the scheduler.
        options: value of each option in force.
        steps: number of steps that it is made for.
        sizes: sizes (height, width) in pixels that it is made for.
        schedules: schedules of the static cache.
        batch_sizes: numbers of images in a call that it is made for.
        scheduler_settings: digest of the scheduler's settings.
        lora_rank: largest rank of the LoRAs that are swapped without compiling again, or None.
        measured: figures of the check.
        versions: versions of the packages.
        device: type of the device.
    """

    pipeline: str
    denoiser: tuple[str, ...]
    scheduler: str
    options: Mapping[str, Any]
    steps: int
    sizes: tuple[tuple[int, int], ...]
    schedules: tuple[Schedule, ...] = ()
    batch_sizes: tuple[int, ...] = (1,)
    scheduler_settings: str = ""
    lora_rank: int | None = None
    measured: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    device: str = "cpu"

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        record = asdict(self)
        record["schedules"] = [s.to_json() for s in self.schedules]
        return {"format": FORMAT, **record}

    def save(self, folder: str | Path) -> Path:
        """Write the plan into a pipeline's folder, and return its file."""
        file = Path(folder) / PLAN
        write_text(file, json.dumps(self.to_json(), indent=1) + "\n")
        return file

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan from its file or its folder.

        Raises:
            UsageError: the file is missing, damaged or of a later format.
        """
        file = Path(path)
        file = file / PLAN if file.is_dir() else file
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            version = record.pop("format")
            if version != FORMAT:
                raise UsageError(
                    f"preset={str(path)!r}: the plan has format {version}, and this version of diffalign reads "
                    f"{FORMAT}. Update diffalign, or accelerate anew."
                )
            schedules = tuple(Schedule.from_json(s) for s in record.pop("schedules"))
            sizes = tuple((int(h), int(w)) for h, w in record.pop("sizes"))
            denoiser = tuple(record.pop("denoiser"))
            # plans of earlier versions have none
            batches = tuple(int(n) for n in record.pop("batch_sizes", (1,)))
            return cls(
                denoiser=denoiser, sizes=sizes, schedules=schedules, batch_sizes=batches, **record
            )
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(
                f"preset={str(path)!r}: this is neither a preset nor the file of a plan ({error}). Choose a preset, or "
                f"the path of {PLAN}."
            ) from error


@dataclass
class Acceleration:
    """Report of the acceleration in force on a pipeline.

    Attributes:
        preset: name of the preset, or "plan".
        plan: settings in force.
        dropped: options that are not in force.
        reasons: what an option covers, or why "auto" chose its value.
        measured: seconds, ratio and PSNR of the check; empty without one.
    """

    preset: str
    plan: Plan
    dropped: list[Dropped]
    undo: Undo
    reference: Reference | None = None
    declared: Declared | None = None
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def applied(self) -> dict[str, Any]:
        """Value of each option in force, in the order of application."""
        return dict(self.plan.options)

    @property
    def measured(self) -> dict[str, float]:
        """Figures of the check; empty without one."""
        return dict(self.plan.measured)

    def check(self) -> list[str]:
        """Draw the images of the check again, and return what is wrong with them.

        Raises:
            UsageError: the acceleration was made without a check.
        """
        return self.need_reference().problems()

    def need_reference(self) -> Reference:
        """Return the images of the check.

        Raises:
            UsageError: the acceleration was made without a check.
        """
        if self.reference is None:
            raise UsageError(
                "check=0: there are no images to compare with. Call `accelerate` with check=2."
            )
        return self.reference

    def save(self, folder: str | Path) -> Path:
        """Write the plan into a pipeline's folder, from which `diffalign.load` puts it in force."""
        return self.plan.save(folder)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        dropped = [asdict(d) for d in self.dropped]
        choice = {"preset": self.preset, "dropped": dropped, "reasons": dict(self.reasons)}
        return {**choice, **self.plan.to_json()}

    def __str__(self) -> str:
        rows = [f"preset     {self.preset}"]
        for name, value in self.applied.items():
            reason = f" ({self.reasons[name]})" if name in self.reasons else ""
            rows.append(f"applied    {name} = {value}{reason}")
        for schedule in self.plan.schedules:
            rows.append(
                f"           {len(schedule.computed)} of {schedule.steps} steps are computed"
            )
        if not self.applied:
            rows.append("applied    nothing")
        for option in self.dropped:
            rows.append(f"dropped    {option.option}: {option.why}")
            rows.append(f"           what helps: {option.remedy}")
        rows += [f"measured   {name} = {value:.4g}" for name, value in self.measured.items()]
        return "\n".join(rows)
