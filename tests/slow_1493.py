"""A slow, plain witness of the model of PR #1493: layer by layer, head by head, in float64.

Layers 3..5 are visited several times in a row, once looping is on; gated U-Net skips join the first half of
the visits to the second. Late layers compute attention and MLP side by side. XSA, partial rotary positions.
Nothing is imported from the package, and nothing is shared with the other witnesses: an error here can only
agree with an error there by chance.
"""
import numpy as np

EPS = 2.0**-23    # the machine epsilon of float32: what `rms_norm` uses when none is given


def rms(x):
    "x / sqrt(mean(x^2) + eps), over the last axis."
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)


def rope_frequencies(r, base, length, trained):
    "base^(-2j/r) for j < r/2; windows longer than the trained ones stretch the base."
    if length > trained: base = base * (length/trained)**(r/(r-2))
    return base**(-2*np.arange(r//2)/r)


def rope_table(positions, frequencies):
    "Cosines and sines [T, r/2]."
    angle = np.asarray(positions, np.float64)[:, None] * frequencies
    return np.cos(angle), np.sin(angle)


def rotate(z, cos, sin):
    "Turn as many leading channels of [.., T, d] as the tables are for, paired by halves; the rest pass."
    h = cos.shape[-1]
    a, b = z[..., :h], z[..., h:2*h]
    return np.concatenate([a*cos + b*sin, -a*sin + b*cos, z[..., 2*h:]], -1)


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def without_own_value(y, v):
    "XSA: y - (y . n) n, with n the direction of the value at the same position."
    n = v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-12)
    return y - (y*n).sum(-1, keepdims=True) * n


def visits(c, looping=True):
    "The layers visited, as an encoder and a decoder list."
    L, lo, hi = c['num_layers'], c['loop_start'], c['loop_end']
    if not looping or not c['num_loops']: return list(range(L//2)), list(range(L//2, L))
    order = [*range(lo)] + (c['num_loops'] + 1)*[*range(lo, hi+1)] + [*range(hi+1, L)]
    return order[:len(order)//2], order[len(order)//2:]


def attention(p, c, i, v, xsa=None, frequencies=None):
    "Attention of layer i on v [B,T,D]; `xsa` and `frequencies` replace the layer's own."
    name, T, heads, kv_heads = f'blocks.{i}.attn', v.shape[1], c['num_heads'], c['num_kv_heads']
    d = c['model_dim']//heads
    if xsa is None: xsa = i >= c['num_layers'] - c['xsa_last_n']
    if frequencies is None:
        frequencies = rope_frequencies(c['rope_dims'] or d, c['rope_base'], T, c['train_seq_len'])
    q, k, value = (v @ p[f'{name}.{part}.weight'].T for part in ('c_q', 'c_k', 'c_v'))
    cos, sin = rope_table(np.arange(T), frequencies)
    past = np.tril(np.ones((T, T), bool))
    out = []
    for h in range(heads):
        j = h // (heads//kv_heads)    # the kv head that this query head reads
        qh = rotate(rms(q[..., h*d:(h+1)*d]), cos, sin) * p[f'{name}.q_gain'][h]
        kj = rotate(rms(k[..., j*d:(j+1)*d]), cos, sin)
        vj = value[..., j*d:(j+1)*d]
        y = softmax(np.where(past, qh @ kj.swapaxes(1, 2) / np.sqrt(d), -np.inf)) @ vj
        out.append(without_own_value(y, vj) if xsa else y)
    return np.concatenate(out, -1) @ p[f'{name}.proj.weight'].T


def mlp(p, i, v):
    "proj(lrelu(fc(v))^2), with slope 1/2 below zero"
    h = v @ p[f'blocks.{i}.mlp.fc.weight'].T
    return np.where(h < 0, 0.5*h, h)**2 @ p[f'blocks.{i}.mlp.proj.weight'].T


def block(p, c, i, x, x0, frequencies=None):
    "Layer i: attention then MLP, or from `parallel_residual_start` on both from the same input."
    attn_scale, mlp_scale = p[f'blocks.{i}.attn_scale'], p[f'blocks.{i}.mlp_scale']
    mix = p[f'blocks.{i}.resid_mix']
    depth = 1/np.sqrt(i+1) if c['ln_scale'] else 1.0
    u = mix[0]*x + mix[1]*x0
    a = attn_scale * attention(p, c, i, depth*rms(u), frequencies=frequencies)
    if i >= c['parallel_residual_start']: return u + a + mlp_scale * mlp(p, i, depth*rms(u))
    w = u + a
    return w + mlp_scale * mlp(p, i, depth*rms(w))


def forward(params, config, tokens, frequencies=None):
    """Logits [B,T,V], `x0`, and the stream before (`inputs`, with its skip) and after (`outputs`) each visit.

    `frequencies` replaces the rotary frequencies, for comparisons with tables that were rounded.
    """
    c = config.get('model', config)
    # two options that the spec names but does not describe
    if not c['skip_gates_enabled']: raise ValueError('skips without gates')
    if c['embedding_dim'] != c['model_dim']: raise ValueError('embedding_dim is not model_dim')
    p = {name: np.asarray(w, np.float64) for name, w in params.items()}
    encoder, decoder = visits(c, c.get('looping_active', True))
    x = x0 = rms(p['tok_emb.weight'][tokens])
    inputs, outputs, stack = [], [], []
    for i in encoder:
        inputs.append(x)
        x = block(p, c, i, x, x0, frequencies)
        outputs.append(x)
        stack.append(x)
    for j, i in enumerate(decoder):
        if j < len(p['skip_weights']) and stack:
            s, g = p['skip_weights'][j] * stack.pop(), sigmoid(p['skip_gates'][j])
            x = g*x + (1-g)*s    # the gate is on the main path
        inputs.append(x)
        x = block(p, c, i, x, x0, frequencies)
        outputs.append(x)
    z = rms(x) @ p['tok_emb.weight' if c['tie_embeddings'] else 'lm_head.weight'].T
    cap = c['logit_softcap']
    return {'logits': cap*np.tanh(z/cap), 'outputs': outputs, 'inputs': inputs, 'x0': x0}


def nll(logits, targets):
    "-log softmax(logits)[target], for each position [B,T]."
    z = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    return -np.take_along_axis(log_p, np.asarray(targets, np.int64)[..., None], -1)[..., 0]


def loss(logits, targets, last_n=None):
    "Mean cross-entropy in nats, over the last `last_n` positions of every row if given."
    each = nll(logits, targets)
    return float((each if last_n is None else each[:, -last_n:]).mean())


def shapes(config):
    "Name -> shape of every parameter. The skips are those of the looped lists, even while looping is off."
    c = config.get('model', config)
    D, H, V, F = c['model_dim'], c['num_heads'], c['vocab_size'], int(c['mlp_mult']*c['model_dim'])
    kv, skips = c['num_kv_heads'] * (D//H), min(map(len, visits(c)))
    out = {'skip_weights': (skips, D), 'skip_gates': (skips, D), 'tok_emb.weight': (V, D)}
    for name in (f'blocks.{i}' for i in range(c['num_layers'])):
        out |= {f'{name}.attn_scale': (D,), f'{name}.mlp_scale': (D,), f'{name}.resid_mix': (2, D),
                f'{name}.attn.q_gain': (H,), f'{name}.attn.c_q.weight': (D, D),
                f'{name}.attn.c_k.weight': (kv, D), f'{name}.attn.c_v.weight': (kv, D),
                f'{name}.attn.proj.weight': (D, D),
                f'{name}.mlp.fc.weight': (F, D), f'{name}.mlp.proj.weight': (D, F)}
    if not c['tie_embeddings']: out['lm_head.weight'] = (V, D)
    return out


def random_params(config, seed):
    "Parameters of which none is trivial; float32, so that others can compute with the same values."
    rng, out = np.random.default_rng(seed), {}
    for name, shape in shapes(config).items():
        w = rng.standard_normal(shape)
        if name.endswith('resid_mix'): w = 0.25*w + np.array([[1.0], [0.0]])
        elif name == 'skip_gates': w = 0.8*w
        elif name.endswith('q_gain'): w = 1.5 + 0.4*w
        elif name.endswith(('_scale', 'skip_weights')): w = 1 + 0.3*w
        elif name in ('tok_emb.weight', 'lm_head.weight'): w = 0.6*w
        else: w = w / np.sqrt(shape[1])
        out[name] = w.astype(np.float32)
    return out
