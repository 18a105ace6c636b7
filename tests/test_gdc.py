"""Finding and downloading TCGA, against a server of our own that gives GDC's real answers and misbehaves on demand."""
import gzip
import hashlib
import json
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from gemmgan_nb import gdc as g
from gemmgan_nb.data import Cohort, prepare, read_cases, read_star
from gemmgan_nb.gdc import DownloadError, GdcError, TinyGdc, among, ask, clinical, download, download_cohort, file_table, read_manifest, search, select_pairs, target, write_manifest
from gemmgan_nb.workspace import read_json

ROOT = Path(__file__).parents[1]
DATA = ROOT/'..'/'shared'/'data'
real = pytest.mark.skipif(not (DATA/'gdc').is_dir(), reason='real answers of GDC are not here (../shared/data/gdc, ../shared/data/tcga_clinical)')
QUICK = dict(wait=.01)


@pytest.fixture(scope='module')
def archive(tmp_path_factory): return g.tiny_archive(tmp_path_factory.mktemp('archive'))


@pytest.fixture
def here(archive):
    archive.faults.clear(); archive.log.clear(); archive.ranges = True
    with archive: yield archive


@pytest.fixture
def selection(): return g.load_selection()['selection']


def files_of(n, size=300_000):
    "A manifest of made-up files, and their bytes."
    contents = {str(uuid.uuid5(uuid.NAMESPACE_URL, f'{i}')): hashlib.sha512(bytes([i])).digest()*(size//64 + i) for i in range(n)}
    table = pd.DataFrame([dict(id=k, filename=f'{k[:4]}.svs', md5=hashlib.md5(v).hexdigest(), size=len(v), state='released') for k, v in contents.items()])
    return table, contents


# What GDC really answers

@real
def test_every_real_manifest_is_read_and_written_back(tmp_path):
    found = sorted((DATA/'gdc'/'he2rna').glob('gdc_manifest*.gz'))
    tables = [read_manifest(f) for f in found]
    assert (len(found), sum(map(len, tables))) == (34, 24_815)
    write_manifest(tmp_path/'m.txt', tables[0])
    assert (tmp_path/'m.txt').read_text().splitlines()[0] == 'id\tfilename\tmd5\tsize\tstate' and read_manifest(tmp_path/'m.txt').equals(tables[0])


@real
@pytest.mark.parametrize('faults', [[], ['500', '429', 'html', 'junk']])
def test_real_clinical_records_come_through_pages_and_faults(faults):
    cases = [c | dict(id=c['submitter_id']) for f in sorted((DATA/'tcga_clinical'/'gdc_cases_json').glob('*.gz')) for c in json.loads(gzip.open(f).read())['data']['hits']]
    with TinyGdc([], cases, {}) as gdc:
        gdc.faults['cases'] = list(faults)
        wanted = [c['submitter_id'] for c in cases][::-1]
        records = clinical(gdc.url, wanted, **QUICK)
        assert [r['submitter_id'] for r in records] == wanted and records[0] == cases[-1]
        assert len([1 for name, _ in gdc.log if name == 'cases']) == -(-len(wanted)//200) + len(faults)
        with pytest.raises(GdcError, match='no record of TCGA-XX-0000'): clinical(gdc.url, [*wanted[:3], 'TCGA-XX-0000'])


@real
def test_real_answers_word_for_word():
    answers = {f.name[:2]: f.read_bytes() for f in (DATA/'tcga_clinical'/'gdc_docs_json').glob('*.json')}
    with TinyGdc([], [], {}) as gdc:
        for number in ('04', '06', '12', '14', '15', '16', '17'):
            gdc.faults['files'] = [answers[number]]
            assert ask(f'{gdc.url}/files', {}) == json.loads(answers[number])
        gdc.faults['files'] = [answers['14'], answers['10']]       # ten of 931,947 hits, and then a page of another archive
        with pytest.raises(GdcError, match='had 931947 hits and has 0'): search(f'{gdc.url}/files', among('access', 'open'))
        again = json.loads(answers['14']); again['data']['pagination']['total'] = 20
        gdc.faults['files'] = [json.dumps(again).encode()]*2       # the same page twice
        with pytest.raises(GdcError, match='gave a hit twice'): search(f'{gdc.url}/files', among('access', 'open'))


@real
def test_the_slide_table_says_what_the_chapter_says():
    pytest.importorskip('pyarrow')
    slides, said = g.read_idc(DATA/'gdc'/'tcga_slides_idc.parquet'), g.load_selection()['idc']
    small = slides[slides.megabytes < 100]
    assert (len(slides), slides.patient.nunique(), (slides.kind == 'frozen').sum()) == (said['slides'], said['patients'], said['frozen'])
    assert (len(small), small.patient.nunique(), (small.kind == 'frozen').sum(), (small.tissue == 'NT').sum(), small.jpeg2000.sum()) == tuple(
        said[f'below_{k}'] for k in ('slides', 'patients', 'frozen', 'normal', 'jpeg2000'))
    rna = pd.read_csv(DATA/'gdc'/'he2rna'/'samples_description.csv.gz', sep='\t')
    rna = set(rna['Case.ID'][rna['Sample.Type'] == 'Primary Tumor'])
    table = g.try_rules(slides, rna, {'DICOM': 100, 'GDC': 104.2, 'MiB': 100*1.048576*1.042, '70': 70*1.042})
    assert (len(rna), len(table)) == (9944, 23)
    assert table[['kinds', 'limit', 'projects', 'cases', 'residue']].head(4).values.tolist() == [
        ['frozen+FFPE', 'DICOM', 19, 1943, -1], ['frozen', 'GDC', 30, 1951, 7], ['frozen', 'MiB', 19, 2003, 59], ['frozen', 'GDC', 19, 1883, -61]]
    assert table[table.limit == '70'].cases.max() == 1295 and table[table.kinds == 'FFPE'].cases.max() == 378


def _described(row, kind):
    "A row of a published list as /files would answer it, without portions, which those lists do not have."
    sample = dict(submitter_id=row['sample'], sample_type=row['type'], tissue_type='Not Reported', tumor_descriptor='Not Reported')
    return dict(id=row['id'], file_id=row['id'], file_name=row['filename'], md5sum=row['md5'], file_size=int(row['size']), access='open', state='released',
                experimental_strategy='Tissue Slide' if kind == 'slide' else 'RNA-Seq', cases=[dict(submitter_id=row['sample'][:12], project=dict(project_id=row['project']), samples=[sample])])


@real
def test_real_colon_and_rectum_pair_by_sample(selection):
    rna = pd.read_csv(DATA/'gdc'/'he2rna'/'samples_description.csv.gz', sep='\t')
    rna = rna[rna['Project.ID'].isin(['TCGA-COAD', 'TCGA-READ'])].rename(columns={'File.ID': 'id', 'Sample.ID': 'sample', 'Sample.Type': 'type', 'Project.ID': 'project'})
    rna = rna.merge(read_manifest(DATA/'gdc'/'he2rna'/'gdc_manifest.2018-03-13_alltranscriptome.txt.gz'), on='id')
    slides = read_manifest(DATA/'gdc'/'he2rna'/'gdc_manifest.CRC_frozen_slides.txt.gz').assign(type='', project='TCGA-CRC')
    slides['sample'] = slides.filename.str[:16]
    tables = [file_table([_described(r, k) for r in t.to_dict('records')]) for t, k in ((slides, 'slide'), (rna, 'rna'))]
    assert tables[0].kind.eq('frozen').all() and tables[0].slide.str.match(r'TCGA-..-....-\d\d[A-Z]-\d\d-[A-Z0-9]+$').all()
    assert tables[0].tissue.eq('Normal').sum() == slides['sample'].str[13].eq('1').sum() > 0      # read from the barcode where GDC does not say
    by_sample, funnel = select_pairs(*tables, selection | dict(match='sample'))
    by_case, _ = select_pairs(*tables, selection | dict(match='case'))
    assert (by_sample['sample'] == by_sample.rna_sample).all() and by_sample.case_id.is_unique and by_sample.bytes.max() < 1e8
    assert by_sample['sample'].str[13:15].eq('01').all() and 300 < len(by_sample) <= len(by_case) and funnel.cases.is_monotonic_decreasing
    with pytest.raises(ValueError, match='No pair is left'): select_pairs(*tables, selection)           # no portions in these lists


# Pairs

def test_the_portion_is_read_from_the_tree_not_from_the_barcode(here, selection):
    slides, rna = (file_table(search(f'{here.url}/files', g.file_filter(selection, k), g.FIELDS)) for k in ('slide', 'rna'))
    row = slides.set_index('slide').loc['SIMU-00-0003-01A-02-TS2']
    assert (row.portion, row['sample'], row.kind) == ('SIMU-00-0003-01A-21', 'SIMU-00-0003-01A', 'frozen')
    pairs, _ = select_pairs(slides, rna, selection)
    assert (pairs.portion == pairs.rna_portion).all() and (pairs.match == 'portion').all()


def test_a_file_hangs_on_the_branch_that_gdc_names(here):
    found = next(h for h in here.hits['files'] if h['data_type'] != 'Slide Image')
    case = found['cases'][0]
    beside = json.loads(json.dumps(case['samples'][0]).replace('-01A', '-11A').replace('Primary Tumor', 'Solid Tissue Normal'))
    whole = found | dict(cases=[case | dict(samples=[beside, *case['samples']])])          # the tree with a normal sample first
    assert file_table([whole])[['sample', 'portion', 'tissue']].equals(file_table([found])[['sample', 'portion', 'tissue']])


def test_a_newer_normal_file_costs_nobody(here, selection):
    slides, rna = (file_table(search(f'{here.url}/files', g.file_filter(selection, k), g.FIELDS)) for k in ('slide', 'rna'))
    normal = rna.iloc[[0]].assign(id='normal', updated='2030', tissue='Normal', descriptor='Not Applicable', sample='SIMU-00-0000-11A', portion='SIMU-00-0000-11A-11')
    pairs, _ = select_pairs(slides, pd.concat([rna, normal]), selection)
    assert len(pairs) == 4 and 'normal' not in set(pairs.rna_id)


def test_the_largest_projects_and_a_manifest_as_a_choice(here, selection, tmp_path):
    g.find(here.url, selection, tmp_path/'all')
    pairs = pd.read_csv(tmp_path/'all'/'pairs.csv')
    assert pairs.chosen.sum() == 4 and len(pairs) == 8 and read_json(tmp_path/'all'/'query'/'release.json')['data_release'] == 'Drawn Release 1.0'
    found, funnel, _ = g.find(here.url, selection | dict(largest=2), tmp_path/'two')
    assert (found.project.nunique(), funnel.rule.iloc[-2]) == (2, 'the 2 largest projects')
    mine = read_manifest(tmp_path/'all'/'gdc_manifest.txt')
    write_manifest(tmp_path/'mine.txt', mine[mine.filename.str.contains('0002|0003') & mine.filename.str.endswith('.tiff')])
    assert list(g.find(here.url, selection, tmp_path/'mine', only=tmp_path/'mine.txt')[0].case_id) == ['SIMU-00-0002', 'SIMU-00-0003']


def test_genes_shared_by_x_and_y_stand_once(tmp_path):
    lines = ['# gene-model: GENCODE v36', 'gene_id\tgene_name\tgene_type\ttpm_unstranded', 'N_unmapped\t\t\t', 'ENSG00000182378.14\tPLCXD1\tprotein_coding\t3.5',
             'ENSG00000182378.14_PAR_Y\tPLCXD1\tprotein_coding\t0', 'ENSG00000243485.5\tMIR1302-2HG\tlncRNA\t1']
    (tmp_path/'s.tsv').write_text('\n'.join(lines))
    assert read_star(tmp_path/'s.tsv').value.to_dict() == {'ENSG00000182378': 3.5}


# Weather

def test_pauses_that_a_server_asks_for():
    asked = lambda v: g.pause_asked(SimpleNamespace(headers=dict([('Retry-After', v)] if v else [])))
    assert (asked('7'), asked(None), asked('soon')) == (7., 0., 0.) and asked('Wed, 21 Oct 2015 07:28:00 GMT') == 0. and asked('Wed, 21 Oct 2099 07:28:00 GMT') > 1e9


def test_a_pause_is_never_longer_than_the_longest():
    naps, left = [], [g.Passing('429', after=9e9), g.Passing('500')]
    def call():
        if left: raise left.pop(0)
    g.patiently(call, longest=5., sleep=naps.append)
    assert naps[0] == 5. and .5 <= naps[1] <= 3.


@pytest.mark.parametrize('fault', ['404', '403'])
def test_what_no_try_can_cure_is_asked_once(here, tmp_path, fault):
    table = files_of(1)[0]
    here.faults[table.id[0]] = [fault]*9
    with pytest.raises(DownloadError, match=fault) as e: download(table, tmp_path, here.url, spare=0)
    assert len(here.log) == 1 and e.value.report.tries.tolist() == [1]


@pytest.mark.parametrize('ranges', [True, False])
def test_every_fault_at_once_and_every_file_verified(tmp_path, ranges):
    table, contents = files_of(12)
    with TinyGdc([], [], contents, ranges) as gdc:
        for i, faults in enumerate((['cut'], ['cut', 'cut', '500'], ['wrong'], ['429'], ['html', '503'], ['cut', 'wrong'])): gdc.faults[table.id[i]] = faults
        report = download(table, tmp_path, gdc.url, workers=3, spare=0, **QUICK)
        spans = [s for k, s in gdc.log if k == table.id[1]]
    assert report.status.tolist() == ['retried']*6 + ['ok']*6 and report.tries[:6].tolist() == [2, 4, 2, 2, 3, 3]
    assert all(target(tmp_path, k, f'{k[:4]}.svs').read_bytes() == v for k, v in contents.items())
    assert not list(tmp_path.rglob('*.part')) and spans[0] is None and spans[1].startswith('bytes=') and (spans[1] == spans[2]) is not ranges


def test_a_second_run_takes_up_where_the_first_was_killed(tmp_path):
    table, contents = files_of(5)
    places = [target(tmp_path, r['id'], r['filename']) for r in table.to_dict('records')]
    whole = list(contents.values())
    for p in places: p.parent.mkdir(parents=True)
    parts = [p.with_name(p.name + '.part') for p in places]
    parts[0].write_bytes(whole[0][:200_000])                       # cut
    parts[1].write_bytes(b'?'*200_000)                             # cut, and of something else
    parts[2].write_bytes(whole[2] + b'more')                       # longer than the file
    parts[3].write_bytes(whole[3])                                 # whole, killed before the rename
    places[4].write_bytes(b'?'*len(whole[4]))                      # there, of the right size, and wrong
    with TinyGdc([], [], contents) as gdc:
        report = download(table, tmp_path, gdc.url, spare=0, **QUICK)
        log = gdc.log[:]
    assert [p.read_bytes() for p in places] == whole and report.status.tolist() == ['ok', 'retried', 'ok', 'ok', 'ok']
    assert table.id[3] not in [k for k, _ in log] and (table.id[0], 'bytes=200000-') in log


def test_a_server_that_goes_on_from_another_byte_is_not_believed(tmp_path):
    table, contents = files_of(1)
    part = tmp_path/'f.part'; part.write_bytes(contents[table.id[0]][:1000])
    answer = SimpleNamespace(status_code=206, headers={'Content-Range': 'bytes 0-9/10'}, url='http://x')
    with pytest.raises(g.Passing, match='cannot go on from byte 1000'): g.checked_range(answer, 1000, part)
    assert not part.exists()


def test_no_room_is_said_before_the_first_byte(tmp_path, monkeypatch):
    table, contents = files_of(3)
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: SimpleNamespace(free=800_000))
    with TinyGdc([], [], contents) as gdc:
        with pytest.raises(OSError, match='still to come'): download(table, tmp_path, gdc.url, spare=0)
        assert gdc.log == []
        done = target(tmp_path, table.id[0], table.filename[0]); done.parent.mkdir(); done.write_bytes(contents[table.id[0]])
        done.write_bytes(bytes(len(contents[table.id[0]])))                                                # of the right length, and not the file
        with pytest.raises(OSError, match='still to come'): download(table, tmp_path, gdc.url, spare=0)
        assert gdc.log == []
        done.write_bytes(contents[table.id[0]])
        assert download(table, tmp_path, gdc.url, spare=0).status.tolist() == ['present', 'ok', 'ok']      # what is there needs no room


def test_names_that_would_leave_the_folder(here, selection, tmp_path):
    evil = dict(here.hits['files'][0], file_name='../../outside.tiff')
    with TinyGdc([evil, *here.hits['files'][1:]], here.hits['cases'], here.contents) as gdc:
        with pytest.raises(ValueError, match='outside'): download_cohort(gdc.url, selection, tmp_path/'a'/'b', spare=0)
    assert not list(tmp_path.rglob('*outside*'))
    for name in ('..', '.', 'a/b', 'a\\b', '', 'x\n', 'C:x', 'n'*300):
        with pytest.raises(ValueError, match='outside'): target(tmp_path, str(uuid.uuid4()), name)
    for id in ('..', '', '/tmp', 'x'*36):
        with pytest.raises(ValueError, match='outside'): target(tmp_path, id, 'a.svs')


@pytest.mark.parametrize('column,value', [('id', '../x'), ('filename', '../x.svs'), ('md5', 'abc'), ('size', '-1'), ('size', '1e3')])
def test_a_wrong_manifest_is_named_by_line_and_column(tmp_path, column, value):
    table = files_of(2)[0].astype(str)
    table.loc[1, column] = value
    table.to_csv(tmp_path/'m.txt', sep='\t', index=False)
    with pytest.raises(ValueError, match=f'm.txt, line 3, column {column}'): read_manifest(tmp_path/'m.txt')


# The whole way

def test_the_stage_fails_while_a_file_is_missing_and_ends_where_the_simulation_ends(here, tmp_path):
    out, tiffs = tmp_path/'source', [f for f in here.hits['files'] if f['file_name'].endswith('01A-01-TS1.0000.tiff')]
    here.faults |= {tiffs[1]['id']: ['404']*9, tiffs[0]['id']: ['cut'], 'files': ['html']}
    values = json.dumps(dict(endpoint=here.url, out=str(out), spare_gb=0.0, selection=dict(largest=0)))
    run = lambda: subprocess.run([sys.executable, '-m', 'gemmgan_nb.reproduce', 'stage', str(ROOT/'nbs'/'05_gdc.ipynb'), str(out/'executed.ipynb'), values], cwd=ROOT, capture_output=True, text=True, timeout=300)
    failed = run()
    assert failed.returncode != 0 and '1 bad of 4 files' in failed.stdout + failed.stderr
    assert not (out/'manifest.csv').exists() and not (out/'provenance.json').exists() and list(read_manifest(out/'slides'/'missing.txt').id) == [tiffs[1]['id']]
    here.faults.clear()
    again = run()
    assert again.returncode == 0, again.stderr[-2000:]
    notes = read_json(out/'provenance.json')
    assert (notes['cases'], notes['present'], notes['ok'], notes['frozen']) == (4, 7, 1, 4) and not (out/'slides'/'missing.txt').exists()
    prepare(out, tmp_path/'cohort')
    cohort = Cohort.load(tmp_path/'cohort')
    assert len(cohort) == 4 and [c['submitter_id'] for c in read_cases(out/'clinical.jsonl')] == sorted(cohort.obs.index)
    slides = pd.read_csv(tmp_path/'cohort'/'slides.csv')
    assert all((tmp_path/'cohort'/p).exists() for p in slides.path) and pd.read_csv(out/'funnel.csv').genes.notna().sum() == 5


@real
def test_the_real_funnel_ends_near_the_paper():
    rna = pd.read_csv(DATA/'gdc'/'he2rna'/'samples_description.csv.gz', sep='\t')
    funnel = g.idc_funnel(g.read_idc(DATA/'gdc'/'tcga_slides_idc.parquet'), set(rna[rna['Sample.Type'] == 'Primary Tumor']['Case.ID']))
    assert funnel.cases.tolist() == [11007, 9670, 2941, 2141, 2062, 1951, 1883] and funnel.slides.tolist() == [30075, 26558, 4531, 3044, 2960, 2680, 2609]
    assert funnel.residue.tolist() == [c - 1944 for c in funnel.cases]
