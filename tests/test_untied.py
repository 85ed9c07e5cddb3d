"The untied view and the hooks, also under torch.func, on a schedule that uses every feature."
import pytest
import torch
from torch.func import functional_call, jvp, vjp, vmap

from golf_nb.block import Weights
from golf_nb.config import Bigram, ModelConfig, ValueEmbed
from golf_nb.model import build
from golf_nb.schedule import from_order

pytestmark = pytest.mark.filterwarnings('ignore:.torch.jit.script. is deprecated')  # inside torch.func

SCHEDULE = from_order([0] + 3*[1, 2] + [3], per_visit={'cond'}, film=True, gated=True,
                      xsa=[5, 7], value_embed=[6, 7], parallel=[2])
CONFIG = ModelConfig(schedule=SCHEDULE, vocab=40, dim=32, heads=4, kv_heads=2, hidden=48, activation='leaky2',
                     ln_scale=True, bigram=Bigram(31, 8), smear=True, value_embed=ValueEmbed(8))


@pytest.fixture
def model():
    "A model without trivial zeros and ones, in float64."
    found = build(CONFIG)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in found.parameters(): p.add_(0.2*torch.randn_like(p))
    return found.double()


@pytest.fixture
def tokens(): return torch.randint(40, (2, 2, 10), generator=torch.Generator().manual_seed(0))


def own_weights(model):
    "The blocks' own weights, one entry a visit."
    return [model.blocks[layer.block].weights() for layer in SCHEDULE]


def test_a_blocks_own_weights_change_nothing(model, tokens):
    assert torch.equal(model(tokens[0], weights=own_weights(model)), model(tokens[0]))
    assert torch.equal(model(tokens[0], weights=[None]*len(SCHEDULE)), model(tokens[0]))


def test_an_error_in_one_visit_leaves_earlier_layers_alone(model, tokens):
    "And moves every later one."
    def outputs(weights):
        found = {}
        def hook(v, name, x):
            if name == 'out': found[v] = x
        model(tokens[0], weights=weights, hook=hook)
        return found
    w = own_weights(model)[3]
    changed = outputs([None]*3 + [w._replace(up=w.up + 0.01)] + [None]*4)
    plain = outputs(None)
    assert [torch.equal(plain[v], changed[v]) for v in range(8)] == [True]*3 + [False]*5


def test_seeing_changes_nothing_and_sees_every_layer(model, tokens):
    seen = []
    logits = model(tokens[0], hook=lambda v, name, x: seen.append((v, name)))
    assert torch.equal(logits, model(tokens[0]))
    names = {'in', 'attn_in', 'o_in', 'mlp_in', 'down_in', 'out'}
    for v in range(len(SCHEDULE)): assert {name for w, name in seen if w == v} >= names


def nudged(model, tokens, step, visit=3):
    "Logits when one visit's weights are moved, each entry by `step` times a fixed pattern."
    pattern = [torch.arange(p.numel(), dtype=p.dtype).sin().view(p.shape) for p in own_weights(model)[visit]]
    w = Weights(*(p + step*d for p, d in zip(own_weights(model)[visit], pattern, strict=True)))
    return model(tokens, weights=[w if v == visit else None for v in range(len(SCHEDULE))])


def test_jvp_is_the_limit_of_differences(model, tokens):
    zero = torch.zeros((), dtype=torch.float64)
    _, tangent = jvp(lambda step: nudged(model, tokens[0], step), (zero,), (zero + 1,))
    h = 1e-6
    with torch.no_grad(): slope = (nudged(model, tokens[0], h) - nudged(model, tokens[0], -h))/(2*h)
    torch.testing.assert_close(tangent, slope, atol=1e-6, rtol=1e-5)


def test_vjp_and_jvp_agree(model, tokens):
    zero = torch.zeros((), dtype=torch.float64)
    out, pull = vjp(lambda step: nudged(model, tokens[0], step), zero)
    _, tangent = jvp(lambda step: nudged(model, tokens[0], step), (zero,), (zero + 1,))
    torch.manual_seed(3)
    cotangent = torch.randn_like(out)
    torch.testing.assert_close(pull(cotangent)[0], (cotangent*tangent).sum())


def test_vmap_over_errors_is_a_loop(model, tokens):
    steps = torch.tensor([0., 0.01, -0.02], dtype=torch.float64)
    many = vmap(lambda step: nudged(model, tokens[0], step))(steps)
    torch.testing.assert_close(many, torch.stack([nudged(model, tokens[0], step) for step in steps]))


def test_functional_call_takes_other_parameters(model, tokens):
    doubled = {name: 2*p for name, p in model.named_parameters()}
    other = build(CONFIG).double()
    other.load_state_dict(doubled)
    torch.testing.assert_close(functional_call(model, doubled, (tokens[0],)), other(tokens[0]))
