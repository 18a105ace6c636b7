"""Real spatial sections as a cohort, what must fail, and the download against a server of our own."""
import functools
import http.server
import shutil
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gemmgan_nb.data import Cohort, LeakError, read_tiles
from gemmgan_nb.her2st import build_her2st, download_her2st, log_cp10k, read_section, read_sections, tiny_sections
from gemmgan_nb.workspace import read_json, sha256

REAL = Path(__file__).parents[1]/'..'/'shared'/'data'/'her2st'
MANIFEST = Path(__file__).parents[1]/'data_manifest'/'her2st.toml'
real = pytest.mark.skipif(not REAL.is_dir(), reason='real sections are not here (../shared/data/her2st)')


@pytest.fixture(scope='module')
def sections(tmp_path_factory): return tiny_sections(tmp_path_factory.mktemp('sections'), ['X1', 'X2', 'Y1', 'Z1'])


@pytest.fixture(scope='module')
def section_preset(tmp_path_factory):
    out = tmp_path_factory.mktemp('section')
    return out, build_her2st(REAL, out, ['B4', 'C2'], ['C3'], ['C4'], within_patient=True).set_index('slide')


@real
def test_real_sections(section_preset):
    out, found = section_preset
    assert found.spots.to_dict() == dict(B4=284, C2=187, C3=182, C4=187)
    assert found.cases.to_dict() == dict(B4=276, C2=185, C3=179, C4=184)
    assert found.mpp.between(.686, .690).all()
    cohort = Cohort.load(out)
    assert cohort.X.shape == (824, 1000) and cohort.unit == 'log1p(cp10k)' and cohort.modalities == {'image'}
    assert bool(cohort.uns['within_patient']) and set(cohort.obs.group) == {'B', 'C'}
    assert set(cohort.obs.disease_type) == set(cohort.obs.primary_site) == {''}
    assert cohort.obs.split.value_counts().to_dict() == dict(train=461, val=179, test=184)


@real
def test_real_tiles_and_bags(section_preset):
    out, found = section_preset
    bags, obs = read_json(out/'bags.json'), Cohort.load(out).obs
    assert list(bags) == list(obs.index) and {len(r) for _, r in bags.values()} <= set(range(1, 10))
    for name in found.index:
        s, (coords, attrs) = read_section(REAL, name), read_tiles(out/'tiles'/f'{name}.h5')
        assert len(coords) == len(s.spots) and attrs['patch_size'] == 256 and attrs['patch_size_level0'] == 291
        assert (coords >= 0).all() and (coords + 291 <= s.size).all()
        case = obs.index[obs.slide == name][0]; slide, rows = bags[case]
        centre = coords[rows[0]] + 291/2
        np.testing.assert_allclose(centre, s.spots.loc[case.split('_')[1], ['pixel_x', 'pixel_y']].to_numpy(float), atol=1)


@real
def test_real_expression_is_that_of_the_spot(section_preset):
    out, _ = section_preset
    cohort, s = Cohort.load(out), read_section(REAL, 'C4')
    at = cohort.obs.index.get_loc('C4_' + s.counts.index[5])
    np.testing.assert_allclose(cohort.X[at], log_cp10k(s.counts).iloc[5][cohort.var.index], rtol=1e-5)
    assert cohort.obs.total_counts.iloc[at] == s.counts.iloc[5].sum()


@real
def test_patient_preset_is_not_within_patient(tmp_path):
    build_her2st(REAL, tmp_path, ['C2', 'C3'], ['C4'], ['B4'])
    uns = Cohort.load(tmp_path).uns
    assert not uns['within_patient'] and uns['val_within_patient']


@real
def test_section_preset_must_be_admitted(tmp_path):
    with pytest.raises(LeakError, match='Patient C.*within_patient: true'): build_her2st(REAL, tmp_path, ['B4', 'C2'], ['C3'], ['C4'])
    assert not (tmp_path/'cohort.h5ad').exists()


@real
def test_manifest_is_of_these_files():
    import tomllib
    files = tomllib.loads(MANIFEST.read_text())['files']
    assert len(files) == 12
    for f in files: assert ((REAL/f['name']).stat().st_size, sha256(REAL/f['name'])) == (f['bytes'], f['sha256'])


def test_a_further_section_needs_no_code(sections, tmp_path):
    assert [s.name for s in read_sections(sections)] == ['X1', 'X2', 'Y1', 'Z1']
    assert build_her2st(sections, tmp_path, ['X1', 'X2'], ['Y1'], ['Z1'], 30).cases.sum() > 200


@pytest.mark.parametrize('suffix,says', [('.jpg', 'no image: expected Y1.jpg'), ('_selection.tsv', 'no spot positions: expected Y1_selection.tsv'), ('.tsv.gz', 'no counts: expected Y1.tsv.gz')])
def test_section_without_a_file(sections, tmp_path, suffix, says):
    shutil.copytree(sections, tmp_path/'s')
    (tmp_path/'s'/f'Y1{suffix}').unlink()
    with pytest.raises(FileNotFoundError, match=says): build_her2st(tmp_path/'s', tmp_path/'out', ['X1'], ['Y1'], ['Z1'], 30)


def test_empty_folder_and_unknown_section(sections, tmp_path):
    with pytest.raises(FileNotFoundError, match='holds no section'): read_sections(tmp_path)
    with pytest.raises(FileNotFoundError, match='has no section Q9. It has X1, X2, Y1, Z1'): build_her2st(sections, tmp_path, ['X1'], ['Q9'], ['Z1'])


def test_a_section_stands_on_one_side(sections, tmp_path):
    with pytest.raises(LeakError, match='named twice'): build_her2st(sections, tmp_path, ['X1'], ['X1'], ['Z1'])
    with pytest.raises(LeakError, match='Patient X'): build_her2st(sections, tmp_path, ['X1'], ['Y1'], ['X2'])


def test_genes_are_chosen_on_training_sections_alone(sections, tmp_path):
    shutil.copytree(sections, tmp_path/'s')
    build_her2st(tmp_path/'s', tmp_path/'a', ['X1'], ['Y1'], ['Z1'], 20)
    for name in ('Y1', 'Z1'):
        counts = pd.read_csv(tmp_path/'s'/f'{name}.tsv.gz', sep='\t', index_col=0)
        counts.iloc[::2, :] = np.random.default_rng(0).poisson(200, counts.iloc[::2].shape)
        counts.to_csv(tmp_path/'s'/f'{name}.tsv.gz', sep='\t')
    build_her2st(tmp_path/'s', tmp_path/'b', ['X1'], ['Y1'], ['Z1'], 20)
    assert list(Cohort.load(tmp_path/'a').var.index) == list(Cohort.load(tmp_path/'b').var.index)


@pytest.fixture
def server(sections):
    "Serves the drawn sections on this machine alone."
    quiet = type('Quiet', (http.server.SimpleHTTPRequestHandler,), dict(log_message=lambda *a: None))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(quiet, directory=str(sections))) as s:
        threading.Thread(target=s.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{s.server_port}'
        s.shutdown()


def manifest(sections, server, path, wrong=False):
    files = [sections/f'X1{e}' for e in ('.tsv.gz', '_selection.tsv', '.jpg')]
    head = f'homepage = "h"\nbase = "{server}"\n'
    path.write_text(head + ''.join(f'[[files]]\nsection = "X1"\nname = "{f.name}"\npath = "{f.name}"\nsha256 = "{"0"*64 if wrong else sha256(f)}"\n' for f in files))
    return path


def test_download(sections, server, tmp_path, monkeypatch):
    monkeypatch.setenv('NO_PROXY', '127.0.0.1'); monkeypatch.setenv('no_proxy', '127.0.0.1')
    toml = manifest(sections, server, tmp_path/'m.toml')
    files = download_her2st(tmp_path/'d', ['X1'], toml)
    assert [f.read_bytes() for f in files] == [(sections/f.name).read_bytes() for f in files]
    assert read_section(tmp_path/'d', 'X1').mpp == pytest.approx(1.25, abs=.01)
    when = files[0].stat().st_mtime_ns
    download_her2st(tmp_path/'d', ['X1'], toml)
    assert files[0].stat().st_mtime_ns == when      # what is there and fits is left alone


def test_download_refuses_a_wrong_checksum(sections, server, tmp_path, monkeypatch):
    monkeypatch.setenv('NO_PROXY', '127.0.0.1'); monkeypatch.setenv('no_proxy', '127.0.0.1')
    with pytest.raises(RuntimeError, match='could not be downloaded.*put it into'): download_her2st(tmp_path/'d', ['X1'], manifest(sections, server, tmp_path/'m.toml', wrong=True))
    assert not (tmp_path/'d'/'X1.tsv.gz').exists()


def test_sections_of_another_archive(tmp_path):
    """skinST's names: a patient has several sections, and is held out whole."""
    train, val, test = ['P2_ST_rep1', 'P9_ST_rep1'], ['P10_ST_rep1'], ['P5_ST_rep1']
    tiny_sections(tmp_path/'in', [*train, *val, *test, 'P5_ST_rep2'])
    build_her2st(tmp_path/'in', tmp_path/'out', train, val, test, 20, project='skinST')
    obs = Cohort.load(tmp_path/'out').obs
    assert set(obs.group[obs.split == 'test']) == {'P5'} and set(obs.project) == {'skinST'}
    with pytest.raises(LeakError, match='P5'): build_her2st(tmp_path/'in', tmp_path/'leak', [*train, 'P5_ST_rep2'], val, test, 20)
