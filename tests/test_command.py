"""The `gemmgan` command: what the doctor finds, what a download leaves, how wrong input and Ctrl-C end."""
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

from gemmgan_nb import reproduce as r
from gemmgan_nb.experiment import entries_of
from gemmgan_nb.gdc import TinyGdc, tiny_archive, write_manifest
from gemmgan_nb.training import Budget
from gemmgan_nb.workspace import load_profile, lock

ROOT = Path(__file__).parents[1]
NOWHERE = 'http://127.0.0.1:9'   # nobody listens there
H200 = r.Gpus('13.0', [('H200', 141., 'sm_90')], ['sm_90'], '13.0')


def gemmgan(*words):
    "Exit code and output on a wide terminal, in this process."
    ran = CliRunner(env=dict(COLUMNS='2000')).invoke(r.app, [str(w) for w in words])
    assert ran.exception is None or isinstance(ran.exception, SystemExit), ran.exception
    assert 'Traceback' not in ran.output
    return ran.exit_code, ran.output


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch): monkeypatch.chdir(ROOT)


@pytest.fixture
def alone(monkeypatch, tmp_path):
    "A machine without token, cache, hub, or GPU."
    from huggingface_hub import constants
    monkeypatch.delenv('HF_TOKEN', raising=False); monkeypatch.delenv('HUGGING_FACE_HUB_TOKEN', raising=False)
    for name, value in dict(HF_HUB_CACHE=str(tmp_path/'hub'), HF_TOKEN_PATH=str(tmp_path/'token'), ENDPOINT=NOWHERE).items(): monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(r, 'gpus_here', lambda: r.Gpus('13.0', [], [], ''))


def rows(text):
    "The doctor's table as check -> (found, needed, verdict, remedy)."
    cells = [[c.strip() for c in line.split('│')[1:-1]] for line in text.splitlines() if line.startswith('│')]
    return {c[0]: tuple(c[1:]) for c in cells}


# Doctor

def test_the_demo_needs_neither_token_nor_gdc(alone):
    code, text = gemmgan('doctor')
    table = rows(text)
    assert code == 0 and 'Nothing is missing' in text and {t[2] for t in table.values()} <= {'fine', 'warning'}
    assert not {'GDC', "hub's token"} & set(table) and table['GPU'][:3] == ('none', 'none', 'fine')
    assert table['packages'][2] == table['slide libraries'][2] == table['network minilm'][2] == 'fine'


SMALL = ['--profile', 'tcga', '--set', 'cohort.selection={largest: 1, megabytes_below: 5}']


def test_nothing_reachable_is_named_with_its_remedy_and_soon(alone):
    start = time.time()
    code, text = gemmgan('doctor', *SMALL, '--set', f'cohort.endpoint={NOWHERE}')
    table = rows(text)
    assert code == 1 and time.time() - start < 60
    missing = {k: v[3] for k, v in table.items() if v[2] == 'missing'}
    llama = 'network ContactDoctor/Bio-Medical-Llama-3-8B'
    assert {"hub's token", 'GPU', 'GDC', 'network uni', 'network clinical_modernbert', llama} <= set(missing)
    for check, remedy in {"hub's token": 'HF_TOKEN', 'GPU': 'encoders.image=efficientnet_lite0', 'GDC': f'{NOWHERE}/status', 'network uni': 'encoders.image_checkpoint=FOLDER',
                          'network clinical_modernbert': 'encoders.text=minilm', llama: 'summaries.writer=template'}.items(): assert remedy in missing[check]
    assert 'huggingface.co/MahmoodLab/uni' in missing['network uni'] and table['GDC'][0] == 'Connection refused'
    assert f'{len(missing)} missing' in text


def test_where_all_is_there_the_paper_s_profile_may_begin(alone, monkeypatch):
    from gemmgan_nb import encoders, summaries
    monkeypatch.setattr(encoders, 'access', lambda name, checkpoint=None: '')
    monkeypatch.setattr(summaries, 'precision_here', lambda device: ('float16', 'for four bits: pip install bitsandbytes'))
    monkeypatch.setattr(r, 'gpus_here', lambda: H200)
    monkeypatch.setenv('HF_TOKEN', 'hf_secret')
    real = r._places
    monkeypatch.setattr(r, '_places', lambda *a: {k: (f, 0.) for k, (f, _) in real(*a).items()})   # whatever the disk of this machine holds
    with TinyGdc([], [], {}) as gdc: code, text = gemmgan('doctor', *SMALL, '--set', f'cohort.endpoint={gdc.url}')
    table = rows(text)
    assert code == 0, text
    assert table['GDC'][:3] == ('Drawn Release 1.0', gdc.url, 'fine') and table["hub's token"][0] == 'HF_TOKEN' and 'hf_secret' not in text
    assert table['language model'][2] == 'warning' and '.[llama]' in table['language model'][3]      # a warning alone stops nobody


def test_what_lies_in_the_cache_or_in_a_folder_needs_no_token(alone, tmp_path):
    weights = tmp_path/'hub'/'models--MahmoodLab--uni'/'snapshots'/'abc'/'pytorch_model.bin'
    assert [f.verdict for f in r.check_token({'uni': ''}, None)] == ['missing'] and r.check_network('uni').verdict == 'missing'
    weights.parent.mkdir(parents=True); weights.write_bytes(b'x')
    assert r.check_token({'uni': ''}, None) == [] and r.check_network('uni').found == 'in the cache'
    (tmp_path/'model.safetensors').touch()
    assert r.check_network('clinical_modernbert', str(tmp_path)).verdict == 'fine' and r.check_network('uni', str(weights.parent.parent)).verdict == 'missing' and 'no ' in r.check_network('uni', str(tmp_path/'none')).remedy


@pytest.mark.parametrize('profile, settings, needs', [
    ('tcga', {}, (True, ['uni', 'clinical_modernbert'], 1, 'must')),
    ('tcga', {'encoders.image': 'owner/name', 'summaries.writer': 'template'}, (True, ['owner/name', 'clinical_modernbert'], 0, 'must')),
    ('her2st', {}, (True, ['efficientnet_lite0'], 0, '')), ('xena', {}, (False, ['minilm'], 0, '')), ('dial', {}, (False, [], 0, '')), ('study', {}, (True, ['efficientnet_lite0', 'minilm'], 0, ''))])
def test_only_what_a_profile_needs_is_asked(profile, settings, needs):
    n = r.needs_of(load_profile(profile, settings))
    assert (n.slides, list(n.networks), len(n.writer), n.gpu) == needs


def test_an_own_cohort_asks_for_what_its_folder_holds(tmp_path):
    values = load_profile('own', {'cohort.folder': str(tmp_path)})
    assert [f.verdict for f in r.check_folder(values['cohort'])] == ['missing']
    (tmp_path/'expression.csv').write_text('case_id,A\nx,1\n'); (tmp_path/'slides.csv').write_text('case_id,path\nx,x.svs\n')
    assert 'unit' in r.check_folder(values['cohort'])[0].found + r.check_folder(values['cohort'])[0].remedy
    values = load_profile('own', {'cohort.folder': str(tmp_path), 'cohort.unit': 'tpm'})
    assert r.check_folder(values['cohort'])[0].verdict == 'fine' and list(r.needs_of(values).networks) == ['efficientnet_lite0']
    (tmp_path/'features').mkdir()
    assert not r.needs_of(values).slides and r.needs_of(values).networks == {}


# Download

@pytest.fixture
def files(tmp_path):
    "A manifest of six files, and their bytes."
    contents = {str(uuid.uuid5(uuid.NAMESPACE_URL, f'{i}')): hashlib.sha512(bytes([i])).digest()*(3000 + i) for i in range(6)}
    table = pd.DataFrame([dict(id=k, filename=f'{i}.svs', md5=hashlib.md5(v).hexdigest(), size=len(v), state='released') for i, (k, v) in enumerate(contents.items())])
    write_manifest(tmp_path/'m.txt', table)
    return tmp_path/'m.txt', table, contents


def test_a_manifest_is_fetched_verified_and_resumed(files, tmp_path):
    manifest, table, contents = files
    words = lambda gdc: ('download', '--manifest', manifest, '--to', tmp_path/'to', '--workers', 3, '--set', f'cohort.endpoint={gdc.url}')
    with TinyGdc([], [], contents) as gdc:
        gdc.faults |= {table.id[0]: ['cut'], table.id[1]: ['404'], table.id[2]: ['wrong']}
        code, text = gemmgan(*words(gdc))
        assert code == 1 and '6 files: 3 ok (0 were there), 2 retried, 1 bad' in text and '1.svs' in text and '404' in text and 'Go on: gemmgan download --manifest' in text
        asked = len(gdc.log)
        code, text = gemmgan(*words(gdc))
        assert code == 0 and '6 files: 6 ok (5 were there), 0 retried, 0 bad' in text and len(gdc.log) - asked == 2   # /status and the one file
    assert all((tmp_path/'to'/k/f).read_bytes() == contents[k] for k, f in zip(table.id, table.filename, strict=True))


def test_a_gdc_that_is_down_and_a_download_at_work_are_said(files, tmp_path, monkeypatch):
    words = ('download', '--manifest', files[0], '--to', tmp_path/'to')
    monkeypatch.setattr('gemmgan_nb.gdc.patiently.__defaults__', (6, .01, 300., '', lambda s: None))
    code, text = gemmgan(*words, '--set', f'cohort.endpoint={NOWHERE}')
    assert code == 1 and NOWHERE[7:].split(':')[0] in text
    with TinyGdc([], [], files[2]) as gdc, lock(tmp_path/'to'/'.lock'):
        monkeypatch.setattr(r, 'lock', lambda path, patience: lock(path, 0))
        code, text = gemmgan(*words, '--set', f'cohort.endpoint={gdc.url}')
    assert code == 2 and 'Another download' in text


@pytest.mark.parametrize('status, ends, code', [(['ok', 'retried'], 0, 0), (['ok', 'bad'], 1, 1), ([], 1, 1)])
def test_the_pipeline_s_download_is_reported(monkeypatch, tmp_path, status, ends, code):
    asked, source = [], tmp_path/'runs'/'tcga'/'source'
    def at_work(profile, settings, *flags, every):
        asked.append((profile, settings, flags))
        for i, (part, s) in enumerate(zip(('expression', 'slides'), status, strict=False)):
            (source/part).mkdir(parents=True)
            pd.DataFrame([dict(id=i, filename=f'{i}.svs', status=s, tries=1, error='gone')]).to_csv(source/part/'download.csv', index=False)
            os.utime(source/part/'download.csv', (time.time() + 5,)*2)
        return ends
    monkeypatch.setattr(r, 'at_work', at_work); monkeypatch.setattr(r, '_endpoint', lambda cohort: NOWHERE); monkeypatch.setattr(r, 'project_root', lambda: tmp_path)
    got, text = gemmgan('download', '--workers', 3)
    assert got == code and asked == [('tcga', {'cohort.workers': '3'}, ('--until', 'download'))]
    assert ('2 files: 1 ok' in text) == bool(status) and ('1.svs' in text) == ('bad' in status)
    assert ("Go on: make reproduce PROFILE=tcga SET='cohort.workers=3'" in text) == (code == 0)


@pytest.mark.slow
def test_a_cohort_is_fetched_to_where_the_pipeline_looks(tmp_path):
    for name in ('nbs', 'gemmgan_nb', 'workflow', 'data_manifest'): shutil.copytree(ROOT/name, tmp_path/name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    def run(gdc):
        words = [sys.executable, '-m', 'gemmgan_nb.reproduce', 'download', '--set', f'cohort.endpoint={gdc.url}', '--workers', '2']
        ran = subprocess.run(words, cwd=tmp_path, env=os.environ | dict(PYTHONPATH=str(tmp_path)), capture_output=True, text=True, timeout=400)
        return ran.returncode, ran.stdout, ran.stderr
    with tiny_archive(tmp_path/'archive', cases=2) as gdc:
        lost = next(i for i, name in ((h['id'], h['file_name']) for h in gdc.hits['files']) if name.startswith('SIMU-00-0000-01A') and name.endswith('.tiff'))
        gdc.faults[lost] = ['404']
        code, out, err = run(gdc)
        assert code == 1 and re.search(r'4 files: 3 ok .* 1 bad', out) and '404' in out, out[-3000:] + err[-3000:]
        code, out, err = run(gdc)
    assert code == 0 and '4 files: 4 ok (3 were there)' in out and 'make reproduce PROFILE=tcga' in out, out[-3000:] + err[-3000:]
    assert len(pd.read_csv(tmp_path/'runs'/'tcga'/'source'/'manifest.csv')) == 2


# Wrong input

@pytest.mark.parametrize('command', ['reproduce', 'plan', 'doctor', 'download'])
@pytest.mark.parametrize('words, says', [(['--profile', 'nosuch'], "no profile 'nosuch'. Choose one of: brca, cptac, demo"), (['--set', 'training.stepz=3'], "no setting 'training.stepz'. It has: batch"),
                                         (['--set', 'training.steps'], 'Write it as name=value'), (['--set', 'seeds=[1'], 'not YAML'), (['--set', 'models=[nobody]'], 'No model nobody')])
def test_wrong_words_are_one_sentence_and_code_2(command, words, says):
    code, text = gemmgan(command, *words)
    assert code == 2 and says in text and len(text.splitlines()) == 1


@pytest.mark.parametrize('text, says', [('- 1\n', 'is not a profile'), ('run: x\n', 'says nothing about cohort'), ('run: "{preset}"\ncohort: {source: own}\n', 'missing'), ('a: [\n', 'not YAML'), ('', 'is not a profile')])
def test_a_file_that_is_no_profile(tmp_path, text, says):
    (tmp_path/'mine.yaml').write_text(text)
    for command in ('doctor', 'plan'):
        code, out = gemmgan(command, '--profile', tmp_path/'mine.yaml')
        assert code == 2 and says in out and len(out.splitlines()) == 1


@pytest.mark.parametrize('words, says', [
    (['dial', '--set', 'x'], 'name=value'), (['dial', '--set', 'cohort.features_of=nobody'], 'First: make reproduce PROFILE=nobody'), (['plan', '--profile', 'xena'], 'needs the folder'),
    (['doctor', '--set', 'cohort.selection={biggest: 1}', '--profile', 'tcga'], "no rule 'biggest'"), (['download', '--set', 'cohort.selection={biggest: 1}'], "no rule 'biggest'"),
    (['download', '--profile', 'demo'], 'its cohort is simulated'), (['download', '--to', 'x'], '--to belongs to --manifest'), (['download', '--manifest', 'nosuch.txt'], 'nosuch.txt cannot be read'),
    (['download', '--manifest', 'README.md'], 'README.md has no column id'), (['download', '--manifest', 'nbs'], 'nbs cannot be read'),
    (['download', '--manifest', 'nosuch.txt', '--set', 'cohort.endpoint='], 'needs an address'), (['evaluate', '--predictions', 'nosuch.h5ad', '--cohort', 'nosuch'], 'nosuch')])
def test_wrong_use_of_single_commands(words, says):
    code, text = gemmgan(*words)
    assert code == 2 and says in text


def test_a_manifest_that_leads_elsewhere_and_a_target_that_cannot_be(files, tmp_path):
    manifest, table, _ = files
    code, text = gemmgan('download', '--manifest', manifest, '--to', manifest/'under')
    assert code == 2 and 'cannot be written to' in text
    manifest.write_text(manifest.read_text().replace('1.svs', '../1.svs'))
    code, text = gemmgan('download', '--manifest', manifest, '--to', tmp_path/'to')
    assert code == 2 and 'line 3, column filename' in text and not (tmp_path/'to').exists()


# Help, completion, Ctrl-C

def test_every_help_page_has_examples_and_exit_codes():
    commands = {k: c for k, c in typer.main.get_command(r.app).commands.items() if not c.hidden}
    assert {'doctor', 'download', 'reproduce', 'plan', 'dial', 'evaluate'} <= set(commands)
    for name in commands:
        code, text = gemmgan(name, '--help')
        assert code == 0 and f'gemmgan {name}' in text.split('Examples')[1] and 'Exit codes: 0' in text and '2 ' in text.split('Exit codes')[1]


def test_help_loads_nothing_heavy():
    code = ("import sys, time, resource; t = resource.getrusage(resource.RUSAGE_SELF); import gemmgan_nb.reproduce as r\ntry: r.app(['--help'])\nexcept SystemExit: pass\n"
            "e = resource.getrusage(resource.RUSAGE_SELF); print('heavy:', [m for m in ('torch', 'pandas', 'papermill', 'matplotlib', 'snakemake', 'requests') if m in sys.modules])\n"
            "print('seconds:', e.ru_utime + e.ru_stime)")
    ran = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert 'heavy: []' in ran.stdout and float(ran.stdout.split('seconds:')[1]) < 1.5, ran.stdout + ran.stderr


def test_the_shell_completes_profiles_and_settings():
    ask = lambda words, n: CliRunner(env=dict(_GEMMGAN_COMPLETE='complete_bash', COMP_WORDS=words, COMP_CWORD=str(n))).invoke(r.app, prog_name='gemmgan').output.split()
    assert ask('gemmgan doctor --profile tc', 3) == ['tcga'] and 'doctor' in ask('gemmgan do', 1)
    assert 'training.steps=' in ask('gemmgan doctor --profile tcga --set training.', 5)


@pytest.mark.parametrize('words, says', [(['reproduce', '--set', 'training.steps=7'], "Go on: make reproduce PROFILE=demo SET='training.steps=7'"), (['doctor'], 'Nothing was changed'), (['plan'], 'Nothing was changed')])
def test_ctrl_c_is_130_and_says_how_to_go_on(monkeypatch, words, says):
    def stopped(*_, **__): raise KeyboardInterrupt
    for name in ('_run', 'examine'): monkeypatch.setattr(r, name, stopped)
    monkeypatch.setattr(r, 'lock', lambda path, patience: lock(path.with_name('.lock.test'), 0))
    monkeypatch.setattr(subprocess, 'call', stopped)
    code, text = gemmgan(*words)
    assert code == 130 and says in text
    (ROOT/'runs'/'demo'/'.lock.test').unlink(missing_ok=True)


def test_ctrl_c_in_a_download_keeps_what_has_arrived(files, tmp_path):
    manifest, table, contents = files
    words = [sys.executable, '-m', 'gemmgan_nb.reproduce', 'download', '--manifest', str(manifest), '--to', str(tmp_path/'to'), '--workers', '1']
    with TinyGdc([], [], contents) as gdc:
        gdc.faults[table.id[3]] = ['503']*9      # there the one worker waits, longer each time
        child = subprocess.Popen([*words, '--set', f'cohort.endpoint={gdc.url}'], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            end = time.time() + 200
            while len([1 for k, _ in gdc.log if k == table.id[3]]) < 2 and time.time() < end and child.poll() is None: time.sleep(.05)
            child.send_signal(signal.SIGINT)
            out, _ = child.communicate(timeout=60)
        finally: child.kill()
    assert child.returncode == 130 and 'What has arrived is kept. Go on: gemmgan download' in out and 'Traceback' not in out, out
    assert sum(1 for p in (tmp_path/'to').rglob('*.svs')) == 3


@pytest.mark.slow
def test_ctrl_c_ends_a_run_with_all_its_processes(tmp_path):
    import psutil
    for name in ('nbs', 'gemmgan_nb', 'workflow', 'data_manifest'): shutil.copytree(ROOT/name, tmp_path/name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    child = subprocess.Popen([sys.executable, '-m', 'gemmgan_nb.reproduce', 'reproduce', '--profile', 'tiny'], cwd=tmp_path, env=os.environ | dict(PYTHONPATH=str(tmp_path)),
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        end, below = time.time() + 300, []
        while not any('ipykernel' in ' '.join(p.cmdline()) for p in below) and time.time() < end:
            time.sleep(.2); below = [p for p in psutil.Process(child.pid).children(recursive=True) if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        child.send_signal(signal.SIGINT)
        out, _ = child.communicate(timeout=120)
    finally: child.kill()
    assert child.returncode == 130 and 'Go on: make reproduce PROFILE=tiny' in out, out[-2000:]
    assert not psutil.wait_procs(below, timeout=20)[1]


@pytest.mark.parametrize('path', sorted((ROOT/'workflow'/'profiles').glob('*.yaml')), ids=lambda p: p.stem)
def test_every_profile_names_rows_that_exist(path):
    profile = load_profile(path.stem)
    assert [e['spec']['name'] for e in entries_of(profile['models'])] == profile['models']
    Budget(**profile['training'])
