"""The profile `tcga` from the archive's first answer to the tables: a small GDC on this machine, and tiny random networks in the formats of UNI, Clinical ModernBERT and Bio-Medical-Llama."""
import json

import pandas as pd
import pytest

from gemmgan_nb.data import Cohort
from gemmgan_nb.encoders import tiny_modernbert, tiny_vit
from gemmgan_nb.gdc import tiny_archive
from gemmgan_nb.summaries import tiny_llama
from test_pipeline import Project

pytestmark = pytest.mark.slow

SMALL = ('models=[noise,film,gemmgan,ridge,real]', 'seeds=[0]', 'training={steps: 4, batch: 8, patches: 8, dim: 16, score_every: 2, checkpoint_seconds: 30}',
         'evaluation={generations: [2, 1], samples: 4, shuffles: 1}')


@pytest.fixture(scope='module')
def tcga(tmp_path_factory):
    "A finished run of 20 patients; the archive cuts a connection, is busy once and out of order once."
    p, nets = Project(tmp_path_factory.mktemp('tcga'), 'tcga'), tmp_path_factory.mktemp('networks')
    local = [f'encoders.image_checkpoint={tiny_vit(nets/"uni")}', f'encoders.text_checkpoint={tiny_modernbert(nets/"bert")}', f'summaries.checkpoint={tiny_llama(nets/"llama")}']
    with tiny_archive(tmp_path_factory.mktemp('archive'), cases=20) as gdc:
        p.settings = [w for s in (f'cohort.endpoint={gdc.url}', *local, *SMALL) for w in ('--set', s)]
        first, second = list(gdc.contents)[:2]
        gdc.faults[first], gdc.faults[second], gdc.faults['files'] = ['cut'], ['429'], ['500']
        p.first, p.asked = p('reproduce', *p.settings), len(gdc.log)
        p.again, p.asked_again = p('reproduce', *p.settings), len(gdc.log)
    return p


def test_one_command_goes_from_the_archive_to_the_tables(tcga):
    code, out = tcga.first
    assert code == 3 and '20 items were left out' in out, out[-3000:]      # a random network writes no summary: each patient gets the template's, and is named
    problems = pd.concat([pd.read_csv(f) for f in tcga.run.rglob('problems.csv')])
    assert problems.problem.str.contains("has the template's text, because the model's was refused").all() and len(problems) == 20
    table = pd.read_csv(tcga.run/'tables'/'table1.csv')
    assert 'GeMM-GAN' in table.to_string() and (tcga.run/'report'/'index.html').exists()
    assert len(list((tcga.run/'source').rglob('*.part'))) == 0


def test_training_gets_the_same_directories_as_the_demos(tcga):
    cohort = Cohort.load(tcga.run/'cohort')
    assert len(cohort) == 20 and cohort.unit == 'log2(tpm+1)' and set(cohort.modalities) >= {'image', 'text', 'labels'}
    assert cohort.patches.facts['encoder'] == 'uni' and cohort.tokens.facts['encoder'] == 'clinical_modernbert'
    assert (cohort.patches.counts > 0).all() and set(cohort.obs.split) == {'train', 'val', 'cal', 'test'}
    told = [json.loads(line) for line in (tcga.run/'summaries'/'summaries.jsonl').read_text().splitlines()]
    assert len(told) == 20 and all(t['text'].strip() for t in told)


def test_what_is_there_is_not_asked_for_again(tcga):
    code, out = tcga.again
    assert code == 3 and 'Nothing to be done' in out and tcga.asked_again == tcga.asked
