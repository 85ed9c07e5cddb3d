"Logs and claims as evidence: any layout is read alike, sound folders pass, each lie fails in its own row."
import base64
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import ROOT

from golf_nb.audit.claims import Claim, named_seeds, read_claim, readme_scores, track_of
from golf_nb.audit.evidence import CAP, TEXT_BYTES, Evidence, evidence_rows, gather, implied_bytes, text_rows
from golf_nb.audit.logs import decode, parse_log
from golf_nb.audit.public import confusion, pull_number
from golf_nb.audit.verdict import worst_rows

SCRIPT = 'print("train")\n'
SOURCE = '''"""A log that prints its source."""
import torch
from torch import nn

class H:
    matrix_lr: float = 0.5
    seed = 99

def main():
    print(f"val_bpb:{1.5}")

if __name__ == "__main__":
    main()
''' + '='*100 + '\n'


def log_text(seed, bpb, extra='', seconds=588., size=15_950_000, last=''):
    "A log like those of the contest."
    return (f'seed:{seed}\nmatrix_lr:0.02 warmup_steps:20\n{extra}'
            f'step:4000/20000 train_loss:2.1 train_time:{seconds*860:.0f}ms step_avg:126.4ms\n'
            f'step:4550/20000 val_loss:2.0000 val_bpb:1.2000 train_time:{seconds*1000:.0f}ms\n'
            f'peak memory allocated: {39000 + seed} MiB reserved: {39100 + seed} MiB\n'
            f'Serialized model int6+brotli: {size - 50_000} bytes\nCode size: 50000 bytes\n'
            f'Total submission size int6+brotli: {size} bytes\n{last}'
            f'final_int6_sliding_window val_loss:1.9000 val_bpb:{bpb:.4f} eval_time:{80_000 + seed}ms\n')


@pytest.fixture
def folder(tmp_path):
    "A submission whose three logs support its claim."
    place = tmp_path/'it'
    place.mkdir()
    (place/'train_gpt.py').write_text(SCRIPT)
    for seed, bpb in ((1, 1.10), (2, 1.11), (3, 1.12)):
        (place/f'train_seed{seed}.log').write_text(log_text(seed, bpb))
    (place/'submission.json').write_text(json.dumps({'val_bpb': 1.11, 'seeds': [1, 2, 3]}))
    return place


def rows_of(place, track=None):
    return {row.check: row for row in worst_rows(evidence_rows(gather(place, place/'train_gpt.py', track)))}


def verdicts(place, track=None):
    "The rows that did not pass."
    return {check: row.verdict for check, row in rows_of(place, track).items() if row.verdict != 'pass'}


def write_logs(place, change=str, **options):
    "Write the three logs again, other than they are."
    for seed in (1, 2, 3):
        (place/f'train_seed{seed}.log').write_text(change(log_text(seed, 1.09 + .01*seed, **options)))


def claim(place, **fields): (place/'submission.json').write_text(json.dumps(fields))


def replace(place, old, new, name='train_seed1.log'):
    text = (place/name).read_text()
    assert old in text
    (place/name).write_text(text.replace(old, new))


# --- reading -----------------------------------------------------------------------------------------------

ENCODINGS = 'utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le', 'utf-16-be'      # the last two without a mark
STEPS = ('step:{n}/20000 train_loss:{loss} train_time:{ms}ms',
         '{n}/20000 train_loss: {loss} train_time: {ms}ms',
         'step:{n} loss:{loss} t:{ms}ms avg:9.1ms', '{{"step": {n}, "loss": {loss}, "train_time_ms": {ms}}}')


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(ENCODINGS), st.sampled_from(['\n', '\r\n', '\r']), st.sampled_from(STEPS), st.data())
def test_a_log_says_the_same_in_any_layout(encoding, end, step, data):
    stamped, with_source = data.draw(st.booleans()), data.draw(st.booleans())
    seed, ms = data.draw(st.integers(0, 9999)), data.draw(st.integers(300_000, 700_000))
    tokens = data.draw(st.integers(30_000_000, 70_000_000))
    size = data.draw(st.integers(15_000_000, 17_000_000))
    bpb = data.draw(st.floats(.9, 1.3))
    body = [f'seed:{seed}', 'matrix_lr: 0.02', f'val_tokens: {tokens:,}', 'warmup_step: 20/20',
            step.format(n=2000, loss=3.1, ms=ms//2), step.format(n=4000, loss=2.1, ms=ms),
            'GPTQ:collecting Hessians from calibration data...', 'GPTQ:collected 67 Hessians in 12.5s',
            f'Total submission size int6+brotli: {size} bytes',
            f'final_int6_sliding val_loss:1.9 val_bpb:{bpb:.8f} eval_time:80000ms']
    if stamped: body = [f'17761423{i:02}.710 {line}' for i, line in enumerate(body)]
    text = (SOURCE if with_source else '') + '\n'.join(body) + '\n'
    log = parse_log(decode(text.replace('\n', end).encode(encoding)))
    assert log.seed == seed and log.settings['matrix_lr'][0] == '0.02'
    assert [one[0] for one in log.steps] == [2000, 4000] and log.warmup.value == 20
    assert max(fact.value for fact in log.clocks['training']) == round(ms/1000, 6)
    assert log.seconds('calibration') == 12.5
    assert log.counts['tokens'].value == tokens and log.sizes['total'].value == size
    assert [(one.kind, one.bpb, one.seconds) for one in log.scores] == [('sliding', round(bpb, 8), 80.)]


def test_lines_are_those_of_the_file():
    log = parse_log(SOURCE + log_text(7, 1.1))
    lines = (SOURCE + log_text(7, 1.1)).splitlines()
    assert '1.1000' in lines[log.scores[-1].line - 1] and lines[log.settings['seed'][1] - 1] == 'seed:7'
    assert log.seed == 7                                  # and not 99, which stands in the source


@pytest.mark.parametrize('line, kind', [
    ('GPTQ:collected 67 Hessians in 12.7s', 'calibration'),
    ('gptq:calibrated 66 layers in 6.8s', 'calibration'),
    ('gptq:generated 64 sequences in 198.3s (autoregressive)', 'own calibration'),
    ('gptq:calibrated on val_tokens in 9.0s', 'validation calibration'),
    ('GPTQ:quantized in 10.2s', 'compression'),
    ('ttt_lora:compile warmup done (122.0s)', 'compile'), ('total_eval_time:338.2s', 'evaluation'),
    ('ngram_tilt:precompute n_tok=40540161 elapsed=32.3s', 'preparation')])
def test_clocks_are_kept_apart(line, kind):
    assert list(parse_log(f'step:1/2 loss:1 train_time:5ms\n{line}\n').clocks) == ['training', kind]


# --- sound folders -----------------------------------------------------------------------------------------

def test_a_sound_folder_passes(folder):
    assert verdicts(folder) == {}
    assert rows_of(folder)['budget training'].evidence.startswith('train_seed1.log:4: 588.0 s of steps')


def test_numbers_of_a_run_are_no_settings(folder):
    for seed in (1, 2, 3):
        replace(folder, 'Serialized', f'elapsed: {290 + seed}.5s\nSerialized', f'train_seed{seed}.log')
    assert verdicts(folder) == {}


def test_printed_source_holds_no_settings(folder):
    (folder/'train_seed1.log').write_text(SOURCE + (folder/'train_seed1.log').read_text())
    replace(folder, 'Code size', 'matrix_lr: 0.5\nCode size', 'train_seed2.log')
    assert verdicts(folder) == {}


def test_identical_logs_count_once(folder):
    (folder/'train.log').write_bytes((folder/'train_seed1.log').read_bytes())
    assert verdicts(folder) == {}
    assert gather(folder).copies == ['train_seed1.log = train.log']


def test_logs_in_a_folder_and_in_utf16(folder):
    (folder/'logs').mkdir()
    for seed in (1, 2, 3):
        text = (folder/f'train_seed{seed}.log').read_text()
        (folder/'logs'/f'train{seed}.txt').write_bytes(text.encode('utf-16'))
        (folder/f'train_seed{seed}.log').unlink()
    assert verdicts(folder) == {} and len(gather(folder).claimed()) == 3


@pytest.mark.parametrize('fields', [
    {'ttt_recovery_bpb': .0117}, {'base_val_bpb': 1.2345},
    {'val_bpb_std': .001, 'sota_bpb': 1.3, 'delta_bpb': -.02}])
def test_other_numbers_claim_no_score(fields, folder):
    claim(folder, val_bpb=1.11, seed_results={'1': {'val_bpb': 1.1, **fields}}, **fields)
    assert verdicts(folder) == {}


def test_a_later_score_is_not_the_claim(folder):
    for seed in (1, 2, 3):
        with (folder/f'train_seed{seed}.log').open('a') as log:
            log.write('legal_ttt val_loss:1.8 val_bpb:1.0900\n')
    assert verdicts(folder) == {}


def test_a_script_that_is_shipped_packed(folder):
    write_logs(folder, size=16_020_000)
    row = rows_of(folder)['budget artifact']
    assert row.verdict == 'pass' and '16,020,000' in row.evidence
    assert f'{15_970_000 + len(SCRIPT):,}' in row.evidence


def test_text_that_the_model_wrote_is_no_training_data(folder):
    own = 'gptq:generating autoregressive calibration data\ngptq:generated 64 sequences in 198.3s\n'
    for seed in (1, 2, 3): replace(folder, 'peak', own + 'peak', f'train_seed{seed}.log')
    assert verdicts(folder) == {}


@pytest.mark.parametrize('said', [{'track': 'non-record-unlimited-compute-16mb'},
                                  {'blurb': 'Unlimited compute: 4 hours'}])
def test_the_track_without_a_clock(said, folder):
    write_logs(folder, seconds=14_400)
    assert verdicts(folder) == {'budget training': 'fail'}
    assert verdicts(folder, 'unlimited') == {}
    claim(folder, val_bpb=1.11, seeds=[1, 2, 3], **said)
    assert verdicts(folder) == {}
    assert verdicts(folder, '10 minutes') == {'budget training': 'fail'}


def test_the_path_decides_the_track(tmp_path):
    assert track_of(tmp_path/'track_10min_16mb'/'a', {'blurb': 'unlimited'})[0] == '10 minutes'
    assert track_of(tmp_path/'track_non_record_16mb'/'a', {})[0] == 'unlimited'


# --- lies --------------------------------------------------------------------------------------------------

LATE = 'GPTQ:collecting Hessians from calibration data...\nGPTQ:collected 67 Hessians in 19.7s\npeak'
LIES = {
    'cut text, by documents': ('Code size', 'ttt_phased: total_docs:10000\nCode size', 'C4 coverage'),
    'cut text, by tokens': ('matrix_lr', 'val_tokens: 9662464\nmatrix_lr', 'C4 coverage'),
    'a part of the documents': ('matrix_lr', 'val_doc_fraction: 0.2\nmatrix_lr', 'C4 coverage'),
    'a score of other bytes': ('matrix_lr', 'val_tokens: 47851520\nmatrix_lr', 'bytes of the text'),
    'calibration after the clock': ('peak', LATE, 'budget training'),
    'calibration on validation text': ('peak', 'gptq:calibrated on val_tokens in 2.0s\npeak',
                                       'C3 calibration data'),
    'over the cap': ('size int6+brotli: 15950000', 'size int6+brotli: 16999999', 'budget artifact'),
    'evaluation too long': ('eval_time:80001ms', 'eval_time:800001ms', 'budget evaluation'),
    'hints before the timer': ('final', 'hints:precompute done elapsed=550.0s\nfinal', 'budget evaluation'),
    'other settings': ('matrix_lr:0.02', 'matrix_lr:0.03', 'evidence same configuration'),
    'a seed twice': ('seed:1', 'seed:2', 'evidence same configuration'),
    'not a number': ('val_bpb:1.1000', 'val_bpb:nan', 'evidence claim'),
    'epochs before the model is stored': (
        'peak', 'ttt_adamw:epoch 1/2 loss:2\nttt_adamw:epoch 2/2 loss:1\npeak',
        'C3 validation not trained on'),
    'bytes by a constant': ('final', ''.join(f'ttt: batch {n}/9 batch_loss:{n}.0000 batch_bpb:{n/2:.4f}\n'
                                             for n in range(1, 9)) + 'final', 'bytes of the text'),
    'warm-up that trains': ('step:4000', 'warmup_step:600/600\nstep:4000', 'evidence clock'),
    'a clock that is set back': ('peak', 'step:4600/20000 train_loss:2 train_time:1000ms\npeak',
                                 'evidence clock'),
    'steps in no time': ('peak', 'step:9000/20000 train_loss:2 train_time:588500ms\npeak', 'evidence clock'),
    'epochs over the text': ('final', 'ttt_epoch:1 val_bpb:1.2\nttt_epoch:2 val_bpb:1.1\nfinal',
                             'C4 one final score'),
    'fitted to the text': ('peak', 'prequant_ttt:epoch 3/10 loss:2.1\npeak', 'C3 validation not trained on')}


@pytest.mark.parametrize('name', LIES)
def test_a_log_that_tells(name, folder):
    old, new, check = LIES[name]
    replace(folder, old, new)
    assert verdicts(folder).get(check) == 'fail', rows_of(folder)
    assert 'train_seed1.log' in rows_of(folder)[check].evidence


CLAIMS = {
    'no log shows it': ({'val_bpb': 1.05, 'seeds': [1, 2, 3]}, 'evidence claim', 'fail'),
    'a seed that its log does not show': ({'val_bpb': 1.11, 'seed_results': {'1': {'val_bpb': 1.05}}},
                                          'evidence claim', 'fail'),
    'the best seed': ({'val_bpb': 1.10, 'seeds': [1, 2, 3]}, 'C4 one final score', 'fail'),
    'one seed, and no word of the others': ({'val_bpb': 1.10}, 'C4 one final score', 'undecided'),
    'a score during training': ({'val_bpb': 1.2}, 'evidence claim', 'fail'),
    'another size': ({'val_bpb': 1.11, 'bytes_total': 12_000_000}, 'evidence claim', 'fail'),
    'over the cap': ({'val_bpb': 1.11, 'bytes_total': 16_000_001}, 'budget artifact', 'fail'),
    'null': ({'val_bpb': None}, 'evidence claim', 'fail'), 'nothing': ({}, 'evidence claim', 'fail'),
    'under another name': ({'val_loss': 1.11}, 'evidence claim', 'undecided'),
    'seeds without a log': ({'val_bpb': 1.11, 'seeds': [1, 2, 3, 4, 5]}, 'evidence seeds', 'fail')}


@pytest.mark.parametrize('name', CLAIMS)
def test_a_claim_that_lies(name, folder):
    fields, check, verdict = CLAIMS[name]
    claim(folder, **fields)
    assert verdicts(folder).get(check) == verdict, rows_of(folder)


def test_readme_is_evidence_too(folder):
    table = ('# Run\n\n| Seed | val_bpb | steps |\n|---|---|---|\n'
             '| 1 | **1.1000** | 9 |\n| 2 | 1.1100 | 9 |\n| 3 | {} | 9 |\n{}')
    (folder/'README.md').write_text(table.format('1.1200', ''))
    assert verdicts(folder) == {}
    (folder/'README.md').write_text(table.format('1.0700', ''))
    assert verdicts(folder) == {'evidence claim': 'fail'}
    assert 'README:7' in rows_of(folder)['evidence claim'].evidence
    (folder/'README.md').write_text(table.format('1.1200', '| 4 | 1.1900 | 9 |\n'))
    assert verdicts(folder) == {'evidence seeds': 'undecided', 'C4 one final score': 'undecided'}
    assert '3 lowest of 4' in rows_of(folder)['C4 one final score'].evidence
    claim(folder, val_bpb=1.11)
    assert verdicts(folder)['evidence seeds'] == 'fail'           # README is all that names seeds
    (folder/'README.md').write_text('Runs with seeds 1, 2, 3 and 77; 8 GPUs.\n')
    assert verdicts(folder) == {'evidence seeds': 'undecided'}


def test_one_seed_is_claimed_and_the_mean_is_told(folder):
    claim(folder, val_bpb=1.10)
    (folder/'README.md').write_text('Mean of three seeds: 1.1100; submitted is the best.\n')
    assert verdicts(folder) == {}


def test_a_rerun_in_time_leaves_the_clock_open(folder):
    late = log_text(1, 1.10, seconds=599.6).replace('peak', LATE)
    (folder/'train_seed1.log').write_text(late)
    assert verdicts(folder) == {'budget training': 'fail'}
    claim(folder, val_bpb=1.11, seed_results={str(n): {'val_bpb': round(1.09 + .01*n, 2)} for n in (1, 2, 3)})
    rerun = log_text(1, 1.1002, seconds=570.).replace('peak', LATE)
    (folder/'train_seed1_rerun.log').write_text(rerun)
    assert verdicts(folder) == {'budget training': 'undecided'}


def test_calibration_without_a_clock_is_open(folder):
    said = 'gptq:calibrating with 256 batches...\npeak'
    write_logs(folder, lambda text: text.replace('peak', said), seconds=600.1)
    assert verdicts(folder) == {'budget training': 'undecided'}


def test_files_are_weighed_together(folder):
    for name in ('model_a.ptz', 'model_b.ptz'): (folder/name).write_bytes(bytes(9_000_000))
    assert verdicts(folder)['budget artifact'] == 'fail'
    for name in 'ab': (folder/f'model_{name}.ptz').rename(folder/f'model_seed{ord(name)}.ptz')
    assert 'budget artifact' not in verdicts(folder)


def test_code_over_the_cap_that_would_pack_is_open(folder):
    (folder/'train_gpt.py').write_text('import helper\n')
    (folder/'helper.py').write_text('x = 1\n'*20_000)
    write_logs(folder, size=16_020_000)
    assert verdicts(folder) == {'budget artifact': 'undecided'}
    noise = base64.b85encode(random.Random(0).randbytes(80_000)).decode()
    (folder/'helper.py').write_text(f'x = "{noise}"\n')
    assert verdicts(folder) == {'budget artifact': 'fail'}


def test_an_empty_folder_is_open(tmp_path):
    (tmp_path/'train_gpt.py').write_text(SCRIPT)
    found = verdicts(tmp_path)
    assert set(found.values()) == {'undecided'}
    told = ' '.join(row.evidence for row in rows_of(tmp_path).values())
    assert 'within' not in told and '0 of 0' not in told        # nothing that reads like a pass


@given(st.floats(1.5, 3.5), st.floats(.9, 1.4), st.sampled_from([62_021_632, 40_540_160, 47_851_520]))
def test_the_law_of_bytes(loss, factor, tokens):
    bpb = implied_bytes(loss, tokens, 1.)/(TEXT_BYTES*factor)
    log = parse_log(f'val_tokens: {tokens}\nfinal val_loss:{loss:.8f} val_bpb:{bpb:.8f}\n')
    found = Evidence(Path('.'), Claim({'val_bpb': log.scores[0].bpb}), '10 minutes', '', logs=[log])
    row = next(row for row in text_rows(found) if row.check == 'bytes of the text')
    if abs(factor - 1) > .006: assert row.verdict == 'fail'
    if abs(factor - 1) < .004: assert row.verdict == 'pass'


@pytest.mark.parametrize('text, seeds', [
    ('seeds 42, 314 and 999', [42, 314, 999]), ('`SEED=1338`', [1338]),
    ('seed: 7 / 8', [7, 8]), ('3 seeds', []),
    ('seed=42, 8xH100', [42]), ('all seeds 15,951,189 bytes', []), ('seed 1-2', [])])
def test_seeds_in_words(text, seeds):
    assert list(named_seeds(text)) == seeds


def test_tables_need_a_column_of_seeds():
    assert readme_scores('| model | val_bpb |\n|---|---|\n| 7 | 1.1000 |\n') == {}
    assert readme_scores('| seed | loss nats | bpb gain |\n|---|---|---|\n| 7 | 1.9000 | 0.0120 |\n') == {}


@pytest.mark.parametrize('encoding', ENCODINGS)
def test_a_claim_in_any_encoding(encoding, tmp_path):
    text = json.dumps({'val_bpb': 1.1, 'name': 'caf\u00e9'}, ensure_ascii=False)
    (tmp_path/'submission.json').write_bytes(text.encode(encoding))
    found, _ = read_claim(tmp_path)
    assert not found.problem and found.score() == ('val_bpb', 1.1) and found.fields['name'] == 'caf\u00e9'


# --- the public table --------------------------------------------------------------------------------------

def test_the_bench_audits_a_checkout_and_compares(folder, tmp_path):
    checkout, table = tmp_path/'contest', tmp_path/'table.json'
    (checkout/'records'/'track_10min_16mb').mkdir(parents=True)
    folder.rename(checkout/'records'/'track_10min_16mb'/'2026-01-01_A')
    def git(*words):
        command = ['git', '-c', 'user.name=a', '-c', 'user.email=a@b', *words]
        subprocess.run(command, cwd=checkout, check=True, capture_output=True)
    git('init', '-q', '-b', 'main'), git('add', '.'), git('commit', '-qm', 'one')
    table.write_text(json.dumps({'submissions': []}))
    def bench(*options):
        command = [sys.executable, ROOT/'bench'/'public.py', checkout, '--table', table, '--workers', '1']
        return subprocess.run([*command, *options], capture_output=True, text=True, cwd=tmp_path)
    first = bench('--write')
    assert first.returncode == 1 and '2026-01-01_A: new' in first.stdout, first.stderr
    one = json.loads(table.read_text())['submissions'][0]
    assert one['ruling'] == 'accepted' and 'budget training' not in one['rows']
    again = bench()
    assert again.returncode == 0 and again.stdout.rstrip().endswith('as in the committed table')
    log = checkout/'records'/'track_10min_16mb'/'2026-01-01_A'/'train_seed1.log'
    log.write_text(log.read_text().replace('588000ms', '688000ms'))
    changed = bench()
    assert changed.returncode == 1 and 'now fail' in changed.stdout


def test_the_committed_table_holds_facts_only():
    table = json.loads((ROOT/'results'/'audit'/'public.json').read_text())['submissions']
    assert len(table) > 90 and sum(confusion(table)['accepted'].values()) == 45
    for one in table:
        assert one.keys() == {'name', 'ruling', 'where', 'note', 'verdict', 'script', 'rows', 'why'}
        assert one['verdict'] in ('pass', 'undecided', 'fail') and len(one['why']) <= 600
        if pull_number(one['name']): assert one['ruling'] != 'accepted'
    evidence = ('budget', 'evidence', 'bytes of the text', 'C4 coverage')
    def fails(one):
        return any(one['rows'][check] == 'fail' for check in one['rows'] if check.startswith(evidence))
    assert sum(one['ruling'] == 'accepted' and fails(one) for one in table) == 4 and CAP == 16_000_000
