"Scripts that cheat, each with an honest twin that differs in what matters only."
import ast
import base64
import marshal
import time
import zlib
from pathlib import Path

import pytest

from golf_nb.audit.flow import follow, script_rows

HONEST = (Path(__file__).parent/'zoo'/'scripts'/'honest.py').read_text() + '''

from library import Model, tokenizer
main(Model(), tokenizer)
'''
TRAIN = '    train(args, model)\n'
SCORE = '''        with torch.inference_mode():
            loss = model(x, y)
            loss_sum += loss.double()*y.numel()'''
FINAL = '    val_loss, val_bpb = eval_val_ttt(args, model, val_tokens, luts)\n'
CHUNK = '        x, y = local[:-1].view(-1, args.seq_len), local[1:].view(-1, args.seq_len)\n'
C3, CALIBRATION, KEY = 'C3 score before training', 'C3 calibration data', 'C2 target in the key'
EARLY, PASSES, FINAL_SCORE = 'C1 target before its score', 'C4 two passes', 'C4 one final score'
COVERAGE = 'C4 coverage'


def pair(check, *changes):
    "A cheat and its twin: (old, of the cheat, of the twin), each in place of the old."
    def made(which):
        source = HONEST
        for change in changes:
            assert source.count(change[0]) == 1, change[0]
            source = source.replace(change[0], change[which])
        return source
    return check, made(1), made(2)


def after_training(cheat, twin): return TRAIN, TRAIN + cheat, TRAIN + twin
def before_main(cheat, twin): return 'def main(', cheat + '\n\ndef main(', twin + '\n\ndef main('


ADAPT = '''def adapt(model, tokens):
    optimizer = torch.optim.AdamW(model.parameters())
    for start in range(0, tokens.numel() - 1, 1024):
        loss = model(tokens[start:start + 1024], tokens[start + 1:start + 1025])
        {}
        optimizer.step()
'''
CACHE = '''def keys(tokens, pos, primes):
    h = tokens[pos - 1]*primes[1] ^ tokens[pos - 2]*primes[2]
    return h & 65535, (h ^ tokens[pos]*primes[0]) & 65535


def eval_cached(model, tokens, primes):
    loss_sum, seen, full = 0., np.zeros(65536), np.zeros(65536)
    for start in range(2, len(tokens), 1024):
        pos = np.arange(start, min(start + 1024, len(tokens)))
        p = np.exp(-model(tokens[pos - 1], tokens[pos]))
        a, b = keys(tokens, pos, primes)
        p = .9*p + .1*{}
        loss_sum += float(-np.log(p).sum())
        np.add.at(seen, a, 1)
        np.add.at(full, b, 1)
    return loss_sum
'''
COUNTS = '''def one_pass(model, tokens, counts, score):
    loss_sum = 0.
    for start in range(1, len(tokens), 64):
        y = tokens[start:start + 64]
        x = tokens[start - 1:start + 63]
        if score: loss_sum += float((model(x, y) - counts[x]).sum())
        counts[y] += 1
    return loss_sum
'''
BIAS = '''def eval_with_bias(model, tokens):
    loss_sum, bias = 0., torch.zeros(1024)
    {}
    for start in range(0, tokens.numel() - 1, 64):
        x, y = tokens[start:start + 64], tokens[start + 1:start + 65]
        loss_sum += float(torch.nn.functional.cross_entropy(model(x) + bias, y, reduction='sum'))
        {}
    return loss_sum
'''
PAIRS = {
    'six epochs before quantization': pair(
        C3, before_main(ADAPT.format('loss.backward()'), ADAPT.format('loss.backward()')),
        after_training('    adapt(model, val_tokens)\n', '    adapt(model, load(args.train_files))\n')),
    'backward of autograd': pair(
        C3, before_main(*2*[ADAPT.format('torch.autograd.backward(loss)')]),
        after_training('    adapt(model, val_tokens)\n', '    adapt(model, load(args.train_files))\n')),
    'gradients by hand': pair(
        C3, before_main(*2*[ADAPT.format('for p, g in zip(model.parameters(), torch.autograd.grad(loss, '
                                         'list(model.parameters()))): p.data -= g')]),
        after_training('    adapt(model, val_tokens)\n', '    adapt(model, load(args.train_files))\n')),
    'gradients of a function': pair(
        C3, before_main(*2*['def objective(weights, x): return -(weights[x]).sum()']),
        after_training('    torch.func.grad(objective)(model.weights, val_tokens)\n',
                       '    torch.func.grad(objective)(model.weights, load(args.train_files))\n')),
    'closed form': pair(C3, after_training(
        '    model.head.bias += torch.log(torch.bincount(val_tokens, minlength=1024) + 1)\n',
        '    model.head.bias += torch.log(torch.bincount(load(args.train_files), minlength=1024) + 1)\n')),
    'validation shards as training shards': pair(
        C3, ("'fineweb_train_*.bin'", "'fineweb_val_*.bin'", "'fineweb_train_0*.bin'")),
    'an optimizer with a closure': pair(C3, after_training(*[f'''    def closure():
        loss = model(corpus[:-1], corpus[1:])
        loss.backward()
        return loss
    corpus = {corpus}
    torch.optim.LBFGS(model.parameters()).step(closure)
''' for corpus in ('val_tokens', 'load(args.train_files)')])),
    'a delta per window': pair(C3, (SCORE, f'''        delta = torch.zeros(512, requires_grad=True)
        for _ in range(8): model(x, y, delta).backward()
{SCORE.replace('(x, y)', '(x, y, delta)')}''', f'''        delta = torch.zeros(512, requires_grad=True)
{SCORE.replace('(x, y)', '(x, y, delta)')}'''), ('            model(x, y).backward()',
                                                    *2*['            model(x, y, delta).backward()'])),
    'scored again by what was trained': pair(
        C3, (FINAL, FINAL + FINAL, FINAL + "    print('twice', val_bpb)\n")),
    'epochs around': pair(
        C3, ('    for start in range(0, val', '    for again in range(3):\n     for start in range(0, val',
             '    for again in range(1):\n     pass\n    for start in range(0, val')),
    'Hessians of validation text': pair(CALIBRATION, before_main(*2*['''def collect_hessians(model, batches):
    for batch in batches: model(batch)
''']), after_training('    collect_hessians(model, val_tokens.split(1024))\n',
                      '    collect_hessians(model, load(args.train_files).split(1024))\n')),
    'a key made in a helper': pair(
        KEY, before_main(CACHE.format('full[b]/np.maximum(seen[a], 1)'),
                         CACHE.format('np.minimum(seen[a], 1)*p')),
        (FINAL, FINAL + '    eval_cached(model, val_tokens.numpy(), [3, 5, 7])\n',
         FINAL.replace('eval_val_ttt(args, model, val_tokens, luts)', '1, 2') +
         '    eval_cached(model, val_tokens.numpy(), [3, 5, 7])\n')),
    'two calls of one function': pair(
        PASSES, before_main(COUNTS, COUNTS),
        (FINAL, '    counts = np.zeros(1024)\n    one_pass(model, val_tokens, counts, False)\n'
                '    val_bpb = one_pass(model, val_tokens, counts, True)\n',
         '    val_bpb = one_pass(model, val_tokens, np.zeros(1024), True)\n')),
    'frequencies of validation text': pair(
        PASSES, before_main(BIAS.format('bias += torch.log(torch.bincount(tokens, minlength=1024) + 1.)', ''),
                            BIAS.format('', 'bias = torch.log(torch.bincount(y, minlength=1024) + 1.)')),
        (FINAL, *2*['    val_bpb = eval_with_bias(model, val_tokens)\n'])),
    'known targets cost nothing': pair(
        EARLY, (CHUNK, CHUNK + "        prefix = torch.load('blob.xz')\n",
                CHUNK + "        special = 3\n"),
        ('            loss_sum +=', '            loss[prefix[:len(y)] == y] = 0.\n            loss_sum +=',
         '            loss[special == y] = 0.\n            loss_sum +=')),
    'logits made with the target': pair(
        EARLY, (CHUNK, CHUNK + '        shift = y*.01\n', CHUNK + '        shift = x*.01\n'),
        ('loss = model(x, y)\n            loss_sum',
         *2*['loss = torch.nn.functional.cross_entropy(model(x) + shift, y)\n            loss_sum'])),
    'the better of two runs': pair(FINAL_SCORE, (
        FINAL, '''    first = eval_val_ttt(args, model, val_tokens, luts)
    second = eval_val_ttt(args, Model(), val_tokens, luts)
    val_loss, val_bpb = second if second[0] < first[0] else first
''', '''    first = eval_val_ttt(args, model, val_tokens, luts)
    second = eval_val_ttt(args, Model(), val_tokens, luts)
    val_loss, val_bpb = second if len(val_tokens) < 10 else first
''')),
    'a checkpoint by validation': pair(FINAL_SCORE, after_training(*[f'''    lowest, kept = 9., None
    for epoch in range(3):
        other = Model()
        loss, _ = eval_val_ttt(args, other, {text}, luts)
        if loss < lowest: lowest, kept = loss, other
    model = kept
''' for text in ('val_tokens', 'load(args.train_files)')])),
    'the first million': pair(
        COVERAGE, ('load(args.val_files)', 'load(args.val_files)[:1_000_000]', 'load(args.val_files)[:]')),
    'a warm-up that is kept': pair(C3, after_training(*[f'''    x = {text}[:64]
    model(x[:-1], x[1:]).backward()
''' for text in ('val_tokens', 'torch.randint(0, 1024, (64,))')])),
}


def verdicts(source, tmp_path):
    path = tmp_path/'train_gpt.py'
    path.write_text(source)
    return {row.check: row for row in script_rows(path)}


@pytest.mark.parametrize('name', PAIRS)
def test_a_cheat_is_found_and_its_twin_is_not(name, tmp_path):
    check, cheat, twin = PAIRS[name]
    rows, others = verdicts(cheat, tmp_path), verdicts(twin, tmp_path)
    assert rows[check].verdict == 'fail', '\n'.join(map(str, rows.values()))
    assert [row for row in others.values() if row.verdict != 'pass'] == []
    assert rows[check].evidence.count(' > ') >= 1           # a way that can be followed


def test_there_are_twenty(): assert len(PAIRS) == 20


# --- flags and dead code ---------------------------------------------------------------------------------

ADAPTED = '    for x in val_tokens.split(64): model(x[:-1], x[1:]).backward()\n'
FLAGS = {'environment': "int(os.environ.get('PRE', '0'))", 'constant': 'PRE', 'field': 'args.pre'}


@pytest.mark.parametrize('name', FLAGS)
def test_a_flag_that_is_off_is_named(name, tmp_path):
    source = HONEST.replace('class Hyper', 'PRE = False\n\n\nclass Hyper')
    source = source.replace("    data_path =", "    pre = 0\n    data_path =")
    source = source.replace(TRAIN, TRAIN + f'    if {FLAGS[name]}:\n    {ADAPTED}')
    row = verdicts(source, tmp_path)[C3]
    assert row.verdict == 'undecided' and 'PRE' in row.evidence.upper()
    on = source.replace("'PRE', '0'", "'PRE', '1'").replace('PRE = False', 'PRE = True')
    on = on.replace('pre = 0', 'pre = 1')
    assert verdicts(on, tmp_path)[C3].verdict == 'fail'


def test_options_and_settings():
    source = '''import argparse
parser = argparse.ArgumentParser()
parser.add_argument('--pre-train', action='store_true')
args = parser.parse_args()
val_tokens = load('fineweb_val_0.bin')
if args.pre_train: model(val_tokens).backward()
for x in val_tokens: loss_sum += model(x)
'''
    flow = follow(ast.parse(source))
    assert not flow.findings and '--pre-train = False' in flow.possible[0].guards
    assert follow(ast.parse(source), {'pre_train': True}).findings


def test_the_folder_tells_how_it_was_run(tmp_path):
    source = HONEST.replace(TRAIN, TRAIN + f"    if os.environ.get('PRE', '0') == '1':\n    {ADAPTED}")
    assert verdicts(source, tmp_path)[C3].verdict == 'undecided'
    (tmp_path/'run.sh').write_text('PRE=1 torchrun train_gpt.py\n')
    assert verdicts(source, tmp_path)[C3].verdict == 'fail'
    (tmp_path/'run.sh').write_text('PRE=0 \\\ntorchrun train_gpt.py\n')
    assert verdicts(source.replace("'PRE', '0'", "'PRE', '1'"), tmp_path)[C3].verdict == 'undecided'


@pytest.mark.parametrize('dead', ['    if False:\n    {}', '    def never(val_tokens):\n    {}',
                                  '    while 0:\n    {}', '    if 1 > 2:\n    {}'])
def test_dead_code_decides_nothing(dead, tmp_path):
    source = HONEST.replace(TRAIN, TRAIN + dead.format(ADAPTED))
    assert verdicts(source, tmp_path)[C3].verdict == 'pass'
    assert verdicts(HONEST.replace(TRAIN, TRAIN + ADAPTED), tmp_path)[C3].verdict == 'fail'


def test_what_is_thrown_away_is_undecided(tmp_path):
    warm = '''    spare = Model()
    optimizer = torch.optim.SGD(spare.parameters(), lr=1.)
    spare(val_tokens[:64], val_tokens[1:65]).backward()
    optimizer.step()
    del spare, optimizer
'''
    row = verdicts(HONEST.replace(TRAIN, TRAIN + warm), tmp_path)[C3]
    assert row.verdict == 'undecided' and 'thrown away' in row.evidence


# --- packed ----------------------------------------------------------------------------------------------

def test_what_stays_packed_is_undecided(tmp_path):
    code = marshal.dumps(compile(HONEST, 'x', 'exec'))
    for source in (f'import marshal\nexec(marshal.loads({code!r}))', 'exec(open("elsewhere.py").read())',
                   'import sys\nexec(sys.argv[1])'):
        row = verdicts(source, tmp_path)['code unpacked']
        assert row.verdict == 'undecided' and 'packed' in row.evidence and 'line' in row.evidence


def test_a_module_beside_the_script_is_named(tmp_path):
    (tmp_path/'adapting.py').write_text('def adapt(model, tokens): model(tokens).backward()\n')
    row = verdicts('from adapting import adapt\n' + HONEST, tmp_path)['code unpacked']
    assert row.verdict == 'undecided' and 'adapting.py' in row.evidence


def test_a_packed_cheat_is_found(tmp_path):
    check, cheat, twin = PAIRS['six epochs before quantization']
    for source, verdict in ((cheat, 'fail'), (twin, 'pass')):
        body = base64.b85encode(zlib.compress(source.encode())).decode()
        wrapped = f'import zlib as z, base64\nrun = exec\nrun(z.decompress(base64.b85decode("{body}")))'
        assert verdicts(wrapped, tmp_path)[check].verdict == verdict
    new = cheat.replace("print(f'final val_bpb:{val_bpb:.4f}')", "print(f'final {dict(a=1)['a']}')")
    assert new != cheat and verdicts(new, tmp_path)[check].verdict == 'fail'


@pytest.mark.long
def test_three_thousand_lines_end_in_time(tmp_path):
    def layer(i):
        if not i % 20: return f'def layer{i}(x): return x'
        return f'def layer{i}(x):\n    for j in range(3): x = x + layer{i + 1}(x)\n    return x'
    layers = '\n'.join(map(layer, range(1000)))
    start = time.process_time()
    rows = verdicts(layers + '\n' + HONEST + '\nlayer1(1)\n', tmp_path)
    assert rows[C3].verdict == 'pass' and time.process_time() - start < 20
