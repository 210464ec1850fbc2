"""The paper's algorithms in plain NumPy, slow and obvious, independent of the package.

A state is a dict of arrays; ``alpha`` is a function of the parameter's name and the step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

State = dict[str, np.ndarray]


def toy_gradient(state: State, batch: tuple[np.ndarray, np.ndarray]) -> State:
    """Gradient of the toy module's loss, mean((x w + b - y)²)."""
    x, y = batch
    residual = 2 * (x @ state["w"] + state["b"] - y) / y.size
    return {"w": x.T @ residual, "b": residual.sum(axis=0)}


def toy_loss(state: State, batch: tuple[np.ndarray, np.ndarray]) -> float:
    x, y = batch
    return float(np.mean((x @ state["w"] + state["b"] - y) ** 2))


class Sgd:
    """x <- x - η g(x), with η by parameter name."""

    def __init__(self, lr: Callable[[str, int], float]) -> None:
        self.lr = lr

    def gradient_point(self, x: State) -> State:
        return x

    def step(self, x: State, gradient: State, t: int) -> State:
        return {k: x[k] - self.lr(k, t) * gradient[k] for k in x}


class Nesterov(Sgd):
    """Alg. 2: v <- δ v - η g(x + δ v); x <- x + v."""

    def __init__(self, lr: Callable[[str, int], float], momentum: float, start: State) -> None:
        super().__init__(lr)
        self.momentum = momentum
        self.v = {k: np.zeros_like(value) for k, value in start.items()}

    def gradient_point(self, x: State) -> State:
        return {k: x[k] + self.momentum * self.v[k] for k in x}

    def step(self, x: State, gradient: State, t: int) -> State:
        self.v = {k: self.momentum * self.v[k] - self.lr(k, t) * gradient[k] for k in x}
        return {k: x[k] + self.v[k] for k in x}


class TorchNesterov(Nesterov):
    """torch's SGD where η changes: it keeps y = x + δv with v = -η buffer, η of the last step."""

    def step(self, x: State, gradient: State, t: int) -> State:
        y = self.gradient_point(x)
        buffer, new = {}, {}
        for k, g in gradient.items():
            last = self.lr(k, t - 1) if t else 1.0
            buffer[k] = self.momentum * (-self.v[k] / last) + g
            y[k] = y[k] - self.lr(k, t) * (g + self.momentum * buffer[k])
            self.v[k] = -self.lr(k, t) * buffer[k]
            new[k] = y[k] - self.momentum * self.v[k]
        return new


class AdamW(Sgd):
    """Loshchilov and Hutter 2019, with torch's defaults."""

    def __init__(self, lr: Callable[[str, int], float], start: State) -> None:
        super().__init__(lr)
        self.m = {k: np.zeros_like(value) for k, value in start.items()}
        self.s = {k: np.zeros_like(value) for k, value in start.items()}

    def step(self, x: State, gradient: State, t: int) -> State:
        new = {}
        for k, g in gradient.items():
            self.m[k] = 0.9 * self.m[k] + 0.1 * g
            self.s[k] = 0.999 * self.s[k] + 0.001 * g * g
            mean, square = self.m[k] / (1 - 0.9 ** (t + 1)), self.s[k] / (1 - 0.999 ** (t + 1))
            decayed = x[k] * (1 - self.lr(k, t) * 0.01)
            new[k] = decayed - self.lr(k, t) * mean / (np.sqrt(square) + 1e-8)
        return new


class Average:
    """Polyak's z <- (1 - 1/(t+1)) z + c/(t+1), or with ``a`` z <- (1 - a) z + a c, row by row.

    z_0 = c_0, and t counts the moves of a row's center. Zhang et al. 2015, section 5.
    """

    def __init__(self, start: State, a: float | None = None) -> None:
        self.z, self.a = dict(start), a
        self.t = {
            k: np.zeros((len(value),) + (1,) * (value.ndim - 1)) for k, value in start.items()
        }

    def follow(self, name: str, center: np.ndarray, rows: Any = slice(None)) -> None:
        self.t[name][rows] += 1
        a = 1 / (self.t[name][rows] + 1) if self.a is None else self.a
        z = self.z[name] = self.z[name].copy()
        z[rows] = (1 - a) * z[rows] + a * center[rows]


def easgd(
    start: State,
    batches: list[list[tuple[np.ndarray, np.ndarray]]],
    optimizers: list[Any],
    *,
    tau: int,
    alpha: Callable[[str, int], float],
    accumulate: int = 1,
    final_exchange: bool = False,
    center_momentum: float = 0.0,
    lr_drop: float = 0.0,
    sick: tuple[int, int] | None = None,
    average: Average | None = None,
    pull: float | None = None,
    look_ahead: float = 0.0,
) -> tuple[State, list[State]]:
    """The center and the workers' iterates after all batches; ``batches`` by worker.

    With ``pull`` workers lose that much of x - c - λ l, l being the center's last move, and send
    ``alpha`` of x - c all the same.

    A worker whose batch is None, or that has no more, takes no step but takes part in exchanges;
    one that is ``sick`` at a step starts again at the center instead. All do, without momentum,
    with the exchange after the one at which one's learning rate is ``lr_drop`` of its peak.
    ``average`` is told of every move of the center.
    """
    p = len(batches)
    workers, center = [dict(start) for _ in range(p)], dict(start)
    v = {k: 0.0 * start[k] for k in start}
    peaks, agreed = [0.0] * p, False
    steps = max(len(own) for own in batches) // accumulate
    for t in range(steps + 1):
        restart = False
        rates = dict.fromkeys(start, 0.0)
        workers = [dict(center) if (i, t) == sick else x for i, x in enumerate(workers)]
        pulls = lost = [{k: 0.0 * x[k] for k in x} for x in workers]
        if (t % tau == 0 and t < steps) or (final_exchange and t == steps):
            rates = {k: alpha(k, t) for k in start}
            pulls = [{k: rates[k] * (x[k] - center[k]) for k in x} for x in workers]
            lost = pulls
            if pull is not None:
                far = {k: np.where(rates[k], pull, 0.0) for k in start}
                ahead = {k: center[k] + look_ahead * v[k] for k in start}
                lost = [
                    d if (i, t) == sick else {k: far[k] * (x[k] - ahead[k]) for k in x}
                    for i, (x, d) in enumerate(zip(workers, pulls, strict=True))
                ]
            if t and lr_drop:
                restart = agreed
                now = [max(optimizer.lr(k, t) for k in start) for optimizer in optimizers]
                before = now if restart else peaks
                peaks = [max(pair) for pair in zip(now, before, strict=True)]
                agreed = any(n <= lr_drop * peak for n, peak in zip(now, peaks, strict=True))
        if t < steps:
            for i in range(p):
                micro = batches[i][t * accumulate : (t + 1) * accumulate]
                if not micro or micro[0] is None:
                    continue
                point = optimizers[i].gradient_point(workers[i])
                gradients = [toy_gradient(point, batch) for batch in micro]
                mean = {k: sum(g[k] for g in gradients) / accumulate for k in point}
                workers[i] = optimizers[i].step(workers[i], mean, t)
        workers = [{k: x[k] - d[k] for k in x} for x, d in zip(workers, lost, strict=True)]
        for k in center:
            moved = center_momentum * v[k] + sum(d[k] for d in pulls)
            v[k] = np.where(rates[k], moved, v[k])  # rows whose fragment has its turn
            center[k] = center[k] + np.where(rates[k], moved, 0.0)
            if average is not None and np.any(rates[k]):
                average.follow(k, center[k], np.flatnonzero(rates[k]))
        if restart:
            workers = [dict(center) for _ in workers]
            v = {k: 0.0 * start[k] for k in start}
    return center, workers


def asynchronous(
    start: State,
    batches: list[list[tuple[np.ndarray, np.ndarray]]],
    optimizers: list[Any],
    *,
    tau: int,
    alpha: float,
    overlap: bool,
    codec: Callable[[np.ndarray], np.ndarray] | None = None,
    feedback: bool = True,
) -> tuple[State, list[State]]:
    """The center and the workers' iterates, one worker's step after the other's.

    ``codec`` gives what arrives of a worker's difference, all parameters in a row; what is lost
    goes with its next one, or without ``feedback`` stays in its weights. The last is sent in full.
    """
    p, steps = len(optimizers), len(batches[0])
    center, workers = dict(start), [dict(start) for _ in range(p)]
    known = [dict(center) for _ in range(p)]
    lost = [{k: 0.0 * v for k, v in start.items()} for _ in range(p)]
    for t in range(steps + 1):
        for i, optimizer in enumerate(optimizers):
            x, c, d = workers[i], known[i] if overlap else center, None
            if (t % tau == 0 and t > 0) or t == steps:
                d = {k: alpha * (x[k] - c[k]) for k in x}
                sent = {k: d[k] + lost[i][k] for k in d}
                if codec and t < steps:
                    flat = codec(np.concatenate([each.ravel() for each in sent.values()]))
                    ends = np.cumsum([each.size for each in sent.values()])[:-1]
                    pieces = zip(sent.items(), np.split(flat, ends), strict=True)
                    arrives = {k: piece.reshape(each.shape) for (k, each), piece in pieces}
                    if feedback:
                        lost[i] = {k: sent[k] - arrives[k] for k in sent}
                    else:
                        d = arrives
                    sent = arrives
                center = {k: center[k] + sent[k] for k in x}
                known[i] = dict(center)
            if t < steps:
                gradient = toy_gradient(optimizer.gradient_point(x), batches[i][t])
                x = optimizer.step(x, gradient, t)
                workers[i] = {k: x[k] - d[k] for k in x} if d else x
    return center, workers


def asynchronous_downpour(
    start: State,
    batches: list[list[tuple[np.ndarray, np.ndarray]]],
    lr: float,
    *,
    tau: int,
    momentum: float = 0.0,
    average: Average | None = None,
) -> tuple[State, list[State], State]:
    """The center, the workers, and v, which the master keeps; one worker's step after the other's.

    c is the master's look-ahead point: v <- δ v + V; c <- c + V + δ v, V being what a worker made.
    """
    center, v = dict(start), {k: 0.0 * each for k, each in start.items()}
    workers, begun = [dict(start) for _ in batches], [dict(start) for _ in batches]
    for t in range(len(batches[0])):
        for i, x in enumerate(workers):
            gradient = toy_gradient(x, batches[i][t])
            workers[i] = {k: x[k] - lr * gradient[k] for k in x}
            if (t + 1) % tau == 0:
                made = {k: workers[i][k] - begun[i][k] for k in x}
                v = {k: momentum * v[k] + made[k] for k in x}
                center = {k: center[k] + made[k] + momentum * v[k] for k in x}
                workers[i], begun[i] = dict(center), dict(center)
                for k in center if average else ():
                    average.follow(k, center[k])
    return center, workers, v


def int8(values: np.ndarray) -> np.ndarray:
    """What arrives of up to 256 values: whole multiples of a 127th of the largest."""
    scale = float(np.float32(np.abs(values).max() / 127))
    return np.rint(values / scale) * scale if scale else 0 * values


def fp16(values: np.ndarray) -> np.ndarray:
    """What arrives of values within the range of half precision."""
    return values.astype(np.float16).astype(values.dtype)


class LocalSgd:
    """The center becomes the mean of the workers; after Stich 2019.

    Like all that follow, ``move`` says how far the center goes and what is kept, given how far each
    worker went and what was kept before; ``state`` names what is kept. Workers go on ``delay``
    steps later, and keep ``mixing_rate`` of themselves.
    """

    state: tuple[str, ...] = ()
    delay = 0
    mixing_rate = 0.0

    def move(self, moves: list[np.ndarray], kept: State) -> tuple[np.ndarray, State]:
        return sum(moves) / len(moves), kept


class Downpour(LocalSgd):
    """The center goes as far as all workers together; Zhang et al. 2015."""

    def move(self, moves: list[np.ndarray], kept: State) -> tuple[np.ndarray, State]:
        return sum(moves), kept


class MDownpour(LocalSgd):
    """Zhang et al. 2015, Alg. 4 and 5: the master keeps x and v, and hands out x + δ v."""

    state = ("v",)

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum

    def move(self, moves: list[np.ndarray], kept: State) -> tuple[np.ndarray, State]:
        v = self.momentum * kept["v"] + sum(moves)
        return v + self.momentum * (v - kept["v"]), {"v": v}


class SlowMo(LocalSgd):
    """Wang et al. 2020, Alg. 1, line 7 and 8: u with the workers' learning rate γ, any constant."""

    state = ("u",)
    gamma = 0.1

    def __init__(self, alpha: float, beta: float) -> None:
        self.alpha, self.beta = alpha, beta

    def move(self, moves: list[np.ndarray], kept: State) -> tuple[np.ndarray, State]:
        u = self.beta * kept["u"] - sum(moves) / len(moves) / self.gamma
        return -self.alpha * self.gamma * u, {"u": u}


class Bmuf(LocalSgd):
    """Chen and Huo 2016: Δ(t) = η Δ(t-1) + ζ G(t); W(t) = W(t-1) + Δ(t)."""

    state = ("delta",)

    def __init__(self, zeta: float, eta: float) -> None:
        self.zeta, self.eta = zeta, eta

    def move(self, moves: list[np.ndarray], kept: State) -> tuple[np.ndarray, State]:
        delta = self.eta * kept["delta"] + self.zeta * sum(moves) / len(moves)
        return delta, {"delta": delta}


class DiLoCo(LocalSgd):
    """Douillard et al. 2023, Alg. 1, with Nesterov momentum as torch and Sutskever have it."""

    state = ("b",)

    def __init__(self, lr: float, momentum: float, delay: int = 0, mixing_rate: float = 0) -> None:
        """With a delay: Douillard et al. 2025, Alg. 2, ``mixing_rate`` being its α."""
        self.lr, self.momentum, self.delay, self.mixing_rate = lr, momentum, delay, mixing_rate

    def move(self, moves: list[np.ndarray], kept: State) -> tuple[np.ndarray, State]:
        gradient = -sum(moves) / len(moves)
        b = self.momentum * kept["b"] + gradient
        return -self.lr * (gradient + self.momentum * b), {"b": b}


class OuterAdam(LocalSgd):
    """The same with Adam (Kingma and Ba 2015) and torch's defaults."""

    state = ("m", "s", "t")

    def __init__(self, lr: float) -> None:
        self.lr = lr

    def move(self, moves: list[np.ndarray], kept: State) -> tuple[np.ndarray, State]:
        gradient, t = -sum(moves) / len(moves), kept["t"] + 1
        m = 0.9 * kept["m"] + 0.1 * gradient
        s = 0.999 * kept["s"] + 0.001 * gradient**2
        mean, square = m / (1 - 0.9**t), s / (1 - 0.999**t)
        return -self.lr * mean / (np.sqrt(square) + 1e-8), {"m": m, "s": s, "t": t}


class PostLocalSgd(LocalSgd):
    """Lin et al. 2018: gradients are averaged over the workers before ``warm_up`` steps."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up = warm_up


class Lookahead(LocalSgd):
    """Zhang et al. 2019: φ <- φ + α (θ - φ)."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha

    def move(self, moves: list[np.ndarray], kept: State) -> tuple[np.ndarray, State]:
        return self.alpha * sum(moves) / len(moves), kept


def merged(
    batches: list[list[tuple[np.ndarray, np.ndarray]]], groups: list[list[int]]
) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """The batches of each group: those of its workers, one below the other, while they last.

    The gradient of the toy's mean over such a batch is the mean of the workers' gradients.
    """
    found = []
    for ranks in groups:
        longest = max(len(batches[rank]) for rank in ranks)
        steps = [[batches[rank][t : t + 1] for rank in ranks] for t in range(longest)]
        pairs = [[pair for part in parts for pair in part] for parts in steps]
        found.append([tuple(np.concatenate(part) for part in zip(*p, strict=True)) for p in pairs])
    return found


class Clipped:
    """An optimizer whose gradients are clipped to a norm, as torch does it."""

    def __init__(self, optimizer: Any, norm: float) -> None:
        self.optimizer, self.norm = optimizer, norm
        self.gradient_point = optimizer.gradient_point

    def step(self, x: State, gradient: State, t: int) -> State:
        size = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        shrunk = {k: g * min(1.0, self.norm / (size + 1e-6)) for k, g in gradient.items()}
        return self.optimizer.step(x, shrunk, t)


def restarting(
    rule: Any,
    start: State,
    batches: list[list[tuple[np.ndarray, np.ndarray]]],
    optimizers: list[Any],
    *,
    tau: int,
    turns: list[dict[str, list[int]]] | None = None,
    accumulate: int = 1,
    sick: tuple[int, int] | None = None,
    average: Average | None = None,
) -> State:
    """The center after all batches; every tau steps workers go on from it.

    Args:
        rule: as LocalSgd.
        start: of all.
        batches: by worker; one that has no more takes no step.
        optimizers: by worker.
        tau: steps between two exchanges of a row.
        turns: rows of each parameter that are exchanged together; None: all.
        accumulate: batches of a step.
        sick: a worker, and the steps after which it has nothing to give.
        average: told of every move of the center.
    """
    workers, center = [dict(start) for _ in batches], dict(start)
    kept = {k: {name: np.zeros_like(start[k]) for name in rule.state} for k in start}
    turns = turns or [{k: list(range(len(start[k]))) for k in start}]
    pause, turn = tau // len(turns), 0
    steps = max(len(own) for own in batches) // accumulate
    owed: list[tuple[int, dict[str, list[int]]]] = []

    def go_on(clock: float) -> None:
        while owed and owed[0][0] <= clock:
            _, rows = owed.pop()
            for x in workers:
                for k, mine in rows.items():
                    x[k] = x[k].copy()
                    kappa = rule.mixing_rate
                    x[k][mine] = kappa * x[k][mine] + (1 - kappa) * center[k][mine]

    for t in range(steps):
        means = {}
        for i, own in enumerate(batches):
            micro = own[t * accumulate : (t + 1) * accumulate]
            if micro:
                gradients = [toy_gradient(workers[i], batch) for batch in micro]
                means[i] = {k: sum(g[k] for g in gradients) / accumulate for k in start}
        shared = {k: sum(g[k] for g in means.values()) / len(means) for k in start}
        for i, own in means.items():
            mean = shared if t < getattr(rule, "warm_up", 0) else own
            workers[i] = optimizers[i].step(workers[i], mean, t)
        if t < getattr(rule, "warm_up", 0):  # who had no batch, too
            workers = [dict(workers[min(means)]) for _ in workers]
        go_on(t + 1)
        due = 1 if (t + 1) % pause == 0 else 0
        for _ in range(len(turns) if t + 1 == steps else due):
            go_on(np.inf)
            if sick and sick[1] == t + 1:
                workers[sick[0]] = dict(center)
            for k, rows in turns[turn].items():
                well = [x for i, x in enumerate(workers) if (i, t + 1) != sick]
                moves = [x[k][rows] - center[k][rows] for x in well]
                old = {name: value[rows] for name, value in kept[k].items()}
                far, new = rule.move(moves, old)
                center[k] = center[k].copy()
                center[k][rows] += far
                if average is not None:
                    average.follow(k, center[k], rows)
                for name, value in new.items():
                    kept[k][name][rows] = value
            owed.append((t + 1 + rule.delay, turns[turn]))
            go_on(t + 1)
            turn = (turn + 1) % len(turns)
    return center


@dataclass
class DelayedSgd:
    """What others did arrives an exchange late; w of its own a worker keeps."""

    own: float


def delayed(
    rule: DelayedSgd,
    start: State,
    batches: list[list[tuple[np.ndarray, np.ndarray]]],
    optimizers: list[Any],
    *,
    tau: int,
    turns: list[dict[str, list[int]]] | None = None,
    accumulate: int = 1,
    sick: tuple[int, int] | None = None,
    average: Average | None = None,
) -> State:
    """The center after all batches; as restarting, but exchanges begin before a step.

    A sum arrives at the next exchange of the same rows, where the center is read again: it may be
    added as soon as workers have gone on.
    """
    workers, stood = [dict(start) for _ in batches], [dict(start) for _ in batches]
    center = {k: value.copy() for k, value in start.items()}
    turns = turns or [{k: list(range(len(start[k]))) for k in start}]
    pause, turn = tau // len(turns), 0
    steps = max(len(own) for own in batches) // accumulate
    for t in range(steps + 1):
        if sick and sick[1] == t:
            workers[sick[0]] = {k: value.copy() for k, value in center.items()}
            stood[sick[0]] = {k: value.copy() for k, value in center.items()}
        well = [i for i in range(len(batches)) if (i, t) != sick]
        lost = [{k: np.zeros_like(value) for k, value in start.items()} for _ in batches]
        due = 1 if t and t % pause == 0 else 0
        for _ in range(len(turns) if t == steps else due):
            for k, rows in turns[turn].items():
                did = {i: workers[i][k][rows] - stood[i][k][rows] for i in well}
                for i, u in did.items():
                    stood[i][k] = stood[i][k].copy()
                    stood[i][k][rows] = center[k][rows] + rule.own * u
                    lost[i][k][rows] = workers[i][k][rows] - stood[i][k][rows]
                center[k][rows] += sum(did.values()) / len(well)
                if average is not None:
                    average.follow(k, center[k], rows)
            turn = (turn + 1) % len(turns)
        for i, own in enumerate(batches):
            micro = own[t * accumulate : (t + 1) * accumulate]
            if micro:
                gradients = [toy_gradient(workers[i], batch) for batch in micro]
                mean = {k: sum(g[k] for g in gradients) / accumulate for k in start}
                workers[i] = optimizers[i].step(workers[i], mean, t)
        workers = [{k: x[k] - d[k] for k in x} for x, d in zip(workers, lost, strict=True)]
    return center


@dataclass
class LeaderSgd:
    """Teng et al. 2019: pull λ, and s of the running losses."""

    pull: float
    smoothing: float


def following(
    rule: LeaderSgd,
    start: State,
    batches: list[list[tuple[np.ndarray, np.ndarray]]],
    optimizers: list[Any],
    *,
    tau: int,
    accumulate: int = 1,
    sick: tuple[int, int] | None = None,
    **_: Any,
) -> State:
    """As restarting, but the center becomes a worker's weights, to which all are pulled."""
    p, leader = len(batches), 0
    workers, center, running = [dict(start) for _ in batches], dict(start), [np.inf] * p
    steps = max(len(own) for own in batches) // accumulate

    def best() -> int:
        return min(range(p), key=lambda i: (running[i], i != leader, i))

    for t in range(steps):
        for i, own in enumerate(batches):
            micro = own[t * accumulate : (t + 1) * accumulate]
            for batch in micro:
                new = toy_loss(workers[i], batch)
                mean = rule.smoothing * running[i] + (1 - rule.smoothing) * new
                running[i] = mean if np.isfinite(running[i]) else new
            if micro:
                gradients = [toy_gradient(workers[i], batch) for batch in micro]
                mean = {k: sum(g[k] for g in gradients) / accumulate for k in start}
                workers[i] = optimizers[i].step(workers[i], mean, t)
            if sick == (i, t + 1):
                workers[i], running[i] = dict(center), np.inf
        if (t + 1) % tau and t + 1 < steps:
            continue
        if (t + 1) % tau:
            leader = best()  # all have ended, and know the latest losses
        if sick != (leader, t + 1):
            center = dict(workers[leader])
        for x in workers:
            x.update({k: x[k] - rule.pull * (x[k] - center[k]) for k in x})
        leader = best()
    return center


def tree(
    start: State,
    batches: list[list[tuple[np.ndarray, np.ndarray] | None]],
    optimizers: list[Any],
    levels: list[list[list[int]]],
    *,
    tau: int,
    alpha: float,
    inside: list[tuple[int, Callable[[int, str], float]]],
    accumulate: int = 1,
    final_exchange: bool = True,
    center_momentum: float = 0.0,
    sick: tuple[tuple[int, int], ...] = (),
) -> tuple[State, list[list[State]], list[State]]:
    """EASGD at several levels: the center, the centers of all groups, and the workers' iterates.

    ``levels`` has the groups from the outermost inward, and ``inside`` for each level τ, and α by
    the number of participants in a group and the parameter's name. Who has no batch left, or None,
    takes part in exchanges while a member of the group trains; the outermost centers always do. A
    worker that is sick at a step starts again at its group's center; if all participants of a group
    are, it does so with all inside it, at the center above, with the next exchange there.
    """
    everybody = range(len(batches))
    groups = [[list(everybody)], *levels, [[rank] for rank in everybody]]
    states = [[dict(start) for _ in level] for level in groups]
    ill = [[False for _ in level] for level in groups]
    periods = [tau, *(period for period, _ in inside)]
    rates = [lambda participants, name: alpha, *(rate for _, rate in inside)]
    velocity = {k: 0.0 * start[k] for k in start}
    steps = max(len(own) for own in batches) // accumulate

    def micro(rank: int, t: int) -> list[Any]:
        own = batches[rank][t * accumulate : (t + 1) * accumulate]
        return own if len(own) == accumulate and own[0] is not None else []

    def within(depth: int, ranks: list[int]) -> list[int]:
        return [i for i, members in enumerate(groups[depth]) if set(members) <= set(ranks)]

    def exchange(depth: int, t: int) -> dict[int, State]:
        """What is owed to the participants, which are one level further down."""
        pulls = {}
        for i, ranks in enumerate(groups[depth]):
            if depth and t < steps and not any(micro(rank, t) for rank in ranks):
                continue
            center, participants = states[depth][i], within(depth + 1, ranks)
            if depth + 1 == len(periods):
                for rank in participants:
                    ill[-1][rank] = (rank, t) in sick
            for participant in participants:
                if ill[depth + 1][participant]:
                    for below in range(depth + 1, len(groups)):
                        for j in within(below, groups[depth + 1][participant]):
                            states[below][j] = dict(center)
            well = [participant for participant in participants if not ill[depth + 1][participant]]
            ill[depth][i] = not well
            for k in center:
                rate = rates[depth](len(participants), k)
                moves = {
                    participant: rate * (states[depth + 1][participant][k] - center[k])
                    for participant in well
                }
                for participant, move in moves.items():
                    pulls.setdefault(participant, {})[k] = move
                moved = sum(moves.values())
                if not depth:
                    velocity[k] = moved = center_momentum * velocity[k] + moved
                center[k] = center[k] + moved
        return pulls

    def pull(depth: int, pulls: dict[int, State]) -> None:
        for participant, moves in pulls.items():
            states[depth][participant] = {
                k: states[depth][participant][k] - moves[k] for k in moves
            }

    for t in range(steps):
        owed: dict[int, State] = {}
        for depth, period in enumerate(periods):
            pull(depth, owed)
            owed = exchange(depth, t) if t and t % period == 0 else {}
        for rank, optimizer in enumerate(optimizers):
            if found := micro(rank, t):
                point = optimizer.gradient_point(states[-1][rank])
                gradients = [toy_gradient(point, batch) for batch in found]
                mean = {k: sum(g[k] for g in gradients) / accumulate for k in point}
                states[-1][rank] = optimizer.step(states[-1][rank], mean, t)
        pull(-1, owed)
    if final_exchange:
        for depth in reversed(range(len(periods))):
            exchange(depth, steps)
    return states[0][0], states[1:-1], states[-1]
