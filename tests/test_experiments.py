"Every experiment of the book, run once more at toy size, and its page drawn from what that left."
import json
import shutil

import pytest
from reading import ROOT, cells, one_now, source

from golf_nb.authoring.book import run_notebook
from golf_nb.study.findings import NOT_RUN, Page, all_pages, arms_of, summary_rows
from golf_nb.study.grid import TOY, jobs_of, main, read_grid, read_record

FOLDER = ROOT/'nbs'/'experiments'
GRIDS = sorted(FOLDER.glob('e[0-9][0-9].json'))
each_grid = pytest.mark.parametrize('path', GRIDS, ids=lambda path: path.stem)


def page_of(path):
    "The notebook of a grid."
    page, = FOLDER.glob(f'{path.stem}_*.ipynb')
    return page


@pytest.fixture
def toy(tmp_path, monkeypatch):
    "A copy of the pages, where a toy run can leave its records."
    into = tmp_path/'nbs'/'experiments'
    into.mkdir(parents=True)
    for path in FOLDER.glob('*.json'): shutil.copy(path, into)
    for name in ('settings.ini', 'pyproject.toml'): shutil.copy(ROOT/name, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    return tmp_path


@pytest.mark.filterwarnings('ignore:.*torch.jit.script', 'ignore:Data has no positive values')
@pytest.mark.parametrize('path', one_now(GRIDS, FOLDER/'e01.json'), ids=lambda path: path.stem)
def test_experiment_runs_at_toy_size_and_its_page_shows_it(path, toy):
    assert main([str(path), '--toy', '--workers', '0']) == 0
    (toy/TOY[0]).rename(toy/'results')
    copy = toy/'nbs'/'experiments'/page_of(path).name
    shutil.copy(page_of(path), copy)
    run_notebook(copy, [])
    texts = [''.join(output.get('data', {}).get('text/markdown', '')) for cell in cells(copy)
             for output in cell['outputs']]
    assert any('Verdict' in text for text in texts)
    assert Page(path.stem, toy/'results', copy.parent).records


@each_grid
def test_page_says_what_it_must(path):
    "Question, prediction, method, limits, and the command; and no number of records that are not there."
    page, grid = page_of(path), read_grid(path)
    text = '\n'.join(''.join(cell['source']) for cell in cells(page, 'markdown'))
    for word in ('predicted, and why', '## Method', 'could not see', f'nbs/experiments/{path.name}'):
        assert word in text
    assert grid['question'] and grid['expect'] and len(grid['seeds']) >= 3
    assert f"Page('{path.stem}')" in '\n'.join(map(source, cells(page)))
    shown = json.dumps([cell['outputs'] for cell in cells(page)])
    if not (ROOT/'results'/path.stem).is_dir(): assert NOT_RUN in shown


@each_grid
def test_arms_of_an_experiment_exist(path):
    "Whatever a prediction compares is an arm; and no two arms are the same net."
    grid, jobs = read_grid(path), jobs_of(path)
    arms = {job.arm for job in jobs}
    assert len({job.net for job in jobs}) == len(jobs)
    for expect in grid['expect']:
        named = arms_of(expect)
        assert named and named <= arms, expect['say']


@each_grid
def test_records_are_of_the_nets_that_the_grid_names(path):
    "A preset or a field that changes must not orphan what was recorded."
    for job in jobs_of(path):
        record = read_record(ROOT/job.record)
        assert record is None or record['net'] == job.net, job.name


def test_the_summary_is_of_these_records():
    "The copy of the verdicts that lower chapters read; `python -m golf_nb.study.findings` writes it anew."
    rows = summary_rows(list(all_pages(FOLDER, ROOT/'results')))
    assert json.loads((ROOT/'results'/'summary.json').read_text()) == rows
