"""Is the biology kept: fold changes, gene sets, markers and subtype calls against plain computations, bad input, and real patients."""
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr, ttest_ind

from gemmgan_nb import metrics as M
from gemmgan_nb.data import split_by_patient
from gemmgan_nb.workspace import rng

DATA = Path(__file__).parents[1]/'..'/'shared'/'data'
SYMBOLS = ['XIST', 'RPS4Y1', 'DDX3Y'] + [f'G{j}' for j in range(3, 90)]
KIND, SEX = np.arange(120) % 2, np.arange(120)//2 % 2
LABELS = dict(disease_type=np.array(['A', 'B'])[KIND], sex=np.array(['Male', 'Female'])[SEX])
SETS = {f's{i}': SYMBOLS[10*i + 10:10*i + 20] for i in range(4)}


def needs(*parts):
    path = DATA.joinpath(*parts)
    return pytest.mark.skipif(not path.exists(), reason=f'real tables are not here (../shared/data/{"/".join(parts)})')


def patients(key, effect=1., kind=KIND, sex=SEX, n=120):
    r = rng(0, 'patients', key); x = r.normal(size=(n, 90)) + effect*np.outer(kind, np.where(np.arange(90) % 4 == 0, 1.2, 0.)*(-1)**(np.arange(90)//4))
    for i, genes in enumerate(SETS.values()): x[:, [SYMBOLS.index(g) for g in genes]] += .4*(i + 1)*r.normal(size=(n, 1))
    x[:, :3] = np.where(sex[:, None], [1, -1, -1], [-1, 1, 1]) + .7*r.normal(size=(n, 3))
    return x


def test_contrasts_equal_scipy_for_many_groups():
    x = patients('a') + 1e3; first = rng(0, 'f').permuted(np.tile(KIND, (5, 1)), axis=1); second = rng(0, 's').permuted(np.tile(SEX, (5, 1)), axis=1)*(1 - first)
    difference, t = M.contrasts(x, first, second)
    for i in range(5):
        a, b = x[first[i] == 1], x[second[i] == 1]
        assert difference[i] == pytest.approx(a.mean(0) - b.mean(0), abs=1e-9)
        assert t[i] == pytest.approx(ttest_ind(a, b, equal_var=False).statistic, rel=1e-6)


def test_half_splits_share_no_patient_and_keep_the_groups():
    group = M.two_groups(['a']*9 + ['b']*14 + ['']*3 + ['c'])
    (a, b), (c, d), (e, f) = M.half_splits(group, 30, rng(0, 'x'))
    assert ((a + b)*(c + d)).max() == 0 and (a + b + c + d).max() == 1 and (e + f == c + d).all()
    assert (a[:, group != 1].sum(), c[:, group != 1].sum()) == (0, 0) and (e.sum(1) == c.sum(1)).all()      # 'b', the larger, comes first
    assert (e != c).any(1).all() and len(np.unique(a, axis=0)) > 20


@pytest.mark.parametrize('labels, says', [(['a']*30, 'there is a (30)'), (['a']*20 + ['b']*5, 'b (5)'), (['', 'nan', 'Not Reported']*9, 'no label at all')])
def test_two_groups_says_what_there_is(labels, says):
    with pytest.raises(M.TooFew, match='at least 8') as e: M.two_groups(labels)
    assert says in str(e.value)


def test_concordance_is_ordered_by_how_much_is_kept():
    real = patients('test'); found = {e: M.fold_change_concordance(real, patients('made', e), KIND) for e in (1., .4, 0., -1.)}
    r = [found[e]['fold_correlation'] for e in (1., .4, 0., -1.)]
    assert r == sorted(r, reverse=True) and abs(r[0] - found[1.]['fold_correlation_ceiling']) < .06 and r[3] < -.6
    assert found[0.]['fold_correlation'] < found[0.]['fold_correlation_floor_high'] < found[1.]['fold_correlation']
    assert found[.4]['fold_size'] < .8 < found[1.]['fold_size'] < 1.2 and found[1.]['fold_size_ceiling'] == pytest.approx(1, abs=.1)
    assert found[-1.]['fold_sign'] < .5 < found[1.]['fold_sign'] and found[1.]['fold_top_chance'] == 9/90
    assert abs(found[1.]['fold_top_floor'] - .1) < .1 and found[1.]['fold_top'] > .5


def test_a_shift_or_a_scale_of_all_patients_changes_no_concordance():
    real, fake = patients('test'), patients('made'); a, b = M.fold_change_concordance(real, fake, KIND), M.fold_change_concordance(real, 3*fake + 7, KIND)
    assert {k: v for k, v in b.items() if k != 'fold_size'} == pytest.approx({k: v for k, v in a.items() if k != 'fold_size'}, abs=1e-9)
    assert b['fold_size'] == pytest.approx(3*a['fold_size'])


def test_coherence_equals_brute_force_and_survives_constant_genes():
    x = patients('a'); x[:, 12] = 4.; at = M.set_positions(SETS, SYMBOLS)
    brute = [np.corrcoef(x[:, [j for j in p if j != 12]].T)[np.triu_indices(len([j for j in p if j != 12]), 1)].mean() for p in at.values()]
    assert M.coherence(x, at) == pytest.approx(brute, abs=1e-12)
    with np.errstate(all='raise'): flat = M.set_scores(x, np.ones_like(x), SETS, SYMBOLS)
    assert flat['set_coherence'] == flat['set_activity'] == 0 and all(np.isfinite(list(flat.values())))


def test_sets_from_a_file(tmp_path):
    path = tmp_path/'sets.gmt'; path.write_text('A\thttp://x\tG3\tG4\tG4\t\nB\tnote\tG5\n\n')
    assert M.read_sets(path) == dict(A=['G3', 'G4'], B=['G5'])
    assert list(M.set_positions(M.read_sets(path), SYMBOLS, least=2)) == ['A']
    path.write_text('A\tnote\tG3\nB\tnote\n')
    with pytest.raises(ValueError, match='sets.gmt, line 2'): M.read_sets(path)
    with pytest.raises(M.TooFew, match='ENSG0'): M.set_positions(SETS, ['ENSG0', 'ENSG1'])


def test_activity_follows_the_patient_only_when_the_profile_does():
    real = patients('test'); near = real + .5*rng(0, 'n').normal(size=real.shape)
    kept, other = (M.set_scores(real, x, SETS, SYMBOLS)['set_activity'] for x in (near, near[rng(0, 'o').permutation(120)]))
    assert kept > .9 and abs(other) < .2


def test_call_scores_by_hand_and_their_intervals():
    truth, called = np.array(['a']*90 + ['b']*10), np.array(['a']*100)
    found = M.call_scores(called, truth)
    assert found['accuracy'] == .9 and found['balanced'] == .5 == found['balanced_low'] and .8 < found['accuracy_low'] < .88 < .92 < found['accuracy_high'] < 1
    held = [M.call_scores(rng(1, i).random(80) < .7, np.ones(80, bool), draws=200) for i in range(80)]
    assert np.mean([h['accuracy_low'] <= .7 <= h['accuracy_high'] for h in held]) >= .87


def test_markers_follow_sex_and_not_chance():
    real = patients('test'); args = LABELS['sex'], SYMBOLS, M.MARKER_GENES['sex']
    right, wrong = M.marker_scores(patients('m'), real, *args), M.marker_scores(patients('m', sex=1 - SEX), real, *args)
    assert right['marker_accuracy_low'] > .9 and wrong['marker_accuracy'] < .1 and right['marker_accuracy_floor'] == .5
    assert M.marker_scores(real, real, *args)['marker_same'] == 1
    unsaid = LABELS['sex'].copy(); unsaid[:20] = 'not reported'; assert M.marker_scores(real, real, unsaid, *args[1:])['marker_patients'] == 100
    with pytest.raises(M.TooFew, match='Two groups'): M.marker_scores(real, real, LABELS['sex'], [f'H{j}' for j in range(90)], M.MARKER_GENES['sex'])


def test_tissue_markers_ask_only_sites_they_know():
    symbols, sites = ['ALB', 'TG', 'X'], np.array(['Liver and intrahepatic bile ducts', 'Thyroid gland', 'Bladder', 'Eye'])
    x = np.array([[2., -1, 0], [-1, 2, 0], [3, 0, 0], [0, 3, 0]])
    found = M.marker_scores(x, x, sites, symbols, M.MARKER_GENES['primary_site'])
    assert found['marker_patients'] == 2 and found['marker_accuracy'] == 1                 # no gene of the bladder here, no word for the eye


def test_centroids_equal_spearman_written_out():
    train, x = patients('train'), patients('test'); c = M.fit_centroids(train, LABELS['disease_type'], genes=20)
    slow = [c.classes[int(np.argmax([spearmanr(v[c.at] - c.centre, p).statistic for p in c.profile]))] for v in x]
    assert (c(x) == slow).all() and len(c.at) <= 20
    three = M.fit_centroids(np.r_[train, train[:3]], [*LABELS['disease_type'], *'CCC'], genes=20)
    assert three.classes == ['A', 'B'] and (three(x) == c(x)).all()                        # three patients make no class, and move no centre


def test_centroids_come_from_training_patients_alone():
    train, real, fake = patients('train'), patients('test'), patients('made'); kind = LABELS['disease_type']
    a = M.centroid_scores(fake, real, kind, train, kind); b = M.centroid_scores(fake, real[::-1]*9, kind, train, kind)
    assert {k: a[k] for k in a if 'ceiling' not in k and 'same' not in k} == {k: b[k] for k in b if 'ceiling' not in k and 'same' not in k}
    assert a['centroid_balanced_low'] > .8


def test_the_panel_leaves_out_what_cannot_be_asked_and_raises_what_is_wrong():
    real, fake, train = patients('test'), patients('made'), patients('train')
    full = M.biology_panel(fake, real, LABELS, SYMBOLS, SETS, train, LABELS); assert full == M.biology_panel(fake, real, LABELS, SYMBOLS, SETS, train, LABELS)
    assert M.biology_panel(fake, real, dict(sex=['female']*120), [f'H{j}' for j in range(90)], SETS) == {}
    assert not [k for k in M.biology_panel(fake, real, LABELS, SYMBOLS) if 'centroid' in k or k.startswith('set_')]
    with pytest.raises(ValueError, match='generated'): M.biology_panel(fake*np.nan, real, LABELS, SYMBOLS)
    table = M.biology_table(full); base = [k for k in full if not k.endswith(('_low', '_high', '_floor', '_ceiling', '_chance', '_patients', '_number'))]
    assert list(table.index) == base and table.meaning.notna().all() and set(table.better) == {'up', 'down', 'to 1', 'to ceiling'}
    assert all(isinstance(v, (float, int)) and np.isfinite(v) for v in full.values())


# Real patients

@cache
def breast():
    "Invasive ductal and lobular tumours, arcsinh of the z-scores; training and test patients."
    t = pd.read_csv(DATA/'pathgen_porpoise'/'tcga_brca_mutsig_all_clean.csv.zip', low_memory=False).drop_duplicates('case_id').set_index('case_id')
    t = t[t.oncotree_code.isin(['IDC', 'ILC'])]; genes = t.filter(regex='_rnaseq$').dropna(axis=1)
    side = np.array(split_by_patient(list(t.index), list(t.oncotree_code), 0)) == 'train'; x = np.arcsinh(genes.to_numpy()); moves = x[side].std(0) > .01      # some genes are all but constant, and have heavy tails
    x = ((x - x[side].mean(0))[:, moves]/x[side].std(0)[moves]).clip(-5, 5); kinds = t.oncotree_code.to_numpy(str)
    return x[side], kinds[side], x[~side], kinds[~side], [g.removesuffix('_rnaseq') for g in genes.columns[moves]]


def breast_folder(out):
    "Expression and clinical table of those patients, for `make reproduce PROFILE=brca`: nothing is fitted here, the run scales by its own training patients."
    t = pd.read_csv(DATA/'pathgen_porpoise'/'tcga_brca_mutsig_all_clean.csv.zip', low_memory=False).drop_duplicates('case_id').set_index('case_id')
    t = t[t.oncotree_code.isin(['IDC', 'ILC'])]; genes = t.filter(regex='_rnaseq$').dropna(axis=1); x = np.arcsinh(genes.rename(columns=lambda c: c.removesuffix('_rnaseq')))
    out = Path(out); out.mkdir(parents=True, exist_ok=True); x.loc[:, (x.round(2).nunique() > len(x)/10)].to_csv(out/'expression.csv')
    pd.DataFrame(dict(age=t.age, gender=t.is_female.map({1: 'female', 0: 'male'}), disease=t.oncotree_code.map(dict(IDC='invasive ductal carcinoma', ILC='invasive lobular carcinoma')), organ='breast')).to_csv(out/'clinical.csv')
    return out


def drawn(train, of, wanted, key):
    "For each wanted label another training patient of that label: a generator that keeps everything of the type, and nothing of the patient."
    r = rng(0, key); return train[[r.choice(np.flatnonzero(of == w)) for w in wanted]]


@needs('pathgen_porpoise')
def test_real_breast_tumours():
    train, kinds, test, truth, symbols = breast(); labels = dict(disease_type=truth)
    spread = np.stack([train[kinds == k].mean(0) for k in truth]) + rng(0, 'g').normal(size=test.shape)
    makers = dict(stand_in=drawn(train, kinds, truth, 's'), mean_and_noise=spread, no_condition=drawn(train, kinds, rng(0, 'p').permutation(truth), 'n'))
    found = pd.DataFrame({k: M.biology_panel(x, test, labels, symbols, None, train, dict(disease_type=kinds)) for k, x in makers.items()})
    print(found.round(3).to_string()); at = lambda m: found.loc[f'disease_type_{m}']
    assert symbols[np.argmax(np.abs(M.contrasts(train, (kinds == 'ILC')[None], (kinds == 'IDC')[None])[1][0]))] == 'CDH1'       # what makes a tumour lobular
    assert at('centroid_balanced_ceiling').iloc[0] > at('centroid_balanced_floor').iloc[0] + .15
    assert at('centroid_balanced_low')['stand_in'] > .5 and at('centroid_balanced_low')['no_condition'] < .5 < at('centroid_balanced_high')['no_condition']
    assert abs(at('fold_correlation')['stand_in'] - at('fold_correlation_ceiling')['stand_in']) < .2
    assert at('fold_correlation')['no_condition'] < at('fold_correlation_floor_high')['no_condition'] + .1 < at('fold_correlation')['stand_in']
    assert at('centroid_balanced')['stand_in'] > at('centroid_balanced_ceiling')['stand_in']       # the centroids were fitted to these very patients: above the ceiling is no praise


@needs('tcga_expression_xena', 'metadata')
@needs('pathgen_porpoise')
def test_real_gene_sets():
    train, kinds, test, truth, symbols = breast(); t = pd.read_csv(DATA/'tcga_expression_xena'/'metadata'/'hallmarks_signatures.csv'); sets = {k: t[k].dropna().tolist() for k in t}
    stand_in = drawn(train, kinds, truth, 's'); torn = rng(0, 'torn').permuted(stand_in, axis=0)
    found = pd.DataFrame({k: M.set_scores(test, x, sets, symbols) for k, x in dict(stand_in=stand_in, torn=torn).items()}); print(found.round(3).to_string())
    assert found.loc['set_number', 'torn'] > 20 and found.loc['set_coherence_match', 'stand_in'] > .8 and abs(found.loc['set_activity', 'stand_in']) < .15
    assert found.loc['set_coherence_gap', 'torn'] > 2*found.loc['set_coherence_gap', 'stand_in'] and abs(found.loc['set_coherence', 'torn']) < .02


@needs('tcga_clinical', 'cognoma', 'subset_expression-matrix-all-genes.tsv.gz')
def test_xist_tells_the_sex_of_real_patients():
    folder = DATA/'tcga_clinical'/'cognoma'; x = pd.read_csv(folder/'subset_expression-matrix-all-genes.tsv.gz', sep='\t', index_col=0, usecols=['sample_id', '7503'])
    sex = pd.read_csv(folder/'samples.tsv.gz', sep='\t').set_index('sample_id').gender.reindex(x.index); z = ((x - x.mean())/x.std()).to_numpy()
    found = M.marker_scores(z, z, sex.to_numpy(), ['XIST'], M.MARKER_GENES['sex']); print({k: round(v, 3) for k, v in found.items()})
    assert found['marker_patients'] == 50 and found['marker_accuracy_low'] > found['marker_accuracy_floor'] + .1 and found['marker_accuracy'] < 1    # some tumours of men express it


def test_gene_sets_of_a_file_reach_the_scores(tmp_path):
    from test_rows import make, sides, toy
    from gemmgan_nb.baselines import Noise
    from gemmgan_nb.experiment import more_rows
    (tmp_path/'sets.gmt').write_text('ODD\tnote\t' + '\t'.join(f'G{i}' for i in range(1, 12, 2)) + '\n')
    train, val, test = sides(toy()); model = make(Noise); model.fit(train, val, 0); drawn = model.sample(test, 2, 0)
    ask = lambda file: {k for k in more_rows(model, toy(), ('biology',), drawn, file) if k.startswith('set_')}
    assert ask(str(tmp_path/'sets.gmt')) and not ask('')


def test_ssgsea_follows_the_patient_as_activity_does():
    pytest.importorskip('gseapy', reason='gseapy is not installed (pip install .[genesets])')
    real = patients('test'); near = real + .3*rng(0, 'near').normal(size=real.shape); at = M.set_positions(SETS, SYMBOLS)
    scores = M.ssgsea(real, SETS, SYMBOLS); assert scores.shape == (len(at), len(real)) and M.row_correlation(scores, M.activity(real, at)).min() > .5
    kept, other = (M.enrichment_scores(real, x, SETS, SYMBOLS)['set_ssgsea'] for x in (near, near[rng(0, 'other').permutation(len(near))])); assert kept > .7 and abs(other) < .2
    doubled = [*SYMBOLS[:-1], SYMBOLS[0]]; assert np.isfinite(M.ssgsea(real, SETS, doubled)).all()      # a symbol that stands twice
    assert M.biology_panel(near, real, {}, SYMBOLS, SETS)['set_ssgsea'] == pytest.approx(kept)


def test_the_biology_of_every_row_has_a_table(tmp_path):
    from gemmgan_nb.tables import biologies, write_biology
    real, fake, train = patients('test'), patients('made'), patients('train')
    full = M.biology_panel(fake, real, LABELS, SYMBOLS, SETS, train, LABELS); rows = pd.DataFrame([(m, s, 0, k, v) for m in ('gemmgan', 'ridge') for s in (0, 1) for k, v in (full | dict(correlation=.1)).items()], columns=['model', 'seed', 'run', 'metric', 'value'])
    table = biologies(rows); at = table.set_index(['model', 'metric']).loc['ridge']
    assert list(at.index) == list(M.biology_table(full).index) and at.loc['disease_type_centroid_same', ['value', 'low', 'high', 'floor']].tolist() == pytest.approx([full[f'disease_type_centroid_same{e}'] for e in ('', '_low', '_high', '_floor')])
    assert at.ceiling['disease_type_centroid_balanced'] == full['disease_type_centroid_balanced_ceiling'] and not len(biologies(rows[rows.metric == 'correlation']))
    write_biology(table, tmp_path); assert len(pd.read_csv(tmp_path/'biology.csv')) == len(table) and 'Subtype' not in (text := (tmp_path/'biology.md').read_text()) and text.count('disease_type_centroid_same') == 3
