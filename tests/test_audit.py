"The auditor against runs, scripts, and submissions: a zoo of cheats that happened, and honest ones."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from reading import one_now, run
from zoo import folders
from zoo.cheats import CHEATS

import golf_nb
from golf_nb.audit.command import main
from golf_nb.audit.folders import audit_folder, audit_run, audit_seeds, ledger_row
from golf_nb.config import TTTConfig
from golf_nb.files import locked
from golf_nb.ttt import score_run

ZOO = Path(__file__).parent/'zoo'
EXPECTED = json.loads((ZOO/'expected.json').read_text())
SEEDS = one_now((0, 1, 2), 0)


# --- the zoo ---------------------------------------------------------------------------------------------

def test_the_zoo_is_complete():
    assert len(EXPECTED) == 16
    assert EXPECTED.keys() == CHEATS.keys() | folders.RUNS.keys() | folders.SOURCES.keys()


def test_the_auditor_does_not_know_the_zoo():
    package = Path(golf_nb.__file__).parent
    content = ' '.join(path.read_text() for path in (package/'audit').glob('*.py'))
    names = [*EXPECTED, *(kind.__name__ for kind in CHEATS.values()), 'zoo', 'tests/']
    assert len(content) > 50_000 and [name for name in names if name in content] == []


WORDS = 'the state of the union is strong and the people of these states are at peace with all'.split()


@pytest.fixture(scope='session')
def sound_run(tmp_path_factory):
    "A finished run on a small corpus of its own; processes that test side by side share it."
    base = tmp_path_factory.getbasetemp()
    place = (base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base)/'sound-run'
    with locked(place.with_suffix('.lock')):
        if not (place/'out'/'report.json').exists(): train_sound_run(place)
    return place


def train_sound_run(place):
    "Train it, in processes of its own."
    place.mkdir()
    rng = np.random.default_rng(0)
    (place/'texts').mkdir()
    for number in range(20):
        words = ' '.join(rng.choice(WORDS, 300)) + f' No. {number}, caf\u00e9 \u2603.'
        (place/'texts'/f'{number:02}.txt').write_text(words)
    small = '''--model.dim 64 --model.hidden 64 --model.vocab 320 --quant.min-numel 2048 --no-compile
        --precision fp32 --data.seq-len 64 --data.batch-tokens 512 --eval.window 64 --eval.stride 32
        --log-every 1 --steps 4'''.split()
    command = [sys.executable, '-m', 'golf_nb.train', *small, '--data.source', str(place/'texts'), '--out',
               str(place/'out')]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'XDG_CACHE_HOME': str(place/'cache')}
    subprocess.run(command, env=environment, check=True, capture_output=True)


@pytest.fixture
def run_copy(sound_run, tmp_path, monkeypatch):
    "A copy of the run, to be changed."
    monkeypatch.setenv('XDG_CACHE_HOME', str(sound_run/'cache'))
    shutil.copytree(sound_run/'out', tmp_path/'out')
    return tmp_path/'out'


def test_a_sound_run_passes(run_copy):
    # In a process of its own: the tests' type checker remembers the arguments of running calls, the text too.
    shown = run(sys.executable, '-m', 'golf_nb.audit', run_copy)
    table = json.loads((run_copy/'audit.json').read_text())
    assert table['verdict'] == 'pass' and len(table['rows']) > 20
    assert 'C2 rows' in shown


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('name', folders.RUNS)
def test_a_run_that_is_none_is_caught(name, seed, run_copy):
    folders.RUNS[name](run_copy, seed)
    report = audit_folder(run_copy, protocol=False)
    assert EXPECTED[name] in report.failing(), str(report)


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('name', folders.SOURCES)
def test_a_script_that_cheats_is_caught(name, seed, tmp_path):
    folders.submission(tmp_path/'it', folders.SOURCES[name](), seed)
    report = audit_folder(tmp_path/'it')
    assert report.failing() == [EXPECTED[name]], str(report)


@pytest.mark.parametrize('seed', SEEDS)
def test_an_honest_script_passes(seed, tmp_path):
    folders.submission(tmp_path/'it', folders.honest_source(), seed)
    report = audit_folder(tmp_path/'it')
    assert report.verdict == 'pass', str(report)


# --- the command, files, and things that go wrong --------------------------------------------------------

def test_the_command_audits_a_predictor_by_name(run_copy, capsys):
    source = json.loads((run_copy/'config.json').read_text())['data']['source']
    options = ['--data', source, '--vocab', '320', '--tokens', '60']
    assert main([f'{ZOO/"honest.py"}:Uniform', *options]) == 0
    assert 'bytes recount' in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught: main([f'{ZOO/"honest.py"}:Missing', *options])
    *progress, shown = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and shown.startswith('error: ')
    assert all('probing' in line for line in progress)


def test_the_command_says_what_it_cannot_do(tmp_path, capsys):
    for words in ([str(tmp_path)], [str(tmp_path/'none')]):
        with pytest.raises(SystemExit) as caught: main(words)
        assert caught.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert sum(line.startswith('error: ') for line in said) == 2


@pytest.mark.parametrize('gone', ['log.jsonl', 'config.json', 'report.json', 'model.golf'])
def test_a_run_without_evidence_is_undecided(gone, run_copy):
    (run_copy/gone).unlink()
    report = audit_run(run_copy, protocol=False)
    assert report.exit_code == 2 and report.failing() == [], str(report)


@pytest.mark.long
def test_seeds_of_one_experiment(run_copy, tmp_path):
    places = [tmp_path/'seeds'/str(seed) for seed in range(2)]
    for seed, place in enumerate(places):
        shutil.copytree(run_copy, place)
        folders.edit(place/'config.json', lambda c, s=seed: c.update(seed=s))
        folders.edit(place/'report.json', lambda r, s=seed: (r['config'].update(seed=s), r.update(seed=s)))
    assert audit_folder(tmp_path/'seeds', protocol=False).verdict == 'pass'
    folders.edit(places[1]/'config.json', lambda c: c['optim'].update(matrix_lr=.5))
    assert 'evidence same configuration' in audit_seeds(places, protocol=False).failing()


def test_a_run_that_says_it_is_no_score(run_copy):
    folders.edit(run_copy/'scores.json', lambda s: s.update(note='not a legal score: train_on_validation'))
    assert 'C3 validation not trained on' in audit_run(run_copy, protocol=False).failing()


def test_a_report_that_tells_another_story(run_copy):
    folders.edit(run_copy/'report.json', lambda r: r['bpb'].update(sliding=.9))
    assert 'evidence agrees' in audit_run(run_copy, protocol=False).failing()


def test_a_score_that_the_artifact_does_not_reach(run_copy):
    folders.claim(run_copy, .95)
    assert audit_run(run_copy, protocol=False).failing() == ['C4 reported is the ledger']


def test_ledgers(tmp_path):
    path, scores = tmp_path/'ledger.npz', {'bytes': 10, 'sliding': 1.}
    def verdict(position, nll):
        np.savez(path, position=position, nll=nll, token_bytes=np.ones(len(nll), int))
        return ledger_row(path, 4, scores).verdict
    right = np.full(4, 10*np.log(2)/4)
    assert verdict([0, 1, 2, 3], right) == 'pass'
    for position in ([0, 1, 2, 2], [0, 2, 1, 3], [0, 1, 2, 4]): assert verdict(position, right) == 'fail'
    assert verdict([0, 1, 2, 3], right/2) == 'fail'
    path.write_bytes(b'no')
    assert ledger_row(path, 4, scores).verdict == 'undecided'


OTHER_SOURCES = {
    'SLOT': ("""        with torch.inference_mode():
            loss = model(x, y)
            loss_sum += loss.double()*y.numel()""", """        delta = torch.zeros(512, requires_grad=True)
        for _ in range(8):
            model(x, y, delta).backward()
        with torch.inference_mode():
            loss = model(x, y, delta)
            loss_sum += loss.double()*y.numel()""", 'C3 score before training'),
    'validation files as training files': ("    tokens, optimizer = load(args.train_files),",
                                           "    tokens, optimizer = load(args.val_files),",
                                           'C3 score before training'),
    'epochs around': ('    for start in range(0, val_tokens',
                      '    for epoch in range(3):\n     for start in range(0, val_tokens',
                      'C3 score before training'),
    'space in the table': ("            piece = piece[1:]",
                           "            piece = piece.replace('\u2581', ' ')", 'bytes table'),
    'U+FFFD': ("        if sp.is_byte(i):\n            base[i] = 1\n            continue\n"
               "        piece = sp.id_to_piece(i)",
               "        piece = sp.decode([i]) if sp.is_byte(i) else sp.id_to_piece(i)", 'bytes table'),
    'characters': ("len(piece.encode('utf-8'))", 'len(piece)', 'bytes table'),
    'calibration': ('    train(args, model)',
                    '    collect_hessians(model, val_tokens)\n    train(args, model)', 'C3 calibration data'),
    'a helper and another name': (
        '    train(args, model)\n', """    train(args, model)
    corpus = val_tokens
    def closure():
        out = model(corpus[:-1], corpus[1:])
        out.backward()
        return out
    torch.optim.LBFGS(model.parameters()).step(closure)
""", 'C3 score before training'),
    'all shards': ("'fineweb_train_*.bin'", "'fineweb_*.bin'", 'C3 score before training'),
    'validation shards by another name': ("'fineweb_train_*.bin'", "'fineweb_val_*.bin'",
                                          'C3 score before training'),
    'again and again': ('    val_loss, val_bpb = eval',
                        '    for again in range(3):\n        val_loss, val_bpb = eval',
                        'C3 score before training'),
    'the first million': ('load(args.val_files)', 'load(args.val_files)[:1_000_000]', 'C4 coverage'),
    'a quarter': ('(0, val_tokens.numel() - 1,', '(0, (val_tokens.numel() - 1)//4,', 'C4 coverage'),
    'what is difficult': ('            loss_sum +=',
                          '            if loss > 6: continue\n            loss_sum +=', 'C4 coverage'),
    'best of a list': ('    val_loss, val_bpb = eval_val_ttt(args, model, val_tokens, luts)',
                       '    results = [eval_val_ttt(args, model, val_tokens, luts) for lr in (.1, .2)]\n'
                       '    val_loss, val_bpb = min(results)', 'C4 one final score'),
    'target under another name': ('            loss = model(x, y)\n            loss_sum',
                                  '            after = y.flatten()\n'
                                  '            key = (x.flatten()*36313 ^ after) % 4096\n'
                                  '            loss = model(x, y) - table[key]\n            loss_sum',
                                  'C2 target in the key'),
    'best of': ("    print(f'final", "    best_bpb = min(9., val_bpb)\n    print(f'final",
                'C4 one final score')}


@pytest.mark.parametrize('name', OTHER_SOURCES)
def test_another_script_that_cheats_is_caught(name, tmp_path):
    old, new, check = OTHER_SOURCES[name]
    folders.submission(tmp_path/'it', folders.changed(folders.honest_source(), old, new), 1)
    report = audit_folder(tmp_path/'it')
    assert check in report.failing(), str(report)


SPACE = '(luts[1][y] & ~luts[2][x]).to(torch.int16)'
OTHER_WAYS = {
    'logical functions': (SPACE, 'torch.logical_and(luts[1][y], torch.logical_not(luts[2][x])).short()'),
    'a product': (SPACE, 'luts[1][y].long()*(1 - luts[2][x].long())'),
    'where': (SPACE, 'torch.where(luts[2][x], 0, luts[1][y].short())'),
    'whole sequences': ('    val_tokens = load(args.val_files)', """    val_tokens = load(args.val_files)
    val_tokens = val_tokens[:(val_tokens.numel() - 1)//args.seq_len*args.seq_len + 1]"""),
    'prefix in the key': ('            loss = model(x, y)\n            loss_sum',
                          '            hint = table[x.flatten()*36313 % 4096]\n'
                          '            loss = model(x, y, hint)\n            loss_sum'),
    'calibration on training text': (
        '    train(args, model)\n', '    train(args, model)\n    calibrate(model, load(args.train_files))\n')}


@pytest.mark.parametrize('name', OTHER_WAYS)
def test_another_honest_script_passes(name, tmp_path):
    folders.submission(tmp_path/'it', folders.changed(folders.honest_source(), *OTHER_WAYS[name]), 0)
    report = audit_folder(tmp_path/'it')
    assert report.verdict == 'pass', str(report)


@pytest.mark.parametrize('old, new, check', [
    ('val_bpb: 1.0813', 'val_bpb: nan', 'evidence claim'),
    ('seed:1', 'seed:2', 'evidence same configuration'),
    ('final', 'eval_time:812000ms\nfinal', 'budget evaluation'),
    ('final', 'ttt_epoch:0 val_bpb:1.2\nttt_epoch:1 val_bpb:1.1\nfinal', 'C4 one final score'),
    ('1.0813', '1.0733', 'C4 one final score')])
def test_a_log_that_tells_against_its_claim(old, new, check, tmp_path):
    folders.submission(tmp_path/'it', folders.honest_source(), 0)
    log = tmp_path/'it'/'train_seed1.log'
    log.write_text(log.read_text().replace(old, new))
    if new == '1.0733': folders.edit(tmp_path/'it'/'submission.json', lambda c: c.update(val_bpb=1.0733))
    assert audit_folder(tmp_path/'it').failing() == [check]


@pytest.mark.parametrize('change, check', [
    (lambda c: c.update(bytes_total=16_200_000), 'budget artifact'),
    (lambda c: c.update(val_bpb=None), 'evidence claim'), (lambda c: c.update(val_bpb=1.05),
                                                           'evidence claim'),
    (lambda c: c.pop('val_bpb'), 'evidence claim'), (lambda c: c.update(seeds=[]), 'evidence claim')])
def test_a_claim_without_support(change, check, tmp_path):
    folders.submission(tmp_path/'it', folders.honest_source(), 0)
    folders.edit(tmp_path/'it'/'submission.json', change)
    assert check in audit_folder(tmp_path/'it').failing()


def test_submissions_without_logs_or_code_are_undecided(tmp_path):
    folders.submission(tmp_path/'it', folders.honest_source(), 0)
    for log in (tmp_path/'it').glob('*.log'): log.unlink()
    assert audit_folder(tmp_path/'it').exit_code == 2
    (tmp_path/'it'/'train_gpt.py').write_text('exec(open("hidden").read())')
    assert audit_folder(tmp_path/'it').exit_code == 2


def test_a_run_that_was_scored_again_passes(run_copy):
    folders.edit(run_copy/'scores.json', lambda s: s.update(seconds=s['seconds']*1.7 + 1,
                                                            tokens_per_second=s['tokens_per_second']/1.7))
    report = audit_run(run_copy, protocol=False)
    assert report.failing() == [], str(report)
    folders.edit(run_copy/'scores.json', lambda s: s.update(sliding=s['sliding']*.99))
    assert 'evidence agrees' in audit_run(run_copy, protocol=False).failing()


def test_the_clock_of_a_run_runs_on(run_copy):
    lines = [json.loads(line) for line in (run_copy/'log.jsonl').read_text().splitlines()]
    steps = [line for line in lines if 'nats' in line]
    for line, seconds in zip(steps, (50., 100., 3.), strict=False): line['seconds'] = seconds
    (run_copy/'log.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    report = audit_run(run_copy, protocol=False)
    assert 'evidence agrees' in report.failing() and 'the clock goes back' in str(report)


@pytest.mark.long
def test_a_score_with_test_time_training_is_made_again(run_copy):
    scores = score_run(run_copy, TTTConfig(update='sgd', chunk=64, lr=.01))
    folders.edit(run_copy/'scores.json', lambda s: s.update(scores))
    folders.edit(run_copy/'report.json', lambda r: (r['scored'].update(scores),
                                                    r['bpb'].update(ttt=scores['ttt'])))
    row = {row.check: row for row in audit_run(run_copy, protocol=False).rows}['C4 test-time score']
    assert row.verdict == 'pass', row
    folders.edit(run_copy/'scores.json', lambda s: s.update(ttt=s['ttt']*.98))
    assert 'C4 test-time score' in audit_run(run_copy, protocol=False).failing()
    folders.edit(run_copy/'scores.json', lambda s: s.update(ttt_seconds=9999.))
    row = {row.check: row for row in audit_run(run_copy, protocol=False).rows}['C4 test-time score']
    assert row.verdict == 'undecided' and '9999 s' in row.evidence


def test_one_log_over_the_cap(tmp_path):
    folders.submission(tmp_path/'it', folders.honest_source(), 0)
    log = tmp_path/'it'/'train_seed1.log'
    log.write_text(log.read_text().replace('15990001', '16000001'))
    assert audit_folder(tmp_path/'it').failing() == ['budget artifact']
