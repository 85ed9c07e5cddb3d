"Hundreds of changed artifacts; `python tests/fuzz_artifact.py --cases 100000` is the long run."
import json

import pytest
from fuzz_artifact import fuzz
from reading import ROOT, one_now

@pytest.fixture(scope='module', params=one_now([150, 10_000], 150))
def short(request): return fuzz(request.param)


def test_no_changed_file_does_harm(short):
    assert short['cases'] >= 150 and short['failures'] == []


def test_half_of_them_have_a_correct_checksum(short): assert short['resealed'] >= short['cases']/2


def test_memory_stays_below_four_times_that_of_the_valid_file(short): assert short['worst_memory'] < 4


def test_the_record_of_the_long_run():
    record = json.loads((ROOT/'results'/'fuzz'/'artifact.json').read_text())
    assert record['cases'] >= 100_000 and record['resealed'] >= record['cases']/2
    assert record['failures'] == [] and record['worst_memory'] < 4
