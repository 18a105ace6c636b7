"""A cohort of one's own with whatever its folder holds, real patients as two of them, and the rehearsal at a small size."""
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from gemmgan_nb.data import USUAL, Cohort, own_cohort, own_layout, unit_inside
from gemmgan_nb.encoders import (FeatureFile, Rehearsal, encode_images, encode_texts, import_features, import_tokens, load_image_encoder, load_text_encoder, read_summaries,
                                 rehearse, tiny_modernbert, tiny_vit, write_features)
from gemmgan_nb.slides import tiny_slide
from gemmgan_nb.summaries import write_summaries
from gemmgan_nb.tiling import read_slides, tile_cohort
from gemmgan_nb.workspace import Problems, read_json, rng

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent/'shared'/'data'
AUTO = dict.fromkeys(USUAL, 'auto')
real = pytest.mark.skipif(not (REAL/'paired_image_expression_clinical.csv').exists(), reason='real patients are not here (../shared/data/paired_image_expression_clinical.csv)')


@pytest.fixture(scope='module')
def image(tmp_path_factory): return load_image_encoder('uni', checkpoint=tiny_vit(tmp_path_factory.mktemp('vit')))


@pytest.fixture(scope='module')
def bert(tmp_path_factory): return load_text_encoder('clinical_modernbert', checkpoint=tiny_modernbert(tmp_path_factory.mktemp('bert')))


def expression(n=9, genes=6): return pd.DataFrame(rng(0, 'own').uniform(1, 9, (n, genes)).round(3), index=[f'P{i}' for i in range(n)], columns=[f'GENE{j}' for j in range(genes)])


def write(path, text): path.parent.mkdir(parents=True, exist_ok=True); path.write_text(text); return path


def made(folder, out, **told):
    "The cohort of a folder, as profile `own` would ask for it."
    said, has = own_layout(folder, AUTO | dict(unit='log2(tpm+1)') | told)
    facts = own_cohort(folder, out, **said)
    cohort = Cohort.load(out)
    assert cohort.modalities == has
    return cohort, facts


# ---- what a folder may hold
@pytest.fixture(scope='module')
def with_slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp('slides')
    expression().to_csv(folder/'expression.csv')
    pd.DataFrame(dict(case_id=expression().index, age=50, disease_type=['Gliomas', 'Nevi and Melanomas', 'Gliomas']*3, primary_site='Brain')).to_csv(folder/'clinical.csv', index=False)
    for i in range(6): tiny_slide(folder/'scans'/f's{i}.tiff', (1024, 512), seed=i)
    Image.open(folder/'scans'/'s0.tiff').convert('RGB').save(folder/'scans'/'region.png')     # no header that knows its mpp
    where = [('P0', 's0.tiff', ''), ('P0', 'region.png', .5), *[(f'P{i}', f's{i}.tiff', '') for i in range(1, 6)], ('P6', 'lost.tiff', ''), ('P77', 's1b.tiff', '')]
    pd.DataFrame([dict(case_id=c, path=f'scans/{p}', mpp=m, mpp_source='10/20x' if m else '') for c, p, m in where]).to_csv(folder/'slides.csv', index=False)
    return folder


def test_expression_and_slides(with_slides, tmp_path, image, bert):
    cohort, facts = made(with_slides, tmp_path/'c')
    assert cohort.modalities == {'image', 'text', 'labels'} and (facts['slides'], facts['cases_without_slide'], facts['problems']) == (8, 2, 1)
    assert 'line 10: no expression of this case' in (tmp_path/'c'/'problems.csv').read_text()
    tiles = tile_cohort(read_slides(tmp_path/'c'/'slides.csv'), tmp_path/'tiles', tile_px=128, mpp=.5).set_index('slide')
    assert tiles.status.drop('lost').eq('ok').all() and tiles.status['lost'] == 'failed' and (tiles.mpp_source['region'], tiles.mpp['region']) == ('given', .5)
    assert pd.read_csv(tmp_path/'c'/'slides.csv').set_index('slide').mpp_source['region'] == '10/20x'
    problems = Problems()
    write_summaries(tmp_path/'texts.jsonl', dict(zip(cohort.obs.index, cohort.cases, strict=True)), None, problems)
    encode_images(tmp_path/'c', tmp_path/'tiles', tmp_path/'c'/'slides.csv', tmp_path/'features', image, problems); encode_texts(tmp_path/'c', tmp_path/'texts.jsonl', bert, problems)
    cohort = Cohort.load(tmp_path/'c')
    counts = pd.Series(cohort.patches.counts.numpy(), cohort.obs.index)
    assert counts['P0'] == tiles.n_tiles['s0'] + tiles.n_tiles['region'] and counts['P3'] == tiles.n_tiles['s3'] and (counts[['P6', 'P7', 'P8']] == 0).all()
    assert cohort.tokens.counts.min() > 3 and cohort.patches.dim == 16


def theirs(folder, name, n, dim=8, key='features', **more):
    folder.mkdir(exist_ok=True)
    with h5py.File(folder/f'{name}.h5', 'w') as f: f.create_dataset(key, data=rng(0, name).normal(size=(1, n, dim) if key == 'features' else (n, dim)).astype(np.float32), **more)


def test_expression_and_features(tmp_path):
    ad.AnnData(expression(), uns=dict(unit='zscore')).write_h5ad(tmp_path/'expression.h5ad')
    for i in range(6): theirs(tmp_path/'features', f'P{i}', 4 + i, key='features' if i else 'feats')
    write(tmp_path/'features'/'P6.h5', 'an error page'); theirs(tmp_path/'features', 'P7', 3, key='embedding')
    cohort, facts = made(tmp_path, tmp_path/'c', unit='')
    assert cohort.unit == 'zscore' == unit_inside(tmp_path/'expression.h5ad') and cohort.modalities == {'image'}
    problems = Problems()
    assert import_features(tmp_path/'c', tmp_path/'c'/'slides.csv', tmp_path/'features', problems) == dict(slides=6, tiles=39, features_from='features')
    assert Cohort.load(tmp_path/'c').patches.counts.tolist() == [4, 5, 6, 7, 8, 9, 0, 0, 0]
    first = dict(reversed(problems.rows))      # of each, why; then that its bag is empty
    assert 'signature' in first['P6'] and first['P8'] == 'has no image features; its bag is empty.' and first['P7'] == 'no features in features: P7.h5 has no dataset features of rows and columns; it holds embedding.'
    mean = FeatureFile(tmp_path/'features'/'P0.h5')[:].astype(np.float16).astype(np.float32).mean(0)
    np.testing.assert_allclose(Cohort.load(tmp_path/'c').patches.mean()[0].numpy(), mean, atol=1e-5)


def test_features_of_several_slides_by_a_list(tmp_path):
    expression().to_parquet(tmp_path/'expression.parquet')
    for s in 'abc': theirs(tmp_path/'features', s, 5)
    write(tmp_path/'slides.csv', 'case_id,slide\nP0,a\nP0,b\nP4,c\n')
    made(tmp_path, tmp_path/'c')
    import_features(tmp_path/'c', tmp_path/'c'/'slides.csv', tmp_path/'features', Problems())
    assert Cohort.load(tmp_path/'c').patches.counts.tolist() == [10, 0, 0, 0, 5, 0, 0, 0, 0]
    write(tmp_path/'slides.csv', 'case_id,slide\nP0,a\nP4,c\n'); made(tmp_path, tmp_path/'c')
    assert not (tmp_path/'c'/'bags.json').exists()      # that of the first list does not live on


@pytest.mark.parametrize('kind', ['csv', 'jsonl'])
def test_expression_and_ready_texts(tmp_path, bert, kind):
    expression().to_csv(tmp_path/'expression.csv')
    rows = [dict(case_id=f'P{i}', text=f'a woman, "aged" {50 + i}\nwith carcinoma of the breast') for i in range(8)]
    if kind == 'csv': pd.DataFrame(rows).to_csv(tmp_path/'texts.csv', index=False)
    else: write(tmp_path/'texts.jsonl', ''.join(json.dumps(r) + '\n' for r in rows))
    cohort, facts = made(tmp_path, tmp_path/'c')
    assert cohort.modalities == {'text'} and (facts['texts'], facts['cases_without_text']) == (8, 1)
    assert read_summaries(tmp_path/'c'/'texts.jsonl') == {r['case_id']: r['text'] for r in rows}
    encode_texts(tmp_path/'c', tmp_path/'c'/'texts.jsonl', bert, problems := Problems())
    assert Cohort.load(tmp_path/'c').tokens.counts.tolist()[-2:] == [bert.count([rows[7]['text']])[0], 0] and [n for n, _ in problems.rows] == ['P8']


def test_tokens_that_somebody_else_made(tmp_path):
    expression().to_csv(tmp_path/'expression.csv')
    for i in range(4): write_features(tmp_path/'tokens'/f'P{i}.h5', rng(i).normal(size=(3 + i, 6)), None, {}, encoder='theirs')
    made(tmp_path, tmp_path/'c')
    assert import_tokens(tmp_path/'c', tmp_path/'tokens', Problems())['tokens_from'] == 'theirs'
    cohort = Cohort.load(tmp_path/'c')
    assert cohort.modalities == {'text'} and cohort.tokens.counts.tolist() == [3, 4, 5, 6, 0, 0, 0, 0, 0] and cohort.tokens.facts['encoder'] == 'theirs'
    write_features(tmp_path/'tokens'/'P3.h5', np.zeros((2, 5)), None, {})
    with pytest.raises(ValueError, match='Tokens of 5 and 6 numbers'): import_tokens(tmp_path/'c', tmp_path/'tokens', Problems())


def test_clinical_columns_that_are_labels_only(tmp_path):
    expression().to_csv(tmp_path/'expression.csv')
    pd.DataFrame(dict(case_id=expression().index, disease_type='A', primary_site='B')).to_csv(tmp_path/'clinical.csv', index=False)
    assert made(tmp_path, tmp_path/'c', text=False)[0].modalities == {'labels'} and made(tmp_path, tmp_path/'d')[0].modalities == {'labels', 'text'}


BAD = [('expression.csv', 'case,A,B\nP0,1,2\nP1,3,n.d.\n', r"expression.csv: column 'B' does not hold numbers, row 'P1': 'n.d.' is not a number"),
       ('expression.csv', 'case,A,B\nP0,1,2\n,3,4\n', 'expression.csv: row 2 after the header has no name'),
       ('expression.csv', 'case,A,B\nP0,1,2\nP1,3,-1.5\n', r"expression.csv, row 'P1', column 'B': -1.5 cannot be log2\(tpm\+1\).*zscore"),
       ('expression.csv', 'case,A,B\nP0,1,2\nP1,3,5000\n', r"row 'P1', column 'B': 5000 cannot be log2\(tpm\+1\).*tpm or fpkm"),
       ('clinical.csv', 'patient,age\nP0,3\n', "clinical.csv has no column 'case_id'"),
       ('slides.csv', 'case_id,file\nP0,a.svs\n', 'slides.csv has no column path; it has case_id, file'),
       ('slides.csv', 'case_id,path\nP0,a.svs\nP1,\n', "slides.csv, line 3: column 'path' is empty"),
       ('slides.csv', 'case_id,path,mpp\nP0,a.svs,0.5\nP1,b.svs,"0,25"\n', "slides.csv, line 3: column 'mpp' says '0,25'"),
       ('slides.csv', 'case_id,path\nP0,a.svs\nP0,a.svs\n', 'slides.csv, line 3: P0, a stands in line 2 too'),
       ('slides.csv', 'case_id,path\nP0,a.svs\nP1,a.svs\n', 'line 3: slide a is of P1 here and of P0 in line 2'),
       ('slides.csv', 'case_id,path\nTCGA-1,a.svs\n', "line 2: column 'case_id' says 'TCGA-1', and so on: none of 1 is a case"),
       ('texts.csv', 'case_id,words\nP0,a\n', 'texts.csv has no column text'),
       ('texts.csv', 'case_id,text\nP0,a\nP1," "\n', "texts.csv, line 3: column 'text' is empty"),
       ('texts.csv', 'case_id,text\nP0,a\nP1,b\nP0,c\n', 'texts.csv, line 4: P0 stands in line 2 too'),
       ('texts.jsonl', '{"case_id": "P0", "text": "a"}\n{"case_id"', 'texts.jsonl, line 2, is not JSON'),
       ('split.csv', 'case_id,split\nP0,train\n', 'split.csv has no side for 8 cases, P1 among them'),
       ('features/readme.txt', 'none', 'features holds no .h5 file')]


@pytest.mark.parametrize('name, text, says', BAD)
def test_bad_input_is_named_by_file_line_and_column(tmp_path, name, text, says):
    expression().to_csv(tmp_path/'expression.csv'); write(tmp_path/name, text)
    with pytest.raises((ValueError, FileNotFoundError), match=says): made(tmp_path, tmp_path/'c')
    assert not (tmp_path/'c'/'cohort.h5ad').exists()


def test_a_layout_without_its_needs(tmp_path):
    for told, says in ((dict(), 'holds no table of expression'), (dict(expression='mine.csv'), 'holds no file mine.csv')):
        with pytest.raises(FileNotFoundError, match=says): own_layout(tmp_path, AUTO | told)
    with pytest.raises(FileNotFoundError, match='no folder'): own_layout(tmp_path/'nowhere', AUTO)
    ad.AnnData(expression(), uns=dict(unit='zscore')).write_h5ad(tmp_path/'expression.h5ad')
    with pytest.raises(ValueError, match=r'says in uns\[.unit.\] that it holds zscore; the profile says tpm'): made(tmp_path, tmp_path/'c', unit='tpm')


# ---- real patients: one folder a unit, never both in one
PLACES = dict(age_diagnosed='demographic.age_at_index', gender='demographic.gender', race='demographic.race', ajcc_stage='diagnoses.tumor_stage',
              histological_grade='diagnoses.tumor_grade', disease='disease_type', organ='primary_site')
UNITS = dict(porpoise_z='zscore', survpath_log2tpm='log2(tpm+0.001)')


def one_table(name, code, patients):
    "The rows of some patients in one published table, first of each, genes only."
    if name == 'survpath_log2tpm': return pd.read_csv(REAL/f'tcga_expression_xena/xena_{code}_log2tpm.csv.gz', index_col=0).loc[lambda t: t.index.str[:12].isin(patients)].rename(lambda c: c[:12])
    path = REAL/f'pathgen_porpoise/tcga_{code}_mutsig_all_clean.csv.zip'
    inside = next(n for n in zipfile.ZipFile(path).namelist() if not n.startswith('__'))
    with zipfile.ZipFile(path) as z, z.open(inside) as f: head = f.readline().decode().strip().replace('"', '').split(',')
    genes = [c for c in head if c.endswith('_rnaseq')]
    table = pd.read_csv(path, usecols=['case_id', *genes], dtype=dict.fromkeys(genes, np.float32)).set_index('case_id')[genes]
    return table[table.index.isin(patients)].rename(columns=lambda c: c.removesuffix('_rnaseq'))


def own_folder(which, out, patients=None, soft=False):
    """The patients of one unit as a folder of one's own: expression.csv, clinical.csv, and slides.csv with a region a slide.

    mpp is 10/magnification where the list of regions says a magnification, else empty; `soft` takes the arcsinh of z-scores, whose tails are heavy."""
    out = Path(out)
    pairs = pd.read_csv(REAL/'paired_image_expression_clinical.csv')
    where = pairs.set_index('patient_id').expression.str.extract(f'{which}:(\\w+)')[0].dropna()
    where = where[[p for p in where.index if patients is None or p in patients]]
    tables = [one_table(which, code, set(part.index)) for code, part in where.groupby(where)]
    table = pd.concat(tables, join='inner'); table = table[~table.index.duplicated()]
    out.mkdir(parents=True, exist_ok=True); (np.arcsinh(table) if soft else table).to_csv(out/'expression.csv')
    told = pd.read_csv(REAL/'tcga_clinical/cognoma/complete_samples.tsv.gz', sep='\t', dtype=str).drop_duplicates('patient_id').set_index('patient_id').loc[table.index]
    told['organ'] = told.acronym.map(dict(GBM='brain', LGG='brain', LUSC='lung', LUAD='lung', BRCA='breast', COAD='colon', KIRC='kidney', KIRP='kidney', BLCA='bladder', STAD='stomach', PAAD='pancreas'))
    told[list(PLACES)].rename_axis('case_id').to_csv(out/'clinical.csv')
    regions = pd.read_csv(REAL/'tcga_he_tiles/index.csv').query('patient_id in @table.index')
    pd.DataFrame(dict(case_id=regions.patient_id, slide=[Path(f).stem for f in regions.file], path=[str(REAL/'tcga_he_tiles'/f) for f in regions.file], mpp=10/regions.magnification,
                      mpp_source=[f'10/magnification of {s}' if m > 0 else '' for s, m in zip(regions.source, regions.magnification, strict=True)])).to_csv(out/'slides.csv', index=False)
    return out


def through(which, folder, image, bert, patients=None):
    "Chapters 03, 08, 09, 10; the cohort, the tiles a slide, the problems."
    problems, out = Problems(), folder/'cohort'
    cohort, facts = made(own_folder(which, folder/'mine', patients), out, unit=UNITS[which], columns=PLACES)
    tiles = tile_cohort(read_slides(out/'slides.csv'), folder/'tiles', workers=1)
    write_summaries(folder/'texts.jsonl', dict(zip(cohort.obs.index, cohort.cases, strict=True)), None, problems)
    encode_images(out, folder/'tiles', out/'slides.csv', folder/'features', image, problems, workers=1); encode_texts(out, folder/'texts.jsonl', bert, problems)
    return Cohort.load(out), facts, tiles.set_index('slide'), problems


@real
def test_real_patients_in_gene_units(tmp_path, image, bert):
    cohort, facts, tiles, problems = through('survpath_log2tpm', tmp_path, image, bert, ['TCGA-AD-6964', 'TCGA-DK-A2I6', 'TCGA-KB-A93J', 'TCGA-AY-A8YK'])
    assert cohort.unit == 'log2(tpm+1)' and cohort.X.min() >= 0 and cohort.modalities == {'image', 'text', 'labels'} and len(cohort) == 4
    three = pd.Series(cohort.patches.counts.numpy(), cohort.obs.index)['TCGA-AD-6964']     # of three small tiles of one slide
    assert three == tiles.n_tiles[[s for s in tiles.index if s.startswith('Tile')]].sum() and facts['slides'] == 6
    assert cohort.patches.counts.min() > 0 and cohort.tokens.counts.min() > 5 and 'TCGA' not in ''.join(read_summaries(tmp_path/'texts.jsonl').values())


@real
def test_real_patients_as_z_scores_never_become_gene_units(tmp_path, image, bert):
    who = ['TCGA-DK-A2I6', 'TCGA-S4-A8RO', 'TCGA-06-0174', 'TCGA-B0-5698']
    cohort, facts, tiles, _ = through('porpoise_z', tmp_path, image, bert, who)
    assert cohort.unit == 'zscore' and set(cohort.obs.index) == set(who) and (cohort.X < 0).mean() > .3
    assert tiles.status.eq('ok').all() and cohort.patches.counts.min() > 0
    for unit in ('log2(tpm+1)', 'log2(tpm+0.001)', 'tpm', 'log1p(cp10k)'):
        with pytest.raises(ValueError, match='cannot be .*zscore for z-scores'): made(tmp_path/'mine', tmp_path/'wrong', unit=unit, columns=PLACES)
    assert not (tmp_path/'wrong'/'cohort.h5ad').exists()


@real
@pytest.mark.slow
@pytest.mark.parametrize('which, n', [('survpath_log2tpm', 8), ('porpoise_z', 37)])
def test_all_real_patients(which, n, tmp_path):
    "With the networks that come with the installation."
    start = time.time()
    cohort, facts, tiles, problems = through(which, tmp_path, load_image_encoder('efficientnet_lite0'), load_text_encoder('minilm'))
    print(f'\n{which}: {len(cohort)} patients, {cohort.X.shape[1]} genes, {facts["slides"]} regions, {tiles.n_tiles.sum()} tiles, {int(cohort.tokens.counts.sum())} tokens, '
          f'{time.time() - start:.0f} s; problems: {problems.rows}')
    assert len(cohort) == n and cohort.unit == dict(porpoise_z='zscore', survpath_log2tpm='log2(tpm+1)')[which]
    assert tiles.status.eq('ok').all() and cohort.patches.counts.min() > 0 and cohort.tokens.counts.min() > 5 and not len(problems)


# ---- the DAG
SMALL = dict(cases=40, genes=60, types=3, patches=[3, 9], patch_dim=8, tokens=4, token_dim=6)


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp('project')
    for name in ('nbs', 'gemmgan_nb', 'workflow', 'data_manifest'): shutil.copytree(ROOT/name, folder/name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    def command(word, profile, **settings):
        words = [w for k, v in settings.items() for w in ('--set', f'{k.replace("__", ".")}={v}')]
        ran = subprocess.run([sys.executable, '-m', 'gemmgan_nb.reproduce', word, '--profile', profile, *words], cwd=folder, env=os.environ | dict(PYTHONPATH=str(folder)), capture_output=True, text=True, timeout=600)
        return ran.returncode, ran.stdout + ran.stderr
    return folder, command


def rules(out): return set(re.findall(r'^\s*(\w+)\s+1$', out, re.M)) - {'all', 'total'}


@pytest.mark.slow
def test_plan_of_slides_and_clinical_table(project, with_slides):
    code, out = project[1]('plan', 'own', cohort__folder=with_slides)
    assert code == 2 and 'Nobody says in which unit' in out and 'Traceback' not in out
    code, out = project[1]('plan', 'own', cohort__folder=with_slides, cohort__unit='tpm')
    assert code == 0 and {'own', 'tile', 'summarise', 'encode', 'fit_gemmgan', 'tables'} <= rules(out) and 'Left out' not in out, out[-2000:]


def test_plan_of_features_alone_leaves_out_what_needs_more(project, tmp_path):
    expression().to_csv(tmp_path/'expression.csv'); theirs(tmp_path/'features', 'P1', 4)
    code, out = project[1]('plan', 'own', cohort__folder=tmp_path, cohort__unit='tpm')
    assert code == 0 and {'own', 'encode', 'fit_mean_image', 'fit_gemmgan'} <= rules(out) and not rules(out) & {'tile', 'summarise', 'fit_text_cls', 'fit_film', 'fit_cond_wgan', 'fit_cvae'}, out[-2000:]
    assert 'since the cohort has image only: class_mean, cond_wgan, cvae, text_cls' in out


def test_a_rehearsal_is_resumed_and_the_same(tmp_path):
    first = rehearse(tmp_path, **SMALL)
    before = {p: p.read_bytes() for p in [tmp_path/'features'/'R00001.h5', tmp_path/'tokens'/'R00002.h5']}
    X = ad.read_h5ad(tmp_path/'expression.h5ad').X
    for p in before: p.unlink()
    write(tmp_path/'features'/'R00003.h5', 'half')
    assert (first['files_written'], rehearse(tmp_path, **SMALL)['files_written']) == (80, 3)
    for p, content in before.items(): np.testing.assert_array_equal(FeatureFile(p)[:], h5py.File(io.BytesIO(content))['features'][:])
    np.testing.assert_array_equal(ad.read_h5ad(tmp_path/'expression.h5ad').X, X)
    assert (X > 0).mean(0).min() > .1 and len(set(pd.read_csv(tmp_path/'clinical.csv').disease_type)) == 3


def test_a_rehearsal_asks_for_room_first(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(10**12, 0, 3*10**9))
    with pytest.raises(OSError, match=r'1944 cases still needs 9.1 GB .4.5 as files.* has 3.0 GB'): rehearse(tmp_path/'r')
    assert not (tmp_path/'r').exists() and Rehearsal().bytes[1] == 1944*300*768*2


@pytest.mark.slow
def test_the_rehearsal_runs_from_nothing_to_the_tables(project):
    folder, command = project
    small = {f'cohort__{k}': json.dumps(v) for k, v in SMALL.items()}
    code, out = command('reproduce', 'rehearsal', **small, models='[noise, gemmgan]', training__dim=16, training__latent=8, training__hidden=8, training__batch=8, training__patches=4)
    assert code == 0, out[-3000:]
    cohort = Cohort.load(folder/'runs'/'rehearsal'/'cohort')
    assert cohort.X.shape == (40, 60) and cohort.patches.dim == 8 and cohort.tokens.dim == 6 and cohort.patches.facts['encoder'] == 'rehearsal' and cohort.obs.disease_type.nunique() == 3
    for table in ('table1.csv', 'table2.csv'): assert len(pd.read_csv(folder/'runs'/'rehearsal'/'tables'/table)) > 3
    assert read_json(folder/'runs'/'rehearsal'/'features'/'provenance.json')['tokens'] == 160 and not (folder/'figures').exists()
