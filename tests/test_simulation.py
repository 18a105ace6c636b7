"""The simulated cohort: frozen, deterministic, its shares and its oracle as claimed, its files readable by the tools that read real ones."""
import csv
import gzip
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
import openslide
import pandas as pd
import psutil
import pytest

from gemmgan_nb.data import Cohort, prepare, read_cases
from gemmgan_nb.simulation import (FAMILIES, HIDDEN, MARKERS, SHARES, TISSUES, TYPES, clinical_record, draw_cases, draw_slide, drivers, gene_table, hidden_draws, layout,
                                   make_law, oracle, parallel, simulate, symbols, twin_shares)
from gemmgan_nb.workspace import rng, sha256

REAL = Path(__file__).resolve().parents[1]/'../shared/data'

# The data that models are compared on. It may change only on purpose, before any comparison that is kept: a simulation
# that is tuned after models were run on it proves nothing. Whoever changes it says so and why, and runs every row again.
FROZEN = '82e3e0c2c1ad26420990a67dc7126bdc350bfbad0ec33ee659758bd98f066886'


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "Six cases on disk, by two processes."
    folder = tmp_path_factory.mktemp('small')
    simulate(folder, cases=6, genes=300, workers=2)
    return folder


def counts(folder): return np.array([pd.read_csv(p, sep='\t', comment='#').unstranded[4:].to_numpy(int) for p in sorted(Path(folder).glob('expression/*.tsv'))])


def coarse(rgb):
    "Means of 64 x 64 px in steps of 8 grey levels: another processor's last digit does not show."
    n = len(rgb)//64
    return np.round(rgb.reshape(n, 64, n, 64, 3).mean((1, 3))/8).astype(np.uint8)


def test_frozen(small):
    cases = draw_cases(160)
    slides = [cases.iloc[0], cases[cases.power == 40].iloc[0], cases[(cases.pen == 1) & (cases.power == 20)].iloc[0]]
    digest = hashlib.sha256(counts(small).astype('<i8').tobytes())
    digest.update((small/'clinical.jsonl').read_bytes())
    digest.update(cases.round(6).to_csv().encode())
    for case in slides: digest.update(coarse(draw_slide(case)).tobytes())   # before JPEG, whose bytes differ between library versions
    assert digest.hexdigest() == FROZEN, 'The simulation has changed. See the comment at FROZEN before you change the constant.'


def test_same_seed_same_bytes(small, tmp_path):
    simulate(tmp_path, cases=6, genes=300, workers=1)
    files = [p.relative_to(small) for p in small.rglob('*') if p.suffix in ('.tiff', '.tsv', '.jsonl', '.csv')]
    assert len(files) == 6 + 6 + 2
    assert all(sha256(small/f) == sha256(tmp_path/f) for f in files)
    one, two = (ad.read_h5ad(f/'truth.h5ad') for f in (small, tmp_path))
    assert all((one.layers[k] == two.layers[k]).all() for k in ('mean', 'variance'))


def test_another_seed_is_another_cohort():
    assert not draw_cases(20, seed=1)[TISSUES].equals(draw_cases(20, seed=0)[TISSUES])
    a, b = (make_law(200, seed=s).loadings['image'] for s in (0, 1))
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < .35


def test_types():
    cases = draw_cases(160)
    sizes = cases.kind.value_counts()
    assert len(sizes) == 8 and sizes.min() >= 6 and sizes.max() > 2*sizes.min()
    by_disease, by_site = TYPES.groupby('disease_type').primary_site.nunique(), TYPES.groupby('primary_site').disease_type.nunique()
    assert by_disease.max() > 1 and by_site.max() > 1   # neither half of the label gives the other away
    assert .15 < (cases.power == 40).mean() < .35 and 0 < cases.pen.mean() < .3


def test_slides_open_as_real_ones_do(small):
    powers = set()
    for path in sorted(small.glob('slides/*.tiff')):
        slide = openslide.OpenSlide(path)
        mpp = float(slide.properties['openslide.mpp-x'])
        assert slide.properties['openslide.mpp-y'] == slide.properties['openslide.mpp-x'] and slide.properties['openslide.vendor'] == 'aperio'
        assert float(slide.properties['openslide.objective-power']) == 10/mpp and slide.dimensions[0]*mpp == 768
        assert slide.level_count == 3 and 'simulated by gemmgan_nb' in slide.properties['tiff.ImageDescription']
        powers.add(mpp)
    assert powers == {.25, .5}


def test_composition_is_drawn():
    for i, composition in enumerate(draw_cases(12, seed=4)[TISSUES].to_numpy()):
        tissues = layout(composition, .5, rng(i))
        areas = np.bincount(tissues[tissues < 5], minlength=5)/(tissues < 5).sum()
        assert abs(areas - composition).max() < .02


def test_colour_shows_the_tissue():
    "Haematoxylin-rich, pink and empty slides look so, whatever the stain."
    base = draw_cases(3).assign(power=20, pen=0, tissue=.5)
    base[TISSUES] = [[.1, .1, .8, 0, 0], [.1, .8, .1, 0, 0], [.1, .1, .1, 0, .7]]
    immune, stroma, fat = [draw_slide(c)[..., :3].astype(float) for _, c in base.iterrows()]
    dark, pale = lambda rgb: (rgb[..., 0] < 110).mean(), lambda rgb: (rgb.min(-1) > 225).mean()
    assert dark(immune) > 2*dark(stroma) and pale(fat) > pale(stroma) + .15
    assert (stroma[..., 0] - stroma[..., 1]).mean() > 1.3*(immune[..., 0] - immune[..., 1]).mean()


def test_records_speak_gdc():
    record = clinical_record(draw_cases(160).iloc[0])
    assert record['submitter_id'].startswith('SIMU-') and record['samples'][0]['portions'][0]['submitter_id'].startswith(record['samples'][0]['submitter_id'])
    assert 'percent' not in json.dumps(record)   # the text must not show the composition
    folder = REAL/'tcga_clinical'/'gdc_cases_json'
    if not folder.exists(): pytest.skip('real GDC records are not at ../shared/data/tcga_clinical')
    real = json.load(gzip.open(folder/'TCGA-LUSC.cases.json.gz'))['data']['hits']
    assert set(record['demographic']) <= set(real[0]['demographic'])
    assert set(record['diagnoses'][0]) - {'submitter_id'} <= set(real[0]['diagnoses'][0])
    values = {(k, d.get(k)) for c in real for d in c['diagnoses'] for k in ('primary_diagnosis', 'morphology', 'tissue_or_organ_of_origin')}
    lung = TYPES[TYPES.project == 'SIM-LUSC'].iloc[0]
    assert {('primary_diagnosis', lung.diagnosis), ('morphology', lung.morphology), ('tissue_or_organ_of_origin', lung.origin)} <= values


def test_symbols_are_real():
    if not (REAL/'tcga_clinical'/'cognoma').exists(): pytest.skip('real gene lists are not at ../shared/data')
    with gzip.open(REAL/'tcga_clinical'/'cognoma'/'expression-genes.tsv.gz', 'rt') as f: known = {r['symbol'] for r in csv.DictReader(f, delimiter='\t')}
    for path in [*REAL.glob('tcga_expression_xena/xena_*.gz'), *REAL.glob('her2st/*[0-9].tsv.gz')]:
        with gzip.open(path, 'rt') as f: known |= set(f.readline().strip().replace('\t', ',').split(','))
    coding = gene_table(2000).query('gene_type == "protein_coding"').gene_name
    assert len(coding) == 1950 and coding.is_unique
    assert coding.isin(known).mean() >= .95
    assert set(symbols('RPL:3,4-6 HLA-:A-C IL:17A-C XIST')) == {'RPL3', 'RPL4', 'RPL5', 'RPL6', 'HLA-A', 'HLA-B', 'HLA-C', 'IL17A', 'IL17B', 'IL17C', 'XIST'}


def test_ids_are_nobodys():
    table = gene_table(2000)
    assert table.index.str.len().unique().tolist() == [15] and table.index.str.startswith('ENSG9').all() and table.index.is_unique
    assert set(s for text in MARKERS.values() for s in text.split()) <= set(table.gene_name)
    assert len(symbols(FAMILIES)) >= 1900


def test_shares():
    measured = twin_shares(make_law(2000), n=1000).median()
    assert (abs(measured - pd.Series(SHARES)) < .025).all(), measured
    dialled = twin_shares(make_law(600, image_signal=.4, text_signal=0), n=1000, seed=5).median()
    wanted = pd.Series(dict(type=0, image=.10, text=0, hidden=.70, noise=.20))
    assert (abs(dialled - wanted) < .04).all(), dialled


def test_dials_keep_the_total():
    who, g = draw_cases(1500, seed=2), rng(0, 'total')
    spread = {}
    for image, text in [(1, 1), (0, 1), (1, 0), (0, 0)]:
        law = make_law(300, image_signal=image, text_signal=text)
        x = law.log_tpm(law.counts(law.level(drivers(who) | dict(hidden=g.normal(size=(1500, HIDDEN)))), g))
        spread[image, text] = x.std(0)[x.std(0) > .3]
    for s in spread.values(): assert abs(np.median(s/spread[1, 1]) - 1) < .06


@pytest.mark.parametrize('dial, silent', [('image_signal', ['image']), ('text_signal', ['type', 'text'])])
def test_zero_means_zero(dial, silent):
    "With a dial at zero, other compositions, or other types, sexes, ages and stages, give the same reads to the last one."
    law, a, b = make_law(300, **{dial: 0}), drivers(draw_cases(40, seed=1)), drivers(draw_cases(40, seed=2))
    reads = lambda x: law.counts(law.level(x), rng(0, 'same'))
    assert (reads(a) == reads(a | {k: b[k] for k in silent})).all()
    assert (reads(a) != reads(b)).any()


def test_the_oracle_is_the_oracle():
    law, who = make_law(300), draw_cases(150, seed=3)
    shown, hidden, g = law.level(drivers(who)), rng(0, 'h').normal(size=(150, HIDDEN)), rng(0, 'g')
    x = law.log_tpm(law.counts(shown + law.level(dict(hidden=hidden)), g))
    mean, variance = map(np.array, zip(*[oracle(law, s, hidden_draws(256, rng(1)), rng(2, i)) for i, s in enumerate(shown)], strict=True))
    live = x.std(0) > .3
    error = lambda guess: ((x - guess)**2)[:, live].mean()
    assert abs(error(mean)/variance[:, live].mean() - 1) < .05
    types = pd.DataFrame(x).groupby(who.kind.to_numpy()).transform('mean').to_numpy()
    linear = np.c_[np.ones(150), np.concatenate(list(drivers(who).values()), 1)]
    fitted = linear[75:] @ np.linalg.lstsq(linear[:75], x[:75], rcond=1e-6)[0]   # the right variables, learnt from 75 cases
    assert all(error(guess) > error(mean) for guess in (x.mean(0), types, np.roll(mean, 1, 0), .9*mean + .1*x.mean(0), 1.1*mean - .1*x.mean(0), mean + .1))
    assert ((x[75:] - fitted)**2)[:, live].mean() > ((x[75:] - mean[75:])**2)[:, live].mean()


def test_truth_belongs_to_the_files(small):
    truth, manifest = ad.read_h5ad(small/'truth.h5ad'), pd.read_csv(small/'manifest.csv')
    assert list(truth.obs_names) == list(manifest.case_id) == [c['submitter_id'] for c in read_cases(small/'clinical.jsonl')]
    assert all((small/p).exists() for p in [*manifest.slide, *manifest.expression])
    assert all(s.startswith(p) for s, p in zip(manifest.slide_id, manifest.portion, strict=True))
    assert {'mean', 'variance'} == set(truth.layers) and {*TISSUES, 'male', 'age', 'stage', 'kind'} <= set(truth.obs) and truth.uns['share_noise'] > 0
    assert (truth.obs.disease_type.astype(str) == [c['disease_type'] for c in read_cases(small/'clinical.jsonl')]).all()


def test_the_data_chapter_prepares_it(small, tmp_path):
    facts, truth = prepare(small, tmp_path), ad.read_h5ad(small/'truth.h5ad')
    cohort = Cohort.load(tmp_path)
    assert facts['problems'] == 0 and facts['genes_dropped'] >= 1 and len(cohort) == 6
    both = truth[cohort.obs.index, cohort.var.index]
    assert (both.var.gene_type == 'protein_coding').all() and abs(both.X - cohort.X).max() < .01


def test_no_orphans():
    "`kill -9` on the process that simulates takes its workers with it, in a pipeline or not."
    code = "import time; from gemmgan_nb.simulation import parallel; list(parallel(time.sleep, [60, 60], workers=2))"
    parent = psutil.Popen([sys.executable, '-c', code], env={k: v for k, v in os.environ.items() if k != 'GEMMGAN_RUN'})
    for _ in range(300):
        workers = parent.children()
        if len(workers) == 2: break
        time.sleep(.1)
    time.sleep(1); parent.kill(); parent.wait()
    assert len(workers) == 2 and not psutil.wait_procs(workers, timeout=10)[1]


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match='between 0 and 1'): simulate(tmp_path/'a', cases=1, image_signal=2)
    with pytest.raises(ValueError, match='there are symbols for'): simulate(tmp_path/'b', cases=1, genes=5000)
    with pytest.raises(ZeroDivisionError): list(parallel((1).__truediv__, [1, 0], workers=2))   # a failing worker is heard
    assert not (tmp_path/'a').exists()
