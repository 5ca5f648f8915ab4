"""One step of every scheduler against x' = A x + B m + C z with A, B and C written out here, in float64."""

import pytest
import torch
from test_qsched import CASES, made

from diffalign.schedulers import Coefficients, QSched

STEPS = 4
TOLERANCE = 1e-6


def variance_preserving(kind, scheduler, i):
    """Square roots of a and 1 - a at a step, and how m gives x0 and the noise: (x0, noise), each of x and m."""
    a = scheduler.alphas_cumprod.double()[int(scheduler.timesteps[i])]
    signal, noise = a.sqrt(), (1 - a).sqrt()
    return {
        "epsilon": ((1 / signal, -noise / signal), (0, 1)),
        "v_prediction": ((signal, -noise), (noise, signal)),
        "sample": ((0, 1), (1 / noise, -signal / noise)),
    }[kind]


def mixed(scheduler, i, signal, noise):
    """(A, B) of signal x0 + noise epsilon."""
    x0, epsilon = variance_preserving(scheduler.config.prediction_type, scheduler, i)
    return tuple(float(signal * p + noise * q) for p, q in zip(x0, epsilon, strict=True))


def flow(scheduler, i, eta):
    s, s2 = scheduler.sigmas[i : i + 2].double().tolist()
    return 1, s2 - s, 0


def flow_noise(scheduler, i, eta):
    s, s2 = scheduler.sigmas[i : i + 2].double().tolist()
    return 1 - s2, -(1 - s2) * s, s2


def euler(scheduler, i, eta, *, ancestral=False):
    s, s2 = scheduler.sigmas[i : i + 2].double().tolist()
    up = (s2**2 * (s**2 - s2**2) / s**2) ** 0.5 if ancestral else 0
    step = (s2**2 - up**2) ** 0.5 - s
    of_x, of_m = {  # of the derivative (x - x0) / s
        "epsilon": (0, 1),
        "v_prediction": (s / (s**2 + 1), 1 / (s**2 + 1) ** 0.5),
        "sample": (1 / s, -1 / s),
    }[scheduler.config.prediction_type]
    return 1 + step * of_x, step * of_m, up


def ancestral(scheduler, i, eta):
    return euler(scheduler, i, eta, ancestral=True)


def ddim(scheduler, i, eta):
    table, t = scheduler.alphas_cumprod.double(), int(scheduler.timesteps[i])
    earlier = t - 1000 // STEPS
    a, ap = table[t], table[earlier] if earlier >= 0 else scheduler.final_alpha_cumprod.double()
    std = eta * ((1 - ap) / (1 - a) * (1 - a / ap)).sqrt()
    return *mixed(scheduler, i, ap.sqrt(), (1 - ap - std**2).sqrt()), float(std)


def tcd(scheduler, i, eta):
    table, last = scheduler.alphas_cumprod.double(), i == STEPS - 1
    earlier = 0 if last else int(scheduler.timesteps[i + 1])
    end, ap = table[int((1 - eta) * earlier)], table[earlier]
    grown, noise = (ap / end).sqrt(), (1 - ap / end).sqrt()
    if last or eta == 0:
        grown, noise = torch.tensor(1.0), torch.tensor(0.0)
    of = mixed(scheduler, i, end.sqrt(), (1 - end).sqrt())
    return *(float(grown) * v for v in of), float(noise)


def lcm(scheduler, i, eta):
    table, t, last = scheduler.alphas_cumprod.double(), int(scheduler.timesteps[i]), i == STEPS - 1
    scaled = 10.0 * t
    skip, out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5
    ap = torch.tensor(1.0) if last else table[int(scheduler.timesteps[i + 1])]
    of_x, of_m = mixed(scheduler, i, 1.0, 0.0)
    scale = float(ap.sqrt())
    return scale * (out * of_x + skip), scale * out * of_m, float((1 - ap).sqrt())


TABLE = {
    "flow": flow,
    "flow shifted": flow,
    "flow stochastic": flow_noise,
    "flow lcm": flow_noise,
    "euler": euler,
    "euler v": euler,
    "euler sample": euler,
    "ancestral": ancestral,
    "ancestral v": ancestral,
    "ddim": ddim,
    "ddim eta": ddim,
    "ddim v": ddim,
    "ddim sample": ddim,
    "tcd 0": tcd,
    "tcd": tcd,
    "tcd v": tcd,
    "tcd sample": tcd,
    "lcm": lcm,
    "lcm v": lcm,
}


def test_every_case_has_its_row():
    assert TABLE.keys() == CASES.keys()


@pytest.mark.parametrize("case", TABLE)
@pytest.mark.parametrize("factors", [(1.0, 1.0), (0.9, 1.1)])
def test_a_step_is_the_table(case, factors):
    stock, kwargs = made(case, STEPS)
    scheduler = QSched.wrap(stock)
    scheduler.set_coefficients(Coefficients(*((f,) * STEPS for f in factors)))
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(0)
    for i, t in enumerate(scheduler.timesteps):
        a, b, c = TABLE[case](scheduler, i, kwargs.get("eta", 0))
        x, m, z = torch.randn(3, 1, 4, 8, 8, generator=torch.Generator().manual_seed(i))
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        update = scheduler.linear_update(t, **kwargs)
        assert update.sample == pytest.approx(a, rel=TOLERANCE, abs=TOLERANCE)
        assert update.model_output == pytest.approx(b, rel=TOLERANCE, abs=TOLERANCE)
        generator.manual_seed(i)
        z = torch.randn(x.shape, generator=generator)
        generator.manual_seed(i)
        here = scheduler.step(m, t, x, generator=generator, return_dict=False, **kwargs)[0]
        exact = a * factors[0] * x.double() + b * factors[1] * m.double() + c * z.double()
        error = (here.double() - exact).abs().max()
        assert error < TOLERANCE * (abs(a) + abs(b) + abs(c)) * 4  # of standard normal numbers
