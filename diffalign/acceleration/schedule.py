"""Static schedule of a cache: which steps are computed, and the weights of the others.

A schedule is chosen once from trajectories of a few prompts. After that it reads no tensor, so that an image depends on
its own row only.

An extrapolation is linear in the last two computed outputs, plus two corrections whose weights are fitted by least
squares: one along the difference of those outputs, one along the change of the noisy latents. The second one sees how
the trajectory bends. Weights are fitted on the plain trajectories, because a trajectory with errors would spoil the
fits of all later steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from diffalign.acceleration.request import is_same
from diffalign.core.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

FORMAT = 1
HISTORY = 2
"""Number of computed steps that an extrapolation uses."""
LONGEST = 6
"""Largest number of steps in a row that are extrapolated."""
RIDGE = 1e-2
"""Penalty of a correction, relative to the mean square of its feature."""


@dataclass(frozen=True)
class Weights:
    """Weights of one extrapolation: of outputs, of inputs, and of the present input.

    The first of `outputs` and `inputs` belongs to the last computed step. Both are of equal length, or `inputs` is
    empty where a denoiser's input and output differ in shape.
    """

    outputs: tuple[float, ...]
    inputs: tuple[float, ...] = ()
    present: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """Steps to compute, and weights for each other step, for one request of noise levels.

    Attributes:
        request: arguments of the scheduler's `set_timesteps`, noise levels and settings that it is made for.
        steps: number of steps.
        computed: steps that are computed, in ascending order.
        weights: weights by step, then by forward within the step.
        measured: figures of the calibration.
    """

    request: Mapping[str, Any]
    steps: int
    computed: tuple[int, ...]
    weights: Mapping[int, tuple[Weights, ...]] = field(default_factory=dict)
    measured: Mapping[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Number of steps per computed step, a bound of the gain."""
        return self.steps / len(self.computed)

    def is_for(self, request: Mapping[str, Any]) -> bool:
        """Return whether the schedule is made for a request."""
        return is_same(self.request, request)

    def to_json(self) -> dict[str, Any]:
        """Return the schedule as JSON values."""
        return {
            "format": FORMAT,
            "request": dict(self.request),
            "steps": self.steps,
            "computed": list(self.computed),
            "weights": {str(i): [asdict(w) for w in ws] for i, ws in self.weights.items()},
            "measured": dict(self.measured),
        }

    @classmethod
    def from_json(cls, record: Any) -> Schedule:
        """Read a schedule.

        Raises:
            UsageError: the record is damaged, or of a later format.
        """
        try:
            if record["format"] != FORMAT:
                raise UsageError(
                    f"cache: the schedule has format {record['format']}, and this version of diffalign reads {FORMAT}. "
                    "Update diffalign, or calibrate the cache again."
                )
            weights = {
                int(i): tuple(
                    Weights(
                        tuple(map(float, w["outputs"])),
                        tuple(map(float, w["inputs"])),
                        float(w["present"]),
                    )
                    for w in ws
                )
                for i, ws in record["weights"].items()
            }
            schedule = cls(
                dict(record["request"]),
                int(record["steps"]),
                tuple(map(int, record["computed"])),
                weights,
                dict(record["measured"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(
                f"cache: the schedule is damaged ({error!r}). Calibrate the cache again."
            ) from error
        return schedule.checked()

    def checked(self) -> Schedule:
        """Return the schedule if every step is computed or has weights; raise UsageError if not."""
        steps = set(self.computed) | set(self.weights)
        in_order = list(self.computed) == sorted(set(self.computed))
        if steps != set(range(self.steps)) or not in_order or 0 not in self.computed:
            raise UsageError(
                f"cache: the schedule is damaged: of its {self.steps} steps some are neither computed nor have "
                "weights. Calibrate the cache again."
            )
        return self


@dataclass(frozen=True)
class Moments:
    """Inner products of a trajectory's outputs and inputs, and the size of each step.

    Attributes:
        grams: one (2N, 2N) for each forward within a step: inner products of its N outputs and then its N inputs.
        sizes: (N,), factor from an error of a step's output to an error of the latents.
        inputs: whether inputs may be features.
    """

    grams: tuple[np.ndarray, ...]
    sizes: np.ndarray
    inputs: bool = True

    @property
    def steps(self) -> int:
        """Number N of steps."""
        return len(self.sizes)


def extrapolations(
    gram: np.ndarray, last: np.ndarray, before: np.ndarray, step: np.ndarray, *, inputs: bool
) -> np.ndarray:
    """Return weights (P, 2N) of all outputs and inputs for P extrapolations.

    Args:
        gram: (2N, 2N), inner products.
        last: (P,), the last computed steps.
        before: (P,), the computed steps before those.
        step: (P,), the steps to extrapolate to.
        inputs: whether inputs may be features.
    """
    import numpy as np

    steps, rows = len(gram) // 2, np.arange(len(last))
    slope = (step - last) / (last - before)
    line = np.zeros((len(rows), 2 * steps))
    line[rows, last] = 1 + slope
    line[rows, before] = -slope
    basis = np.zeros((len(rows), 1 + inputs, 2 * steps))
    basis[rows, 0, last], basis[rows, 0, before] = 1, -1
    if inputs:
        basis[rows, 1, steps + step], basis[rows, 1, steps + last] = 1, -1
    residual = -line
    residual[rows, step] += 1
    products = basis @ gram
    square = products @ basis.transpose(0, 2, 1)
    diagonal = np.einsum("pjj->pj", square)
    # a feature that is zero everywhere gets the weight 0
    square = square + np.einsum("pj,jk->pjk", RIDGE * diagonal + 1e-30, np.eye(1 + inputs))
    weights = np.linalg.solve(square, products @ residual[:, :, None])
    result: np.ndarray = line + np.einsum("pj,pjn->pn", weights[..., 0], basis)
    return result


def weights_for(moments: Moments, computed: Sequence[int]) -> dict[int, tuple[Weights, ...]]:
    """Return the weights of each step that is not computed, by forward."""
    import numpy as np

    weights: dict[int, tuple[Weights, ...]] = {}
    n = moments.steps
    for step in sorted(set(range(n)) - set(computed)):
        last, before = [k for k in computed if k < step][:-3:-1]
        places = [np.array([k]) for k in (last, before, step)]
        rows = [extrapolations(g, *places, inputs=moments.inputs)[0] for g in moments.grams]
        weights[step] = tuple(
            Weights(
                (float(row[last]), float(row[before])),
                (float(row[n + last]), float(row[n + before])) if moments.inputs else (),
                float(row[n + step]),
            )
            for row in rows
        )
    return weights


def choose(moments: Moments, computed: int, *, tilt: float = 1.0) -> tuple[int, ...]:
    """Return the best set of steps to compute, by dynamic programming.

    The cost of a set is the sum over its gaps of the squared error that a gap leaves in the latents.

    Args:
        computed: number of steps to compute.
        tilt: weight of an error at the first step relative to one at the last.

    Raises:
        UsageError: the number is out of range.
    """
    import numpy as np

    steps, least = moments.steps, fewest(moments.steps)
    if not least <= computed <= steps:
        raise UsageError(
            f"computed={computed}: of {steps} steps between {least} and {steps} can be computed. Choose one of these."
        )
    costs = _gap_costs(moments) * tilt ** (2 - 2 * np.arange(steps) / max(1, steps - 1))
    # best[b, c]: least cost of a set whose last two steps are b < c
    best = np.full((steps, steps), np.inf)
    best[0, 1] = 0.0
    origins = []
    for _ in range(computed - HISTORY):
        following = np.full((steps, steps), np.inf)
        origin = np.zeros((steps, steps), dtype=int)
        for c in range(1, steps):
            for gap in range(min(LONGEST, steps - c - 2) + 1):
                totals = best[:, c] + costs[gap, :, c]
                origin[c, c + gap + 1] = totals.argmin()
                following[c, c + gap + 1] = totals.min()
        origins.append(origin)
        best = following
    for c in range(steps):
        gap = steps - 1 - c
        best[:, c] += costs[gap, :, c] if gap <= LONGEST else np.inf
    b, c = (int(i) for i in np.unravel_index(best.argmin(), best.shape))
    chosen_steps = [c, b]
    for origin in reversed(origins):
        b, c = int(origin[b, c]), b
        chosen_steps.append(b)
    return tuple(sorted(chosen_steps))


def fewest(steps: int) -> int:
    """Return the least number of computed steps of a schedule."""
    return HISTORY + max(0, -(-(steps - HISTORY - LONGEST) // (LONGEST + 1)))


def _gap_costs(moments: Moments) -> np.ndarray:
    """Return the costs (gap, b, c) of gaps after the computed steps b < c."""
    import numpy as np

    steps = moments.steps
    before, last = np.triu_indices(steps, 1)
    costs = np.full((LONGEST + 1, steps, steps), np.inf)
    costs[0, before, last] = 0.0
    for number, gram in enumerate(moments.grams):
        # error of the latents after the gap, as weights of all outputs and inputs
        error = np.zeros((len(last), 2 * steps))
        for gap in range(1, LONGEST + 1):
            inside = last + gap < steps
            b, c = before[inside], last[inside]
            weights = extrapolations(gram, c, b, c + gap, inputs=moments.inputs)
            weights[np.arange(len(c)), c + gap] -= 1
            error[inside] += weights * moments.sizes[c + gap, None]
            cost = np.einsum("pn,pn->p", error[inside] @ gram, error[inside]).clip(min=0)
            costs[gap, b, c] = cost + (costs[gap, b, c] if number else 0.0)
    return costs
