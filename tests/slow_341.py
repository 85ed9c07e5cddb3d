"""A slow, plain witness of the model of PR #341: virtual layer by virtual layer, head by head, in float64.

Entry blocks, then the shared blocks in turn, several times over, then exit blocks. The scales, the residual
mix and the query gains belong to the virtual layer, the matrices to the block; U-Net skips join virtual
layers. Nothing is imported from the package, and nothing is shared with the other witnesses: an error here
can only agree with an error there by chance.
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
    z1, z2 = np.split(z, 2, axis=-1)
    return np.concatenate([z1*cos + z2*sin, -z1*sin + z2*cos], -1)


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def order(c):
    "The block of each virtual layer: entry, loops x shared, exit."
    entry = [f'entry_blocks.{i}' for i in range(c['num_entry_layers'])]
    shared = [f'shared_blocks.{i}' for i in range(c['num_shared_blocks'])]
    return entry + c['num_loops']*shared + [f'exit_blocks.{i}' for i in range(c['num_exit_layers'])]


def attention(p, c, block, q_gain, n):
    "Attention on the normalised stream n [B,T,D]: matrices of the block, gains of the virtual layer."
    T, heads, kv_heads = n.shape[1], c['num_heads'], c['num_kv_heads']
    d = c['model_dim']//heads
    q, k, v = (n @ p[f'{block}.attn.{part}.weight'].T for part in ('c_q', 'c_k', 'c_v'))
    cos, sin = rope_table(np.arange(T), d, c['rope_base'])
    past = np.tril(np.ones((T, T), bool))
    out = []
    for i in range(heads):
        j = i // (heads//kv_heads)    # the kv head that this query head reads
        qi = rotate(rms(q[..., i*d:(i+1)*d]), cos, sin) * q_gain[i]
        kj = rotate(rms(k[..., j*d:(j+1)*d]), cos, sin)
        scores = np.where(past, qi @ kj.swapaxes(1, 2) / np.sqrt(d), -np.inf)
        out.append(softmax(scores) @ v[..., j*d:(j+1)*d])
    return np.concatenate(out, -1) @ p[f'{block}.attn.proj.weight'].T


def mlp(p, block, n):
    "W2 relu(W1 n)^2"
    return np.maximum(n @ p[f'{block}.mlp.fc.weight'].T, 0)**2 @ p[f'{block}.mlp.proj.weight'].T


def forward(params, config, tokens):
    "Logits [B,T,V]; the stream before (`inputs`, with its skip) and after (`outputs`) each layer; `x0`."
    c = config.get('model', config)
    p = {name: np.asarray(w, np.float64) for name, w in params.items()}
    blocks = order(c)
    encoders = len(blocks)//2
    x = x0 = rms(p['tok_emb.weight'][tokens])
    inputs, outputs, stack = [], [], []
    for v, block in enumerate(blocks):
        if v >= encoders and stack: x = x + p['skip_weights'][v - encoders] * stack.pop()
        inputs.append(x)
        mix = p[f'vlayers.{v}.resid_mix']
        x = mix[0]*x + mix[1]*x0
        x = x + p[f'vlayers.{v}.attn_scale'] * attention(p, c, block, p[f'vlayers.{v}.q_gain'], rms(x))
        x = x + p[f'vlayers.{v}.mlp_scale'] * mlp(p, block, rms(x))
        outputs.append(x)
        if v < encoders: stack.append(x)
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
    "Name -> shape of every parameter."
    c = config.get('model', config)
    D, H, V, F = c['model_dim'], c['num_heads'], c['vocab_size'], c['mlp_mult']*c['model_dim']
    kv, blocks = c['num_kv_heads'] * (D//H), order(c)
    out = {'tok_emb.weight': (V, D), 'skip_weights': (len(blocks)//2, D)}
    for block in dict.fromkeys(blocks):
        out |= {f'{block}.attn.c_q.weight': (D, D), f'{block}.attn.c_k.weight': (kv, D),
                f'{block}.attn.c_v.weight': (kv, D), f'{block}.attn.proj.weight': (D, D),
                f'{block}.mlp.fc.weight': (F, D), f'{block}.mlp.proj.weight': (D, F)}
    for v in range(len(blocks)):
        out |= {f'vlayers.{v}.attn_scale': (D,), f'vlayers.{v}.mlp_scale': (D,),
                f'vlayers.{v}.resid_mix': (2, D), f'vlayers.{v}.q_gain': (H,)}
    if not c['tie_embeddings']: out['lm_head.weight'] = (V, D)
    return out


def random_params(config, seed):
    "Parameters of which none is trivial; float32, so that others can compute with the same values."
    rng, out = np.random.default_rng(seed), {}
    for name, shape in shapes(config).items():
        w = rng.standard_normal(shape)
        if name.endswith('resid_mix'): w = 0.25*w + np.array([[1.0], [0.0]])
        elif name.endswith('q_gain'): w = 1.5 + 0.4*w
        elif name.endswith(('_scale', 'skip_weights')): w = 1 + 0.3*w
        elif name in ('tok_emb.weight', 'lm_head.weight'): w = 0.6*w
        else: w = w / np.sqrt(shape[1])
        out[name] = w.astype(np.float32)
    return out
