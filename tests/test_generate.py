"""Generation: what it writes, what it refuses in one sentence, a checkpoint that would harm, attention and counterfactuals."""
import json
import pickle
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from gemmgan_nb.condition import pack_card, reliability
from gemmgan_nb.data import Cohort
from gemmgan_nb.experiment import ENTRIES, construct, untrained_twin
from gemmgan_nb import encoders, reproduce
from gemmgan_nb import generate as module
from gemmgan_nb.generate import (GLANCE, GenerateError, Looker, Request, attention, bank_reference, config_of, counterfactual, distances_of, encoder_for, find_checkpoint, first_numbers, generate, how_far,
                                 keep_reference, keep_references, learned, moved_by, plot_attention, plot_counterfactual, read_checkpoint, requests_of, tensors_of, tiny_ears, tiny_eyes, writable, write)
from gemmgan_nb.simulation import write_slide
from gemmgan_nb.slides import Slide, tiny_slide
from gemmgan_nb.workspace import read_json, rng, write_json

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent/'shared'/'data'/'slides'
real = pytest.mark.skipif(not REAL.is_dir(), reason='real slides are not here (../shared/data/slides)')
TEXT = 'a woman with carcinoma of the breast'
pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')


@pytest.fixture(scope='module')
def run(tiny_place, tmp_path_factory): return Path(shutil.copytree(tiny_place, tmp_path_factory.mktemp('runs')/'tiny'))


@pytest.fixture(scope='module')
def place(run): return run/'fit'/'any_modality'/'any_modality'/'seed0'


@pytest.fixture(scope='module')
def ck(place): return read_checkpoint(place)


@pytest.fixture(scope='module')
def how(run, ck): return dict(checkpoint=ck, image_encoder=tiny_eyes(), text_encoder=tiny_ears(run/'words'))


@pytest.fixture(scope='module')
def look(ck, how): return Looker(ck, how['image_encoder'], how['text_encoder'])


@pytest.fixture(scope='module')
def simulated(tmp_path_factory, run):
    "The same run, of a cohort that calls itself simulated."
    copy = tmp_path_factory.mktemp('sim')/'demo'; shutil.copytree(run, copy)
    config = copy/'fit'/'any_modality'/'any_modality'/'seed0'/'config.json'
    edited(config, lambda c: c['about'].update(simulated=True))
    return copy


def edited(path, change):
    config = read_json(path); change(config); write_json(path, config)


def knows_its_tiles(config): config['about']['features']['image'] |= dict(tile_mpp=.5, tile_px=128, min_tissue=.2)      # as the encode stage says


def altered(place, tmp_path, change=None, tensors=None):
    "A copy of the checkpoint whose config, or tensors, were changed."
    copy = tmp_path/'copy'; shutil.copytree(place, copy, dirs_exist_ok=True)
    if change: edited(copy/'config.json', change)
    if tensors:
        t = load_file(copy/'model.safetensors'); tensors(t); save_file(t, copy/'model.safetensors')
    return copy


# what is written

def test_the_file_says_what_it_is(run, how, tmp_path):
    data = generate(slide=run/'source'/'s0.tiff', text=TEXT, n=32, seed=3, **how)
    back = ad.read_h5ad(write(tmp_path/'deep'/'x.h5ad', data))
    assert back.shape == (1, 16) and back.uns['unit'] == 'log2(tpm+1)' and back.uns['seed'] == 3 and back.uns['n'] == 32
    assert back.uns['checkpoint']['sha256'] == how['checkpoint'].hash and set(back.uns['versions']) >= {'gemmgan_nb', 'torch'}
    assert set(back.layers) == {'q05', 'q50', 'q95', 'z_mean', 'z_q05', 'z_q50', 'z_q95'}
    assert back.uns['quantiles'].startswith('raw')
    assert list(back.var.columns) == ['symbol', 'reliability'] and back.var_names[0].startswith('ENSG')
    row = back.obs.iloc[0]
    assert (row.image, row.mpp, row.tile_mpp, row.far) == ('s0.tiff', .5, .5, 'near') and row.tiles == 22 and len(row.text_sha256) == 64
    assert TEXT not in str(back.uns) + back.obs.to_json() and str(run) not in str(back.uns) + back.obs.to_json()


def test_units_agree(run, how):
    data, scaler = generate(slide=run/'source'/'s0.tiff', text=TEXT, samples=True, n=20, **how), how['checkpoint'].model.scaler
    z, x = (np.stack([data.layers[f'{p}sample{i}'][0] for i in range(20)]) for p in ('z_', ''))
    np.testing.assert_allclose(scaler.inverse(z).clip(0), x, rtol=1e-4)
    np.testing.assert_allclose(x.mean(0), data.X[0], rtol=1e-4)
    np.testing.assert_allclose(z.mean(0), data.layers['z_mean'][0], atol=1e-5)


def test_a_cohort_of_z_scores_gets_no_other_unit(run, how, place, tmp_path):
    plain = read_checkpoint(altered(place, tmp_path, lambda c: c['about'].update(unit='zscore')))
    data = generate(text=TEXT, **how | dict(checkpoint=plain))
    assert data.uns['unit'] == 'zscore' and set(data.layers) == {'z_q05', 'z_q50', 'z_q95'}


def test_same_answer_alone_and_in_company(run, how):
    slides = [run/'source'/f's{i}.tiff' for i in (0, 1)]
    both, alone = generate(slide=slides, text=TEXT, **how), generate(slide=slides[1], text=TEXT, **how)
    np.testing.assert_array_equal(both.X[1], alone.X[0])
    assert (generate(slide=slides[1], text=TEXT, seed=1, **how).X != alone.X).any()


def test_each_way_of_asking(run, how, tmp_path):
    folder = run/'features'/'tiny'
    image, text = generate(slide=run/'source'/'s0.tiff', **how), generate(text=TEXT, **how)
    assert text.obs.tiles.iloc[0] == 0 and text.obs.far.iloc[0] == '' and image.obs.text_sha256.iloc[0] == ''
    files = generate(features=folder, **how); np.testing.assert_array_equal(files.X[0], image.X[0])
    assert list(files.obs_names) == [f's{i}' for i in range(6)]
    (tmp_path/'t.csv').write_text(f'slide,text,mpp,region\n{run}/source/s0.tiff,a woman,,\n{run}/source/s0.tiff,,,"0,0,384,640"\n{run}/none.tiff,a,,\n,a man,,\n')
    table = generate(slide=tmp_path/'t.csv', **how)
    assert list(table.obs_names) == ['s0', 's0 (2)', 'row 4'] and table.obs.region.iloc[1] == '0,0,384,640' and 0 < table.obs.tiles.iloc[1] < 22
    assert len(table.uns['problems']) == 1 and 'none.tiff' in table.uns['problems'][0]
    assert len(generate(slide=tmp_path/'t.csv', **how | dict(checkpoint=how['checkpoint'].folder))) == 3      # by its folder too, one bad row is left out
    half = generate(slide=run/'source'/'s0.tiff', most_tiles=5, **how); assert (half.obs.tiles.iloc[0], half.obs.tiles_on_slide.iloc[0]) == (5, 22)


def test_the_card_stands_beside_its_genes(ck, how, place, tmp_path):
    copy, r = altered(place, tmp_path), rng(0, 'card'); truth = torch.from_numpy(r.normal(size=(80, 16)))
    card = reliability(truth, truth, genes=ck.about['genes']); write_json(copy/'reliability.json', pack_card(card))
    data = generate(text=TEXT, **how | dict(checkpoint=read_checkpoint(copy)))
    assert set(data.var.reliability) == {'usable'} and not any('reliability card' in w for w in data.uns['warnings'])
    write_json(copy/'reliability.json', pack_card(card) | dict(types=dict(all='uu')))
    with pytest.raises(GenerateError, match='speaks of 2 genes'): generate(text=TEXT, **how | dict(checkpoint=read_checkpoint(copy)))


# how far from home

def test_far_slides_are_called_far(run, how, tmp_path):
    snow = rng(0, 'snow').integers(0, 200, (640, 640, 3)).astype(np.uint8); snow[:, 320:] = 245; write_slide(tmp_path/'snow.tiff', snow, .5)
    with pytest.warns(UserWarning, match='far from the training slides'): data = generate(slide=tmp_path/'snow.tiff', text=TEXT, **how)
    assert data.obs.far.iloc[0] == 'far' and data.obs.distance.iloc[0] > 10 and any('Do not trust' in w for w in data.uns['warnings'])


def test_the_reference_travels(ck, run, place, tmp_path):
    rows = read_checkpoint(altered(place, tmp_path))
    assert rows.run == rows.folder and rows.reference['source'] == 'scales of the checkpoint'
    plain = read_checkpoint(altered(place, tmp_path, lambda c: c['budget'].update(standardise=False))); assert plain.reference is None
    shutil.copy(keep_reference(ck), rows.folder/'reference.safetensors'); (place/'reference.safetensors').unlink()
    again = read_checkpoint(rows.folder)
    np.testing.assert_array_equal(again.reference['percentiles'], ck.reference['percentiles'])
    train = Cohort.load(run/'cohort').split('train'); np.testing.assert_allclose(bank_reference(train.patches)['mean'], ck.reference['mean'])
    assert how_far(None, ck.reference)['far'] == ''


def test_a_run_leaves_the_reference_beside_its_checkpoints(run, how, tmp_path):
    other = Path(shutil.copytree(run, tmp_path/'run')); kept, = keep_references(other)
    alone = Path(shutil.copytree(kept.parent, tmp_path/'alone')); edited(alone/'config.json', knows_its_tiles)
    data = generate(slide=run/'source'/'s0.tiff', text=TEXT, **how | dict(checkpoint=alone))
    inside = generate(slide=run/'source'/'s0.tiff', text=TEXT, **how)
    assert data.uns['reference'] == 'kept with the checkpoint' and data.obs.beyond.iloc[0] == inside.obs.beyond.iloc[0] and data.obs.distance.iloc[0] == pytest.approx(inside.obs.distance.iloc[0])
    edited(alone/'config.json', lambda c: c.pop('weights')); weights = load_file(alone/'model.safetensors'); weights['scaler.mean'] += 1; save_file(weights, alone/'model.safetensors')
    assert read_checkpoint(alone).reference['source'] == 'scales of the checkpoint'      # fitted again: what was usual then counts no more
    assert keep_references(tmp_path) == []


@real
def test_taken_out_of_its_run_it_still_says_far(run, how, tmp_path):
    alone = Path(shutil.copytree(run/'fit'/'any_modality'/'any_modality'/'seed0', tmp_path/'alone'))
    shutil.copy(keep_references(Path(shutil.copytree(run, tmp_path/'run')))[0], alone); edited(alone/'config.json', knows_its_tiles)
    data = generate(slide=REAL/'cmu-1-small-region.svs', **how | dict(checkpoint=alone))
    assert data.obs.far.iloc[0] == 'far' and data.obs.beyond.iloc[0] > .5 and any('Do not trust' in w for w in data.uns['warnings'])


# a simulated checkpoint knows it

def test_simulated_checkpoints_refuse_real_slides(simulated, how, run, tmp_path):
    ask, s0 = how | dict(checkpoint=simulated), run/'source'/'s0.tiff'
    with pytest.raises(GenerateError, match='means nothing'): generate(slide=s0, text=TEXT, **ask)
    with pytest.raises(GenerateError, match='means nothing'): generate(features=run/'features'/'tiny', **ask)
    assert generate(slide=s0, text=TEXT, i_know_it_is_simulated=True, **ask).uns['checkpoint']['simulated']
    with Slide(s0) as s: write_slide(tmp_path/'ours.tiff', s.read(0, 0, 640, 640), .5)
    data = generate(slide=tmp_path/'ours.tiff', text=TEXT, **ask)
    assert data.obs.simulated.iloc[0] and any('simulated patients' in w for w in data.uns['warnings'])


def test_the_default_checkpoint(simulated, run, how, tmp_path):
    ask = {k: v for k, v in how.items() if k != 'checkpoint'} | dict(runs=tmp_path)
    with pytest.raises(GenerateError, match='--profile her2st'): generate(slide=run/'source'/'s0.tiff', **ask)
    with pytest.raises(GenerateError, match='--profile demo'): generate(text=TEXT, **ask)
    (tmp_path/'demo').symlink_to(simulated); (tmp_path/'her2st-section').symlink_to(run)
    assert not generate(slide=run/'source'/'s0.tiff', **ask).uns['checkpoint']['simulated']
    with Slide(run/'source'/'s0.tiff') as s: write_slide(tmp_path/'ours.tiff', s.read(0, 0, 640, 640), .5)
    assert generate(slide=tmp_path/'ours.tiff', **ask).uns['checkpoint']['simulated']
    assert find_checkpoint(run).name == 'seed0'


# checkpoints that would harm

class Trap:
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)


def test_a_pickle_is_not_opened(place, tmp_path):
    copy = altered(place, tmp_path)
    for write_bad in (lambda p: p.write_bytes(pickle.dumps(Trap(tmp_path/'ran'))), lambda p: torch.save(Trap(tmp_path/'ran'), p), lambda p: p.write_bytes(pickle.dumps(Trap(tmp_path/'ran'), protocol=0))):
        write_bad(copy/'model.safetensors')
        with pytest.raises(GenerateError, match='pickle|no safetensors'): read_checkpoint(copy)
    assert not (tmp_path/'ran').exists()


@pytest.mark.parametrize('change,why', [
    (lambda c: c.update(kind='os.system'), 'does not have'), (lambda c: c.update(kind='../../evil'), 'does not have'), (lambda c: c.update(kind=['WGAN']), 'does not have'),
    (lambda c: c.update(spec=[]), "no part 'spec'"), (lambda c: c['spec'].update(uses='image'), 'expected tuple'), (lambda c: c['budget'].update(dim='64'), 'expected int'),
    (lambda c: c['budget'].update(optimizer='sgd'), 'no optimizer'), (lambda c: c['budget'].update(shell='rm'), 'does not know'), (lambda c: c['budget'].update(dim=10**9), 'widest tensor'),
    (lambda c: c['budget'].update(layers=10**9), 'layers'), (lambda c: c['budget'].update(heads=7), 'do not fit'), (lambda c: c['budget'].update(hidden=65), 'do not fit'),
    (lambda c: c['sizes'].update(genes=10**12), 'widest tensor'), (lambda c: c['sizes'].update(evil=1), 'do not fit'), (lambda c: c.update(switches=dict(ff=10**10)), 'widest tensor'),
    (lambda c: c['sizes'].update(patch_dim=8), 'patch_dim is 8'), (lambda c: c['about'].update(genes=c['about']['genes'][:9], symbols=c['about']['symbols'][:9]), 'do not fit|does not fit'),
    (lambda c: c['about'].update(genes=5), 'no lists'), (lambda c: c['about'].pop('simulated'), 'whether its patients were simulated'), (lambda c: c['about'].update(unit=None), 'no unit'), (lambda c: c['about'].update(features=[1]), 'features'),
    (lambda c: c['about']['features']['text'].update(max_tokens='many'), 'max_tokens'), (lambda c: c.update(sizes=3), 'sizes')])
def test_a_tampered_config_is_one_sentence(place, tmp_path, change, why):
    with pytest.raises(GenerateError, match=why) as e: read_checkpoint(altered(place, tmp_path, change))
    assert '\n' not in str(e.value) and len(str(e.value)) < 600


def test_tampered_tensors(place, tmp_path):
    def nan(t): t[next(k for k in t if t[k].is_floating_point())].view(-1)[0] = float('nan')
    with pytest.raises(GenerateError, match='not finite'): read_checkpoint(altered(place, tmp_path, tensors=nan))
    shutil.rmtree(tmp_path/'copy')
    with pytest.raises(GenerateError, match='do not fit'): read_checkpoint(altered(place, tmp_path, tensors=lambda t: t.update(extra=torch.zeros(2))))
    shutil.rmtree(tmp_path/'copy')
    with pytest.raises(GenerateError, match='scaler.mean'): read_checkpoint(altered(place, tmp_path, tensors=lambda t: t.pop('scaler.mean')))
    shutil.rmtree(tmp_path/'copy')
    def turned(t): t[next(k for k in t if k.startswith('g.') or 'head' in k)].mul_(-1)
    with pytest.raises(GenerateError, match='not the file that config.json was written for'): read_checkpoint(altered(place, tmp_path, tensors=turned))
    (tmp_path/'copy'/'model.safetensors').write_bytes((place/'model.safetensors').read_bytes()[:5000])
    with pytest.raises(GenerateError, match='damaged'): read_checkpoint(tmp_path/'copy')


def test_near_or_far_is_always_said(run, how):
    data = generate(features=run/'features'/'tiny'/'s0.h5', text=TEXT, n=2, **how)
    assert len(distances_of(data)) == 1 and 'near the training slides' in distances_of(data)[0]
    assert distances_of(generate(text=TEXT, n=2, **how)) == []


def test_the_row_that_answers_is_taken(run, place, tmp_path):
    "Of a run with one row for both and one for any, a text alone goes to the second."
    other = tmp_path/'run'; shutil.copytree(run, other)
    both = other/'fit'/'gemmgan'/'gemmgan'/'seed0'; shutil.copytree(place, both)
    edited(both/'config.json', lambda c: c['budget'].update(modality_dropout=0.))
    assert [find_checkpoint(other, has=has).parts[-2] for has in (['text'], ['image'], ['image', 'text'])] == ['any_modality', 'any_modality', 'gemmgan']


def test_a_run_in_folds_has_checkpoints_too(place, tmp_path):
    for fold in ('fold0', 'fold1'): shutil.copytree(place, tmp_path/'run'/'fit'/'gemmgan'/'gemmgan'/'seed0'/fold)
    assert find_checkpoint(tmp_path/'run').name == 'fold0' and read_checkpoint(find_checkpoint(tmp_path/'run')).reads


def test_an_odd_reference_is_one_sentence(run, how, place, tmp_path):
    for held in (dict(middle=torch.zeros(16)), dict(mean=torch.zeros(3), std=torch.ones(3))):
        copy = altered(place, tmp_path/str(len(held))); save_file(held, copy/'reference.safetensors')
        with pytest.raises(GenerateError, match='no reference of this checkpoint'): read_checkpoint(copy).reference


def test_no_repository_is_fetched_because_a_checkpoint_says_so(ck, place, tmp_path, monkeypatch):
    for name in ('evil--network', '../../evil', '/etc', ''):
        other = read_checkpoint(altered(place, tmp_path, lambda c: c['about']['features']['image'].update(encoder=name)))     # noqa: B023
        with pytest.raises(GenerateError, match='no encoder of the registry'): encoder_for(other, 'image')


def test_places_that_are_no_checkpoint(place, tmp_path):
    for folder, why in ((tmp_path/'none', 'no checkpoint'), (place/'config.json', 'is a file'), (tmp_path, 'no checkpoint')):
        with pytest.raises(GenerateError, match=why): find_checkpoint(folder)
    with pytest.raises(GenerateError, match='no checkpoint folder'): read_checkpoint(tmp_path/'none')
    (tmp_path/'config.json').write_text('{"a":' + '['*50_000)
    with pytest.raises(GenerateError, match='not readable as JSON'): config_of(tmp_path)
    with pytest.raises(GenerateError, match='is a folder'): tensors_of(tmp_path)


def test_a_row_that_reads_nothing(run, tmp_path):
    model = construct(ENTRIES['noise'], {}); train, val = (Cohort.load(run/'cohort').split(s) for s in ('train', 'val'))
    model.fit(train, val, 0); model.save(tmp_path/'noise')
    with pytest.raises(GenerateError, match='neither image nor text'): generate(tmp_path/'noise', text=TEXT)


def test_ridge_needs_both_and_answers(run, how, tmp_path):
    model = construct(ENTRIES['ridge'], {}); train, val = (Cohort.load(run/'cohort').split(s) for s in ('train', 'val'))
    model.fit(train, val, 0); model.save(run/'fit'/'untrained'/'ridge'/'seed0')
    ask = how | dict(checkpoint=run/'fit'/'untrained'/'ridge'/'seed0')
    with pytest.raises(GenerateError, match='has no text'): generate(slide=run/'source'/'s0.tiff', **ask)
    assert np.isfinite(generate(slide=run/'source'/'s0.tiff', text=TEXT, **ask).X).all()


# forty kinds of bad input, one sentence each

def glass(p): write_slide(p, np.full((600, 600, 3), 245, np.uint8), .5)
def picture(p): Image.fromarray(np.full((600, 600, 3), 200, np.uint8)).save(p)
def broken(p): p.write_bytes(b'II*\0' + b'\1'*500)
def empty(p): p.write_bytes(b'')
def words(p): p.write_text('not a slide')


BAD_SLIDES = [('missing.svs', None, 'is not in|not there'), ('dir.svs', Path.mkdir, 'folder'), ('glass.tiff', glass, 'holds no tissue'), ('picture.png', picture, 'no mpp'), ('broken.svs', broken, 'cut short'),
              ('empty.svs', empty, 'empty'), ('words.svs', words, 'no slide'), ('coarse.tiff', lambda p: tiny_slide(p, (512, 512), mpp=2.), 'cannot be invented'),
              ('mute.tiff', lambda p: tiny_slide(p, (512, 512), mpp=None), 'no mpp')]


@pytest.mark.parametrize('name,make,why', BAD_SLIDES, ids=[b[0] for b in BAD_SLIDES])
def test_bad_slides(how, tmp_path, name, make, why):
    if make: make(tmp_path/name)
    with pytest.raises(GenerateError, match=why) as e: generate(slide=tmp_path/name, text=TEXT, **how)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('kw,why', [
    (dict(), 'Nothing is asked'), (dict(text=''), 'is empty'), (dict(text=' \n'), 'is empty'), (dict(text='word '*2001), '2,001 words'), (dict(text='word '*5000), '5,000 words'), (dict(text=float('nan')), 'no text'),
    (dict(text=7), 'no text'), (dict(text=TEXT, n=0), 'whole number'), (dict(text=TEXT, n=10**6), 'whole number'), (dict(text=TEXT, n=2.5), 'whole number'), (dict(slide='S', mpp=float('nan')), 'mpp'), (dict(slide='S', mpp=-1), 'mpp'),
    (dict(slide='S', mpp='half'), 'mpp'), (dict(slide='S', mpp=.25), 'you say 0.25'), (dict(slide='S', region='1,2,3'), 'not four'), (dict(slide='S', region=(0, 0, float('nan'), 1)), 'no area'), (dict(slide='S', region=(0, 0, -5, 9)), 'no area'),
    (dict(slide='S', region=(9000, 0, 9, 9)), 'outside'), (dict(slide='S', region=(0, 0, 5, 5)), 'no tile'), (dict(slide=['S', 'S'], text=['a']), 'one each'), (dict(slide='S', features='F'), 'Give one'), (dict(text='a \udcff'), 'not Unicode'), (dict(text=TEXT, seed=-1), 'The seed -1'), (dict(text=TEXT, seed=.5), 'The seed 0.5'), (dict(features='F', region=(0, 0, 9, 9)), 'region')])
def test_bad_words_and_numbers(run, how, kw, why):
    named = dict(S=run/'source'/'s0.tiff', F=run/'features'/'tiny'/'s0.h5')
    put = lambda v: [put(x) for x in v] if isinstance(v, list) else named.get(v, v) if isinstance(v, str) else v
    with pytest.raises(GenerateError, match=why): generate(**{k: put(v) for k, v in kw.items()}, **how)


@pytest.mark.parametrize('content,why', [(b'', 'not readable as csv'), (b'\xff\xfe\x00bad', 'not readable|columns'), (b'name\nx\n', 'columns'), (b'slide,text,mpp\n', '0 rows'), (b'slide,text,mpp\na.svs,' + b'w '*2500 + b',\n', 'row 1 has 2,500 words'),
                                         (b'slide,mpp\na.svs,fast\n', 'in row 1'), (b'slide,text,mpp\nnone.svs,a,\nnone2.svs,b,\n', 'None of 2')])
def test_bad_tables(how, tmp_path, content, why):
    (tmp_path/'t.csv').write_bytes(content)
    with pytest.raises(GenerateError, match=why): generate(slide=tmp_path/'t.csv', **how)


def test_bad_features(run, how, tmp_path):
    good = run/'features'/'tiny'/'s0.h5'
    def changed(**kw):
        shutil.copy(good, p := tmp_path/'x.h5')
        with h5py.File(p, 'a') as f:
            rows = kw.pop('rows', None)
            if rows is not None: about = dict(f['features'].attrs); del f['features']; f.create_dataset('features', data=rows.astype(np.float16)); f['features'].attrs.update(about)
            f['features'].attrs.update({k: v for k, v in kw.items() if v is not None})
            for k in [k for k, v in kw.items() if v is None]: del f['features'].attrs[k]
        return p
    cases = [(dict(encoder_id='uni-123'), 'features of uni-123; the checkpoint expects tiny-'), (dict(rows=np.ones((3, 7))), '7 numbers a tile'), (dict(rows=np.full((3, 16), np.nan)), 'not finite'), (dict(rows=np.ones((0, 16))), 'no tile'), (dict(tile_mpp=2.), '2 µm per pixel')]
    for kw, why in cases:
        with pytest.raises(GenerateError, match=why): generate(features=changed(**kw), **how)
    silent = generate(features=changed(encoder=None, encoder_id=None), **how); assert any('your word' in w for w in silent.uns['warnings'])
    (tmp_path/'y.h5').write_text('no'); (tmp_path/'none').mkdir()
    for bad, why in ((tmp_path/'y.h5', 'no feature file'), (tmp_path/'z.h5', 'not there'), (tmp_path/'none', 'holds no feature file')):
        with pytest.raises(GenerateError, match=why): generate(features=bad, **how)


def test_another_encoder_is_refused(run, how):
    with pytest.raises(GenerateError, match='its numbers mean|Its numbers mean'): generate(slide=run/'source'/'s0.tiff', **how | dict(image_encoder=tiny_eyes(seed=1)))


def test_unwritable_places(how, tmp_path):
    data = generate(text=TEXT, **how)
    (tmp_path/'file').write_text(''); (tmp_path/'d.h5ad').mkdir()
    for place, why in ((tmp_path/'x.csv', 'does not end'), (tmp_path/'d.h5ad', 'is a folder'), (tmp_path/'file'/'x.h5ad', 'cannot be written'), (Path('/proc/x.h5ad'), 'cannot be written')):
        with pytest.raises(GenerateError, match=why): write(place, data)
        assert place.parent == Path('/proc') or pytest.raises(GenerateError, writable, place)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['d.h5ad', 'file']


# where it looked, and what a word does

def test_attention_sums_to_one_and_was_learned(run, look):
    seen = look(Request('s0', run/'source'/'s0.tiff', text=TEXT)); a = attention(look, seen)
    assert a.patches.weight.sum() + a.itself == pytest.approx(1, abs=1e-5) and a.words.sum() == pytest.approx(1, abs=1e-5)
    assert list(a.words.index) == ['[CLS]', *TEXT.split(), '[SEP]'] and len(a.patches) == 22
    alike = learned(look, seen); assert alike['patches'] < .9
    blank = attention(look, seen, untrained_twin(look.ck.model)); assert not np.allclose(a.patches.weight, blank.patches.weight)
    alone = attention(look, look(Request('s0', run/'source'/'s0.tiff'))); assert alone.words is None and alone.patches.weight.sum() + alone.itself == pytest.approx(1, abs=1e-5)
    plot_attention(run/'source'/'s0.tiff', [a, blank], ['a', 'b'])
    with pytest.raises(GenerateError, match='no image'): attention(look, look(Request('t', text=TEXT)))


@pytest.mark.parametrize('name,ok', [('patch_transformer', True), ('mean_image', False)])
def test_attention_without_cross_attention(run, how, tmp_path, name, ok):
    e = ENTRIES[name]; cohort = Cohort.load(run/'cohort')
    model = construct(e, dict(steps=2, batch=12, patches=4, dim=16, hidden=16, latent=4, score_every=2, n_critic=1)); model.fit(cohort.split('train'), cohort.split('val'), 0)
    model.save(place := run/'fit'/name/name/'seed0')
    look = Looker(read_checkpoint(place), how['image_encoder']); seen = look(Request('s0', run/'source'/'s0.tiff'))
    with pytest.raises(GenerateError, match='would be ignored'): look(Request('s0', run/'source'/'s0.tiff', text=TEXT))
    if not ok:
        with pytest.raises(GenerateError, match='mean of all patches'): attention(look, seen)
        return
    a = attention(look, seen); assert a.words is None and a.patches.weight.sum() + a.itself == pytest.approx(1, abs=1e-5)
    turned = attention(look, replace(seen, patches=seen.patches[::-1].copy(), coords=seen.coords[::-1]))
    np.testing.assert_allclose(turned.patches.weight[::-1], a.patches.weight, atol=1e-6)      # a map follows its patches


def test_the_counterfactual_knows_the_law(run, look):
    seen = look(Request('s0', run/'source'/'s0.tiff', text=TEXT)); frame = counterfactual(look, seen, 'a man with carcinoma of the breast', n=64).set_index('symbol')
    assert frame.loc[['XIST', 'TSIX'], 'change'].max() < 0 < frame.loc[['RPS4Y1', 'UTY'], 'change'].min() and set(frame.index[:2]) <= {'XIST', 'TSIX', 'RPS4Y1', 'UTY'}
    assert counterfactual(look, seen, TEXT).change.abs().max() == 0
    plot_counterfactual(frame.reset_index())
    with pytest.raises(GenerateError, match='is empty'): counterfactual(look, seen, ' ')


def test_another_text_leaves_its_layers(run, how, look):
    data = generate(slide=run/'source'/'s0.tiff', text=TEXT, instead='a man with carcinoma of the breast', n=64, **how)
    frame = counterfactual(look, look(Request('s0', run/'source'/'s0.tiff', text=TEXT)), 'a man with carcinoma of the breast', n=64).loc[data.var_names]
    np.testing.assert_allclose(data.layers['z_change'][0], frame.change, atol=1e-6); np.testing.assert_allclose(data.layers['instead_mean'][0], frame.after, rtol=1e-5)
    moved = moved_by(data); assert list(moved.symbol[:4]) == [s for s in frame.sort_values('change', key=np.abs, ascending=False).symbol[:4]] and (moved.change.abs() > 3*moved.error).all()
    assert not {'instead_mean', 'z_change'} & set(generate(text=TEXT, n=4, **how).layers)
    assert moved_by(generate(text=TEXT, instead=TEXT, n=8, **how)).empty


def test_a_model_without_attention_says_so_before_the_work(run, how, tmp_path):
    e = ENTRIES['mean_image']; cohort = Cohort.load(run/'cohort')
    model = construct(e, dict(steps=2, batch=12, patches=4, dim=16, hidden=16, latent=4, score_every=2, n_critic=1)); model.fit(cohort.split('train'), cohort.split('val'), 0); model.save(tmp_path/'mean')
    def never(*_): raise AssertionError('work began')
    with pytest.raises(GenerateError, match='mean of all patches'): generate(slide=run/'source'/'s0.tiff', **how | dict(checkpoint=tmp_path/'mean'), attention_to=tmp_path/'a.png', follow=never)
    assert not (tmp_path/'a.png').exists()


# what is said while one waits

def test_a_first_number_comes_early_and_changes_nothing(run, how):
    said, ask = [], dict(slide=run/'source'/'s0.tiff', text=TEXT) | how
    data = generate(follow=lambda ck, seen, total: said.append((len(seen.patches), total, first_numbers(ck, seen), first_numbers(ck, seen, genes=16, n=64))), **ask)
    np.testing.assert_array_equal(data.X, generate(**ask).X)
    assert [x[:2] for x in said] == [(GLANCE, 22), (22, 22)] and len(said[0][2]) == 5
    final, (early, late) = pd.Series(data.X[0], data.var.symbol), [x[3] for x in said]
    np.testing.assert_allclose(late, final[late.index], rtol=1e-5)      # of the result's kind: with all tiles and as many draws it is the result
    text_genes = data.var.symbol[:8]; assert (early - final)[text_genes].abs().max() < .6 < final[text_genes].std()      # and what the text says is there with the first


@pytest.fixture
def command(run, how, monkeypatch):
    "`gemmgan generate` with the tiny encoders: exit code, stdout, stderr."
    monkeypatch.setitem(encoders.ENCODERS, 'tiny', encoders.ENCODERS['uni'])
    monkeypatch.setattr(module, 'load_image_encoder', lambda *_: how['image_encoder']); monkeypatch.setattr(module, 'load_text_encoder', lambda *_: how['text_encoder'])
    def go(*words):
        ran = CliRunner(env=dict(COLUMNS='2000')).invoke(reproduce.app, ['generate', '--checkpoint', str(run), *map(str, words)])
        assert ran.exception is None or isinstance(ran.exception, SystemExit), ran.exception
        return ran.exit_code, ran.stdout, ran.stderr
    return go


def test_the_command_says_how_far_it_is_and_keeps_stdout_for_results(command, run, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce.shown_encoding.__wrapped__, '__defaults__', (0.,))      # a line whenever there is something to say
    code, out, err = command('--slide', run/'source'/'s0.tiff', '--slide', run/'source'/'s1.tiff', '--text', TEXT, '--most-tiles', 12, '--out', tmp_path/'x.h5ad')
    lines = err.splitlines()
    assert code == 0 and lines[0].startswith(f's0, preliminary, from {GLANCE} of 12 tiles: ') and 'log2(tpm+1)' in lines[0] and err.count('preliminary') == 1
    assert f's0: {GLANCE} of 12 tiles' in lines and 's1: 12 of 12 tiles' in lines
    assert 'preliminary' not in out and 's0: 12 of its 22 tiles were encoded, drawn uniformly' in out and '2 patients' in out.splitlines()[-1]


def test_the_command_shows_what_moves_and_where_it_looked(command, run, tmp_path):
    code, out, err = command('--slide', run/'source'/'s0.tiff', '--text', TEXT, '--instead', 'a man with carcinoma of the breast', '--attention', tmp_path/'deep'/'a.png', '--out', tmp_path/'x.h5ad')
    assert code == 0 and 'XIST' in out and 'Rank correlation' in out and 'over words' in out
    with Image.open(tmp_path/'deep'/'a.png') as picture: assert picture.format == 'PNG' and min(picture.size) > 200
    assert {'instead_mean', 'z_change', 'z_change_error'} < set(ad.read_h5ad(tmp_path/'x.h5ad').layers)


# other programs

@pytest.mark.filterwarnings('error')
def test_the_file_is_what_scanpy_expects(run, how, tmp_path):
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); write(tmp_path/'x.h5ad', generate(features=run/'features'/'tiny', text=TEXT, **how))
    data = ad.read_h5ad(tmp_path/'x.h5ad')      # a warning, of names that occur twice for instance, is an error here
    assert data.var_names.is_unique and data.obs_names.is_unique and data.raw is None
    assert all(v.dtype == np.float32 and v.shape == data.shape and np.isfinite(v).all() for v in (data.X, *data.layers.values()))
    data.strings_to_categoricals(); data.var_names = data.var.symbol.astype(str); data.var_names_make_unique()
    data[:, ['XIST', 'UTY']].to_df(layer='q05'); ad.concat([data, data], index_unique='-').write_h5ad(tmp_path/'two.h5ad')


def test_scanpy_opens_it_and_works_on_it(run, how, tmp_path):
    import scanpy as sc
    data = sc.read_h5ad(write(tmp_path/'x.h5ad', generate(features=run/'features'/'tiny', text=TEXT, **how)))
    sc.pp.pca(data, n_comps=3); sc.pp.neighbors(data, n_neighbors=3, method='gauss'); data.obs['kind'] = pd.Categorical(['a', 'b']*3)
    sc.tl.rank_genes_groups(data, 'kind', method='t-test')
    assert data.obsm['X_pca'].shape == (6, 3) and len(sc.get.rank_genes_groups_df(data, 'a')) == 16
    assert sc.get.obs_df(data, ['XIST', 'far'], gene_symbols='symbol', layer='q95').shape == (6, 2)


# real tissue, where it is

@real
def test_real_slides_are_refused_or_called_far(simulated, how, tmp_path):
    cmu = REAL/'cmu-1-small-region.svs'
    with pytest.raises(GenerateError, match='means nothing'): generate(slide=cmu, **how | dict(checkpoint=simulated))
    assert generate(slide=cmu, **how).obs.far.iloc[0] == 'far'
    with pytest.raises(GenerateError, match='has no mpp'): generate(slide=REAL/'tcga-cr-7395-01a-01-ts1.svs', **how)
    for name in ('unreadable.svs', 'unopenable.tiff', 'broken.svs'):
        with pytest.raises(GenerateError) as e: generate(slide=REAL/name, **how)
        assert '\n' not in str(e.value)


def test_tables_are_read_as_they_stand(tmp_path):
    pd.DataFrame(dict(slide=['a.svs', '', 'b.svs'], text=['x', 'y', ''], mpp=['', '', '.25'])).to_csv(tmp_path/'t.csv', index=False)
    asked = requests_of(tmp_path/'t.csv'); assert [(a.name, a.text, a.mpp) for a in asked] == [('a', 'x', None), ('row 2', 'y', None), ('b', None, .25)]
    assert asked[0].slide == tmp_path/'a.svs' and json.dumps([a.name for a in asked])
    with warnings.catch_warnings(): warnings.simplefilter('error'); requests_of(text='a')
