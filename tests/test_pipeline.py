"""The pipeline on sixteen simulated patients, in a copy of the project: bad input, what is stale, and kill -9."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
import yaml
from safetensors.numpy import load_file

from gemmgan_nb.baselines import Ridge
from gemmgan_nb.data import TINY, Cohort, tiny_tables
from gemmgan_nb.reproduce import run_stage
from gemmgan_nb.workspace import load_profile, read_json

ROOT = Path(__file__).parents[1]


class Project:
    "A copy of the project in which a test may break things."
    def __init__(self, folder, profile='tiny'):
        self.folder, self.profile, self.run = folder, profile, folder/'runs'/profile
        for name in ('nbs', 'gemmgan_nb', 'workflow', 'data_manifest'):
            shutil.copytree(ROOT/name, folder/name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
        self.env = os.environ | dict(PYTHONPATH=str(folder))

    def command(self, *words): return [sys.executable, '-m', 'gemmgan_nb.reproduce', words[0], '--profile', self.profile, *words[1:]]

    def __call__(self, *words):
        ran = subprocess.run(self.command(*words), cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=600)
        return ran.returncode, ran.stdout + ran.stderr

    def start(self, *words): return subprocess.Popen(self.command(*words), cwd=self.folder, env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def stale(self):
        "The rules that a run would execute."
        _, out = self('plan')
        if 'Nothing to be done' in out: return set()
        return set(re.findall(r'^\s*(\w+)\s+1$', out, re.M)) - {'all', 'total'}

    def edit(self, path, old, new):
        text = (self.folder/path).read_text()
        assert old in text, f'{path} no longer holds {old!r}'
        (self.folder/path).write_text(text.replace(old, new))


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    "A finished run in which one case lost its expression, one slide is missing and one is cut short."
    p = Project(tmp_path_factory.mktemp('project'))
    code, out = p('reproduce', '--until', 'simulate')
    assert code == 0, out[-3000:]
    manifest = pd.read_csv(p.run/'source'/'manifest.csv')
    p.lost, p.missing, p.cut = manifest.expression[0], manifest.slide[1], manifest.slide[2]
    (p.run/'source'/p.lost).unlink()
    (p.run/'source'/p.missing).unlink()
    whole = (p.run/'source'/p.cut).read_bytes()
    (p.run/'source'/p.cut).write_bytes(whole[:len(whole)//3])
    p.first = p('reproduce')
    return p


def test_bad_items_are_listed_and_the_rest_goes_on(project):
    code, out = project.first
    assert code == 3, out[-3000:]
    assert len(pd.read_csv(project.run/'cohort'/'problems.csv')) == 1
    named = set(pd.read_csv(project.run/'tiles'/'problems.csv').item)
    assert named == {Path(project.missing).stem, Path(project.cut).stem}
    table = pd.read_csv(project.run/'tables'/'table1.csv')
    assert {'Noise', 'Train mean', 'Ridge', 'GeMM-GAN'} <= set(table.columns) and len(table) > 10
    for name in ('figure1.png', 'figure2.png', 'condition.md'): assert (project.run/'tables'/name).stat().st_size > 500
    record = read_json(project.run/'fit'/'gemmgan'/'provenance.json')
    assert record['seconds'] > 0 and record['versions']['torch'] and record['params']['seeds'] == [0]


def test_a_second_run_finds_nothing_to_do_and_still_tells_of_the_bad_items(project):
    assert project.stale() == set()
    assert 'Nothing to be done' in project('plan', '--cores', '1')[1]      # on fewer cores than the run had
    code, out = project('reproduce')
    assert code == 3 and 'items were left out' in out


def test_anybodys_profiles_are_scored_with_floor_and_ceiling(project):
    cohort = Cohort.load(project.run/'cohort')
    rows = Ridge.load(project.run/'fit'/'untrained'/'ridge'/'seed0').sample(cohort, 1, 0)[0].numpy()
    mine = ad.AnnData(rows, obs=cohort.obs[[]], var=cohort.var[[]], uns=dict(unit='zscore', trained_on=list(cohort.split('train').obs.index)))
    mine.write_h5ad(project.folder/'mine.h5ad')
    def ask(file):
        words = [sys.executable, '-m', 'gemmgan_nb.reproduce', 'evaluate', '--predictions', str(project.folder/file), '--cohort', str(project.run/'cohort')]
        ran = subprocess.run(words, cwd=project.folder, env=project.env, capture_output=True, text=True, timeout=300)
        return ran.returncode, ran.stdout + ran.stderr
    code, out = ask('mine.h5ad')
    assert code == 0, out
    scores = pd.read_csv(project.folder/'mine.metrics.csv').set_index('metric')
    assert {'precision', 'c_mse', 'correlation', 'correlation_wrong_patient'} <= set(scores.index)
    assert scores.loc['precision', ['floor', 'ceiling']].notna().all()
    mine[:, 1:].write_h5ad(project.folder/'fewer.h5ad')
    code, out = ask('fewer.h5ad')
    assert code == 2 and 'lacks 1 of' in out


def with_profile(project, name, **changes):
    "A profile beside the others, made from the tiny one."
    profile = yaml.safe_load((project.folder/'workflow'/'profiles'/'tiny.yaml').read_text()) | changes
    (project.folder/f'{name}.yaml').write_text(yaml.safe_dump(profile | dict(run=name)))
    words = [sys.executable, '-m', 'gemmgan_nb.reproduce', 'reproduce', '--profile', str(project.folder/f'{name}.yaml')]
    return lambda *more: subprocess.run([*words, *more], cwd=project.folder, env=project.env, capture_output=True, text=True, timeout=300)


def test_a_cohort_of_ones_own_needs_only_a_profile(project):
    tables = tiny_tables(project.folder/'tables')
    run = with_profile(project, 'mine', cohort=TINY | dict(source='own', folder=str(tables)), models=['noise', 'train_mean', 'ridge'])
    ran = run('--until', 'encode')
    assert ran.returncode in (0, 3), ran.stdout[-3000:] + ran.stderr[-3000:]
    cohort = Cohort.load(project.folder/'runs'/'mine'/'cohort')
    assert cohort.patches is None and cohort.tokens.counts.min() > 0 and cohort.modalities == {'text', 'labels'}


def test_another_dial_takes_slides_and_texts_from_its_model_run(project):
    run = with_profile(project, 'dialled', cohort=load_profile('tiny')['cohort'] | dict(image_signal=0., features_of='tiny'))
    ran = run('--until', 'reuse', 'prepare')
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    dialled, model = (Cohort.load(project.folder/'runs'/name/'cohort') for name in ('dialled', 'tiny'))
    both = [c for c in dialled.obs.index if c in model.obs.index]
    at = [list(c.obs.index).index(both[0]) for c in (dialled, model)]
    assert (dialled.patches.mean()[at[0]] == model.patches.mean()[at[1]]).all()
    assert not (project.folder/'runs'/'dialled'/'source'/'slides').exists()
    assert (dialled.X[at[0], :50] != model.X[at[1], :50]).any()


def test_prose_and_demos_rerun_nothing(project):
    for path in sorted((project.folder/'nbs').glob('[0-9]*.ipynb')):
        nb = json.loads(path.read_text())
        nb['cells'][0]['source'] = '# Another title\n'
        for cell in nb['cells']:
            if cell['cell_type'] == 'markdown' and not ''.join(cell['source']).strip().startswith('## '): cell['source'] = 'Other words.\n'
        nb['cells'].append(dict(nb['cells'][0], id='demo', cell_type='code', source='1 + 1  # another demo', outputs=[], execution_count=None, metadata={}))
        path.write_text(json.dumps(nb))
    project.edit('gemmgan_nb/training.py', 'def crps(', '# a comment\ndef crps(')
    assert project.stale() == set()


def test_a_changed_metric_evaluates_again_but_never_retrains(project):
    project.edit('gemmgan_nb/metrics.py', 'def correlation_mse(', 'ANOTHER = 1\ndef correlation_mse(')
    assert project.stale() == set()
    text = (project.folder/'gemmgan_nb'/'metrics.py').read_text()
    changed = re.sub(r'(def correlation_mse\((?:.|\n)*?\n    ".*"\n)', r'\1    ANOTHER\n', text)
    assert changed != text
    (project.folder/'gemmgan_nb'/'metrics.py').write_text(changed)
    assert project.stale() == {'evaluate_untrained', 'evaluate_gemmgan', 'tables', 'report'}
    (project.folder/'gemmgan_nb'/'metrics.py').write_text(text)


def test_a_changed_network_retrains_what_uses_it(project):
    project.edit('gemmgan_nb/wgan_gp.py', 'return -fake.mean()', 'return -1.0*fake.mean()')
    assert project.stale() == {'fit_gemmgan', 'evaluate_gemmgan', 'tables', 'report'}
    project.edit('gemmgan_nb/wgan_gp.py', 'return -1.0*fake.mean()', 'return -fake.mean()')


def test_a_changed_picture_style_reruns_no_training(project):
    project.edit('gemmgan_nb/workspace.py', "'axes.linewidth': .7", "'axes.linewidth': .8")
    assert not {r for r in project.stale() if r.startswith(('fit', 'evaluate', 'encode'))}
    project.edit('gemmgan_nb/workspace.py', "'axes.linewidth': .8", "'axes.linewidth': .7")


def writers(folder):
    "Kernels that are at work for this copy of the project."
    def mine(p):
        try: return p.environ().get('PYTHONPATH') == str(folder) and 'ipykernel' in ' '.join(p.cmdline()) and p.status() != psutil.STATUS_ZOMBIE
        except psutil.Error: return False
    return [p for p in psutil.process_iter() if mine(p)]


def wait_for(what, seconds=300):
    end = time.time() + seconds
    while time.time() < end:
        if found := what(): return found
        time.sleep(.1)
    raise AssertionError('It did not happen in time.')


def test_killed_in_training_a_run_goes_on_from_its_checkpoint(project):
    "kill -9 on the kernel, on papermill, on Snakemake and on the command itself in turn; each time nothing lives on, and the next run resumes."
    settings = ['--set', 'training.steps=100000', '--until', 'fit_gemmgan']
    job = project.run/'fit'/'gemmgan'
    reached = 0

    def step():
        try: return read_json(job/'heartbeat.json')['done']
        except (OSError, ValueError): return 0

    for victim in ('ipykernel', 'gemmgan_nb.reproduce stage', 'snakemake', 'reproduce --profile'):
        (job/'heartbeat.json').unlink(missing_ok=True)
        begun, run = time.time(), project.start('reproduce', *settings)
        try:
            first = wait_for(step)
            assert first >= reached, f'began at step {first}, although a checkpoint held step {reached}'
            wait_for(lambda first=first, begun=begun: step() > first + 3 and any(p.stat().st_mtime > begun for p in job.rglob('checkpoint.pt')))
            assert len(writers(project.folder)) == 1
            chain = [p for p in [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)] if victim in ' '.join(p.cmdline())]
            checkpoint = max(job.rglob('checkpoint.pt'), key=lambda p: p.stat().st_mtime)
            reached = torch.load(checkpoint, weights_only=True)['step']
            os.kill(chain[0].pid, signal.SIGKILL)
            assert run.wait(120) != 0
            wait_for(lambda: not writers(project.folder), 60)
        finally: run.kill()
    code, out = project('reproduce', '--set', 'training.steps=100000', '--set', 'training.batch=8', '--until', 'fit_gemmgan', '-n')
    assert 'fit_gemmgan' in out


def test_two_runs_of_one_profile_do_not_mix(project):
    from gemmgan_nb.workspace import lock
    with lock(project.run/'.lock'):
        code, out = project('reproduce')
    assert code == 2 and 'Another run' in out


@pytest.mark.parametrize('words, says', [(['--profile', 'nosuch'], 'no profile'), (['--set', 'training.stepz=3'], 'stepz')])
def test_wrong_use_is_named(words, says):
    ran = subprocess.run([sys.executable, '-m', 'gemmgan_nb.reproduce', 'reproduce', *words], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 2 and says in ran.stdout and 'Traceback' not in ran.stdout + ran.stderr


def test_unknown_parameter_of_a_stage_is_an_error(tmp_path):
    with pytest.raises(KeyError, match='no parameter tile_size'): run_stage(ROOT/'nbs'/'08_tiling.ipynb', tmp_path/'x.ipynb', dict(tile_size=3))


def test_profiles_name_models_that_exist():
    from gemmgan_nb.experiment import jobs_of
    for path in (ROOT/'workflow'/'profiles').glob('*.yaml'): assert jobs_of(load_profile(str(path))['models'])


def test_slides_are_shared_among_jobs_and_joined():
    settings = json.dumps({'run': 'plan_of_shares', 'tiles.shards': 2, 'encoders.shards': 3})
    planned = subprocess.run([sys.executable, '-m', 'snakemake', '--snakefile', 'workflow/Snakefile', '--config', 'profile=tcga', f'settings={settings}', '--cores', '1', '-n', '--until', 'encode'],
                             cwd=ROOT, capture_output=True, text=True)
    assert planned.returncode == 0, planned.stdout + planned.stderr
    rules = re.findall(r'^rule (\w+):\n(?:.*\n)*?    input: (.*)\n    output: (.*)$', planned.stdout, re.M)
    found = {name: (inputs, outputs) for name, inputs, outputs in rules}
    assert {n for n in found if n.startswith(('tile', 'encode'))} == {'tile', 'tile_1_of_2', 'tile_2_of_2', 'encode', 'encode_1_of_3', 'encode_2_of_3', 'encode_3_of_3'}
    for stage, n in (('tile', 2), ('encode', 3)):
        for i in range(1, n + 1): assert found[f'{stage}_{i}_of_{n}'][1] in found[stage][0].split(', ')      # the joining job waits for each share
    assert found['tile'][1] in found['encode_2_of_3'][0] and 'patches.safetensors' in found['encode'][1]


@pytest.mark.slow
def test_shares_make_the_same_features(tmp_path_factory):
    p = Project(tmp_path_factory.mktemp('shares'))
    for run, shares in dict(alone=(), shared=('tiles.shards=2', 'encoders.shards=2')).items():
        code, out = p('reproduce', '--until', 'encode', *(w for s in (f'run={run}', *shares) for w in ('--set', s)))
        assert code == 0, out[-3000:]
    assert (p.folder/'runs'/'shared'/'features'/'shard_2_of_2').exists()
    alone, shared = (load_file(p.folder/'runs'/run/'cohort'/'patches.safetensors') for run in ('alone', 'shared'))
    assert alone.keys() == shared.keys() and all(np.array_equal(v, shared[k]) for k, v in alone.items())
