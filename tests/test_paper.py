"""The paper's numbers, the verdicts that follow from them, and the file they are written to."""
import json

import numpy as np
import pandas as pd
import pytest

from gemmgan_nb.paper import CLAIMS, VERDICTS, exports, grid, judge, load_paper_values, manifest_file, printed, rounded, t_interval, write_claims


@pytest.fixture(scope='module')
def paper(): return load_paper_values()


def verdict(id, paper, **kw): return next(v for v in judge([c for c in CLAIMS if c.id == id], paper=paper, **kw))


def changed(paper, where, value, column='mean'):
    "A copy of the paper in which some cells hold another number."
    v = paper['values'].copy()
    assert len(v.query(where)), where
    v.loc[v.query(where).index, column] = value
    return paper | dict(values=v)


def test_the_tables_are_whole(paper):
    v = paper['values']
    assert v.groupby('table').size().to_dict() == {1: 60, 2: 42}
    assert v.query('table == 1')['mean'].isna().sum() == 8 and v.query('table == 2').sd.isna().all()   # the vanilla GAN has no utility; Table 2 no deviations
    assert set(v[v['mean'].isna()].model) == {'vanilla'}
    spots = {('precision', 'cond_wgan', 1): .8436, ('lr_f1', 'gemmgan', 1): .5444, ('primary_site_mlp_f1', 'cvae', 1): .5735, ('c_mse', 'text_cls', 2): .0045,
             ('lr_accuracy', 'film', 2): .5853, ('disease_type_rf_f1', 'patch_transformer', 2): .8158, ('precision', 'cross_attention', 2): .7}
    for (metric, model, table), want in spots.items(): assert printed(paper, metric, model, table) == want
    assert [printed(paper, 'primary_site_rf_f1', m, what='sd') for m in ('cond_wgan', 'cvae', 'gemmgan')] == [.0201, .0049, .0090]
    assert (paper['cohort']['cases'], paper['cohort']['genes'], paper['setup']['patches'], paper['setup']['batch']) == (1944, 18868, 256, 64)
    assert v.drop_duplicates('metric').set_index('metric').direction.loc[['recall', 'c_mse', 'mlp_f1', 'primary_site_rf_accuracy']].tolist() == ['up', 'down', 'down', 'up']


def test_it_is_found_from_below_and_says_what_to_do(tmp_path, monkeypatch, paper):
    (tmp_path/'a'/'b').mkdir(parents=True); (tmp_path/'data_manifest').mkdir(); (tmp_path/'data_manifest'/'x.toml').write_text('')
    assert manifest_file('x.toml', tmp_path/'a'/'b') == tmp_path/'data_manifest'/'x.toml'
    with pytest.raises(FileNotFoundError, match='inside a checkout'): manifest_file('nosuch.toml', tmp_path)


def test_every_claim_is_told_whole(paper):
    assert len({c.id for c in CLAIMS}) == len(CLAIMS) >= 35
    for v in judge(CLAIMS, paper=paper):
        assert v['verdict'] in VERDICTS.values() and v['reason'].strip() and v['claim'] and v['where'] and v['notebook'][:2].isdigit()
        if v['on'] == 'run': assert v['verdict'] == 'not testable here'
    said = {c.where.split(',')[0] for c in CLAIMS}
    assert {f'Eq. {n}' for n in (1, 2, 3, 4, 7, 8)} | {'Eq. 5-6', 'Fig. 1', 'Fig. 2', 'Table 1', 'Table 2'} <= said


# claim, verdict on the printed numbers, a change, the verdict then
FLIPS = [
    ('recall_best', 'differs', 'metric == "recall" and model in ["film", "cross_attention"]', .8, 'mean', 'reproduced'),
    ('accuracy_gain', 'differs', 'metric == "disease_type_mlp_accuracy" and model == "cond_wgan"', .80, 'mean', 'reproduced'),
    ('c_mse_gain', 'differs', 'metric == "c_mse" and model == "cond_wgan"', .0389, 'mean', 'reproduced'),
    ('c_mse_noise', 'differs', 'metric == "c_mse" and model == "gemmgan"', .0080, 'mean', 'reproduced'),
    ('rf_rows', 'differs', 'metric == "disease_type_rf_f1" and model == "cvae"', .50, 'mean', 'reproduced'),
    ('utility_gains', 'reproduced', 'metric == "disease_type_rf_accuracy" and model == "gemmgan"', .70, 'mean', 'differs'),
    ('ten_runs', 'differs', 'metric == "precision" and model == "vanilla"', .0191, 'sd', 'not testable here'),
    ('utility_all', 'reproduced', 'metric == "primary_site_mlp_f1" and model == "cvae"', .9, 'mean', 'differs'),
    ('image_rows', 'reproduced', 'table == 2 and metric == "disease_type_rf_accuracy" and model == "text_cls"', .7, 'mean', 'differs'),
    ('best_overall', 'reproduced', 'table == 2 and metric == "lr_f1" and model == "film"', .5, 'mean', 'differs')]


@pytest.mark.parametrize('id, as_printed, where, value, column, then', FLIPS, ids=lambda x: x if isinstance(x, str) and x.islower() and ' ' not in x else '')
def test_a_verdict_follows_from_its_numbers(paper, id, as_printed, where, value, column, then):
    assert verdict(id, paper)['verdict'] == as_printed
    assert verdict(id, changed(paper, where, value, column))['verdict'] == then


def test_shares_on_no_grid_decide_nothing(paper):
    v = paper['values'].copy(); some = v.query('table == 2 and model != "gemmgan"').index
    v.loc[some, 'mean'] = (v.loc[some, 'mean'] + np.random.default_rng(0).uniform(-.01, .01, len(some))).round(4)
    assert verdict('ten_runs_table2', paper)['verdict'] == 'differs' and verdict('ten_runs_table2', paper | dict(values=v))['verdict'] == 'not testable here'


def test_numbers_of_the_arithmetic(paper):
    gain = verdict('c_mse_gain', paper)
    assert (gain['low'], gain['number'], gain['high']) == pytest.approx((80.0, 81.579, 83.117), abs=.001)
    assert verdict('accuracy_gain', paper)['number'] == pytest.approx(100*(.9354/.9262 - 1))
    assert '17.0 % relative, 10.8 points' in verdict('accuracy_gain', paper)['reason']
    assert '0.8821' in verdict('recall_best', paper)['reason'] and '0.8346' in verdict('recall_best', paper)['reason']
    assert '12 of 12 RF cells and in 0 of 6 MLP' in verdict('rf_rows', paper)['reason']
    assert verdict('c_mse_noise', paper)['number'] == pytest.approx(.0007*389/2)
    assert (verdict('ten_runs_table2', paper)['number'], '2 runs of 390' in verdict('ten_runs_table2', paper)['reason']) == (2, True)
    assert verdict('eq7', paper)['number'] == 1


def test_rounding_boxes_and_grids():
    assert rounded(lambda a: a, .5) == pytest.approx((.5, .49995, .50005))
    assert rounded(lambda a, b: a - b, .5, .2) == pytest.approx((.3, .2999, .3001))
    assert grid([.3333, .3334, .5], 3).tolist() == [True, False, False]
    for n in (390, 780): assert grid(np.round(np.arange(n)/n, 4), n).all()


def test_interval_is_welch():
    from scipy import stats
    r = np.random.default_rng(0); a, b = r.normal(1, 1, 5), r.normal(0, 3, 4)
    ci = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    assert t_interval(a, b) == pytest.approx((a.mean() - b.mean(), ci.low, ci.high))
    ci = stats.ttest_1samp(a, .2).confidence_interval()
    assert t_interval(a, [.2])[1:] == pytest.approx((ci.low - .2, ci.high - .2))
    assert np.isnan(t_interval([1.])[1])


def run(**metrics):
    "Tidy scores: metric -> {model: one number a seed}."
    return pd.DataFrame([(m, s, r, k, v) for k, models in metrics.items() for m, values in models.items() for s, v in enumerate(values) for r in range(2)],
                        columns=['model', 'seed', 'run', 'metric', 'value'])


@pytest.mark.parametrize('shuffled, verdict_then', [([.1, .11, .09], 'reproduced'), ([.31, .30, .305], 'not testable here'), ([.5, .51, .49], 'differs')])
def test_does_the_image_matter(paper, shuffled, verdict_then):
    scores = run(correlation=dict(gemmgan=[.30, .31, .305]), correlation_shuffled_image=dict(gemmgan=shuffled))
    assert verdict('images_crucial', paper, scores=scores, cohort='toy')['verdict'] == verdict_then


def test_collapse_detectability_and_rivals(paper):
    scores = run(spread_ratio=dict(gemmgan=[.01, .02, .015]), lr_auc=dict(gemmgan=[.97, .98, .96]), as_coded_lr_accuracy=dict(gemmgan=[.52, .53, .52]),
                 c_mse=dict(gemmgan=[.01, .011, .012], real=[.002], cvae=[.02, .021, .02], cond_wgan=[.03, .031, .03]),
                 **{f'disease_type_{c}_accuracy': dict(gemmgan=[.9, .91, .9], cond_wgan=[.8, .81, .8], cvae=[.7, .71, .7]) for c in ('rf', 'mlp')})
    said = {v['id']: v for v in judge(CLAIMS, scores, 'toy', paper)}
    want = dict(no_collapse='differs', lr_undetectable='differs', correlations_run='differs', vae_worse='differs', beats_rivals='reproduced', table1='not testable here')
    assert {k: said[k]['verdict'] for k in want} == want
    assert 'accuracy 0.52' in said['lr_undetectable']['reason'] and said['vae_worse']['cohort'] == 'toy' and said['recall_best']['cohort'].startswith('TCGA')
    alone = {v['id']: v['verdict'] for v in judge(CLAIMS, scores[scores.seed == 0], 'toy', paper)}
    assert {alone[k] for k in want} == {'not testable here'}


def test_what_two_numbers_decide_needs_both(paper):
    three = lambda x: [x, x + .01, x - .01]
    scores = run(recall=dict(gemmgan=three(.8), cond_wgan=three(.5), text_cls=three(.4)), precision=dict(gemmgan=three(.6), cond_wgan=three(.9), text_cls=three(.5)),
                 lr_auc=dict(gemmgan=three(.7), cond_wgan=three(.9), cvae=three(.95)), mlp_auc=dict(gemmgan=three(.99)))
    said = {v['id']: v for v in judge(CLAIMS, scores, 'toy', paper)}
    want = dict(precision_below='reproduced', text_selective='differs', lr_harder='reproduced', mlp_detects='reproduced', images_stable='reproduced', end_to_end='differs', filter='differs')
    assert {k: said[k]['verdict'] for k in want} == want
    assert said['lr_harder']['number'] == pytest.approx(.2) and said['lr_harder']['low'] < .2 < said['lr_harder']['high']
    flipped = changed(paper, 'table == 2 and model == "film" and metric == "recall"', .1)
    assert verdict('images_stable', flipped)['verdict'] == 'differs'


def test_a_run_is_never_judged_against_the_papers_values(paper):
    scores = run(recall=dict(gemmgan=[.5, .51], cvae=[.1, .11], vanilla=[.2, .21]))
    other = changed(paper, 'metric == "recall"', .99)
    keep = lambda p: [v for v in judge(CLAIMS, scores, 'HER2ST', p) if v['on'] == 'run']
    assert str(keep(paper)) == str(keep(other))   # as text, since nan is not nan


def test_tables_are_compared_on_tcga_alone(paper):
    v = paper['values'].query('table == 1').dropna(subset='mean')
    same = pd.DataFrame([(m, s, 0, k, x) for m, k, x in zip(v.model, v.metric, v['mean'], strict=True) for s in range(2)], columns=['model', 'seed', 'run', 'metric', 'value'])
    assert verdict('table1', paper, scores=same, cohort='TCGA')['verdict'] == 'reproduced'
    assert verdict('table1', paper, scores=same, cohort='HER2ST')['verdict'] == 'not testable here'


def test_differences_with_patients_are_taken(paper):
    scores = run(correlation=dict(gemmgan=[.3, .31], film=[.2, .21]))
    wide = pd.DataFrame([('correlation', 'gemmgan', 'film', .1, -.2, .4)], columns=['metric', 'model', 'other', 'difference', 'low', 'high'])
    got = verdict('cross_attention_helps', paper, scores=scores, cohort='toy', differences=wide)
    assert (got['verdict'], got['low'], got['high']) == ('not testable here', -.2, .4)


def test_the_file(tmp_path, paper):
    write_claims(tmp_path/'claims.json', judge(CLAIMS, paper=paper))
    text = (tmp_path/'claims.json').read_text()
    read = json.loads(text, parse_constant=lambda x: pytest.fail(f'{x} is no JSON'))
    assert len(read) == len(CLAIMS) and {'id', 'where', 'claim', 'notebook', 'verdict', 'reason', 'number', 'low', 'high', 'cohort'} <= set(read[0])
    assert [p.name for p in tmp_path.iterdir()] == ['claims.json']
    assert exports('film', 'FiLM') and not exports('film', 'NoSuch') and not exports('nosuch', 'FiLM')
