"A model is restored in one way: what is scored, adapted, and audited is the same model."
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from golf_nb.audit.folders import RunPredictor
from golf_nb.config import to_dict
from golf_nb.evaluate import sliding
from golf_nb.presets import get
from golf_nb.runs import load_model, open_data
from golf_nb.step import Process, start, train_step
from golf_nb.trainer import write_result

@pytest.fixture(scope='module')
def universal(tmp_path_factory):
    "Three steps of `universal` at a quarter of its width, on the grid from the first one; no scoring."
    mini = get('universal', 'mini')
    share = 64/mini.model.dim
    config = replace(
        mini, steps=3, precision='fp32', compile=False,
        eval=replace(mini.eval, window=64, stride=32, batch=4),
        model=replace(mini.model, dim=64, hidden=round(mini.model.hidden*share)),
        quant=replace(mini.quant, qat_start=0., min_numel=round(mini.quant.min_numel*share**2)),
        optim=replace(mini.optim, ns_dtype='fp32'), data=replace(mini.data, seq_len=64, batch_tokens=256))
    folder = tmp_path_factory.mktemp('universal')
    run = start(config, open_data(config), Process())
    for _ in range(3): train_step(run)
    assert config.quant.qat_eval and run.model.fake_quant is not None
    Path(folder/'config.json').write_text(json.dumps(to_dict(config)))
    write_result(run, folder)
    return folder, run.dataset


def test_universal_is_audited_as_it_is_scored(universal):
    "The auditor's predictor gives the rows that `sliding` scores: stored weights are rounded once more."
    folder, dataset = universal
    model, config = load_model(folder, artifact=True)
    text = dataset.val_tokens()[:161].astype(np.int64)
    scored = sliding(model, text, 64, 32, bytes=dataset.byte_table, batch=4)
    predictor = RunPredictor(config)
    predictor.start(folder/'model.golf', config.model.vocab, len(text))
    rows = predictor.score(1, len(text), text)
    audited = -rows[np.arange(len(rows)), text[1:]].astype(float)
    assert model.fake_quant is not None and predictor.adapting.model.fake_quant is not None
    np.testing.assert_allclose(audited, scored.nll, rtol=0, atol=1e-5)
    model.fake_quant = None                         # without it, another model: the test can see it
    again = sliding(model, text, 64, 32, bytes=dataset.byte_table, batch=4)
    assert np.abs(again.nll - scored.nll).max() > 1e-4
