"""Each kind of leak, planted; each must be refused by name."""
import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.decomposition import PCA

from gemmgan_nb.data import (TINY, Cohort, LeakError, Scaler, fit_on_training, gene_filter, own_cohort, pack, prepare, split_by_patient, tiny_source, tiny_tables, write_cohort,
                             write_star)
from gemmgan_nb.training import WGAN, Budget, ModelSpec, refuse_seen, train_network
from gemmgan_nb.workspace import read_json, rng, write_json

SMALL = Budget(steps=4, batch=8, patches=2, dim=16, hidden=16, latent=4, score_every=2, score_samples=2, dropout=0.)
IMAGE = ModelSpec('g', 'G', uses=('image',))


def table(n=40, seed=0):
    names = [f'c{i}' for i in range(n)]
    return pd.DataFrame(dict(group=[f'p{i}' for i in range(n)], project='X', disease_type=['A', 'B']*(n//2), primary_site='S', slide=[f's{i}' for i in range(n)],
                             split=['train']*(n//2) + ['val']*(n//8) + ['cal']*(n//8) + ['test']*(n - n//2 - 2*(n//8))), index=pd.Index(names, name='case_id'))


def written(folder, obs, genes=6, **uns):
    r = rng(0, 'leaks')
    write_cohort(folder, r.normal(size=(len(obs), genes)), obs, pd.DataFrame(dict(symbol=[f'G{j}' for j in range(genes)]), index=[f'E{j}' for j in range(genes)]), 'zscore',
                 ['image', 'labels'], pd.DataFrame(dict(slide=obs.slide, path='none', mpp=.5)), uns=uns)
    pack(folder/'patches.safetensors', {s: r.normal(size=(3, 4)) for s in obs.slide.unique()}, {c: [(s, None)] for c, s in obs.slide.items()})
    return Cohort.load(folder)


@pytest.fixture(scope='module')
def cohort(tmp_path_factory): return written(tmp_path_factory.mktemp('cohort'), table())


@pytest.mark.parametrize('sides', [('train', 'val'), ('train', 'test'), ('val',), ('test',), ('train', 'cal')])
def test_nothing_is_fitted_on_other_than_training_cases(cohort, sides):
    seen = cohort.split(*sides)
    for what, fit in {'The scaler': lambda: Scaler.fit(seen), 'The gene filter': lambda: gene_filter(seen), 'The PCA': lambda: fit_on_training(seen, 'The PCA', PCA(2).fit),
                      'The top-k list': lambda: fit_on_training(seen, 'The top-k list', lambda X: np.argsort(-X.var(0))[:3])}.items():
        with pytest.raises(LeakError, match=f'{what} would see .* not training cases.*Pass cohort.split'): fit()


def test_one_test_case_among_the_training_cases_is_enough(cohort):
    mixed = cohort[[*range(20), 39]]
    with pytest.raises(LeakError, match='would see 1 cases .* c39'): Scaler.fit(mixed)
    with pytest.raises(LeakError, match='Training would see|scaler would see'): WGAN(IMAGE, SMALL).fit(mixed, cohort.split('val'), 0)


def test_what_was_fitted_remembers_whom_it_saw(cohort):
    train, test = cohort.split('train'), cohort.split('test')
    pca = fit_on_training(train, 'The PCA', PCA(2).fit)
    assert pca.seen == tuple(train.obs.index) == Scaler.fit(train).seen and set(pca.groups) == set(train.obs.group)
    pca.refuse(test)
    with pytest.raises(LeakError, match='The PCA was fitted on 1 of these cases, c3'): pca.refuse(cohort[[3, 39]])
    other = test[:2]; other.obs = other.obs.assign(group=['p5', 'elsewhere'])
    with pytest.raises(LeakError, match='these patients, p5'): pca.refuse(other)


@pytest.mark.parametrize('side', ['train', 'test', 'cal'])
def test_a_model_is_selected_on_validation_cases_alone(cohort, side):
    train, wrong = cohort.split('train'), cohort.split(side)
    with pytest.raises(LeakError, match='Model selection would see .* not validation'): WGAN(IMAGE, SMALL).fit(train, wrong, 0)
    model = WGAN(IMAGE, SMALL); model.fit(train, cohort.split('val'), 0)
    with pytest.raises(LeakError, match='Model selection'): train_network(model, train, wrong, 0, SMALL)


@pytest.mark.parametrize('side', ['val', 'cal', 'test'])
def test_two_slides_of_one_patient_stand_on_one_side(tmp_path, side):
    obs = table(); obs.loc[obs.index[obs.split == side][0], 'group'] = 'p0'
    with pytest.raises(LeakError, match=f'p0 stands on the {side} side and on another'): written(tmp_path, obs)
    assert not (tmp_path/'cohort.h5ad').exists()


def test_one_slide_stands_on_one_side_even_where_patients_may_not(tmp_path):
    obs = table(); obs.loc['c39', ['group', 'slide']] = ['p0', 's0']
    with pytest.raises(LeakError, match='Slide s0'): written(tmp_path, obs, within_patient=True)
    obs.loc['c39', 'slide'] = 's39'
    assert bool(written(tmp_path, obs, within_patient=True).uns['within_patient'])


def test_split_is_by_patient_stratified_and_repeatable():
    who = [f'P{i//3}' for i in range(900)]; kind = ['rare' if int(w[1:]) % 10 == 0 else 'common' for w in who]
    sides = pd.Series(split_by_patient(who, kind, seed=3))
    assert sides.groupby(who).nunique().max() == 1 and (sides == split_by_patient(who, kind, seed=3)).all()
    shares = pd.crosstab(np.array(kind), sides.to_numpy(), normalize='index')
    assert (shares.test - .2).abs().max() < .04 and (shares.train - .6).abs().max() < .05


def test_a_slide_seen_in_training_is_not_scored(cohort, tmp_path):
    model = WGAN(IMAGE, SMALL); model.fit(cohort.split('train'), cohort.split('val'), 0); model.save(tmp_path/'m')
    about = WGAN.load(tmp_path/'m').about
    refuse_seen(about, cohort.split('test'))
    with pytest.raises(LeakError, match='trained on 20 of these slides'): refuse_seen(about, cohort.split('train'))
    one = cohort.split('test')[:3]; one.obs = one.obs.assign(slide=['s7', 'new', 'newer'])
    with pytest.raises(LeakError, match='these slides, s7'): refuse_seen(about, one)
    patient = cohort.split('test')[:1]; patient.obs = patient.obs.assign(group='p7')
    with pytest.raises(LeakError, match='these groups, p7'): refuse_seen(about, patient)
    refuse_seen(about, patient, within_patient=True)


def test_cases_without_slides_share_none(cohort):
    about = dict(slides=[''], groups=['p0']); none = cohort.split('test')[:2]; none.obs = none.obs.assign(slide='')
    refuse_seen(about, none)


def test_evaluation_refuses_a_checkpoint_that_saw_a_test_slide(cohort, tmp_path):
    from gemmgan_nb.experiment import entries_of, evaluate_job, fit_job
    job = entries_of(['noise'])
    fit_job(job, cohort, [0], {}, tmp_path)
    for path in tmp_path.rglob('*.json'):
        saved = read_json(path)
        if 'about' in saved: saved['about']['slides'].append('s39'); write_json(path, saved); break
    else: pytest.fail('no checkpoint says what it was trained on')
    with pytest.raises(LeakError, match='s39'): evaluate_job(job, cohort, tmp_path, tmp_path/'e')


def test_an_edited_split_is_noticed(tmp_path):
    cohort = written(tmp_path, table()); path = tmp_path/'split.csv'; text = path.read_text()
    assert len(cohort.uns['split_sha256']) == 64 and len(text.splitlines()) == 41
    for broken in (text.replace('c39,p39,test', 'c39,p39,train'), text.replace('c39,', 'd39,'), '\n'.join(text.splitlines()[:-1])):
        path.write_text(broken)
        with pytest.raises(LeakError, match='disagree'): Cohort.load(tmp_path)
    path.write_text(text.replace('c39,p39', 'c39,p38'))
    with pytest.raises(LeakError, match='not the file that was written'): Cohort.load(tmp_path)
    path.unlink()
    with pytest.raises(LeakError, match='missing'): Cohort.load(tmp_path)
    path.write_text(text); assert len(Cohort.load(tmp_path)) == 40


def test_moving_a_case_in_the_expression_file_is_noticed_too(tmp_path):
    written(tmp_path, table())
    data = ad.read_h5ad(tmp_path/'cohort.h5ad'); data.obs['split'] = data.obs.split.astype(str); data.obs.loc['c39', 'split'] = 'train'; data.write_h5ad(tmp_path/'cohort.h5ad')
    with pytest.raises(LeakError, match='disagree'): Cohort.load(tmp_path)


def test_the_gene_filter_and_the_filling_look_at_training_cases_alone(tmp_path):
    prepare(tiny_source(tmp_path/'source'), tmp_path/'a'); cohort = Cohort.load(tmp_path/'a')
    genes = pd.DataFrame(dict(gene_id=[f'ENSG{i}.1' for i in range(5)], gene_name=list('ABCDE'), gene_type='protein_coding', length=1000))
    outside = cohort.obs.index[cohort.obs.split != 'train']
    for case in outside: write_star(tmp_path/'source'/f'{case}.tsv', genes, np.array([900, 0, 0, 0, 5]))
    prepare(tmp_path/'source', tmp_path/'b')
    assert len(outside) and list(Cohort.load(tmp_path/'b').var.index) == list(cohort.var.index)
    tables = tiny_tables(tmp_path/'tables'); own_cohort(tables, tmp_path/'c', **TINY)
    filled = Cohort.load(tmp_path/'c')
    for name in ('lung.csv', 'skin.csv'):
        frame = pd.read_csv(tables/name, header=None, dtype=str)
        for j, case in enumerate(frame.iloc[0].fillna('')):
            if case in filled.obs.index and filled.obs.split[case] != 'train' and case != 'P2': frame.iloc[1:, j] = '9'
        frame.to_csv(tables/name, header=False, index=False)
    own_cohort(tables, tmp_path/'d', **TINY)
    at = list(filled.obs.index).index('P2')
    np.testing.assert_array_equal(Cohort.load(tmp_path/'d').X[at], filled.X[at])


def test_a_given_split_is_kept_and_checked(tmp_path):
    tables = tiny_tables(tmp_path/'t'); own_cohort(tables, tmp_path/'a', **TINY)
    sides = pd.read_csv(tmp_path/'a'/'split.csv', dtype=str)
    sides.assign(split=['train' if g != 'P4' else 'test' for g in sides.group]).to_csv(tables/'mine.csv', index=False)
    own_cohort(tables, tmp_path/'b', **TINY, split='mine.csv')
    assert Cohort.load(tmp_path/'b').obs.split.value_counts().to_dict() == dict(train=9, test=1)
    sides.assign(split=['test' if c == 'P8' else 'train' for c in sides.case_id]).to_csv(tables/'mine.csv', index=False)
    with pytest.raises(LeakError, match='P8 stands on the test side'): own_cohort(tables, tmp_path/'c', **TINY, split='mine.csv')
    sides[:-1].to_csv(tables/'mine.csv', index=False)
    with pytest.raises(ValueError, match='no side for 1 cases, P8_2'): own_cohort(tables, tmp_path/'d', **TINY, split='mine.csv')


def test_shuffling_never_touches_the_split_or_expression(cohort):
    test = cohort.split('test')
    for what in ('image', 'text', 'patient'):
        other = test.shuffled(what, 1)
        assert (other.X == test.X).all() and (other.obs.split == 'test').all() and (other.obs.group == test.obs.group).all()
    other = test.shuffled('patient', 1)
    assert torch.equal(other.patches.mean(), test.patches.mean()[np.searchsorted(test.image_of, other.image_of)])
