"The notation that is printed can be typed, for every preset."
import io
from contextlib import redirect_stderr
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from golf_nb.config import ConfigError, RunConfig, parse
from golf_nb.limits import check
from golf_nb.presets import PRESETS, get
from golf_nb.schedule import MOST_LAYERS, ScheduleError, Style, fold_order, restyled, unfold_order

orders = st.lists(st.integers(0, 12), min_size=1, max_size=40).map(tuple)
pieces = st.recursive(st.integers(0, 9).map(str), lambda inner: st.one_of(
    st.tuples(inner, st.integers(1, 4)).map(lambda pair: f'({pair[0]})x{pair[1]}'),
    st.lists(inner, min_size=1, max_size=3).map(lambda parts: f'({" ".join(parts)})')), max_leaves=8)


@given(orders)
def test_unfolding_is_the_inverse_of_folding(order):
    assert unfold_order(fold_order(order)) == order
    assert unfold_order(','.join(map(str, order))) == unfold_order(' '.join(map(str, order))) == order


@given(st.lists(pieces, min_size=1, max_size=4))
def test_brackets_mean_what_python_means(parts):
    "Against an interpreter of the same notation that Python has: lists, + and *."
    python = ' + '.join(parts).replace(')x', ')*').replace(' + ', '+')
    by_python = '+'.join(part.replace('(', '((').replace(')', '))') for part in python.split('+'))
    listed = ''
    for character in by_python.replace(' ', '+'):
        listed += f'[{character}]' if character.isdigit() and not listed.endswith('*') else character
    assert unfold_order(' '.join(parts)) == tuple(eval(listed))


@given(st.text('0123 ,x()-a', max_size=12))
def test_any_text_is_read_or_refused_in_one_line_that_points_at_a_character(text):
    try: order = unfold_order(text)
    except ScheduleError as error:
        place = int(str(error).split(': character ')[1].split(':')[0])
        assert '\n' not in str(error) and 1 <= place <= len(text) + 1
    else: assert unfold_order(fold_order(order)) == order


def test_nothing_explodes():
    for text in ('0x999999999', '((((0)x99)x99)x99)x99', '(' * 5000, ' '.join(['0']*5000)):
        with pytest.raises(ScheduleError): unfold_order(text)
    assert len(unfold_order(f'0x{MOST_LAYERS}')) == MOST_LAYERS


@pytest.mark.parametrize('name, scale', [(name, scale) for name, p in PRESETS.items() for scale in p.scales])
def test_a_preset_typed_as_it_is_printed_is_the_preset(name, scale):
    run = get(name, scale)
    schedule = run.model.schedule
    assert parse(['--model.schedule', fold_order(schedule.order)], run).run == run
    assert restyled(schedule, schedule.order, Style(film=schedule.rows('film') > 0)) == schedule


@pytest.mark.parametrize('name', PRESETS)
def test_every_preset_takes_another_order_and_style(name):
    base = replace(get(name), depth_at=())
    run = parse(['--model.schedule', '0 (1 2)x4 3'], base).run
    check(run)
    schedule = run.model.schedule
    assert schedule.order == (0, *4*(1, 2), 3)
    for flag in ('film', 'value_embed'):
        assert (schedule.rows(flag) > 0) == (base.model.schedule.rows(flag) > 0)
    words = '--schedule.per-visit --schedule.skips 0 --schedule.xsa none --schedule.value-embed none ' \
            '--schedule.parallel none --schedule.film False'
    plain = parse(['--model.schedule', '0 (1 2)x4 3', *words.split()], base).run.model.schedule
    assert [(v.block, v.cond, v.gain) for v in plain] == [(b, b, b) for b in schedule.order]
    assert not any(v.skip or v.xsa or v.parallel for v in plain)
    assert plain.rows('film') == plain.rows('value_embed') == 0


def test_styles_on_the_command_line():
    words = '--model.schedule 0,1,2,1,2,3 --schedule.per-visit cond gain --schedule.skips 4 ' \
            '--schedule.gated True --schedule.site after --schedule.xsa last2 --schedule.parallel 0,5'
    run = parse(words.split(), get('tiny')).run
    layers = run.model.schedule.layers
    assert [v.cond for v in layers] == [v.gain for v in layers] == [*range(6)]
    assert [v.skip and v.skip.source for v in layers] == [None, None, 1, 0, None, None]
    assert layers[2].skip.gated and layers[2].skip.site == 'after'
    assert [v.xsa for v in layers] == 4*[False] + 2*[True]
    assert [v.parallel for v in layers] == [1, 0, 0, 0, 0, 1]


@pytest.mark.parametrize('words, said', [
    ('--model.schedule 0y', "character 2: expected a block or a bracket"),
    ('--model.schedule 0,2', 'numbered 0..n-1 without gaps, got [0, 2]'),
    ('--schedule.xsa first2', 'all, none, last4'), ('--schedule.parallel 9', 'there is no virtual layer 9')])
def test_mistakes_are_one_line(words, said):
    heard = io.StringIO()
    with redirect_stderr(heard), pytest.raises((SystemExit, ConfigError)) as ended:
        parse(words.split(), get('tiny'))
    line = heard.getvalue() or f'{ended.value}\n'
    assert said in line and line.count('\n') == 1


def test_a_table_that_is_missing_is_named():
    run = parse(['--schedule.value-embed', 'last2'], get('tiny')).run
    with pytest.raises(ConfigError, match='--model.value-embed None: allowed is a table'): check(run)
    assert isinstance(run, RunConfig)
