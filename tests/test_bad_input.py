"""Bad input to the command, kind by kind: one clear sentence, an exit code that is not 0, nothing executed, nothing written elsewhere, nothing half written."""
import os
import pickle
import shlex
import shutil
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import NamedTuple

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from gemmgan_nb import encoders, generate, reproduce
from gemmgan_nb.gdc import write_manifest
from gemmgan_nb.report import Complaints
from gemmgan_nb.simulation import write_slide
from gemmgan_nb.slides import tiny_slide
from gemmgan_nb.workspace import read_json, write_json

ROOT = Path(__file__).parents[1]
CK = Path('runs/tiny/fit/any_modality/any_modality/seed0')
S0, F0, COHORT = 'runs/tiny/source/s0.tiff', Path('runs/tiny/features/tiny/s0.h5'), Path('runs/tiny/cohort')


class Bad(NamedTuple):
    "A kind of bad input."
    name: str         # of the kind
    make: object      # called in the project's folder before the command: makes the bad thing; None: there is nothing to make
    words: str        # what is typed after `gemmgan`
    says: str         # words of the one sentence; several by |, all of them wanted
    code: int = 2     # exit code


# how bad things are made, with paths from the project's folder

class Trap:
    "Leaves a file when it is unpickled."
    def __reduce__(self): return os.system, (f'touch {Path("executed").absolute()}',)


def bytes_of(path, content): return lambda: (Path(path).parent.mkdir(parents=True, exist_ok=True), Path(path).write_bytes(content if isinstance(content, bytes) else content.encode()))
def trapped(path, **how): return lambda: bytes_of(path, pickle.dumps(Trap(), **how))()
def picture(path, value=200): return lambda: Image.fromarray(np.full((600, 600, 3), value, np.uint8)).save(path)
def folder(path): return lambda: Path(path).mkdir(parents=True)
def part_of(path, n, to): return lambda: bytes_of(to, Path(path).read_bytes()[:n])()


def config(**parts):
    "The checkpoint's config with changed parts; a part that is a list of names and values is changed inside."
    def make():
        c = read_json(CK/'config.json')
        for k, v in parts.items(): c[k] = c[k] | v if isinstance(v, dict) and isinstance(c.get(k), dict) else v
        write_json(CK/'config.json', c)
    return make


def tensors(change):
    def make(): t = load_file(CK/'model.safetensors'); change(t); save_file(t, CK/'model.safetensors')
    return make


def not_finite(t): t['scaler.mean'][0] = float('nan')


def torch_file(): torch.save(Trap(), CK/'model.safetensors')


def features(rows=None, **attrs):
    "x.h5: features of a slide with changed rows or facts."
    def make():
        shutil.copy(F0, 'x.h5')
        with h5py.File('x.h5', 'a') as f:
            if rows is not None: about = dict(f['features'].attrs); del f['features']; f['features'] = np.asarray(rows, np.float16); f['features'].attrs.update(about)
            f['features'].attrs.update(attrs)
    return make


def predictions(change=None, **uns):
    "mine.h5ad: profiles for the test cases, changed."
    def make():
        data = ad.read_h5ad(COHORT/'cohort.h5ad'); data = data[data.obs.split == 'test'].copy()
        data.uns = dict(unit='log2(tpm+1)') | uns
        if change is not None: data = change(data)
        data.write_h5ad('mine.h5ad')
    return make


def torn(data): data.X[1, 2] = np.nan; return data


def cohort(change):
    "The cohort's h5ad, changed; with profiles that are as they should be."
    def make():
        predictions()(); path = COHORT/'cohort.h5ad'; data = ad.read_h5ad(path); change(data); data.write_h5ad(path)
    return make


def nan_in_cohort(data): data.X[0, 3] = np.nan
def no_split(data): del data.obs['split']
def no_unit(data): del data.uns['unit']
def moved_split(): predictions()(); p = COHORT/'split.csv'; p.write_text(p.read_text().replace('P00,train', 'P00,test', 1) if 'P00,train' in p.read_text() else p.read_text().replace('train', 'test', 1))
def no_split_file(): predictions()(); (COHORT/'split.csv').unlink()
def cohort_of_words(): predictions()(); (COHORT/'cohort.h5ad').write_text('no cohort')
def trapped_cohort(): predictions()(); trapped(COHORT/'cohort.h5ad')()


def manifest(**kw):
    "m.txt: one file of a manifest, changed."
    def make():
        row = dict(id=str(uuid.UUID(int=7)), filename='a.svs', md5='0'*32, size=51234, state='released')
        write_manifest(Path('m.txt'), pd.DataFrame([row])); text = Path('m.txt').read_text()
        for k, v in kw.items(): text = text.replace(str(row[k]), v)
        Path('m.txt').write_text(text)
    return make


def own(slides='', expression='case_id,A,B\nP0,1,2\nP1,3,4\nP2,1,1\n', **files):
    "mine/: a folder of one's own."
    def make():
        if expression: bytes_of('mine/expression.csv', expression)()
        if slides: bytes_of('mine/slides.csv', slides)()
        for k, v in files.items(): bytes_of(f'mine/{k}.csv', v)()
    return make


def profile(text): return bytes_of('mine.yaml', text)


GEN = 'generate --checkpoint runs/tiny --out out.h5ad '
OWN = ' --profile own --set cohort.folder=mine --set cohort.unit=tpm'
SLIDES = [
    Bad('a slide that is not there', None, GEN + '--slide missing.svs', 'missing.svs'),
    Bad('a slide whose name breaks the line', None, GEN + "--slide 'a\nb\x1b[2J.svs'", 'b'),
    Bad('a folder in place of a slide', folder('dir.svs'), GEN + '--slide dir.svs', 'dir.svs is a folder'),
    Bad('an empty slide', bytes_of('x.svs', b''), GEN + '--slide x.svs', 'x.svs|empty'),
    Bad('words in place of a slide', bytes_of('x.svs', 'not a slide'), GEN + '--slide x.svs', 'no slide'),
    Bad('a corrupt slide', bytes_of('x.svs', b'II*\0' + b'\1'*500), GEN + '--slide x.svs', 'x.svs|cut short'),
    Bad('half a slide', part_of(S0, 20_000, 'x.tiff'), GEN + '--slide x.tiff', 'x.tiff|cut short'),
    Bad('a pickle in place of a slide', trapped('x.svs'), GEN + '--slide x.svs', 'no slide'),
    Bad('no tissue', lambda: write_slide('x.tiff', np.full((600, 600, 3), 245, np.uint8), .5), GEN + '--slide x.tiff', 'x.tiff holds no tissue'),
    Bad('a picture without scale', picture('x.png'), GEN + '--slide x.png', 'has no mpp|--mpp'),
    Bad('a scan that is too coarse', lambda: tiny_slide('x.tiff', (512, 512), mpp=2.), GEN + '--slide x.tiff', 'cannot be invented'),
    Bad('another mpp than the header says', None, GEN + f'--slide {S0} --mpp 0.25', 'you say 0.25'),
    Bad('an mpp that is none', None, GEN + f'--slide {S0} --mpp nan', 'mpp|between 0.05 and 20'),
    Bad('an mpp in words', None, GEN + f'--slide {S0} --mpp half', "'--mpp'|number"),
    Bad('a region of three numbers', None, GEN + f'--slide {S0} --region 1,2,3', 'not four numbers'),
    Bad('a region beside the slide', None, GEN + f'--slide {S0} --region 9000,0,50,50', 'outside s0.tiff'),
    Bad('a region without tissue', None, GEN + f'--slide {S0} --region 0,0,5,5', 'no tile with tissue'),
    Bad('a region that is no number', None, GEN + f'--slide {S0} --region 0,0,nan,5', 'no area'),
    Bad('a real slide for a simulated checkpoint', config(about=dict(simulated=True)), GEN + f'--slide {S0}', 'means nothing|--i-know-it-is-simulated')]
TEXTS = [
    Bad('an empty text', None, GEN + "--text ''", 'is empty'),
    Bad('a text of blanks', None, GEN + "--text ' \n '", 'is empty'),
    Bad('a text of 5,000 words', None, GEN + f"--text '{'word '*5000}'", '5,000 words|at most 2,000'),
    Bad('a text of 2,001 words', None, GEN + f"--text '{'word '*2001}'", '2,001 words|at most 2,000'),
    Bad('a text that is no Unicode', None, GEN + "--text 'a man \udcff'", 'Unicode'),
    Bad('nothing asked', None, GEN, 'Nothing is asked about'),
    Bad('a slide and its features', None, GEN + f'--slide {S0} --features {F0}', 'Give one of them'),
    Bad('no profiles', None, GEN + "--text 'a man' --n 0", '0 profiles'),
    Bad('a million profiles', None, GEN + "--text 'a man' --n 1000000", '1000000 profiles'),
    Bad('many profiles in words', None, GEN + "--text 'a man' --n many", "'--n'|integer"),
    Bad('a seed below zero', None, GEN + "--text 'a man' --seed -1", 'seed'),
    Bad('an option nobody knows', None, GEN + "--text 'a man' --temperature 2", '--temperature'),
    Bad('no tiles', None, GEN + f'--slide {S0} --most-tiles 0', '0 tiles at most'),
    Bad('tiles in words', None, GEN + f'--slide {S0} --most-tiles all', "'--most-tiles'|integer"),
    Bad('a device nobody has', None, GEN + f'--slide {S0} --device abacus', "'abacus'|cpu, cuda"),
    Bad('a GPU that is not there', None, GEN + f'--slide {S0} --device cuda:99', 'GPUs here|cuda:99'),
    Bad('another text without a first', None, GEN + f"--slide {S0} --instead 'a man'", 'no text that another could stand in for'),
    Bad('another text that is empty', None, GEN + "--text 'a man' --instead ' '", 'The text instead is empty'),
    Bad('another text of 5,000 words', None, GEN + f"--text 'a man' --instead '{'word '*5000}'", 'The text instead has 5,000 words'),
    Bad('attention without a slide', None, GEN + "--text 'a man' --attention a.png", 'one slide'),
    Bad('attention for two slides', None, GEN + f'--slide {S0} --slide {S0} --attention a.png', '2 patients'),
    Bad('attention in a file that is no picture', None, GEN + f'--slide {S0} --attention a.txt', 'no name of a picture'),
    Bad('attention into a folder', folder('a.png'), GEN + f'--slide {S0} --attention a.png', 'a.png is a folder'),
    Bad('attention where nobody may write', None, GEN + f'--slide {S0} --attention /proc/a.png', 'cannot be written')]
TABLES = [
    Bad('a table that is not there', None, GEN + '--slide t.csv', 't.csv is not there'),
    Bad('an empty table', bytes_of('t.csv', b''), GEN + '--slide t.csv', 't.csv is not readable as csv'),
    Bad('a table without the columns', bytes_of('t.csv', 'name\nx\n'), GEN + '--slide t.csv', 'Expected rows with slide, text, mpp'),
    Bad('a table of bytes', bytes_of('t.csv', b'\xff\xfe\0\0slide'), GEN + '--slide t.csv', 't.csv'),
    Bad('a table with a text too long', bytes_of('t.csv', 'slide,text\na.svs,' + 'w '*2500 + '\n'), GEN + '--slide t.csv', 'row 1 has 2,500 words'),
    Bad('a table of missing slides', bytes_of('t.csv', 'slide,text\na.svs,\nb.svs,\n'), GEN + '--slide t.csv', 'None of 2 patients'),
    Bad('a table and a text', bytes_of('t.csv', 'slide,text\na.svs,\n'), GEN + "--slide t.csv --text 'a man'", 'is a table')]
FEATURES = [
    Bad('features that are not there', None, GEN + '--features x.h5', 'x.h5 is not there'),
    Bad('a folder without features', folder('none'), GEN + '--features none', 'holds no feature file'),
    Bad('words in place of features', bytes_of('x.h5', 'no'), GEN + '--features x.h5', 'no feature file'),
    Bad('a pickle in place of features', trapped('x.h5'), GEN + '--features x.h5', 'no feature file'),
    Bad('features of another encoder', features(encoder_id='uni-123'), GEN + '--features x.h5', 'features of uni-123; the checkpoint expects tiny-'),
    Bad('features of another width', features(np.ones((3, 7))), GEN + '--features x.h5', '7 numbers a tile'),
    Bad('features that are not finite', features(np.full((3, 16), np.nan)), GEN + '--features x.h5', 'not finite'),
    Bad('features of no tile', features(np.ones((0, 16))), GEN + '--features x.h5', 'no tile'),
    Bad('features at another scale', features(tile_mpp=2.), GEN + '--features x.h5', '2 µm per pixel'),
    Bad('features of one dimension', features(np.ones(4)), GEN + '--features x.h5', 'no feature file')]
CHECKPOINTS = [
    Bad('a checkpoint that is not there', None, "generate --checkpoint runs/none --out out.h5ad --text 'a man'", 'runs/none holds none'),
    Bad('no checkpoint at all', None, "generate --out out.h5ad --text 'a man'", 'gemmgan reproduce --profile demo'),
    Bad('a file in place of a checkpoint', None, f"generate --checkpoint {CK}/config.json --out out.h5ad --text 'a man'", 'is a file'),
    Bad('a pickle renamed to safetensors', trapped(CK/'model.safetensors'), GEN + "--text 'a man'", 'pickle under another name'),
    Bad('an old pickle renamed to safetensors', trapped(CK/'model.safetensors', protocol=0), GEN + "--text 'a man'", 'no safetensors file'),
    Bad("PyTorch's pickle renamed to safetensors", torch_file, GEN + "--text 'a man'", 'pickle under another name'),
    Bad('a pickle beside the checkpoint', trapped(CK/'reference.safetensors'), GEN + f'--slide {S0}', 'pickle under another name'),
    Bad('half a checkpoint', part_of(CK/'model.safetensors', 3000, CK/'model.safetensors'), GEN + "--text 'a man'", 'damaged'),
    Bad('a checkpoint without weights', lambda: (CK/'model.safetensors').unlink(), GEN + "--text 'a man'", 'not there'),
    Bad('weights that are not finite', tensors(not_finite), GEN + "--text 'a man'", 'not finite'),
    Bad('a tampered checkpoint', tensors(lambda t: t.update(extra=torch.zeros(2))), GEN + "--text 'a man'", 'do not fit its config'),
    Bad('a config that is no JSON', bytes_of(CK/'config.json', '{"a":' + '['*50_000), GEN + "--text 'a man'", 'not readable as JSON'),
    Bad('a config of bytes', bytes_of(CK/'config.json', b'\xff\xfe\x80'), GEN + "--text 'a man'", 'not readable as JSON'),
    Bad('a config that names a command', config(kind='os.system'), GEN + "--text 'a man'", 'which this library does not have'),
    Bad('a config that asks for a terabyte', config(budget=dict(dim=10**9)), GEN + "--text 'a man'", 'widest tensor'),
    Bad('a config that asks for a billion patches', config(budget=dict(patches=10**9)), GEN + "--text 'a man'", '1000000000 patches'),
    Bad('a config with an odd title', config(spec=dict(title='\x1b[2Jevil\nline'), budget=dict(dim=10**9)), GEN + "--text 'a man'", 'widest tensor'),
    Bad('an encoder nobody knows', config(about=dict(features=dict(image=dict(encoder='evil--network'), text=dict(encoder='tiny')))), GEN + f'--slide {S0} --mpp 0.5', "'evil--network', no encoder of the registry"),
    Bad('an encoder that is a path', config(about=dict(features=dict(image=dict(encoder='../../evil'), text=dict(encoder='tiny')))), GEN + f'--slide {S0}', 'no encoder of the registry'),
    Bad('the wrong weights of the encoder', folder('weights'), GEN + f'--slide {S0} --image-weights weights', 'Its numbers mean something else'),
    Bad('weights of an encoder that are not there', config(about=dict(features=dict(image=dict(encoder='uni', tile_mpp=.5), text=dict(encoder='tiny')))), GEN + f'--slide {S0} --image-weights nosuch', 'nosuch'),
    Bad('a card of reliability for other genes', bytes_of(CK/'reliability.json', '{"genes": ["A"]}'), GEN + "--text 'a man'", 'reliability card')]
PLACES = [
    Bad('an output of another kind', None, "generate --checkpoint runs/tiny --text 'a man' --out out.csv", 'does not end in .h5ad'),
    Bad('an output that is a folder', folder('out.h5ad'), GEN + "--text 'a man'", 'is a folder'),
    Bad('an output below a file', bytes_of('file', b''), "generate --checkpoint runs/tiny --text 'a man' --out file/out.h5ad", 'cannot be written'),
    Bad('an output where nobody may write', None, "generate --checkpoint runs/tiny --text 'a man' --out /proc/out.h5ad", 'cannot be written'),
    Bad('no output named', None, "generate --checkpoint runs/tiny --text 'a man'", "'--out'")]
EV = f'evaluate --predictions mine.h5ad --cohort {COHORT}'
EVALUATE = [
    Bad('profiles that are not there', None, EV, 'mine.h5ad'),
    Bad('a folder in place of profiles', folder('mine.h5ad'), EV, 'mine.h5ad is a folder'),
    Bad('words in place of profiles', bytes_of('mine.h5ad', 'no'), EV, 'mine.h5ad'),
    Bad('a pickle in place of profiles', trapped('mine.h5ad'), EV, 'mine.h5ad'),
    Bad('an HDF5 file that is no AnnData', lambda: h5py.File('mine.h5ad', 'w').close(), EV, 'mine.h5ad'),
    Bad('profiles without some genes', predictions(lambda d: d[:, :5]), EV, 'lacks 11 of the 16 genes'),
    Bad('profiles without some cases', predictions(lambda d: d[:3]), EV, 'test cases'),
    Bad('profiles in another unit', predictions(unit='fpkm'), EV, 'its unit is fpkm'),
    Bad('profiles without unit', predictions(unit=''), EV, 'unit'),
    Bad('profiles that are not finite', predictions(torn), EV, 'not finite'),
    Bad('profiles of somebody who saw the tests', predictions(trained_on=['P60', 'P61']), EV, 'trained on'),
    Bad('a cohort that is not there', predictions(), 'evaluate --predictions mine.h5ad --cohort nosuch', 'nosuch holds no cohort.h5ad'),
    Bad('NaN in a cohort', cohort(nan_in_cohort), EV, 'not finite|P00'),
    Bad('a cohort without split', cohort(no_split), EV, 'split'),
    Bad('a cohort without unit', cohort(no_unit), EV, 'unit'),
    Bad('a cohort whose split was edited', moved_split, EV, 'split.csv'),
    Bad('a cohort whose split is gone', no_split_file, EV, 'split.csv is missing'),
    Bad('words in place of a cohort', cohort_of_words, EV, 'cohort.h5ad'),
    Bad('a pickle in place of a cohort', trapped_cohort, EV, 'cohort.h5ad'),
    Bad('scores that go into a folder', lambda: (predictions()(), folder('out')()), EV + ' --out out', 'out is a folder'),
    Bad('scores that go below a file', lambda: (predictions()(), bytes_of('file', b'')()), EV + ' --out file/x.csv', 'cannot be written')]
REPORT = [
    Bad('a report of a run that is not there', None, 'report --profile her2st', 'There is no run'),
    Bad('a report of a file', bytes_of('runs/demo', b''), 'report', 'There is no run'),
    Bad('a report below a file', bytes_of('file', b''), 'report --profile tiny --out file/page', 'cannot be written'),
    Bad('a report in place of a file', bytes_of('file', b''), 'report --profile tiny --out file', 'cannot be written'),
    Bad('a report where anyone sees it', None, 'report --profile tiny --out figures/tiny', 'for anyone to see'),
    Bad('a report for a profile that is not there', None, 'report --profile nosuch', "no profile 'nosuch'")]
DOWNLOAD = [
    Bad('a manifest that is not there', None, 'download --manifest m.txt', 'm.txt cannot be read'),
    Bad('a folder in place of a manifest', folder('m.txt'), 'download --manifest m.txt', 'm.txt cannot be read'),
    Bad('a manifest of bytes', bytes_of('m.txt', b'\xff\xfe\x80\x81'), 'download --manifest m.txt', 'm.txt'),
    Bad('a manifest without columns', bytes_of('m.txt', 'a\tb\n1\t2\n'), 'download --manifest m.txt', 'm.txt has no column id'),
    Bad('a manifest with a name that leads elsewhere', manifest(filename='../a.svs'), 'download --manifest m.txt --to to', 'line 2, column filename'),
    Bad('a manifest with an id that leads elsewhere', manifest(id='../../..'), 'download --manifest m.txt --to to', 'line 2, column id'),
    Bad('a manifest with a size that is none', manifest(size='many'), 'download --manifest m.txt --to to', 'line 2, column size'),
    Bad('a manifest with a checksum that is none', manifest(md5='zz'), 'download --manifest m.txt --to to', 'line 2, column md5'),
    Bad('a download below a file', lambda: (manifest()(), bytes_of('file', b'')()), 'download --manifest m.txt --to file/to', 'cannot be written to'),
    Bad('a download without workers', manifest(), 'download --manifest m.txt --workers 0', '--workers'),
    Bad('a download of nothing', None, 'download --profile demo', 'fetches nothing from GDC'),
    Bad('a download to nowhere', None, 'download --to x', '--to belongs to --manifest')]
RUNS = [
    Bad('a profile that is not there', None, '{} --profile nosuch', "no profile 'nosuch'"),
    Bad('a profile that is a folder', folder('mine.yaml'), '{} --profile mine.yaml', 'mine.yaml'),
    Bad('a profile of bytes', profile(b'\xff\xfe\x80'), '{} --profile mine.yaml', 'mine.yaml'),
    Bad('a profile that runs a command', profile('run: !!python/object/apply:os.system ["touch executed"]\n'), '{} --profile mine.yaml', 'mine.yaml|not YAML'),
    Bad('a profile that is a list', profile('- 1\n'), '{} --profile mine.yaml', 'not a profile'),
    Bad('a run that leads elsewhere', None, '{} --set run=../../elsewhere', 'run'),
    Bad('a run at the root', None, '{} --set run=/tmp/elsewhere', 'run'),
    Bad('a setting nobody knows', None, '{} --set training.stepz=3', "no setting 'training.stepz'"),
    Bad('a setting without value', None, '{} --set training.steps', 'name=value'),
    Bad('a number in words', None, '{} --set training.steps=many', "training.steps|'many'"),
    Bad('a row nobody knows', None, '{} --set models=[nobody]', 'No model nobody')]
COHORTS = [
    Bad('no folder named', None, '{} --profile own', 'needs the folder'),
    Bad('a folder that is not there', None, '{}' + OWN, 'no folder mine'),
    Bad('a file in place of the folder', bytes_of('mine', b''), '{}' + OWN, 'no folder mine'),
    Bad('a folder without expression', folder('mine'), '{}' + OWN, 'holds no table of expression'),
    Bad('expression without unit', own(), '{} --profile own --set cohort.folder=mine', 'in which unit'),
    Bad('../ in the path of a slide', own('case_id,path\nP0,../../secret.svs\n'), '{}' + OWN, "slides.csv, line 2|'../../secret.svs'"),
    Bad('../ in the name of a slide', own('case_id,slide,path\nP0,../../up,a.svs\n'), '{}' + OWN, "slides.csv, line 2|'../../up'"),
    Bad('a list of slides without paths', own('case_id,file\nP0,a.svs\n'), '{}' + OWN, 'slides.csv has no column path'),
    Bad('a list of slides with an odd mpp', own('case_id,path,mpp\nP0,a.svs,40x\n'), '{}' + OWN, "line 2: column 'mpp' says '40x'")]
EACH = [b._replace(words=b.words.format(c), name=f'{b.name} ({c})') for b in RUNS for c in ('plan', 'reproduce', 'doctor')] + [
    b._replace(words=b.words.format(c), name=f'{b.name} ({c})') for b in COHORTS for c in ('plan', 'reproduce')]
KINDS = [*SLIDES, *TEXTS, *TABLES, *FEATURES, *CHECKPOINTS, *PLACES, *EVALUATE, *REPORT, *DOWNLOAD, *EACH]


def seen(place):
    "Every file and folder below a place, with what would change if somebody wrote there."
    found = {}
    for p in sorted(place.rglob('*')):
        s = p.lstat(); found[str(p.relative_to(place))] = 'folder' if p.is_dir() and not p.is_symlink() else (s.st_size, s.st_mtime_ns)
    return found


def sentence(output):
    "The one message: a line of ours, or what stands in typer's frame."
    lines = [x for x in output.splitlines() if x.strip()]
    if any('─ Error ─' in x for x in lines):
        lines = [x.strip('│ ') for x in lines if x.startswith('│')]
    assert len(lines) == 1, output
    return lines[0]


@pytest.fixture(scope='module')
def project(tiny_place, tmp_path_factory):
    "A checkout with a run in it."
    place = tmp_path_factory.mktemp('world')/'project'
    shutil.copytree(ROOT/'workflow', place/'workflow'); shutil.copytree(tiny_place, place/'runs'/'tiny')
    for name in ('nbs', 'data_manifest', 'gemmgan_nb'): (place/name).symlink_to(ROOT/name)
    return place


@pytest.fixture
def world(project, tmp_path, tmp_path_factory, monkeypatch):
    "A copy of it, where one stands; a home and a place for temporary files of its own."
    shutil.copytree(project, tmp_path/'project', symlinks=True)
    for name in ('home', 'tmp'): (tmp_path/name).mkdir()
    monkeypatch.chdir(tmp_path/'project'); monkeypatch.setenv('HOME', str(tmp_path/'home')); monkeypatch.setenv('TMPDIR', str(tmp_path/'tmp'))
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path/'tmp'))
    for name in ('MPLCONFIGDIR', 'XDG_CACHE_HOME'): monkeypatch.setenv(name, str(tmp_path_factory.getbasetemp()/'cache'))     # where libraries keep what is theirs
    return tmp_path


@pytest.fixture(scope='module')
def ears(tmp_path_factory): return generate.tiny_ears(tmp_path_factory.mktemp('words'))


@pytest.fixture
def tiny_encoders(monkeypatch, ears):
    "The registry knows the tiny encoders too; a local folder holds other weights."
    real = generate.load_image_encoder, generate.load_text_encoder
    monkeypatch.setitem(encoders.ENCODERS, 'tiny', encoders.ENCODERS['uni'])
    monkeypatch.setattr(generate, 'load_image_encoder', lambda name, device, given: generate.tiny_eyes(int(given is not None)) if name == 'tiny' else real[0](name, device, given))
    monkeypatch.setattr(generate, 'load_text_encoder', lambda name, *a: ears if name == 'tiny' else real[1](name, *a))
    def begun(*_): raise AssertionError('work began')
    monkeypatch.setattr(reproduce, 'snakemake_command', begun)


@pytest.mark.parametrize('bad', KINDS, ids=[b.name for b in KINDS])
def test_bad_input_is_one_sentence(bad, world, tiny_encoders):
    if bad.make: bad.make()
    before = seen(world)
    ran = CliRunner(env=dict(COLUMNS='2000')).invoke(reproduce.app, shlex.split(bad.words))
    assert ran.exception is None or isinstance(ran.exception, SystemExit), ran.exception
    assert ran.exit_code == bad.code, ran.output
    said = sentence(ran.output)
    assert all(w in said for w in bad.says.split('|')) and 'Traceback' not in said and len(said) < 700, said
    assert seen(world) == before


# what the table cannot hold

def test_the_trap_would_snap(world):
    "The pickles above do harm where somebody opens them as such, so that their silence means something."
    pickle.loads(pickle.dumps(Trap())); assert Path('executed').exists()


def test_html_in_clinical_fields_is_only_ever_text(world):
    evil, path = '<script>alert("type")</script>', COHORT/'cohort.h5ad'
    data = ad.read_h5ad(path); data.obs[['project', 'disease_type', 'primary_site']] = evil; data.write_h5ad(path)
    pd.DataFrame(dict(item=[evil], problem=['<img src=x onerror=alert(1)>'])).to_csv(COHORT/'problems.csv', index=False)
    write_json(COHORT/'provenance.json', dict(seconds=1., params=dict(source=evil), commit=evil))
    before = seen(world)
    ran = CliRunner(env=dict(COLUMNS='2000')).invoke(reproduce.app, ['report', '--profile', 'tiny', '--out', 'page'])
    page = Path('page/index.html').read_text()
    assert ran.exit_code == 0 and Complaints(page).found == [] and '<script' not in page and '<img src=x' not in page and '&lt;script&gt;alert(' in page
    assert set(seen(world)) - set(before) == {'project/page', 'project/page/index.html', 'project/page/stages.csv'} and {k: v for k, v in seen(world).items() if k in before} == before


REAL = ['a pickle renamed to safetensors', 'a text that is no Unicode', 'NaN in a cohort', '../ in the name of a slide (plan)']


@pytest.mark.parametrize('bad', [b for b in KINDS if b.name in REAL], ids=REAL)
def test_through_the_command_itself(bad, world):
    gemmgan = Path(sys.executable).with_name('gemmgan')
    if not gemmgan.exists(): pytest.skip('the package is not installed: there is no command gemmgan')
    if bad.make: bad.make()
    before, env = seen(world), os.environ | dict(COLUMNS='2000', OMP_NUM_THREADS='1', PYTHONDONTWRITEBYTECODE='1')
    ran = subprocess.run([gemmgan, *(os.fsencode(w) for w in shlex.split(bad.words))], capture_output=True, env=env, timeout=300)
    said = sentence(ran.stdout.decode() + ran.stderr.decode())
    assert ran.returncode == bad.code and all(w in said for w in bad.says.split('|')) and seen(world) == before, said
