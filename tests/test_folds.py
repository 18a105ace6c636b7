"""Too few patients for a split: folds by patient, a row of fold models, what leaks and is refused, and what the tables say of it."""
import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from gemmgan_nb import experiment
from gemmgan_nb.condition import gene_correlation
from gemmgan_nb.data import Cohort, LeakError, pack, write_cohort
from gemmgan_nb.encoders import write_features
from gemmgan_nb.experiment import (ENTRIES, Folded, asked, condition_rows, cut_folds, entries_of, evaluate, evaluate_job, few_as_other, fit_job, fold_view, load_row, patient_folds,
                                   realism, scaled, sided)
from gemmgan_nb.tables import folded, power_lines, read_patients, resampled, smallest, spreads, write_tables
from gemmgan_nb.workspace import read_json, rng, write_json

ROOT = Path(__file__).resolve().parents[1]
TINY = dict(steps=40, batch=24, dim=16, hidden=32, latent=8, patches=3, lr=2e-3, lr_critic=2e-3, score_every=20, score_samples=4, dropout=0.)
FOLDS = ['fold0', 'fold1', 'fold2', 'fold3']


def made(folder, n=48, genes=30, two_slides=0):
    "Patients of three types whose image and text say something; the first `two_slides` have a second case with a slide of its own."
    r = rng(0, 'folds'); kind = np.arange(n) % 3
    hidden = r.normal(size=(n, 3))
    of = np.array([*range(n), *range(two_slides)])
    hidden, kind, names = hidden[of] + .1*r.normal(size=(len(of), 3)), kind[of], [f'c{i}' for i in range(len(of))]
    X = hidden @ r.normal(size=(3, genes)) + 2*r.normal(size=(3, genes))[kind] + r.normal(size=(len(of), genes))
    obs = pd.DataFrame(dict(group=[f'p{i}' for i in of], project='TOY', disease_type=np.array(['Gliomas', 'Adenomas', 'Nevi'])[kind], primary_site=np.array(['Brain', 'Colon', 'Skin'])[kind],
                            slide=[f's{i}' for i in range(len(of))], split='train'), index=names)
    write_cohort(folder, X, obs, pd.DataFrame(dict(symbol=[f'G{j}' for j in range(genes)]), index=[f'E{j}' for j in range(genes)]), 'zscore', ['image', 'text', 'labels'],
                 pd.DataFrame(dict(slide=obs.slide, path='none', mpp=.5)))
    pack(folder/'patches.safetensors', {f's{i}': hidden[i] + .3*r.normal(size=(4, 3)) for i in range(len(of))}, {c: [(s, None)] for c, s in obs.slide.items()})
    pack(folder/'tokens.safetensors', {f's{i}': np.eye(5)[[kind[i], 3, 4]] for i in range(len(of))}, {c: [(s, None)] for c, s in obs.slide.items()})
    return Cohort.load(folder)


def strangers(cohort, seed=0): other = cohort[:]; other.X = cohort.X[rng(seed, 'strangers').permutation(len(cohort))]; return other


@pytest.fixture(scope='module')
def cohort(tmp_path_factory): return made(tmp_path_factory.mktemp('cohort'))


@pytest.fixture(scope='module')
def fitted(cohort, tmp_path_factory):
    folder = tmp_path_factory.mktemp('fit')
    fit_job(entries_of(['ridge', 'noise', 'real']), cohort, [0, 1], {}, folder, folds=4)
    return folder


def repeat(fitted, name='ridge', seed=0): return load_row(ENTRIES[name], fitted/name/f'seed{seed}')


def everybody(cohort): return sided(cohort, ['test']*len(cohort))


def correlation(model, cohort): return gene_correlation(model.sample(cohort, 16, 0).mean(0), scaled(model, cohort)).mean().item()


# ---- the cut
def test_patients_are_dealt_whole_evenly_and_by_type():
    who = [f'P{i//3}' for i in range(333)]; kind = np.array(['rare' if int(w[1:]) % 10 == 0 else 'common' for w in who])
    fold = pd.Series(patient_folds(who, kind, 5, 3))
    assert fold.groupby(who).nunique().max() == 1 and (fold == patient_folds(who, kind, 5, 3)).all() and (fold != patient_folds(who, kind, 5, 4)).any()
    patients = pd.DataFrame(dict(kind=kind, fold=fold)).groupby(np.array(who)).first()
    assert np.ptp(patients.fold.value_counts()) <= 1 and np.ptp(pd.crosstab(patients.kind, patients.fold).to_numpy(), axis=1).max() <= 1


def test_everybody_is_tested_once_a_repeat_and_never_seen(cohort):
    table = cut_folds(cohort, 4, 0)
    assert ((table[FOLDS] == 'test').sum(axis=1) == 1).all() and not table[FOLDS].equals(cut_folds(cohort, 4, 1)[FOLDS])
    for f in range(4):
        view = fold_view(cohort, table, f)
        assert [len(view.split(s)) for s in ('train', 'val', 'test')] == [27, 9, 12]
        for c in ('disease_type', 'primary_site'): assert set(view.split('test').obs[c]) <= set(view.split('train').obs[c])


def test_cases_of_one_patient_go_together(tmp_path):
    table = cut_folds(made(tmp_path, two_slides=20), 4, 0)
    assert len(table) == 68 and table.groupby('group')[FOLDS].nunique().to_numpy().max() == 1


def test_rare_labels_are_one():
    words = pd.Series(['a']*9 + ['b']*4 + ['c']*2 + ['d']); who = [f'P{i}' for i in range(16)]
    assert pd.Series(few_as_other(words, who)).value_counts().to_dict() == dict(a=9, b=4, Other=3)
    assert pd.Series(few_as_other(words[:15], who[:15])).value_counts().to_dict() == dict(a=9, Other=6)     # two are still too few: the next rarest joins
    assert few_as_other(words[:13], ['one']*9 + who[9:13]).tolist() == ['Other']*13                        # nine cases of one patient are one patient


def test_validation_gives_back_what_training_would_lack(tmp_path):
    cohort = made(tmp_path); cohort.obs = cohort.obs.assign(primary_site=['Eye']*4 + ['Skin']*44, disease_type='Nevi')
    for seed in range(12):
        table = cut_folds(cohort, 4, seed)
        for f in FOLDS: assert not (table[f][:4] == 'test').any() or (table[f][:4] == 'train').any()


@pytest.mark.parametrize('k, says', [(1, 'make no 1 folds'), (17, '48 patients make no 17 folds')])
def test_too_few_patients(cohort, k, says):
    with pytest.raises(ValueError, match=says): cut_folds(cohort, k, 0)


# ---- a row of fold models
def test_each_case_is_drawn_and_scaled_by_the_model_that_did_not_see_it(cohort, fitted):
    model = repeat(fitted); at = model.place(cohort)
    drawn, real = model.sample(cohort, 3, 5), scaled(model, cohort)
    for f, m in enumerate(model.models):
        mine = np.flatnonzero(at == f)
        assert not set(m.about['groups']) & set(cohort.obs.group.iloc[mine]) and list(mine) == list(np.flatnonzero(model.table[f'fold{f}'] == 'test'))
        assert torch.equal(drawn[:, mine], m.sample(cohort[mine], 3, 4*5 + f)) and torch.equal(real[mine], torch.from_numpy(m.scaler.transform(cohort[mine].X)))
    order = rng(0).permutation(len(cohort)); assert torch.equal(scaled(model, cohort[order]), real[order])
    noise = repeat(fitted, 'noise').sample(cohort, 1, 0)[0]; assert len({tuple(row[:3].tolist()) for row in noise}) == len(cohort)     # folds share no noise


def test_somebody_new_is_nobodys_patient(cohort, fitted):
    new = cohort[:2]; new.obs = new.obs.assign(group=['n0', 'n1'], slide=['x', 'y'])
    assert repeat(fitted).sample(new, 2, 0).shape == (2, 2, 30)


def test_signal_is_found_and_strangers_give_nothing(cohort, tmp_path):
    rows = ['ridge', 'knn', 'class_mean']
    fit_job(entries_of(rows), cohort, [0], {}, tmp_path/'true', folds=4)
    for name in rows: assert correlation(repeat(tmp_path/'true', name), cohort) > .2, name
    found = []
    for s in range(3):
        fit_job(entries_of(rows), strangers(cohort, s), range(3), {}, tmp_path/f's{s}', folds=4)
        found += [[correlation(repeat(tmp_path/f's{s}', name, r), strangers(cohort, s)) for name in rows] for r in range(3)]
    found = np.mean(found, 0)
    assert np.abs(found[:2]).max() < .06 and -.15 < found[2] < .06, found       # nothing is lent; of a row with three values, leaving out takes a little


def test_networks_too(cohort, tmp_path):
    rows = entries_of(['gemmgan'])
    done = fit_job(rows, cohort, [0], TINY, tmp_path, folds=3)
    assert (done.seconds > 0).all() and not list(tmp_path.rglob('reliability.json')) and len(list(tmp_path.rglob('model.safetensors'))) == 3
    found = evaluate_job(rows, cohort, tmp_path, tmp_path, generations=1, samples=16, shuffles=2).groupby('metric').value.mean()
    assert found['correlation'] > found['correlation_wrong_patient'] + .1 and found['correlation_shuffled_image'] < found['correlation']
    assert {'genes_fdr', 'correlation_zeroed_image', 'lr_auc', 'precision', 'crps'} <= set(found.index)
    written = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('model.safetensors')}
    fit_job(rows, cohort, [0], TINY, tmp_path, folds=3); assert written == {p: p.stat().st_mtime_ns for p in tmp_path.rglob('model.safetensors')}
    fit_job(rows, cohort, [0], TINY | dict(steps=2), tmp_path, folds=2); assert read_json(tmp_path/'gemmgan'/'seed0'/'folds.json')['folds'] == 2


def test_patients_are_exchanged_within_their_fold(cohort, fitted, monkeypatch):
    model, seen = repeat(fitted), []
    real_view = experiment.seen_under
    monkeypatch.setattr(experiment, 'seen_under', lambda part, view, *rest: seen.append((part, view, real_view(part, view, *rest))) or seen[-1][2])
    condition_rows(model, everybody(cohort), 0, 4, 2)
    exchanged = [(part, other) for part, view, other in seen if view.startswith(('shuffled', 'wrong'))]; at = model.place(cohort)
    assert len(exchanged) == 3*2*4
    for part, other in exchanged: assert len(set(at[other.image_of]) | set(at[other.text_of])) == 1 and set(at[other.image_of]) == set(model.place(part))


def test_realism_does_not_praise_a_row_that_hands_out_its_training_patients(cohort, fitted):
    model, found = repeat(fitted, 'real'), {}
    for k in (1, 4):
        by_fold = [experiment.precision_recall(m.scaler.transform(test.X), m.sample(test, 1, f)[0].numpy(), k)['precision'] for f, m in enumerate(model.models) for test in [fold_view(cohort, model.table, f).split('test')]]
        found[k] = np.mean(by_fold)
    together = experiment.precision_recall(scaled(model, cohort).numpy(), model.sample(cohort, 1, 0)[0].numpy(), 1)['precision']
    assert together > .95 and found[1] < .9, (together, found)
    panel = realism(model, everybody(cohort), 0)
    assert panel['precision'] == pytest.approx(found[4]) and not any(k.startswith(('disease', 'primary', 'as_coded')) or k.endswith('_low') for k in panel)


def test_blocks_are_refused(cohort, fitted):
    with pytest.raises(ValueError, match='no calibration side, so privacy'): evaluate(repeat(fitted), everybody(cohort), blocks=('privacy',), generations=1, samples=4, shuffles=1)


# ---- leaks
@pytest.fixture
def copied(fitted, tmp_path): shutil.copytree(fitted/'ridge', tmp_path/'ridge'); return tmp_path


def test_a_patient_in_two_folds(cohort, fitted):
    model = repeat(fitted); at = model.place(cohort)
    one = dict(group=cohort.obs.group.where(cohort.obs.index != cohort.obs.index[at != at[0]][0], 'p0'))
    table, double = model.table.assign(**one), cohort[:]; double.obs = cohort.obs.assign(**one)
    with pytest.raises(LeakError, match='p0 stands on'): fold_view(double, table, 0)
    planted = Folded(model.models, table)
    with pytest.raises(LeakError, match='c0 was seen by all 4 fold models'): planted.sample(double, 1, 0)
    with pytest.raises(LeakError, match='trained on 1 of these groups, p0'): evaluate(planted, everybody(double), generations=1, samples=4)
    assert pd.Series(patient_folds(double.obs.group, double.obs.disease_type, 4, 0)).groupby(double.obs.group.to_numpy()).nunique().max() == 1       # the cut itself keeps them together


def test_a_second_slide_of_a_patient_and_a_shared_slide(cohort, fitted):
    model = repeat(fitted)
    second = cohort[:1]; second.obs = second.obs.assign(slide='elsewhere'); assert model.place(second)[0] == model.place(cohort[:1])[0]        # goes where its patient is unknown
    shared = cohort[:]; shared.obs = cohort.obs.assign(slide=cohort.obs.slide.replace({f's{i}': 's0' for i in range(8)}))
    with pytest.raises(LeakError, match='Slide s0'): cut_folds(shared, 4, 0)
    with pytest.raises(LeakError, match='seen by all 4'): model.place(shared)


@pytest.mark.parametrize('edit, says', [(lambda t: t.replace('val', 'test', 1), 'not the file that was written'), (lambda t: t.replace('train', 'test', 1), 'not the file that was written')])
def test_edited_folds(copied, edit, says):
    path = copied/'ridge'/'seed0'/'folds.csv'; path.write_text(edit(path.read_text()))
    with pytest.raises(LeakError, match=says): repeat(copied)


def test_models_of_other_folds(cohort, copied):
    folder = copied/'ridge'/'seed0'
    (folder/'fold0').rename(folder/'x'); (folder/'fold1').rename(folder/'fold0'); (folder/'x').rename(folder/'fold1')
    with pytest.raises(LeakError, match='fold0 was not trained on the cases that folds.csv names'): repeat(copied)


def test_a_model_that_has_seen_a_test_patient(cohort, fitted):
    model = repeat(fitted)
    for m in model.models: m.about = copy.deepcopy(m.about); m.about['slides'].append('s0')
    planted = Folded(model.models, model.table)
    with pytest.raises(LeakError, match='these slides, s0'): evaluate(planted, everybody(cohort), generations=1, samples=4)
    with pytest.raises(LeakError, match='c0 was seen by all'): planted.sample(cohort, 1, 0)


@pytest.mark.parametrize('fact', ['missing_filled', 'genes_dropped'])
def test_nothing_is_fitted_before_the_folds(tmp_path, fact):
    cohort = made(tmp_path)
    write_json(tmp_path/'provenance.json', {fact: 0}); cut_folds(cohort, 4, 0)
    write_json(tmp_path/'provenance.json', {fact: 3})
    with pytest.raises(LeakError, match=f'{fact} = 3, learned from patients whom a fold will test'): fit_job(entries_of(['noise']), cohort, [0], {}, tmp_path/'f', folds=4)


def test_folds_of_another_cohort(cohort, fitted):
    with pytest.raises(LeakError, match='not about the cases'): fold_view(cohort[5:], repeat(fitted).table, 0)


# ---- tables
@pytest.fixture(scope='module')
def evaluated(cohort, fitted, tmp_path_factory):
    out = tmp_path_factory.mktemp('evaluate')
    return evaluate_job(entries_of(['noise', 'ridge']), cohort, fitted, out, generations=[2, 1], samples=8, shuffles=2), out


def test_repeats_are_the_seeds_of_the_tables(cohort, evaluated, tmp_path):
    scores, folder = evaluated; s = spreads(scores); patients = read_patients([folder])
    assert s.loc[('correlation', 'ridge'), 'seeds'] == 2 and s.loc[('correlation', 'ridge'), 'over_seeds'] > 0 and s.loc[('precision', 'ridge'), 'runs'] == 2
    assert not np.allclose(patients['real/0/truth'], patients['real/1/truth'])
    for seed in (0, 1):     # each repeat is resampled in its own units
        alone = resampled({'real': patients[f'real/{seed}/truth'], f'ridge/{seed}/mean': patients[f'ridge/{seed}/mean']}, 50)
        np.testing.assert_array_equal(alone['correlation', 'ridge', seed], resampled(patients, 50)['correlation', 'ridge', seed])
    done = write_tables(tmp_path, scores, cohort, patients, resamples=200, folds=dict(k=4, repeats=2))
    notes = ' '.join(done['sheets']['condition'].notes)
    for say in ('48 patients (48 cases), cross-validated in 4 folds of 12 to 12 patients, cut anew 2 times', 'deviation over 2 repeats', 'test patients and repeats', 'exchanged within a fold', 'Utility is "-"'): assert say in notes, say
    assert 'training seed' not in notes and 'training, ' not in notes and '[' in done['sheets']['condition'].text.loc[('Condition', 'Correlation with the patient ↑'), 'Ridge']


def drawn(n): return {('correlation', m): x + rng(0, m).normal(size=2000)*.6/n**.5 for m, x in (('gemmgan', .1), ('ridge', .15), ('noise', 0.))}


@pytest.mark.parametrize('n, under', [(37, True), (148, True), (3000, False)])
def test_what_so_few_patients_could_have_shown_follows_from_their_number(n, under):
    line, = power_lines(drawn(n), n)
    assert line.startswith('Underpowered: ') == under and f'{n} patients' in line and 'that of Ridge, the best other row' in line
    assert f'difference of {smallest(np.std(drawn(n)["correlation", "gemmgan"] - drawn(n)["correlation", "ridge"])):.2f}' in line


def test_the_smallest_difference_is_found_in_four_runs_of_five():
    r, n, spread = rng(0, 'power'), 37, .8
    d = smallest(spread/n**.5); found = r.normal(d, spread, (20_000, n)); z = found.mean(1)/(spread/n**.5)
    assert (z > 1.96).mean() == pytest.approx(.8, abs=.02) and power_lines({}, 37) == []
    assert '37 patients (37 cases)' in folded(type('C', (), dict(obs=pd.DataFrame(dict(group=range(37))), __len__=lambda s: 37))(), dict(k=5, repeats=3))[0]


def test_one_answer_of_one_model(cohort):
    assert torch.equal(asked('row', cohort, 7, lambda m, part, s, f: torch.tensor([[len(part), s, f is None]])), torch.tensor([[48, 7, 1]]))


# ---- the profile
@pytest.mark.slow
def test_the_profile_goes_from_a_folder_to_the_tables(tmp_path):
    project, mine = tmp_path/'project', tmp_path/'mine'
    for name in ('nbs', 'gemmgan_nb', 'workflow', 'data_manifest'): shutil.copytree(ROOT/name, project/name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    cohort = made(mine); cohort.obs[['disease_type', 'primary_site']].rename_axis('case_id').to_csv(mine/'clinical.csv')
    pd.DataFrame(cohort.X, cohort.obs.index, cohort.var.symbol).to_csv(mine/'expression.csv'); (mine/'split.csv').unlink()
    pd.DataFrame(dict(case_id=cohort.obs.index, slide=cohort.obs.slide)).to_csv(mine/'slides.csv', index=False)
    for i, (c, s) in enumerate(cohort.obs.slide.items()):
        for folder, name, bank in (('features', s, cohort.patches), ('tokens', c, cohort.tokens)): write_features(mine/folder/f'{name}.h5', bank.first([i])[0][0].numpy(), None, {}, encoder='toy')
    def command(word, **settings):
        words = [w for k, v in (dict(cohort__folder=mine, cohort__unit='zscore', cohort__folds='{k: 3, repeats: 2}', models='[noise, ridge, gemmgan]', training__steps=10) | settings).items()
                 for w in ('--set', f'{k.replace("__", ".")}={v}')]
        ran = subprocess.run([sys.executable, '-m', 'gemmgan_nb.reproduce', word, '--profile', 'patients', *words], cwd=project, env=os.environ | dict(PYTHONPATH=str(project)), capture_output=True, text=True, timeout=1200)
        return ran.returncode, ran.stdout + ran.stderr
    for settings, says in ((dict(cohort__max_zeros=.9), 'set cohort.max_zeros=1'), (dict(evaluation__blocks='[privacy]'), 'set evaluation.blocks=')):
        code, out = command('plan', **settings); assert code == 1 and says in out, out[-2000:]
    code, out = command('reproduce'); assert code == 0, out[-4000:]
    tables = project/'runs'/'patients'/'tables'
    for name in ('table1', 'table2', 'condition'): assert 'cut anew 2 times' in (tables/f'{name}.md').read_text()
    assert 'nderpowered' in (tables/'headline.md').read_text() and (tables/'figure1.png').exists() and not (project/'figures').exists()
