"""Forward passes written from the papers in plain float64 NumPy, one document at a time, one head at a time.

They share no code with llmjax and are slow and short on purpose: a reader can hold them beside the paper. Parameters
come as a flat dict from our paths ("layers/attention/query/kernel") to arrays; stacked layers have a leading dimension.
Letters of shapes are those of the project: L tokens, M keys, D width, F feed-forward width, H heads, K head size, V vocabulary.
"""

import math
from collections.abc import Callable

import numpy as np
from oracles_recurrent import gelu_tanh, rglru

Params = dict[str, np.ndarray]
Turn = Callable[[np.ndarray], np.ndarray]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    """x times the normal distribution function (Hendrycks & Gimpel 2016)."""
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def layer_norm(w: Params, name: str, x: np.ndarray, epsilon: float) -> np.ndarray:
    """Ba et al. 2016; without a bias where the parameters have none."""
    centered = x - x.mean(-1, keepdims=True)
    y = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + epsilon)
    return y * w[f"{name}/scale"] + w.get(f"{name}/bias", 0)


def rms_norm(w: Params, name: str, x: np.ndarray, epsilon: float) -> np.ndarray:
    """Zhang & Sennrich 2019."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * w[f"{name}/scale"]


def linear(w: Params, name: str, x: np.ndarray) -> np.ndarray:
    return x @ w[f"{name}/kernel"] + w.get(f"{name}/bias", 0)


def at(p: Params, prefix: str, layer: int) -> Params:
    """The parameters of one layer, without the prefix."""
    return {name.removeprefix(f"{prefix}/"): a[layer] for name, a in p.items() if name.startswith(f"{prefix}/")}


def attention(
    w: Params,
    name: str,
    x_LD: np.ndarray,
    keys_MD: np.ndarray,
    mask_LM: np.ndarray,
    *,
    scale: float | None = None,
    bias_HLM: np.ndarray | None = None,
    turn: Turn = lambda x: x,
) -> np.ndarray:
    """Softmax attention (Vaswani et al. 2017); several query heads share a key head where there are fewer of those."""
    query, key, value, out = (w[f"{name}/{part}/kernel"] for part in ("query", "key", "value", "out"))
    heads, groups, size = query.shape[1], key.shape[1], query.shape[2]
    zeros = np.zeros((heads, size))
    y_LD = np.zeros((len(x_LD), out.shape[-1])) + w.get(f"{name}/out/bias", 0)
    for h in range(heads):
        g = h * groups // heads
        q = turn(x_LD @ query[:, h] + w.get(f"{name}/query/bias", zeros)[h])
        k = turn(keys_MD @ key[:, g] + w.get(f"{name}/key/bias", zeros)[g])
        v = keys_MD @ value[:, g] + w.get(f"{name}/value/bias", zeros)[g]
        scores = q @ k.T * (size**-0.5 if scale is None else scale)
        if bias_HLM is not None:
            scores = scores + bias_HLM[h]
        y_LD += softmax(np.where(mask_LM, scores, -np.inf)) @ v @ out[h]
    return y_LD


def causal(length: int) -> np.ndarray:
    return np.tril(np.ones((length, length), bool))


def band(length: int, window: int) -> np.ndarray:
    """The last `window` tokens, the own one included."""
    return np.array([[m - window < j <= m for j in range(length)] for m in range(length)])


# Positions


def rotation(frequencies: np.ndarray, length: int, factor: float = 1.0) -> Turn:
    """Su et al. 2021: pair i of the token at position m turns by m times frequency i. Pairs are (k, k + K/2)."""

    def turn(x_LK: np.ndarray) -> np.ndarray:
        half = len(frequencies)
        y = x_LK.copy()
        for m in range(length):
            for i, frequency in enumerate(frequencies):
                cos, sin = math.cos(m * frequency) * factor, math.sin(m * frequency) * factor
                a, b = x_LK[m, i], x_LK[m, i + half]
                y[m, i], y[m, i + half] = a * cos - b * sin, a * sin + b * cos
        return y

    return turn


def rotary(size: int, base: float = 10_000.0) -> np.ndarray:
    """theta_i = base^(-2i/d), i from 0."""
    return np.array([base ** (-2 * i / size) for i in range(size // 2)])


def rotary_linear(size: int, base: float, factor: float) -> np.ndarray:
    """Position interpolation (Chen et al. 2023): position m becomes m / factor."""
    return rotary(size, base) / factor


def rotary_ntk(size: int, base: float, factor: float) -> np.ndarray:
    """NTK-aware scaling (in Peng et al. 2023, section 3.1): the base becomes base * factor^(d / (d - 2))."""
    return rotary(size, base * factor ** (size / (size - 2)))


def rotary_yarn(
    size: int, base: float, factor: float, length: int, slow: float, fast: float
) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al. 2023): frequencies, and the factor on cosine and sine, sqrt(1/t) = 0.1 ln(factor) + 1.

    The ramp between interpolated and untouched pairs runs over the index of the pair, as in the authors' code; the
    formula printed in the paper has it run over the number of turns.
    """

    def dimension(turns: float) -> float:  # where a pair turns this often in `length` tokens, as a real number
        return size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(dimension(fast)), 0), min(math.ceil(dimension(slow)), size - 1)
    frequencies = []
    for i, theta in enumerate(rotary(size, base)):
        share = min(1.0, max(0.0, (i - low) / max(high - low, 0.001)))  # of interpolation
        frequencies.append(share * theta / factor + (1 - share) * theta)
    return np.array(frequencies), 0.1 * math.log(factor) + 1


def rotary_llama3(size: int, base: float, factor: float, length: int, slow: float, fast: float) -> np.ndarray:
    """Llama 3.1 (Dubey et al. 2024): by wavelength, with a ramp in the number of turns between the two bounds."""
    frequencies = []
    for theta in rotary(size, base):
        wavelength = 2 * math.pi / theta
        if wavelength < length / fast:
            frequencies.append(theta)
        elif wavelength > length / slow:
            frequencies.append(theta / factor)
        else:
            smooth = (length / wavelength - slow) / (fast - slow)
            frequencies.append((1 - smooth) * theta / factor + smooth * theta)
    return np.array(frequencies)


def sinusoids(length: int, width: int) -> np.ndarray:
    """Vaswani et al. 2017, section 3.5: PE(pos, 2i) = sin(pos / 10000^(2i/D)), PE(pos, 2i + 1) = the cosine."""
    table = np.zeros((length, width))
    for pos in range(length):
        for i in range(0, width, 2):
            angle = pos / 10_000 ** (i / width)
            table[pos, i], table[pos, i + 1] = math.sin(angle), math.cos(angle)
    return table


def t5_bucket(offset: int, buckets: int, most: int, *, both_ways: bool) -> int:
    """Raffel et al. 2020, section 2.1: the bucket of key position minus query position."""
    start = 0
    if both_ways:
        buckets //= 2
        start = buckets if offset > 0 else 0
        distance = abs(offset)
    else:
        distance = max(-offset, 0)
    exact = buckets // 2
    if distance < exact:
        return start + distance
    steps = math.log(distance / exact) / math.log(most / exact) * (buckets - exact)
    return start + min(exact + int(steps + 1e-9), buckets - 1)


def t5_bias(table: np.ndarray, queries: int, keys: int, most: int, *, both_ways: bool) -> np.ndarray:
    """(H, L, M) from the table (buckets, H)."""
    bias = np.zeros((table.shape[1], queries, keys))
    for i in range(queries):
        for j in range(keys):
            bias[:, i, j] = table[t5_bucket(j - i, len(table), most, both_ways=both_ways)]
    return bias


# Models: tokens (L,) -> logits (L, V)


def palm(p: Params, tokens: np.ndarray, *, turn: Turn | None = None, epsilon: float = 1e-5) -> np.ndarray:
    """Chowdhery et al. 2022, section 2: y = x + MLP(LN(x)) + attention(LN(x)), one key and value head, rotary positions,
    SwiGLU, no biases, the embedding as head with logits divided by sqrt(D)."""
    x = p["embedding"][tokens]
    width, size = x.shape[1], p["layers/attention/query/kernel"].shape[-1]
    turn = turn or rotation(rotary(size), len(tokens))
    for i in range(len(p["layers/attention/query/kernel"])):
        w = at(p, "layers", i)
        h = layer_norm(w, "attention_norm", x, epsilon)
        mlp = linear(w, "mlp/down", silu(linear(w, "mlp/gate", h)) * linear(w, "mlp/up", h))
        x = x + mlp + attention(w, "attention", h, h, causal(len(x)), turn=turn)
    return layer_norm(p, "final_norm", x, epsilon) @ p["embedding"].T / math.sqrt(width)


def lamda(p: Params, tokens: np.ndarray, *, most: int, epsilon: float = 1e-6) -> np.ndarray:
    """Thoppilan et al. 2022, section 3: a decoder with gated GELU and T5's relative positions, one table for all layers.

    The paper says no more of the block. As in T5 (Raffel et al. 2020, Shazeer 2020), RMS norms stand before each branch
    and nothing has a bias; scores are divided by sqrt(K), and the head is a matrix of its own.
    """
    x = p["embedding"][tokens]
    bias = t5_bias(p["relative_embedding"], len(x), len(x), most, both_ways=False)
    for i in range(len(p["layers/attention/query/kernel"])):
        w = at(p, "layers", i)
        h = rms_norm(w, "attention_norm", x, epsilon)
        x = x + attention(w, "attention", h, h, causal(len(x)), bias_HLM=bias)
        h = rms_norm(w, "mlp_norm", x, epsilon)
        x = x + linear(w, "mlp/down", gelu(linear(w, "mlp/gate", h)) * linear(w, "mlp/up", h))
    return linear(p, "head", rms_norm(p, "final_norm", x, epsilon))


def transformer(p: Params, source: np.ndarray, target: np.ndarray, *, epsilon: float = 1e-6) -> np.ndarray:
    """Vaswani et al. 2017: LayerNorm(x + branch(x)), embeddings times sqrt(D) plus sinusoids, ReLU, one matrix for source,
    target and output embeddings. Logits of every target position, (target length, V)."""
    width = p["embedding"].shape[1]

    def embed(tokens: np.ndarray) -> np.ndarray:
        return p["embedding"][tokens] * math.sqrt(width) + sinusoids(len(tokens), width)

    def feed_forward(w: Params, x: np.ndarray) -> np.ndarray:
        return linear(w, "mlp/down", relu(linear(w, "mlp/up", x)))

    memory = embed(source)
    for i in range(len(p["encoder/layers/attention/query/kernel"])):
        w = at(p, "encoder/layers", i)
        everything = np.ones((len(source), len(source)), bool)
        memory = layer_norm(
            w, "attention_norm", memory + attention(w, "attention", memory, memory, everything), epsilon
        )
        memory = layer_norm(w, "mlp_norm", memory + feed_forward(w, memory), epsilon)
    x = embed(target)
    for i in range(len(p["layers/attention/query/kernel"])):
        w = at(p, "layers", i)
        everything = np.ones((len(target), len(source)), bool)
        x = layer_norm(w, "attention_norm", x + attention(w, "attention", x, x, causal(len(x))), epsilon)
        x = layer_norm(w, "cross_norm", x + attention(w, "cross", x, memory, everything), epsilon)
        x = layer_norm(w, "mlp_norm", x + feed_forward(w, x), epsilon)
    return x @ p["embedding"].T


def unilm_mask(mode: str, length: int, source: int) -> np.ndarray:
    """Dong et al. 2019, figure 1: which tokens (columns) a token (row) sees. `source`: tokens of the first segment."""
    mask = np.zeros((length, length), bool)
    for i in range(length):
        for j in range(length):
            if mode == "bidirectional":
                mask[i, j] = True
            elif mode == "left-to-right":
                mask[i, j] = j <= i
            elif mode == "right-to-left":
                mask[i, j] = j >= i
            elif mode == "sequence-to-sequence":
                mask[i, j] = j < source or (i >= source and j <= i)
            else:
                raise ValueError(mode)
    return mask


def unilm(
    p: Params, tokens: np.ndarray, types: np.ndarray, mask_LM: np.ndarray, *, epsilon: float = 1e-12
) -> np.ndarray:
    """Dong et al. 2019: BERT (Devlin et al. 2018) under one of four masks; logits of the masked-token head."""
    x = p["embedding"][tokens] + p["position_embedding"][: len(tokens)] + p["type_embedding"][types]
    x = layer_norm(p, "embedding_norm", x, epsilon)
    for i in range(len(p["layers/attention/query/kernel"])):
        w = at(p, "layers", i)
        x = layer_norm(w, "attention_norm", x + attention(w, "attention", x, x, mask_LM), epsilon)
        x = layer_norm(w, "mlp_norm", x + linear(w, "mlp/down", gelu(linear(w, "mlp/up", x))), epsilon)
    h = layer_norm(p, "head_norm", gelu(linear(p, "head_transform", x)), epsilon)
    return h @ p["embedding"].T + p["head_bias"]


def gpt3(p: Params, tokens: np.ndarray, *, window: int, epsilon: float = 1e-5) -> np.ndarray:
    """Brown et al. 2020, section 2.1: GPT-2 (Radford et al. 2019) with dense and locally banded attention in turn.

    Even layers are dense ("layers/0"), odd ones see the last `window` tokens, their own included ("layers/1").
    """
    x = p["embedding"][tokens] + p["position_embedding"][: len(tokens)]
    length = len(tokens)
    for i in range(2 * len(p["layers/0/attention/query/kernel"])):
        w = at(p, f"layers/{i % 2}", i // 2)
        mask = band(length, window) if i % 2 else causal(length)
        h = layer_norm(w, "attention_norm", x, epsilon)
        x = x + attention(w, "attention", h, h, mask)
        h = layer_norm(w, "mlp_norm", x, epsilon)
        x = x + linear(w, "mlp/down", gelu_tanh(linear(w, "mlp/up", h)))
    return layer_norm(p, "final_norm", x, epsilon) @ p["embedding"].T


def deepnorm(p: Params, tokens: np.ndarray, *, epsilon: float = 1e-5) -> np.ndarray:
    """Wang et al. 2022, figure 2: LayerNorm(alpha x + branch(x)), alpha = (2 M)^(1/4) for a decoder of M layers."""
    layers = len(p["layers/attention/query/kernel"])
    alpha = (2 * layers) ** 0.25
    x = p["embedding"][tokens] + p["position_embedding"][: len(tokens)]
    for i in range(layers):
        w = at(p, "layers", i)
        x = layer_norm(w, "attention_norm", alpha * x + attention(w, "attention", x, x, causal(len(x))), epsilon)
        x = layer_norm(w, "mlp_norm", alpha * x + linear(w, "mlp/down", relu(linear(w, "mlp/up", x))), epsilon)
    return x @ p["embedding"].T


def griffin(
    p: Params,
    tokens: np.ndarray,
    layers: list[tuple[str, int, str]],
    *,
    window: int,
    scale: float = 1.0,
    epsilon: float = 1e-6,
) -> np.ndarray:
    """De et al. 2024, section 2: residual blocks of a mixer and a gated MLP, each behind an RMS norm.

    The mixer is the gated linear recurrence or local attention with one key and value head and rotary positions.
    layers: for each its path, its index there, and which of the two it has. scale: of the embeddings, sqrt(D) from
    Botev et al. 2024 on.
    """
    x = p["embedding"][tokens] * scale
    for path, i, kind in layers:
        w = at(p, path, i)
        if kind == "rglru":
            recurrence = {name.removeprefix("rglru/"): a for name, a in w.items() if name.startswith("rglru/")}
            x = x + rglru(recurrence, rms_norm(w, "recurrent_norm", x, epsilon))
        else:
            h = rms_norm(w, "attention_norm", x, epsilon)
            turn = rotation(rotary(w["attention/query/kernel"].shape[-1]), len(x))
            x = x + attention(w, "attention", h, h, band(len(x), window), turn=turn)
        h = rms_norm(w, "mlp_norm", x, epsilon)
        x = x + linear(w, "mlp/down", gelu_tanh(linear(w, "mlp/gate", h)) * linear(w, "mlp/up", h))
    return rms_norm(p, "final_norm", x, epsilon) @ p["embedding"].T
