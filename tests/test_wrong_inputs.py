"What people typed wrongly ends in one line, not in a traceback, and with an exit status."
import pytest
from reading import one_now
from wrong_inputs import lines, tried, world

SOME = ('train --model.heads 3 --steps 2', 'train --optim.lr 0.1', 'evaluate W/run',
        'train --data.source W/twice --steps 2')


@pytest.fixture(scope='module')
def wrong(tmp_path_factory): return world(tmp_path_factory.mktemp('wrong'))


@pytest.mark.parametrize('line', one_now(lines(), *SOME))
def test_a_wrong_input_is_answered_in_one_line(line, wrong):
    code, _, said = tried(line, *wrong)
    assert code not in (0, None) and len(said) == 1, said
    assert 'Traceback' not in said[0] and len(said[0]) < 700
