"""The network in plain NumPy float64, for one environment, with loops over heads and positions.

Written from the papers' equations alone, for comparison with transformerXL.py.
"""

import numpy as np


def dense(x, layer):
    return x @ layer["kernel"] + layer.get("bias", 0.0)


def layer_norm(x, layer):
    mean = x.mean(axis=-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * layer["scale"] + layer["bias"]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gate(x, y, params):
    """Computes GTrXL's gate with Wr, Wz, Wg and Ur, Uz, Ug cut out of the fused matrices."""
    w_r, w_z, w_g = np.split(params["w"]["kernel"], 3, axis=1)
    u_r, u_z = np.split(params["u"]["kernel"], 2, axis=1)
    u_g = params["u_g"]["kernel"]
    r = sigmoid(y @ w_r + x @ u_r)
    z = sigmoid(y @ w_z + x @ u_z - params["bias"])
    h = np.tanh(y @ w_g + (r * x) @ u_g)
    return (1 - z) * x + z * h


def sinusoid(distance, embed_size):
    frequencies = [10000.0 ** (-2 * i / embed_size) for i in range(embed_size // 2)]
    angles = [distance * f for f in frequencies]
    return np.array([np.sin(a) for a in angles] + [np.cos(a) for a in angles])


def attention(x, memory, boundary, params, heads):
    """Maps x (T, E), memory (M, E) and boundary (M+T,) to (T, qkv_features)."""
    window_mem, steps = len(memory), len(x)
    n = layer_norm(np.concatenate([memory, x]), params["attention_norm"])
    q = dense(n, params["query"])
    k, v = np.split(dense(n, params["key_value"]), 2, axis=1)
    size = q.shape[1] // heads
    out = np.zeros((steps, q.shape[1]))
    for h in range(heads):
        head = slice(h * size, (h + 1) * size)
        u, w = params["content_bias"][h], params["position_bias"][h]
        for i in range(window_mem, window_mem + steps):
            logits, values = [], []
            for j in range(window_mem + steps):
                if not 0 <= i - j <= window_mem or boundary[j:i].any():
                    continue
                p = sinusoid(i - j, x.shape[1]) @ params["position"]["kernel"]
                logit = (q[i, head] + u) @ k[j, head] + (q[i, head] + w) @ p[head]
                logits.append(logit / np.sqrt(size))
                values.append(v[j, head])
            weights = np.exp(np.array(logits) - max(logits))
            out[i - window_mem, head] = weights / weights.sum() @ np.array(values)
    return out


def head(x, params, activation):
    x = activation(dense(x, params["Dense_0"]))
    x = activation(dense(x, params["Dense_1"]))
    return dense(x, params["Dense_2"])


def forward(params, obs, memory, boundary, heads, gating, activation):
    """Computes T steps of one environment.

    Args:
      params: those of `ActorCriticTransformer`, leaves float64.
      obs: (T, obs_size).
      memory: (M, L, E), each layer's inputs at the M steps before.
      boundary: (M+T,) bool, whether the memory is reset after that step.

    Returns:
      The actor's outputs (T, outputs), values (T,), layer inputs (T, L, E).
    """
    params = params["params"]
    transformer = params["transformer"]
    x = dense(obs, transformer["encoder"])
    hidden = []
    for index in range(memory.shape[1]):
        layer = transformer[f"layers_{index}"]
        hidden.append(x)
        a = dense(attention(x, memory[:, index], boundary, layer, heads), layer["attention_out"])
        y = gate(x, np.maximum(a, 0), layer["attention_gate"]) if gating else x + a
        f = gelu(dense(layer_norm(y, layer["mlp_norm"]), layer["mlp_in"]))
        f = dense(f, layer["mlp_out"])
        x = gate(y, np.maximum(f, 0), layer["mlp_gate"]) if gating else y + f
    activation = {"relu": lambda z: np.maximum(z, 0), "tanh": np.tanh}[activation]
    outputs = head(x, params["actor"], activation)
    values = head(x, params["critic"], activation)[:, 0]
    return outputs, values, np.stack(hidden, axis=1)
