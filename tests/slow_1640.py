"""A slow, plain witness of the model of PR #1640: block call by block call, head by head, in float64.

K blocks run R times over. FiLM scales and shifts the whole stream in front of every block call, and the U-Net
skip is added *behind* it. Nothing is imported from the package, and nothing is shared with the other
witnesses: an error here can only agree with an error there by chance.
"""
import numpy as np

EPS = 2.0**-23    # the machine epsilon of float32: what `rms_norm` uses when none is given


def rms(x):
    "x / sqrt(mean(x^2) + eps), over the last axis."
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)


def rope_table(positions, d, base):
    "Cosines and sines [T, d/2] of the angles t * base^(-2j/d)."
    angle = np.asarray(positions, np.float64)[:, None] * base**(-2*np.arange(d//2)/d)
    return np.cos(angle), np.sin(angle)


def rotate(z, cos, sin):
    "Turn all channels of [.., T, d] by their position: channel j is paired with channel j + d/2."
    a, b = np.split(z, 2, axis=-1)
    return np.concatenate([a*cos + b*sin, -a*sin + b*cos], -1)


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def fake_quant(w):
    "Each row on -31..31 steps of its own; in the precision of `w`, since rounding decides."
    scale = np.maximum(np.abs(w).max(1, keepdims=True), w.dtype.type(1e-8)) / w.dtype.type(31)
    quantised = np.clip(np.round(w/scale), -31, 31) * scale
    return w + (quantised - w)


def weight(params, name, qat):
    "The matrix that a Linear multiplies with: fake-quantised as soon as the global switch is on."
    w = np.asarray(params[f'{name}.weight'])
    return (fake_quant(w) if qat else w).astype(np.float64)


def bigram_bucket(tokens, buckets):
    "(27191 * token + 36313 * previous) mod buckets, for positions 1..T-1; position 0 has none."
    tokens = np.asarray(tokens, np.int64)
    return (27191*tokens[:, 1:] + 36313*tokens[:, :-1]) % buckets


def embed(params, c, tokens):
    "x0: token + bigram, normalised."
    x = params['tok_emb.weight'][tokens].astype(np.float64)
    x[:, 1:] += params['bigram_emb.weight'][bigram_bucket(tokens, c['bigram_buckets'])]
    return rms(x)


def attention(params, c, qat, k, n):
    "Attention of block k on the normalised stream n [B,T,D]."
    name, T, heads, kv_heads = f'blocks.{k}.attn', n.shape[1], c['num_heads'], c['num_kv_heads']
    d = c['model_dim']//heads
    q, key, v = (n @ weight(params, f'{name}.{part}', qat).T for part in ('c_q', 'c_k', 'c_v'))
    cos, sin = rope_table(np.arange(T), d, c['rope_base'])
    past = np.tril(np.ones((T, T), bool))
    out = []
    for h in range(heads):
        g = h*kv_heads//heads    # the kv head that this query head reads
        qh = rotate(rms(q[..., h*d:(h+1)*d]), cos, sin) * float(params[f'{name}.q_gain'][h])
        kg = rotate(rms(key[..., g*d:(g+1)*d]), cos, sin)
        scores = np.where(past, qh @ kg.swapaxes(1, 2) / np.sqrt(d), -np.inf)
        out.append(softmax(scores) @ v[..., g*d:(g+1)*d])
    return np.concatenate(out, -1) @ weight(params, f'{name}.proj', qat).T


def mlp(params, qat, k, n):
    "proj(f(fc(n))) with f(z) = max(z, z/2)^2"
    z = n @ weight(params, f'blocks.{k}.mlp.fc', qat).T
    return np.maximum(z, 0.5*z)**2 @ weight(params, f'blocks.{k}.mlp.proj', qat).T


def block(params, c, qat, k, x, x0):
    "Residual mix, attention, MLP."
    attn_scale, mlp_scale, mix = (params[f'blocks.{k}.{part}'].astype(np.float64) for part in (
        'attn_scale', 'mlp_scale', 'resid_mix'))
    u = mix[0]*x + mix[1]*x0
    u = u + attn_scale * attention(params, c, qat, k, rms(u))
    return u + mlp_scale * mlp(params, qat, k, rms(u))


def forward(params, config, tokens):
    """Logits [B,T,V]; the stream after each virtual layer, with its skip (`outputs`); `x0`.

    `inputs` (behind FiLM) and `block_outputs` (without the skip) are what each block call reads and returns.
    """
    c, qat = config.get('model', config), config.get('qat', False)
    K, R = c['num_unique_blocks'], c['recurrence_steps']
    p = {name: np.asarray(w) for name, w in params.items()}
    x = x0 = embed(p, c, tokens)
    inputs, block_outputs, outputs, stack, reads = [], [], [], [], 0
    for r in range(R):
        for k in range(K):
            gamma, beta = (p[f'blocks.{k}.film_{part}'][r].astype(np.float64) for part in ('gamma', 'beta'))
            x = gamma*x + beta
            inputs.append(x)
            x = block(p, c, qat, k, x, x0)
            block_outputs.append(x)
            if r*K + k < K*R//2: stack.append(x)
            elif stack:
                x = x + p['skip_weights'][reads].astype(np.float64) * stack.pop()
                reads += 1
            outputs.append(x)
    head = p['tok_emb.weight'].astype(np.float64) if c['tie_embeddings'] else weight(p, 'lm_head', qat)
    z = rms(x) @ head.T
    cap = c['logit_softcap']
    return {'logits': cap*np.tanh(z/cap), 'outputs': outputs, 'block_outputs': block_outputs,
            'inputs': inputs, 'x0': x0}


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
    "Name -> shape of every parameter."
    c = config.get('model', config)
    D, H, V, F = c['model_dim'], c['num_heads'], c['vocab_size'], c['mlp_mult']*c['model_dim']
    K, R, kv = c['num_unique_blocks'], c['recurrence_steps'], c['num_kv_heads'] * (D//H)
    out = {'skip_weights': (K*R//2, D), 'tok_emb.weight': (V, D),
           'bigram_emb.weight': (c['bigram_buckets'], D)}
    for name in (f'blocks.{k}' for k in range(K)):
        out |= {f'{name}.attn.c_q.weight': (D, D), f'{name}.attn.c_k.weight': (kv, D),
                f'{name}.attn.c_v.weight': (kv, D), f'{name}.attn.proj.weight': (D, D),
                f'{name}.attn.q_gain': (H,),
                f'{name}.mlp.fc.weight': (F, D), f'{name}.mlp.proj.weight': (D, F),
                f'{name}.attn_scale': (D,), f'{name}.mlp_scale': (D,), f'{name}.resid_mix': (2, D),
                f'{name}.film_gamma': (R, D), f'{name}.film_beta': (R, D)}
    if not c['tie_embeddings']: out['lm_head.weight'] = (V, D)
    return out


def random_params(config, seed):
    "Parameters of which none is trivial; float32, so that others can compute with the same values."
    rng, out = np.random.default_rng(seed), {}
    for name, shape in shapes(config).items():
        w = rng.standard_normal(shape)
        if name.endswith('resid_mix'): w = 0.25*w + np.array([[1.0], [0.0]])
        elif name.endswith('q_gain'): w = 1.5 + 0.4*w
        elif name.endswith(('_scale', 'skip_weights', 'film_gamma')): w = 1 + 0.3*w
        elif name.endswith('film_beta'): w = 0.3*w
        elif name in ('tok_emb.weight', 'bigram_emb.weight', 'lm_head.weight'): w = 0.6*w
        else: w = w / np.sqrt(shape[1])
        out[name] = w.astype(np.float32)
    return out
