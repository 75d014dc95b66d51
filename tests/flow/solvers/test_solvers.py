"""Solvers: the declared order is the measured one, NFE is what the network was called, the data end stays untouched."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from flow import solvers
from flow.guidance import GuidedVelocity
from flow.likelihood import T_MAX
from flow.solvers import ADAPTIVE, time_grids
from flow.solvers.multistep import ADAMS_BASHFORTH
from flow.solvers.runge_kutta import TABLEAUX
from flow.solvers.sde import DIFFUSION_COEFFICIENTS


def test_a_failed_integration_is_an_error():
    """SciPy and torchdiffeq notice it in their own ways; no state of the middle is taken for the end."""
    for method in ADAPTIVE:
        with pytest.raises(ValueError, match=f"{method}: the velocity is not finite, or too steep"):
            # with the default tolerances, methods of order 2 take a million evaluations to get there
            loose = {"rtol": 1e-1, "atol": 1e-1}
            solvers.solve(lambda x, t, t_next: x / (0.5 - t) ** 3, torch.ones(2, 3).double(), [0.0, 1.0], method, **loose)
    with pytest.raises(ValueError, match="dopri5: the velocity is not finite"):
        solvers.solve(lambda x, t, t_next: x / 0, torch.ones(1, 2), [0.0, 1.0], "dopri5")
    x = torch.ones(2, 3).requires_grad_()
    with pytest.raises(ValueError, match="scipy_solver: gives no gradient"):
        solvers.solve(lambda x, t, t_next: x, x, [0.0, 1.0], "scipy_solver")


SDE = ("euler_maruyama", "stochastic_heun")


def rotation(x: torch.Tensor, t: float, t_next=None) -> torch.Tensor:
    """dx/dt = cos(t) A x with A the rotation generator: x(1) is x(0) turned by sin(1)."""
    return math.cos(t) * torch.stack([-x[:, 1], x[:, 0]], dim=1)


def rotation_error(method: str, steps: int, **options: float) -> float:
    x = torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    angle = math.sin(1.0)
    turn = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    return (solvers.solve(rotation, x, time_grids.uniform(steps), method, **options).x - x @ turn).norm().item()


@pytest.mark.parametrize(
    ("method", "order"),
    [*((name, t.order) for name, t in TABLEAUX.items()), *((name, order) for name, (order, _) in ADAMS_BASHFORTH.items())],
)
def test_measured_order_is_the_declared_one(method, order):
    steps = [16, 32, 64, 128]
    logs = [math.log2(rotation_error(method, n)) for n in steps]
    slope = (logs[0] - logs[-1]) / (len(steps) - 1)
    assert slope == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(("method", "order"), [("dpmpp_2m", 2), ("unipc", 3)])
def test_order_in_log_snr(method, order):
    """These two take their order from steps in log(t / (1 - t)), of which there are none at either end."""
    x = torch.tensor([[1.0, 0.5]], dtype=torch.float64)

    def at(n: int, method: str) -> torch.Tensor:
        logits = [-2 + 4 * i / n for i in range(n + 1)]
        return solvers.solve(rotation, x, [1 / (1 + math.exp(-a)) for a in logits], method).x

    fine = at(2000, "rk4")
    errors = [math.log2((at(n, method) - fine).norm()) for n in (64, 128, 256, 512)]
    assert (errors[0] - errors[-1]) / 3 == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_methods_meet_their_tolerance(method):
    """On the Gaussian flow below, whose solution is known; fewer evaluations for a loose tolerance."""
    x0 = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    tight = solvers.solve(gaussian_velocity, x0, time_grids.build("uniform", 1), method, rtol=1e-5, atol=1e-5)
    loose = solvers.solve(gaussian_velocity, x0, time_grids.build("uniform", 1), method, rtol=1e-2, atol=1e-2)
    assert (tight.x - (3 + 0.5 * x0)).abs().max() < 2e-4
    assert loose.nfe < tight.nfe


def test_every_name_of_torchdiffeq_is_a_method():
    from torchdiffeq._impl.odeint import SOLVERS

    assert set(SOLVERS) <= set(solvers.SOLVERS)
    solved_there = {name for name, solver in solvers.SOLVERS.items() if solver.times != "grid"}
    assert set(SOLVERS) == solved_there | (set(SOLVERS) & set(TABLEAUX))


@pytest.mark.filterwarnings("ignore:Functional iteration did not converge")  # by the last bits, with these tolerances
@pytest.mark.parametrize("method", [name for name, solver in solvers.SOLVERS.items() if solver.times == "even"])
def test_adams_methods_of_torchdiffeq(method):
    """At least of fourth order, with the open last step; without one, to a time before the data and back, as accurate."""
    tight = {"rtol": 1e-12, "atol": 1e-12} if solvers.SOLVERS[method].options else {}
    logs = [math.log2(rotation_error(method, n, **tight)) for n in (16, 32, 64)]
    assert (logs[0] - logs[-1]) / 2 > 3.8
    x0 = torch.linspace(-2, 2, 8, dtype=torch.float64).view(4, 2)
    middle = solvers.solve(rotation, x0, [0.5 * t for t in time_grids.uniform(16)], method, **tight).x
    back = solvers.solve(rotation, middle, [0.5 - 0.5 * t for t in time_grids.uniform(16)], method, **tight).x
    assert (middle - x0).abs().max() > 0.1 and (back - x0).abs().max() < 1e-4
    assert solvers.solve(rotation, x0, time_grids.uniform(1), method).nfe == 3  # the open last step alone


@pytest.mark.parametrize("method", [m for m in solvers.SOLVERS if m not in solvers.STOCHASTIC])
def test_states_on_the_way(method):
    """One for each time of the grid after the first; the last is the end, which watching does not change."""
    x0 = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    states = []
    watched = solvers.solve(gaussian_velocity, x0, time_grids.uniform(8), method, states.append)
    assert len(states) == 8 and torch.equal(states[-1], watched.x)
    plain = solvers.solve(gaussian_velocity, x0, time_grids.uniform(8), method)
    assert torch.allclose(plain.x, watched.x) and plain.nfe == watched.nfe
    t = 0.5  # the exact state there: mean 3 t, standard deviation hypot(1 - t, t / 2)
    assert (states[3] - (3 * t + math.hypot(1 - t, t / 2) * x0)).abs().max() < 0.3


def gaussian_velocity(x: torch.Tensor, t: float, t_next: float | None = None) -> torch.Tensor:
    """The exact velocity of the linear path to N(3, 0.5^2): its flow is x0 -> 3 + 0.5 x0."""
    return 3 + (0.25 * t - (1 - t)) / ((1 - t) ** 2 + (0.5 * t) ** 2) * (x - 3 * t)


@pytest.mark.parametrize("tableau", TABLEAUX.values(), ids=TABLEAUX)
def test_tableaux_are_consistent(tableau):
    """Row sums of a equal c, and the quadrature is exact for polynomials below the order."""
    assert [sum(row) for row in tableau.a] == pytest.approx(list(tableau.c))
    for power in range(tableau.order):
        moment = sum(b * c**power for b, c in zip(tableau.b, tableau.c, strict=True))
        assert moment == pytest.approx(1 / (power + 1))


@pytest.mark.parametrize(("method", "expected"), [
        ("euler", 7), ("midpoint", 14), ("heun", 13), ("heun3", 21), ("rk4", 27), ("ab2", 7), ("ab3", 9), ("ab4", 13),
        ("dpmpp_2m", 7), ("unipc", 7),
    ],
)  # fmt: skip
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_nfe_equals_the_calls_inside_the_network(method, expected, scale):
    """Seven steps; guidance doubles the samples that go through the network, not the velocity evaluations."""
    images, times = [], []

    def net(x, t, y):
        images.append(len(x))
        times.append(t.max().item())
        return x * 0

    y = torch.zeros(3, dtype=torch.long)
    velocity = GuidedVelocity(net, y, null=10, scale=scale)
    solution = solvers.solve(velocity, torch.zeros(3, 1, 2, 2), time_grids.uniform(7), method)
    assert solution.nfe == len(images) == expected
    assert velocity.forwards == sum(images) / 3 == (expected if scale == 1 else 2 * expected)
    assert max(times) < 1  # a velocity at the data end would leave noise in the image


@pytest.mark.parametrize("method", [m for m in solvers.SOLVERS if m not in solvers.STOCHASTIC])
def test_no_noise_is_left_when_the_data_is_one_point(method):
    """The exact velocity towards a point mass at mu jumps at t = 1; every method must still land on mu."""
    mu = 0.7

    def velocity(x, t, t_next=None):
        return (mu - x) / (1 - t) if t < 1 else x  # at t = 1 a trained network answers E[x1 - x0 | x1] = x1

    x = torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    landed = solvers.solve(velocity, x, time_grids.uniform(5), method).x
    assert (landed - mu).abs().max() < 0.02 * x.std()


@pytest.mark.filterwarnings("ignore:Functional iteration did not converge")  # in the strongest field
@pytest.mark.parametrize("method", solvers.SOLVERS)
def test_evaluation_times_stay_in_interval(method):
    """Forwards as sampling does it, backwards as likelihood and inversion do, in weak and strong fields."""
    backwards = [(1 - time_grids.END_EPS, 0.0), (T_MAX, 0.0)] if method in solvers.DETERMINISTIC else []
    for start, end in [(0.0, 1.0), (0.0, 0.9), *backwards]:
        for strength in (-30.0, -1e-9, 0.0, 30.0):
            times = []

            def velocity(x, t, t_next, start=start, end=end, strength=strength, times=times):
                times.append(t)
                if not min(start, end) <= t <= max(start, end) or t >= 1:
                    raise RuntimeError(f"velocity at t = {t}")
                return strength * x

            x = torch.linspace(-2, 2, 8, dtype=torch.float64).view(4, 2)
            options = {"rtol": 1e-2, "atol": 1e-2} if method in solvers.HAS_TOLERANCES else {}
            if method in solvers.STOCHASTIC:
                options["noise"] = torch.zeros_like(x).mul
            steps = [start + (end - start) * t for t in time_grids.uniform(7)]
            assert solvers.solve(velocity, x, steps, method, **options).nfe == len(times) > 0


def test_adaptive_methods_have_no_error_floor():
    """It was 2e-6 here, and 1e-4 for data as narrow as 0.01, whatever the tolerances."""
    x0 = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    for method in ("dopri5", "dopri8"):
        x = solvers.solve(gaussian_velocity, x0, [0.0, 1.0], method, rtol=1e-11, atol=1e-11).x
        assert (x - (3 + 0.5 * x0)).abs().max() < 1e-9


@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_states_within_the_last_step(method):
    """Grids finer than END_EPS have times beyond 1 - END_EPS."""
    x0 = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    for times in (
        [0.0, *time_grids.uniform(1500)[-4:]],
        [0.0, 0.5, 1 - time_grids.END_EPS, 0.9996, 1.0],
        [0.9995, 0.9999, 1.0],
    ):
        states, start = [], 3 * times[0] + math.hypot(1 - times[0], times[0] / 2) * x0
        solvers.solve(gaussian_velocity, start, times, method, states.append, rtol=1e-5, atol=1e-5)
        errors = [(x - 3 * t - math.hypot(1 - t, t / 2) * x0).abs().max() for x, t in zip(states, times[1:], strict=True)]
        assert max(errors) < 0.01


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([1.0, 0.5], r"must lie in \[0, 1\] and start before 1"),
        ([-0.1, 0.5], r"must lie in \[0, 1\]"),
        ([0.5, 1.1], r"must lie in \[0, 1\]"),
        ([0, 0.8, 0.3, 1], "times 0, 0.8, 0.3, 1: must rise or fall at each step"),
        ([0, 1, 0.5], "must rise or fall at each step"),
        ([0, 0.5, 0.5, 1], "must rise or fall at each step"),
        ([0.9, 0.9, 0.1], "must rise or fall at each step"),
    ],
)
def test_times_that_are_refused(times, message):
    for method in ("euler", "ab2", "unipc"):
        with pytest.raises(ValueError, match=message):
            solvers.solve(rotation, torch.zeros(1, 2), times, method)


def test_solver_keeps_dtype_and_input():
    """The solver keeps the dtype and does not change its input."""
    for dtype in (torch.float32, torch.float64):
        x = torch.ones(2, 2, dtype=dtype)
        assert solvers.solve(rotation, x, time_grids.uniform(3), "heun").x.dtype == dtype
        assert torch.equal(x, torch.ones(2, 2, dtype=dtype))


def test_unknown_method_and_too_few_steps_are_named():
    with pytest.raises(ValueError, match="unknown solver 'foo'; choose from euler"):
        solvers.solve(rotation, torch.zeros(1, 2), time_grids.uniform(1), "foo")
    with pytest.raises(ValueError, match="steps=0: must be a whole"):
        time_grids.build("uniform", 0)
    with pytest.raises(ValueError, match="unknown time grid 'foo'; choose from uniform"):
        time_grids.build("foo", 3)
    for value in (0.0, -1.0, 2.0):
        with pytest.raises(ValueError, match=r"rtol=.*: must be greater than 0"):
            solvers.solve(rotation, torch.zeros(1, 2), time_grids.uniform(1), "dopri5", rtol=value)
    with pytest.raises(ValueError, match="euler has no option 'rtol'; it takes none"):
        solvers.solve(rotation, torch.zeros(1, 2), time_grids.uniform(1), "euler", rtol=1e-3)
    with pytest.raises(ValueError, match="unknown diffusion coefficient 'linear'; choose from constant, sigma, increasing"):
        solvers.validate_options("euler_maruyama", diffusion="linear")  # SiT's is 1 - t, which is sigma
    with pytest.raises(ValueError, match="noise_scale=-1: must be 0 or more"):
        solvers.solve(rotation, torch.zeros(1, 2), time_grids.uniform(1), "euler_maruyama", noise=lambda i: 0, noise_scale=-1)


@pytest.mark.parametrize("shape", [(1, 8, 8), (2,)])
def test_a_solver_may_use_the_layout_of_a_batch(monkeypatch, shape):
    """Also in the trial before the sampling; its options are checked there."""

    def normalized(velocity, x, time_grid, power=1.0):
        if power <= 0:
            raise ValueError(f"power={power}: must be above 0")
        for t, t_next in pairwise(time_grid):
            v = velocity(x, t)
            assert v.shape[1:].numel() > 1
            yield (x := x + (t_next - t) * v / (v.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1)) + 1) ** power)

    monkeypatch.setitem(solvers.SOLVERS, "mine", solvers.Solver(normalized, ("power",)))
    with pytest.raises(ValueError, match="power=-1: must be above 0"):
        solvers.validate_options("mine", power=-1)
    assert solvers.nfe("mine", 3) == solvers.max_steps_for_nfe("mine", 3) == 3
    assert solvers.solve(lambda x, t, t_next: x, torch.ones(4, *shape), [0.0, 0.5], "mine", power=2).x.shape == (4, *shape)


def edm_time(i: int, n: int) -> float:
    """Karras et al. 2022, eq. 5: N noise levels from 80 to 0.002, then none; the ratio of noise to data is (1 - t) / t."""
    if i in (0, n):
        return float(i == n)
    sigma = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    return 1 / (1 + sigma)


def test_every_grid_has_the_times_of_its_formula():
    """Time i of n. In Esser et al. 2024 the noise s = 1 - t becomes 3 s / (1 + 2 s)."""
    formulas = {
        "uniform": lambda i, n: i / n,
        "cosine": lambda i, n: math.sin(math.pi / 2 * i / n) ** 2,
        "shift": lambda i, n: 1 - 3 * (1 - i / n) / (1 + 2 * (1 - i / n)),
        "edm": edm_time,
        "quadratic_noise": lambda i, n: i**2 / n**2,
        "quadratic_data": lambda i, n: 1 - (n - i) ** 2 / n**2,
    }
    assert formulas.keys() == time_grids.GRIDS.keys()
    for name, formula in formulas.items():
        assert time_grids.build(name, 7) == pytest.approx([formula(i, 7) for i in range(8)]), name
    assert time_grids.build("edm", 3) == pytest.approx([0, 1 / (1 + 2.5152), 1 / 1.002, 1], abs=1e-5)


@pytest.mark.parametrize("name", time_grids.GRIDS)
def test_grids_rise_from_prior_to_data(name):
    for steps in (1, 2, 3, 10, 100):
        times = time_grids.build(name, steps)
        assert len(times) == steps + 1 and times[0] == 0 and times[-1] == 1
        assert all(a < b for a, b in pairwise(times))


# ---- stochastic methods


def mixture_velocity(x: torch.Tensor, t: float, t_next: float | None = None) -> torch.Tensor:
    """The exact velocity of the linear path from N(0, I) to a mixture of three Gaussians in the plane."""
    s = 1 - t
    scores, means = [], []
    for weight, mu, std in MIXTURE:
        variance = s * s + (t * std) ** 2
        difference = x - t * torch.tensor(mu, dtype=x.dtype)
        scores.append(math.log(weight) - difference.square().sum(1) / (2 * variance) - math.log(variance))
        data = torch.tensor(mu, dtype=x.dtype) + t * std**2 / variance * difference  # E[x1 | x, component]
        means.append(data)
    share = torch.softmax(torch.stack(scores), dim=0)  # [3, B]
    data = (share[:, :, None] * torch.stack(means)).sum(0)
    return (data - x) / s


MIXTURE = [(0.5, (2.0, 0.0), 0.3), (0.3, (-1.0, 1.5), 0.5), (0.2, (-1.0, -2.0), 0.2)]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        *((method, {"diffusion": name}) for method in SDE for name in DIFFUSION_COEFFICIENTS),
        ("ancestral", {}),
        ("ancestral", {"eta": 0.5}),
    ],
)
def test_marginals_of_the_sde_are_those_of_the_target(method, options):
    """Means and covariances of a Gaussian mixture, within three standard errors and the bias of the steps."""
    n = 10_000
    g = torch.Generator().manual_seed(1)
    x0 = torch.randn(n, 2, dtype=torch.float64, generator=g)
    noise = lambda i: torch.randn(n, 2, dtype=torch.float64, generator=g)  # noqa: E731
    steps = 200 if method == "euler_maruyama" else 100
    x = solvers.solve(mixture_velocity, x0, time_grids.uniform(steps), method, noise=noise, **options).x
    weights = torch.tensor([w for w, *_ in MIXTURE], dtype=torch.float64)
    mus = torch.tensor([mu for _, mu, _ in MIXTURE], dtype=torch.float64)
    mean = weights @ mus
    cov = sum(w * (s**2 * torch.eye(2) + torch.outer(m - mean, m - mean)) for (w, _, s), m in zip(MIXTURE, mus, strict=True))
    error = 3 * (cov.diagonal().max() / n) ** 0.5
    assert (x.mean(0) - mean).abs().max() < error + 0.01
    assert (torch.cov(x.T) - cov).abs().max() < 3 * cov.max() * (2 / n) ** 0.5 + 0.04


@pytest.mark.parametrize(
    ("method", "ode"), [("euler_maruyama", "euler"), ("stochastic_heun", "heun"), ("ancestral", "euler"), ("ddim", "euler")]
)
def test_without_noise_the_sde_is_the_ode(method, ode):
    x0 = torch.randn(50, 2, dtype=torch.float64)
    options = {"noise_scale": 0.0, "eta": 0.0, "noise": lambda i: 1 / 0}
    options = {name: value for name, value in options.items() if name in solvers.SOLVERS[method].options}
    found = solvers.solve(mixture_velocity, x0, time_grids.uniform(9), method, **options)
    wanted = solvers.solve(mixture_velocity, x0, time_grids.uniform(9), ode)
    assert torch.equal(found.x, wanted.x) and found.nfe == wanted.nfe


@pytest.mark.parametrize("method", SDE)
@pytest.mark.parametrize(
    ("diffusion", "form"),
    [
        ("constant", lambda t: 1.0),
        ("sigma", lambda t: 1 - t),  # also "linear" of SiT
        ("sine", lambda t: math.sin(math.pi * t) ** 2),
        ("decreasing", lambda t: 0.25 * (math.cos(math.pi * t) + 1) ** 2),
    ],
)
def test_diffusion_coefficients_are_those_of_sit(method, diffusion, form):
    """A step adds sqrt(w h) times the increment, w = g^2 of the paper; SiT's code has sqrt(2 D h): noise_scale sqrt(2)."""
    x, h, t = torch.zeros(1, 2, dtype=torch.float64), 1e-6, 0.3

    def step(noise_scale: float, increment: float) -> torch.Tensor:
        noise = lambda i: torch.full_like(x, increment)  # noqa: E731
        options = {"noise": noise, "noise_scale": noise_scale, "diffusion": diffusion}
        return solvers.solve(lambda x, t, t_next: x * 0, x, [t, t + h], method, **options).x

    for noise_scale, w in ((1.0, form(t)), (math.sqrt(2), 2 * form(t))):
        added = (step(noise_scale, 1.0) - step(noise_scale, 0.0)) / math.sqrt(h)
        assert torch.allclose(added, torch.full_like(x, math.sqrt(w)), rtol=1e-4)


@pytest.mark.parametrize("method", SDE)
def test_sde_on_one_point_leaves_no_noise(method):
    """The SDE leaves no noise where the data is one point."""
    mu = 0.7
    x0 = torch.randn(100, dtype=torch.float64)
    noise = lambda i: torch.randn(100, dtype=torch.float64)  # noqa: E731
    x = solvers.solve(
        lambda x, t, t_next: (mu - x) / (1 - t), x0, time_grids.uniform(20), method, noise=noise, diffusion="constant"
    ).x
    assert (x - mu).abs().max() < 1e-12


@pytest.mark.parametrize("diffusion", DIFFUSION_COEFFICIENTS)
@pytest.mark.parametrize("method", SDE)
def test_sde_with_wrong_field_leaves_little_noise(method, diffusion):
    """A network cannot follow v = (x1 - x) / (1 - t) to the end: here its slope stops at 1 / 0.05."""
    draws = np.random.default_rng(0)
    x0 = torch.from_numpy(draws.standard_normal((4000, 1)))
    noise = lambda step: torch.from_numpy(draws.standard_normal((4000, 1)))  # noqa: E731
    left = solvers.solve(
        lambda x, t, t_next: -x / max(1 - t, 0.05), x0, time_grids.uniform(50), method, noise=noise, diffusion=diffusion
    ).x
    assert left.std() < 0.02  # of 1 at the start


def test_the_most_steps_within_a_number_of_evaluations():
    assert solvers.max_steps_for_nfe("euler", 10) == 10
    assert solvers.max_steps_for_nfe("heun", 10) == 5  # 2 x 5 - 1 = 9
    assert solvers.max_steps_for_nfe("heun", 1) == 1
    assert solvers.max_steps_for_nfe("rk4", 10) == 2  # 4 + 3
    assert solvers.max_steps_for_nfe("unipc", 7) == 7
    assert solvers.max_steps_for_nfe("euler_maruyama", 7) == 7
    assert (solvers.max_steps_for_nfe("heun", 5), solvers.max_steps_for_nfe("heun", 5, end=0.9)) == (3, 2)
    with pytest.raises(ValueError, match="NFE 2: rk4 needs at least 3"):
        solvers.max_steps_for_nfe("rk4", 2)
    assert solvers.max_steps_for_nfe("explicit_adams", 20) == 12
    there, back = ([solvers.nfe(method, 5, *ends) for method in ("euler", "dpmpp_2m", "unipc")] for ends in ((0, 1), (0.9, 0)))
    assert there == back == [5, 5, 5]
    for method in ("dopri5", "implicit_adams"):
        with pytest.raises(ValueError, match=f"{method} chooses its own number of evaluations"):
            solvers.max_steps_for_nfe(method, 100)


@pytest.mark.parametrize("method", solvers.STOCHASTIC)
def test_noise_has_no_way_back(method):
    with pytest.raises(ValueError, match=f"{method} adds noise, so it cannot be solved backwards"):
        solvers.solve(lambda x, t, t_next: x, torch.ones(1), [0.9, 0.0], method, noise=torch.zeros_like)
