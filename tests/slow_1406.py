"""A slow, plain witness of the model of PR #1406: layer by layer, head by head, in float64.

Eleven layers with U-Net skips, then layers 4 and 5 once more, just before the head. The matrices of all
layers sit in four banks. Bigram hash, smear gate, shared value embedding, partial rotary positions whose base
grows with sequences longer than 1024, XSA in the last layers. Nothing is imported from the package, and
nothing is shared with the other witnesses: an error here can only agree with an error there by chance.
"""
import numpy as np

EPS = 2.0**-23    # the machine epsilon of float32: what `rms_norm` uses when none is given
TRAINED = 1024    # sequences longer than this stretch the rotary base; fixed in the script


def rms(x):
    "x / sqrt(mean(x^2) + eps), over the last axis."
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)


def rope_table(positions, r, base, length, trained=TRAINED):
    "Cosines and sines [T, r/2] of the angles t * base^(-2i/r), for windows of `length`."
    if length > trained: base = base * (length/trained)**(r/(r-2))
    angle = np.asarray(positions, np.float64)[:, None] * base**(-2*np.arange(r//2)/r)
    return np.cos(angle), np.sin(angle)


def rotate(z, cos, sin):
    "Turn as many leading channels of [.., T, d] as the tables are for, paired by halves; the rest pass."
    h = cos.shape[-1]
    a, b = z[..., :h], z[..., h:2*h]
    return np.concatenate([a*cos + b*sin, -a*sin + b*cos, z[..., 2*h:]], -1)


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def without_own_value(y, v):
    "XSA: y - (y . u) u, with u the direction of the value at the same position."
    u = v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-12)
    return y - (y*u).sum(-1, keepdims=True) * u


def fake_quant(w):
    "Each row on -32..31 steps of at least 1/31; in the precision of `w`, since rounding decides."
    top = w.dtype.type(31)
    scale = np.maximum(np.abs(w).max(1, keepdims=True)/top, 1/top)
    quantised = np.clip(np.round(w/scale), -32, 31) * scale
    return w + (quantised - w)


def weight(params, name, qat):
    "The matrix of a Linear; only these are ever fake-quantised, the banks are not."
    w = np.asarray(params[f'{name}.weight'])
    return (fake_quant(w) if qat else w).astype(np.float64)


def bigram_bucket(tokens, vocab):
    "((36313 * token) xor (27191 * previous)) mod (vocab - 1), in int32; the first position has the last row."
    tokens = np.asarray(tokens, np.int32)
    out = np.full(tokens.shape, vocab - 1, np.int32)
    out[:, 1:] = (36313*tokens[:, 1:] ^ 27191*tokens[:, :-1]) % (vocab - 1)
    return out


def bigram(params, c, tokens, qat):
    "What is added to the token embedding."
    x = params['bigram.embed.weight'][bigram_bucket(tokens, c['bigram_vocab_size'])].astype(np.float64)
    if 'bigram.proj.weight' in params: x = x @ weight(params, 'bigram.proj', qat).T
    return x * float(params['bigram.scale'])


def smear(x, gate):
    "Mix every position with the one before; the first has zeros before it."
    g = 1 / (1 + np.exp(-gate.astype(np.float64)))
    before = np.concatenate([np.zeros_like(x[:, :1]), x[:, :-1]], 1)
    return (1-g)*x + g*before


def value_embedding(params, tokens, qat):
    "The part [B,T,G*d] of all layers with value embeddings; each has its own scale."
    x = params['ve_shared.embed.weight'][tokens].astype(np.float64)
    if 've_shared.proj.weight' in params: x = x @ weight(params, 've_shared.proj', qat).T
    return x * float(params['ve_shared.scale'])


def attention(params, c, i, n, ve):
    "Attention of layer i on n [B,T,D], the normalised stream times its layer scale."
    L, T, heads, kv_heads = c['num_layers'], n.shape[1], c['num_heads'], c['num_kv_heads']
    d = c['model_dim']//heads
    qo, kv = params['qo_bank'].astype(np.float64), params['kv_bank'].astype(np.float64)
    q, k, v = n @ qo[i].T, n @ kv[i].T, n @ kv[L+i].T
    v = v + ve    # before the heads are split
    cos, sin = rope_table(np.arange(T), c['rope_dims'] or d, c['rope_base'], T)
    past = np.tril(np.ones((T, T), bool))
    out = []
    for h in range(heads):
        j = h // (heads//kv_heads)    # the kv head that this query head reads
        qh = rotate(rms(q[..., h*d:(h+1)*d]), cos, sin) * float(params[f'blocks.{i}.attn.q_gain'][h])
        kj = rotate(rms(k[..., j*d:(j+1)*d]), cos, sin)
        vj = v[..., j*d:(j+1)*d]
        y = softmax(np.where(past, qh @ kj.swapaxes(1, 2) / np.sqrt(d), -np.inf)) @ vj
        out.append(without_own_value(y, vj) if i >= L - c['xsa_last_n'] else y)
    return np.concatenate(out, -1) @ qo[L+i].T


def mlp(params, i, n):
    "down(max(z, z/2)^2) with z = up(n)"
    z = n @ params['mlp_up_bank'][i].astype(np.float64).T
    return np.maximum(z, 0.5*z)**2 @ params['mlp_down_bank'][i].astype(np.float64).T


def block(params, c, i, x, x0, ve):
    "Residual mix, attention, MLP; both read the normalised stream times 1/sqrt(i+1)."
    attn_scale, mlp_scale, mix = (params[f'blocks.{i}.{part}'].astype(np.float64) for part in (
        'attn_scale', 'mlp_scale', 'resid_mix'))
    depth = 1/np.sqrt(i+1) if c['ln_scale'] else 1.0
    u = mix[0]*x + mix[1]*x0
    u = u + attn_scale * attention(params, c, i, depth*rms(u), ve)
    return u + mlp_scale * mlp(params, i, depth*rms(u))


def ve_layers(c):
    "The layers with a value embedding, in the order of their scales."
    return [int(i) for i in c['ve_layers'].split(',')] if c['ve_enabled'] else []


def forward(params, config, tokens, training=True):
    """Logits [B,T,V]; the stream before (`inputs`, with its skip) and after (`outputs`) each layer; `x0`.

    `bigram`, `smear_in` and `ve` are what x0 and the values are made of. Fake quantisation acts in training
    only.
    """
    c, qat = config.get('model', config), config.get('qat', False) and training
    L = c['num_layers']
    p = {name: np.asarray(w) for name, w in params.items()}
    added = bigram(p, c, tokens, qat) if c['bigram_vocab_size'] else 0.0
    smear_in = rms(p['tok_emb.weight'][tokens].astype(np.float64) + added)
    x = x0 = smear(smear_in, p['smear.gate'])
    shared = value_embedding(p, tokens, qat) if ve_layers(c) else 0.0
    ve = {i: shared * float(p[f've_layer_scales.{j}'][0]) for j, i in enumerate(ve_layers(c))}
    inputs, outputs, stack = [], [], []
    for v, i in enumerate([*range(L), *c.get('recur_layers', [])]):    # repeats come last and have no skips
        if L//2 <= v < L and stack: x = x + p['skip_weights'][v - L//2].astype(np.float64) * stack.pop()
        inputs.append(x)
        x = block(p, c, i, x, x0, ve.get(i, 0.0))
        outputs.append(x)
        if v < L//2: stack.append(x)
    head = p['tok_emb.weight'].astype(np.float64) if c['tie_embeddings'] else weight(p, 'lm_head', qat)
    z = rms(x) @ head.T
    cap = c['logit_softcap']
    return {'logits': cap*np.tanh(z/cap), 'outputs': outputs, 'inputs': inputs, 'x0': x0, 'bigram': added,
            'smear_in': smear_in, 've': shared}


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
    D, H, V, L = c['model_dim'], c['num_heads'], c['vocab_size'], c['num_layers']
    kv, F = c['num_kv_heads'] * (D//H), int(c['mlp_mult']*D)
    out = {'skip_weights': (L//2, D), 'qo_bank': (2*L, D, D), 'kv_bank': (2*L, kv, D),
           'mlp_up_bank': (L, F, D), 'mlp_down_bank': (L, D, F), 'tok_emb.weight': (V, D)}
    if c['bigram_vocab_size']:
        out |= {'bigram.scale': (), 'bigram.embed.weight': (c['bigram_vocab_size'], c['bigram_dim'])}
        if c['bigram_dim'] != D: out['bigram.proj.weight'] = (D, c['bigram_dim'])
    out['smear.gate'] = (D,)
    for name in (f'blocks.{i}' for i in range(L)):
        out |= {f'{name}.attn_scale': (D,), f'{name}.mlp_scale': (D,), f'{name}.resid_mix': (2, D),
                f'{name}.attn.q_gain': (H,)}
    if ve_layers(c):
        out |= {'ve_shared.scale': (), 've_shared.embed.weight': (V, c['ve_dim']),
                've_shared.proj.weight': (kv, c['ve_dim'])}
        out |= {f've_layer_scales.{j}': (1,) for j in range(len(ve_layers(c)))}
    if not c['tie_embeddings']: out['lm_head.weight'] = (V, D)
    return out


def random_params(config, seed):
    "Parameters of which none is trivial; float32, so that others can compute with the same values."
    rng, out = np.random.default_rng(seed), {}
    for name, shape in shapes(config).items():
        w = rng.standard_normal(shape)
        if name.endswith('resid_mix'): w = 0.25*w + np.array([[1.0], [0.0]])
        elif name == 'smear.gate': pass
        elif name.endswith('q_gain'): w = 1.5 + 0.4*w
        elif name in ('bigram.scale', 've_shared.scale'): w = 0.5 + 0.1*w
        elif 'scale' in name or name == 'skip_weights': w = 1 + 0.3*w
        elif name.endswith(('tok_emb.weight', 'embed.weight', 'lm_head.weight')): w = 0.6*w
        else: w = w / np.sqrt(shape[-1])
        out[name] = np.asarray(w, np.float32)
    return out
