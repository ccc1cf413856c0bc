"""A slow, literal NumPy statement of the algorithm, in float64, on one flat vector.

Written from the statement of arXiv:1812.02886 and from textbooks, not from the library,
so that the two can disagree.
"""

import dataclasses
import math

import numpy as np
from matrices.coefficients import polar_express

# relative rise, shrink of the base step, part of the previous direction taken back
TABLE = (
    (0.15, 0.5, 0.9),
    (0.125, 0.7, 0.7),
    (0.10, 0.8, 0.5),
    (0.075, 0.9, 0.3),
    (0.05, 0.95, 0.2),
    (0.025, 0.975, 0.1),
    (0.01, 1.0, 0.1),
)


def away_from_zero(x, epsilon):
    return x - epsilon if x < 0 else x + epsilon


def divide(a, b):
    return a / b if b != 0 else 0.0


def beta_value(rule, g, z, prev_g, prev_z, prev_d, prev_d_m_d, epsilon):
    """β from the vectors, unclipped, as the textbooks write it.

    `prev_d_m_d` is dᵀMd of the previous direction d, which the vectors do not tell.
    """
    y = g - prev_g
    w = z - prev_z  # M⁻¹y while M stays the same
    rho = away_from_zero(prev_g @ prev_z, epsilon)
    d_y = away_from_zero(prev_d @ y, epsilon)
    if rule == "fletcher_reeves":
        return divide(g @ z, rho)
    if rule == "polak_ribiere":
        return divide(g @ z - g @ prev_z, rho)
    if rule == "hestenes_stiefel":
        return divide(g @ w, d_y)
    if rule == "dai_yuan":
        return divide(g @ z, d_y)
    if rule == "hager_zhang":
        free = divide((w - 2 * prev_d * divide(y @ w, d_y)) @ g, d_y)
        return max(free, 0.4 * divide(prev_g @ prev_d, prev_d_m_d))
    if rule == "dai_kou":
        free = divide((w - prev_d * divide(y @ w, d_y)) @ g, d_y)
        return max(free, 0.5 * divide(g @ prev_d, prev_d_m_d))
    if rule == "hybrid_hs_dy":
        return max(0.0, min(divide(g @ w, d_y), divide(g @ z, d_y)))
    if rule == "liu_storey":
        return divide(g @ w, away_from_zero(-(prev_g @ prev_d), epsilon))
    raise ValueError(rule)


def metric_length(beta, g, z, prev_d, prev_d_m_d):
    """dᵀMd of d = −z + β d₋₁, given that M z = g and what it was of d₋₁."""
    if beta == 0:
        return z @ g
    return z @ g - 2 * beta * (prev_d @ g) + beta**2 * prev_d_m_d


def relative_rise(new, old):
    """(new − old)/|old|, and its limit where old is 0."""
    if new == old:
        return 0.0
    if old == 0:
        return math.copysign(math.inf, new - old)
    return (new - old) / abs(old)


@dataclasses.dataclass
class Oracle:
    """The optimizer: `step` maps x, g, f and α to everything worth comparing."""

    beta_rule: str = "fletcher_reeves"
    preconditioner: str | None = "diagonal_bfgs"
    step_rule: str | None = "step"
    beta_bounds: tuple = (0.0, 1.0)
    restart_on_ascent: bool = False
    restart_every: int | None = None
    nesterov: bool = False
    period: int = 5
    threshold: float = 1.0
    epsilon: float = 1e-8

    t: int = 0  # steps
    seen: int = 0  # finite losses
    diagonal: np.ndarray | None = None
    prev_x: np.ndarray | None = None
    prev_g: np.ndarray | None = None
    prev_z: np.ndarray | None = None
    prev_d: np.ndarray | None = None
    prev_d_m_d: float = 0.0
    feedback_prev_d: np.ndarray | None = None  # the last d
    base_step: float = 1.0
    average: float = 0.0
    old_average: float = 0.0
    skipped: int = 0
    restarts: int = 0
    nonfinite: int = 0

    def precondition(self, x, g):
        if self.preconditioner is None:
            return g
        if self.t == 0:
            self.diagonal = np.ones_like(x)
            return g
        e, b = self.epsilon, self.diagonal
        s, y = x - self.prev_x, g - self.prev_g
        y_s, s_b_s = y @ s, s @ (b * s)
        if y_s >= e and s_b_s >= e and y_s > 0 and s_b_s > 0:
            self.diagonal = np.abs(
                b - ((b * s) ** 2 + e) / (s_b_s + e) + (y**2 + e) / (y_s + e)
            )
        else:
            self.skipped += 1
        return g / (self.diagonal + e)

    def direct(self, g, z):
        if self.t == 0:
            return -z, 0.0
        beta = beta_value(
            self.beta_rule,
            g,
            z,
            self.prev_g,
            self.prev_z,
            self.prev_d,
            self.prev_d_m_d,
            self.epsilon,
        )
        beta = min(max(beta, self.beta_bounds[0]), self.beta_bounds[1])
        d = -z + beta * self.prev_d
        periodic = self.restart_every is not None and self.t % self.restart_every == 0
        ascends = self.restart_on_ascent and beta != 0 and g @ d >= 0
        if periodic or ascends:
            self.restarts += 1
            return -z, 0.0
        return d, beta

    def feed_back(self, f, output, d):
        """Returns b times the output, less what a rise takes back of the last d."""
        if self.step_rule is None:
            return output
        if not math.isfinite(f):
            self.nonfinite += 1
            self.feedback_prev_d = d
            return self.base_step * output
        step = self.step_rule == "step"
        first = self.seen == 0
        self.average = f if first else 0.7 * self.average + 0.3 * f
        if first:
            self.old_average = f
        taken = output
        if not first and (not step or self.seen % self.period == 0):
            new, old = (self.average, self.old_average) if step else (f, self.average)
            rise = relative_rise(new, old)
            b_old = self.base_step
            if rise < 0.01 * self.threshold:
                self.base_step = min((1.05 if step else 1.02) * b_old, 1.0)
            else:
                for bound, shrink, omega in TABLE:
                    if rise > bound * self.threshold:
                        b = self.base_step = max(shrink * b_old, 1e-4)
                        taken = (1 - omega) * output
                        taken = taken - omega * (b_old / b) * self.feedback_prev_d
                        break
            self.old_average = self.average
        self.seen += 1
        self.feedback_prev_d = d
        return self.base_step * taken

    def step(self, x, g, f, learning_rate):
        z = self.precondition(x, g)
        d, beta = self.direct(g, z)
        self.prev_d_m_d = metric_length(beta, g, z, self.prev_d, self.prev_d_m_d)
        output = -z + beta * d if self.nesterov else d
        update = learning_rate * self.feed_back(f, output, d)
        self.prev_x, self.prev_g, self.prev_z, self.prev_d = x, g, z, d
        self.t += 1
        norms = np.linalg.norm(g) * np.linalg.norm(d)
        out = {
            "update": update,
            "direction": d,
            "beta": beta,
            "cosine": -(g @ d) / norms if norms else 0.0,
            "restarts": self.restarts,
            "metric_length": self.prev_d_m_d,
        }
        if self.preconditioner is not None:
            out |= {"diagonal": self.diagonal, "skipped_curvature": self.skipped}
        if self.step_rule is not None:
            out |= {"base_step": self.base_step, "nonfinite_losses": self.nonfinite}
        return out


def lars(g, w, coefficient, damping=0.1):
    g_norm, scaled = np.linalg.norm(g), coefficient * np.linalg.norm(w)
    if g_norm == 0 or scaled == 0:
        return g
    return g * scaled / (g_norm + damping * scaled)


def dense_bfgs(hessian, s, y):
    """Nocedal & Wright, Numerical Optimization, eq. 6.19."""
    h_s = hessian @ s
    return hessian - np.outer(h_s, h_s) / (s @ h_s) + np.outer(y, y) / (y @ s)


MUON = ((3.4445, -4.7750, 2.0315),) * 10
# For five steps, computed anew with the safety factor, and what goes on from there.
POLAR_EXPRESS = tuple(
    (a / 1.01, b / 1.01**3, c / 1.01**5)
    for a, b, c in (*polar_express(5, 0.002), *[(15 / 8, -10 / 8, 3 / 8)] * 5)
)


def orthogonalize(g, iterations=5, quintics=MUON, norm=2):
    """The iteration on the singular values, one by one."""
    matrix = np.reshape(g, (-1, np.shape(g)[-1]))
    u, sigma, vh = np.linalg.svd(matrix, full_matrices=False)
    sigma = sigma / np.sum(sigma**norm) ** (1 / norm)
    for a, b, c in quintics[:iterations]:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    polar = (u * sigma) @ vh
    return np.reshape(0.2 * np.sqrt(max(matrix.shape)) * polar, np.shape(g))


def second_moments(gradients, decay=0.99, epsilon=1e-8):
    """Gradients by the root of their average square, bias corrected."""
    v, out = 0.0, []
    for t, g in enumerate(gradients, start=1):
        v = decay * v + (1 - decay) * np.abs(g) ** 2
        out.append(g / (np.sqrt(v / (1 - decay**t)) + epsilon))
    return out


def soap(
    gradients,
    b1=0.0,
    b2=0.95,
    eps=1e-8,
    *,
    nesterov=False,
    every=1,
    max_side=1024,
    linear=False,
):
    """SOAP of matrices as its paper states it (Algorithm 3), with a first step."""
    out, bases, roundings = [], [], 64 * np.finfo(np.float64).eps
    for count, g in enumerate(gradients):
        products = [g @ g.conj().T, g.conj().T @ g]
        if count == 0:
            old, factors, m, v = [np.eye(n) for n in g.shape], products, 0 * g, 0.0
        else:
            old = bases
            factors = [
                b2 * f + (1 - b2) * p for f, p in zip(factors, products, strict=True)
            ]
            m = b1 * m + (1 - b1) * g
        bases = old
        if count % every == 0 or count < every:
            bases = [
                np.linalg.qr(f @ q)[0] if len(f) <= max_side else q
                for f, q in zip(factors, old, strict=True)
            ]
        left, right = old if count else bases
        square = np.abs(left.conj().T @ g @ right) ** 2
        inside = left.conj().T @ (m if count else g) @ right
        if count:
            inside = inside / (1 - b1**count)
            if nesterov:
                inside = b1 * inside + (1 - b1) * left.conj().T @ g @ right
            before, v = v, b2 * v + (1 - b2) * square
            used = v / (1 - b2**count)
            if linear:
                used = before + 1e-4 * np.mean(before)
        elif linear:
            used = v = (square + np.mean(square)) / 2
        else:
            used = square
        root = np.sqrt(used) + eps + roundings * np.sqrt(np.mean(used))
        out.append(0.2 * left @ (inside / root) @ right.conj().T)
    return out


@dataclasses.dataclass
class NoiseBalance:
    """The rate that balances the cost of noise with the gain, number by number."""

    rate: float
    num_steps: float
    target: float = 1.0
    delay: float = 5.0
    n: int = 0
    age: float = 0.0
    excess: float = 0.0
    now: float = 0.0
    past: float = 0.0
    older: float = 0.0
    variance: float = 0.0
    mean: object = 0.0
    negative: bool = False
    discounted: float = 0.0
    doubt: float = 0.0
    steps: int = 0
    before: tuple = (0.0, 0.0)

    def average(self, x):
        """The average of the parameters, with these."""
        a = max(1 / (self.n + 1), 1 / max(10, (self.n + 1) / 10))
        self.before = self.mean, self.age
        self.mean = self.mean + a * (x - self.mean)
        self.age = (1 - a) * (self.age + 1)
        return self.mean

    def step(self, loss, there):
        """The rate of a step, from the losses at the parameters and their average.

        None where the parameters go back to their average.
        """
        mean, age = self.before
        old = dataclasses.replace(self, mean=mean, age=age)
        rate = self._step(loss, there)
        steered = self.steps / self.num_steps < 0.55
        self.steps += 1
        if steered and self.n > 10 and self.excess > 4 * (self.discounted + self.doubt):
            rate = None
            vars(self).update(
                vars(old), rate=old.rate / 4, excess=0.0, steps=self.steps
            )
        return rate

    def _step(self, loss, there):
        self.n += 1
        n = self.n
        short, long = 9 / (n + 8), 2 / (n + 1)
        self.excess += short * (loss - there - self.excess)
        before = self.now
        self.now += short * (there - self.now)
        self.past += long * (there - self.past)
        self.older += long * (self.past - self.older)
        spread = 0 if n == 1 else (there - before) * (there - self.now)
        self.variance += short * (spread - self.variance)
        gain = max(self.past - self.now, 0)
        cost = self.excess + 3.3 * self.age / n * gain
        if self.older - self.past > 1.5 * gain:
            gain *= 1.5 * gain / (self.older - self.past)
        self.negative |= min(loss, there) < 0
        fast = n > 1 and -self.excess / (3.3 * self.age / n) > 0.1 * self.now
        fast &= not self.negative
        doubt = math.sqrt(self.variance * 9 / (n + 8))
        self.discounted, self.doubt = gain, doubt
        wanted = self.target * max(gain, 0.1 * doubt)
        part = self.steps / self.num_steps
        size = wanted + abs(cost) + min(doubt, gain)
        if n > 1 and part < 0.55 and size > 0:
            window = (n + 8) / 9
            too_low = (wanted - cost) / size
            if fast:
                too_low = min(too_low, 0)
            self.rate *= math.exp(1.4 * too_low / (window + self.delay))
        return self.rate * min(max((1 - part) / 0.45, 0), 1)
