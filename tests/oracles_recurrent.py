"""Recurrent mixers written from the papers in plain float64 NumPy: one document at a time, one token at a time.

They share no code with llmjax. Each takes the parameters of one mixer as a flat dict ("input/kernel" -> array without a
layer dimension) and x_LD, the tokens of one document, and returns y_LD. Nothing is chunked, scanned or batched.
"""

import math

import numpy as np

Params = dict[str, np.ndarray]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


def softplus(x: np.ndarray) -> np.ndarray:
    return np.log1p(np.exp(x))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """GELU's approximation, in GPT-2, GPT-3 and Griffin (Hendrycks & Gimpel 2016)."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def linear(p: Params, name: str, x: np.ndarray) -> np.ndarray:
    return x @ p[f"{name}/kernel"] + p.get(f"{name}/bias", 0)


def rnn(p: Params, x_LD: np.ndarray) -> np.ndarray:
    """Elman 1990: h_t = tanh(W x_t + U h_{t-1} + b); y_t = V h_t."""
    w, u, b = p["input/kernel"][:, 0], p["hidden/kernel"][:, 0], p["bias"][0]
    h, outputs = np.zeros(len(b)), []
    for x in x_LD:
        h = np.tanh(x @ w + h @ u + b)
        outputs.append(linear(p, "out", h))
    return np.array(outputs)


def lstm(p: Params, x_LD: np.ndarray) -> np.ndarray:
    """Gers et al. 2000, without peepholes; y_t = V h_t. Gates are stored as input, forget, cell, output."""
    w, u, b = p["input/kernel"], p["hidden/kernel"], p["bias"]
    h, c, outputs = np.zeros(b.shape[1]), np.zeros(b.shape[1]), []
    for x in x_LD:
        i, f, g, o = (x @ w[:, k] + h @ u[:, k] + b[k] for k in range(4))
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        outputs.append(linear(p, "out", h))
    return np.array(outputs)


def short_convolution(p: Params, name: str, x_LR: np.ndarray) -> np.ndarray:
    """y_t = b + sum_i w_i x_{t - i} with the present token's weight last, each channel by itself."""
    w_WR, y_LR = p[f"{name}/kernel"], np.zeros_like(x_LR)
    for t in range(len(x_LR)):
        for i in range(len(w_WR)):
            if t - i >= 0:
                y_LR[t] += w_WR[len(w_WR) - 1 - i] * x_LR[t - i]
    return y_LR + p.get(f"{name}/bias", 0)


def block_diagonal(p: Params, name: str, x_R: np.ndarray) -> np.ndarray:
    blocks = p[f"{name}/kernel"]
    parts = np.split(x_R, len(blocks))
    return np.concatenate([part @ w + b for part, w, b in zip(parts, blocks, p[f"{name}/bias"], strict=True)])


def rglru(p: Params, x_LD: np.ndarray) -> np.ndarray:
    """De et al. 2024, equations 1 to 4 and figure 2, with a^c = exp(-8 softplus(Lambda)) and no decay before token 0."""
    x_LR = short_convolution(p, "conv", linear(p, "input", x_LD))
    h, hidden = np.zeros(x_LR.shape[1]), []
    for t, x in enumerate(x_LR):
        r = sigmoid(block_diagonal(p, "recurrence_gate", x))
        i = sigmoid(block_diagonal(p, "input_gate", x))
        a = np.exp(-8 * softplus(p["Lambda"]) * r)
        h = a * h + np.sqrt(1 - a**2) * (i * x) if t else i * x
        hidden.append(h)
    return linear(p, "out", gelu_tanh(linear(p, "gate", x_LD)) * np.array(hidden))


def mamba2(p: Params, x_LD: np.ndarray, *, heads: int, groups: int, epsilon: float) -> np.ndarray:
    """Dao & Gu 2024: the recurrence S_t = exp(dt A) S_{t-1} + dt x_t B_t', y_t = S_t C_t + D x_t, head by head."""
    z_LR = linear(p, "gate", x_LD)
    x_LR = silu(short_convolution(p, "conv", linear(p, "input", x_LD)))
    bc = silu(short_convolution(p, "state_conv", linear(p, "state", x_LD)))
    b_LGJ, c_LGJ = np.moveaxis(bc.reshape(len(x_LD), 2, groups, -1), 1, 0)
    dt_LH = softplus(x_LD @ p["dt/kernel"] + p["dt_bias"])
    a_H = -np.exp(p["A_log"])
    y_LR = np.zeros_like(x_LR)
    for head, channels in enumerate(np.split(np.arange(x_LR.shape[1]), heads)):
        group = head // (heads // groups)
        state = np.zeros((len(channels), b_LGJ.shape[2]))
        for t in range(len(x_LD)):
            x, dt = x_LR[t, channels], dt_LH[t, head]
            state = np.exp(dt * a_H[head]) * state + dt * np.outer(x, b_LGJ[t, group])
            y_LR[t, channels] = state @ c_LGJ[t, group] + p["D"][head] * x
    y_LR = y_LR * silu(z_LR)
    parts = np.split(y_LR, groups, axis=1)
    normed = [y / np.sqrt((y**2).mean(-1, keepdims=True) + epsilon) for y in parts]
    return linear(p, "out", np.concatenate(normed, 1) * p["norm/scale"])


def conv(p: Params, x_LD: np.ndarray) -> np.ndarray:
    """LFM2's block (Liquid AI 2025): a gate before the convolution, and one after it."""
    before, after, x = (linear(p, name, x_LD) for name in ("before", "after", "input"))
    return linear(p, "out", after * short_convolution(p, "conv", before * x))
