"""A slow, plain witness of the model of PR #927: loop by loop, head by head, in float64.

Four shared blocks run as seven loops; loop l uses block l mod N. Bigram hash, smear gate, value embeddings,
partial rotary positions, XSA and U-Net skips. Nothing is imported from the package, and nothing is shared
with the other witnesses: an error here can only agree with an error there by chance.
"""
import numpy as np

EPS = 2.0**-23    # the machine epsilon of float32: what `rms_norm` uses when none is given
THRESHOLD = 65536    # weights with more elements than this are fake-quantised, those with as many are not


def rms(x):
    "x / sqrt(mean(x^2) + eps), over the last axis."
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)


def rope_table(positions, d, base):
    "Cosines and sines [T, d/2] of the angles t * base^(-2j/d)."
    angle = np.asarray(positions, np.float64)[:, None] * base**(-2*np.arange(d//2)/d)
    return np.cos(angle), np.sin(angle)


def rotate(z, cos, sin):
    "Turn the leading channels of [.., T, d] by their position: d/2 of them, paired by halves; the rest pass."
    h = z.shape[-1]//2//2 or z.shape[-1]//2    # pairs that turn: the fastest half of the frequencies
    cos, sin, z1, z2 = cos[:, :h], sin[:, :h], z[..., :h], z[..., h:2*h]
    return np.concatenate([z1*cos + z2*sin, -z1*sin + z2*cos, z[..., 2*h:]], -1)


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def without_own_value(y, v):
    "XSA: y - (y . u) u, with u the direction of the value at the same position."
    u = v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-12)
    return y - (y*u).sum(-1, keepdims=True) * u


def fake_quant(w, bits):
    "Each row on a grid of 2^bits levels; in the precision of `w`, since rounding decides."
    top, bottom = 2**(bits-1) - 1, -2**(bits-1)
    scale = np.maximum(np.abs(w).max(1, keepdims=True)/w.dtype.type(top), w.dtype.type(1e-8))
    quantised = np.clip(np.round(w/scale), bottom, top) * scale
    return w + (quantised - w)


def weight(params, name, c):
    "The matrix that a Linear multiplies with."
    w = np.asarray(params[f'{name}.weight'])
    threshold = THRESHOLD if c.get('qat_min_numel') is None else c['qat_min_numel']
    if c.get('qat') and w.size > threshold:
        mlp = name.endswith(('mlp.fc', 'mlp.proj')) and c['qat_mlp_bits'] > 0
        w = fake_quant(w, c['qat_mlp_bits'] if mlp else c['qat_bits'])
    return w.astype(np.float64)


def bigram_bucket(tokens, buckets):
    "(previous * 92821 + token) mod buckets; the first position has 0 before it."
    tokens = np.asarray(tokens, np.int64)
    previous = np.concatenate([np.zeros_like(tokens[:, :1]), tokens[:, :-1]], 1)
    return (previous*92821 + tokens) % buckets


def embed(params, c, tokens):
    "x0: token + bigram, normalised, then mixed with the position before."
    x = params['tok_emb.weight'][tokens].astype(np.float64)
    if c['bigram_buckets']:
        rows = params['bigram.table.weight'][bigram_bucket(tokens, c['bigram_buckets'])].astype(np.float64)
        x = x + rows @ weight(params, 'bigram.proj', c).T
    x = rms(x)
    if c['use_smear_gate']:
        g = 1 / (1 + np.exp(-params['smear.gate'].astype(np.float64)))
        before = np.concatenate([np.zeros_like(x[:, :1]), x[:, :-1]], 1)
        x = (1-g)*x + g*before
    return x


def attention(params, c, block, n, value_embedding, xsa):
    "Attention of shared block `block` on the normalised stream n [B,T,D]."
    name, T, heads, kv_heads = f'shared_blocks.{block}.attn', n.shape[1], c['num_heads'], c['num_kv_heads']
    d = c['model_dim']//heads
    q, k, v = (n @ weight(params, f'{name}.{part}', c).T for part in ('c_q', 'c_k', 'c_v'))
    v = v + value_embedding    # before the heads are split
    cos, sin = rope_table(np.arange(T), d, c['rope_base'])
    past = np.tril(np.ones((T, T), bool))
    out = []
    for i in range(heads):
        j = i // (heads//kv_heads)    # the kv head that this query head reads
        qi = rotate(rms(q[..., i*d:(i+1)*d]), cos, sin) * float(params[f'{name}.q_gain'][i])
        kj = rotate(rms(k[..., j*d:(j+1)*d]), cos, sin)
        vj = v[..., j*d:(j+1)*d]
        y = softmax(np.where(past, qi @ kj.swapaxes(1, 2) / np.sqrt(d), -np.inf)) @ vj
        out.append(without_own_value(y, vj) if xsa else y)
    return np.concatenate(out, -1) @ weight(params, f'{name}.proj', c).T


def mlp(params, c, block, n):
    "W2 relu(W1 n)^2"
    hidden = np.maximum(n @ weight(params, f'shared_blocks.{block}.mlp.fc', c).T, 0)**2
    return hidden @ weight(params, f'shared_blocks.{block}.mlp.proj', c).T


def xsa_flags(c, per_loop=False):
    """Whether loop l uses XSA, for each l.

    The script writes the flag of block l mod N for all loops before any block runs: the last write holds, in
    all loops of that block. `per_loop` is what its README says instead: the last n loops.
    """
    N, L = c['num_blocks'], c['num_loops']
    written = [loop >= L - c['xsa_last_n'] for loop in range(L)]
    if per_loop: return written
    final = {loop % N: flag for loop, flag in enumerate(written)}
    return [final[loop % N] for loop in range(L)]


def forward(params, config, tokens, xsa_per_loop=False):
    "Logits [B,T,V]; the stream before (`inputs`, with its skip) and after (`outputs`) each loop; `x0`."
    c = config.get('model', config)
    N, L = c['num_blocks'], c['num_loops']
    p = {name: np.asarray(w) for name, w in params.items()}
    attn_scales, mlp_scales, mixes, skips = (p[name].astype(np.float64) for name in (
        'attn_scales', 'mlp_scales', 'resid_mixes', 'skip_weights'))
    flags, encoders = xsa_flags(c, xsa_per_loop), L//2
    x = x0 = embed(p, c, tokens)
    inputs, outputs, stack = [], [], []
    for loop in range(L):
        if loop >= encoders and stack: x = x + skips[loop - encoders] * stack.pop()
        inputs.append(x)
        x = mixes[loop, 0]*x + mixes[loop, 1]*x0
        ve, j = 0.0, loop - (L - c['ve_last_n'])
        if c['ve_enabled'] and j >= 0:
            rows = p['ve.table.weight'][tokens].astype(np.float64)
            ve = float(p[f've.scales.{j}'][0]) * (rows @ weight(p, 've.proj', c).T)
        x = x + attn_scales[loop] * attention(p, c, loop % N, rms(x), ve, flags[loop])
        x = x + mlp_scales[loop] * mlp(p, c, loop % N, rms(x))
        outputs.append(x)
        if loop < encoders: stack.append(x)
    head = p['tok_emb.weight'].astype(np.float64) if c['tie_embeddings'] else weight(p, 'lm_head', c)
    z = rms(x) @ head.T
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
    "Name -> shape of every parameter."
    c = config.get('model', config)
    D, H, L, V = c['model_dim'], c['num_heads'], c['num_loops'], c['vocab_size']
    kv, F = c['num_kv_heads'] * (D//H), c['mlp_mult']*D
    out = {'attn_scales': (L, D), 'mlp_scales': (L, D), 'resid_mixes': (L, 2, D), 'skip_weights': (L//2, D),
           'tok_emb.weight': (V, D)}
    if c['bigram_buckets']:
        out |= {'bigram.table.weight': (c['bigram_buckets'], c['bigram_dim']),
                'bigram.proj.weight': (D, c['bigram_dim'])}
    if c['use_smear_gate']: out['smear.gate'] = (D,)
    if c['ve_enabled']:
        out |= {'ve.table.weight': (V, c['ve_dim']), 've.proj.weight': (kv, c['ve_dim'])}
        out |= {f've.scales.{j}': (1,) for j in range(c['ve_last_n'])}
    for b in range(c['num_blocks']):
        name = f'shared_blocks.{b}'
        out |= {f'{name}.attn.q_gain': (H,), f'{name}.attn.c_q.weight': (D, D),
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
        if name == 'resid_mixes': w = 0.25*w + np.array([[1.0], [0.0]])
        elif name == 'smear.gate': pass
        elif name.endswith('q_gain'): w = 1.5 + 0.4*w
        elif '_scales' in name or name == 'skip_weights' or name.startswith('ve.scales'): w = 1 + 0.3*w
        elif name.endswith(('tok_emb.weight', 'table.weight', 'lm_head.weight')): w = 0.6*w
        else: w = w / np.sqrt(shape[1])
        out[name] = w.astype(np.float32)
    return out
