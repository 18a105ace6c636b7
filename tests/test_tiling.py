"""Tiling: real slides, cohorts with bad slides in them, resuming, and what it costs."""
import json
from pathlib import Path

import h5py
import imagecodecs
import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image
from skimage.filters import threshold_otsu

from gemmgan_nb.data import read_tiles
from gemmgan_nb.slides import Slide, SlideError, tiny_slide
from gemmgan_nb.tiling import (contours, dump_patches, plot_tiling, read_slides, reselect, tile_cohort, tile_grid, tile_images, tile_slide, tissue_fractions,
                               tissue_mask)

REAL = Path(__file__).parents[1]/'..'/'shared'/'data'/'slides'
real = pytest.mark.skipif(not REAL.is_dir(), reason='real slides are not here (../shared/data/slides)')
TCGA, CMU = 'tcga-cr-7395-01a-01-ts1.svs', 'cmu-1-small-region.svs'


@real
@pytest.mark.parametrize('name,least', [(CMU, .95), (TCGA, .98)])
def test_low_resolution_mask_keeps_the_tiles_of_level_0(name, least):
    "The paper's way, Otsu on level 0, against ours at 8 um/px: overlap of the kept tiles."
    with Slide(REAL/name) as s:
        ours = tile_grid(s, tissue_mask(s)[0])
        w, h = s.dimensions
        gray = np.asarray(s.handle.read_region((0, 0), 0, (w, h)).convert('L'))
        share = tissue_fractions(gray < threshold_otsu(gray), np.arange(0, w, 256), np.arange(0, h, 256), (256, 256))
    paper = {(256*i, 256*j) for i, j in np.argwhere(share > .2)}
    kept = set(zip(ours.x, ours.y, strict=True))
    assert len(kept & paper)/len(kept | paper) >= least


@real
def test_bad_slides_do_not_stop_the_cohort(tmp_path):
    names = [CMU, TCGA, 'unreadable.svs', 'unopenable.tiff', 'broken.svs', 'nosuch.svs']
    pd.DataFrame(dict(slide=[Path(n).stem for n in names], path=[str((REAL/n).resolve()) for n in names])).to_csv(tmp_path/'slides.csv', index=False)
    summary = tile_cohort(read_slides(tmp_path/'slides.csv'), tmp_path/'tiles').set_index('slide')
    assert summary.n_tiles[Path(CMU).stem] == 47 and summary.n_tiles[Path(TCGA).stem] == 168
    assert (summary.status == 'ok').sum() == 2
    problems = pd.read_csv(tmp_path/'tiles'/'problems.csv')
    assert sorted(problems.item) == ['broken', 'nosuch', 'unopenable', 'unreadable']
    assert sorted(p.name for p in (tmp_path/'tiles').iterdir()) == sorted([f'{Path(CMU).stem}.h5', f'{Path(TCGA).stem}.h5', 'problems.csv', 'process_list.csv', 'tiles.csv'])


@real
def test_tile_file_has_the_names_other_tools_use(tmp_path):
    tile_slide(REAL/CMU, tmp_path/'a.h5', mpp=.998)
    coords, attrs = read_tiles(tmp_path/'a.h5')
    assert coords.dtype == np.int64
    for key in 'patch_size patch_size_level0 level0_magnification target_magnification overlap name level0_width level0_height mpp mpp_source tissue_method threshold min_tissue'.split():
        assert key in attrs, key
    assert (attrs['patch_size'], attrs['patch_size_level0']) == (256, 512)
    with Slide(REAL/CMU) as s: assert len(list(tile_images(s, coords, attrs))) == len(coords)


@real
def test_zero_tiles_is_a_clear_error(tmp_path):
    with pytest.raises(SlideError, match='no tile with more than 100% tissue'): tile_slide(REAL/CMU, tmp_path/'a.h5', min_tissue=1.)
    assert not (tmp_path/'a.h5').exists()


@real
@pytest.mark.parametrize('name', [CMU, TCGA])
def test_figure_2(name, tmp_path):
    with Slide(REAL/name) as s: plot_tiling(s).savefig(tmp_path/'f.png')
    assert (tmp_path/'f.png').stat().st_size > 20_000


def listed(folder, names, mpp=None):
    "A slides.csv of these files."
    pd.DataFrame(dict(slide=[Path(n).stem for n in names], path=[str(n) for n in names], mpp=mpp)).to_csv(folder/'slides.csv', index=False)
    return folder/'slides.csv'


def process(out): return pd.read_csv(out/'process_list.csv', keep_default_na=False).set_index('slide')


@real
def test_each_kind_of_damage_has_its_own_line(tmp_path):
    raw = (REAL/CMU).read_bytes()
    (tmp_path/'part.svs').write_bytes(raw[:len(raw)//2])
    Image.fromarray(np.random.default_rng(0).normal(243, 1.5, (900, 900, 3)).clip(0, 255).astype(np.uint8)).save(tmp_path/'glass.png')
    files = [(REAL/n).resolve() for n in ('unreadable.svs', 'unopenable.tiff', 'broken.svs', CMU)] + [tmp_path/'glass.png', tmp_path/'part.svs']
    tile_cohort(read_slides(listed(tmp_path, files)), tmp_path/'tiles')
    table = process(tmp_path/'tiles')
    errors = table.error[table.status == 'failed']
    for name, says in dict(unreadable='opens, but reading', unopenable='Unsupported TIFF compression: 52479', broken='is no slide', glass='is empty glass', part='is cut short').items():
        assert says in errors[name] and '\n' not in errors[name] and str(tmp_path) not in errors[name] and len(errors[name]) < 400
    assert errors.nunique() == 5 and table.status[Path(CMU).stem] == 'tiled' and table.tiles[Path(CMU).stem] == 47


def test_resume_by_settings_and_file(tmp_path):
    files = [tiny_slide(tmp_path/f'{n}.tiff', (700, 700), seed=i) for i, n in enumerate('ab')]
    slides, out = read_slides(listed(tmp_path, files)), tmp_path/'tiles'
    first = tile_cohort(slides, out, pictures=True)
    before = {p: p.stat().st_mtime_ns for p in out.rglob('*') if p.suffix in ('.h5', '.jpg', '.geojson')}
    assert len(before) == 6
    pd.testing.assert_frame_equal(tile_cohort(slides, out, pictures=True), first)
    assert before == {p: p.stat().st_mtime_ns for p in before} and set(process(out).status) == {'kept'}
    tiny_slide(files[1], (700, 700), seed=9)
    tile_cohort(slides, out); assert list(process(out).status) == ['kept', 'tiled']
    tile_cohort(slides.assign(mpp=.3), out); assert list(process(out).status) == ['tiled', 'tiled']      # another mpp in the list is another question
    (out/'a.h5').write_bytes(b'half a file')
    tile_cohort(slides.assign(mpp=.3), out); assert list(process(out).status) == ['tiled', 'kept']
    files[0].write_text('gone bad')
    tile_cohort(slides.assign(mpp=.3), out); assert list(process(out).status) == ['failed', 'kept'] and not (out/'a.h5').exists()
    assert not list(out.rglob('*.part'))


def test_another_share_of_tissue_needs_no_slide(tmp_path):
    path = tiny_slide(tmp_path/'a.tiff', (1024, 1024))
    for share in (.05, .2, .7): tile_slide(path, tmp_path/f'{share}.h5', 128, min_tissue=share)
    path.unlink()
    for share in (.7, .05, .2):
        reselect(tmp_path/'0.2.h5', share)
        (a, m), (b, n) = read_tiles(tmp_path/'0.2.h5'), read_tiles(tmp_path/f'{share}.h5')
        np.testing.assert_array_equal(a, b)
        assert {k: v for k, v in m.items() if k != 'name'} == {k: v for k, v in n.items() if k != 'name'}
        with h5py.File(tmp_path/'0.2.h5') as f, h5py.File(tmp_path/f'{share}.h5') as g: np.testing.assert_array_equal(f['tissue_fraction'], g['tissue_fraction'])


def test_a_threshold_too_strict_keeps_the_grid(tmp_path):
    "It is an error of this run; a lower threshold finds the tiles again without the slide."
    slides = read_slides(listed(tmp_path, [tiny_slide(tmp_path/n, (1024, 768), seed=i) for i, n in enumerate(('a.tiff', 'b.tiff'))])); out = tmp_path/'t'
    first = tile_cohort(slides, out, 128).n_tiles.tolist()
    for _ in range(2):
        with pytest.raises(SlideError): tile_cohort(slides, out, 128, min_tissue=1.)
    assert len(read_tiles(out/'a.h5')[0]) == 0
    assert tile_cohort(slides, out, 128).n_tiles.tolist() == first and list(process(out).status) == ['reselected']*2


def test_policy_and_table_of_mpp(tmp_path):
    path = tiny_slide(tmp_path/'a.tiff', (1024, 1024), mpp=None)
    slides = read_slides(listed(tmp_path, [path]))
    with pytest.raises(SlideError, match='a.tiff has no mpp'): tile_cohort(slides, tmp_path/'t', mpp=.5)
    sizes = {}
    for policy in ('native', 'assume=0.25'):
        tile_cohort(slides, tmp_path/'t', mpp=.5, policy=policy)
        attrs = read_tiles(tmp_path/'t'/'a.h5')[1]; sizes[policy] = attrs['patch_size_level0'], attrs.get('mpp_source'), attrs.get('target_mpp')
    assert sizes == {'native': (256, None, None), 'assume=0.25': (512, 'assumed', .5)}
    (tmp_path/'mpp.csv').write_text('wsi,mpp\na.tiff,0.25\n')
    assert tile_cohort(read_slides(tmp_path/'slides.csv', tmp_path/'mpp.csv'), tmp_path/'t', mpp=.5).mpp_source[0] == 'wsi,mpp table'


def test_shards_make_the_same_files(tmp_path):
    files = [tiny_slide(tmp_path/f's{i}.tiff', (600, 600), seed=i) for i in range(5)]
    slides = read_slides(listed(tmp_path, files))
    whole = tile_cohort(slides, tmp_path/'one')
    for i in (2, 1): tile_cohort(slides, tmp_path/'two', shard=f'{i}/2')
    assert [len(pd.read_csv(tmp_path/'two'/f'shard_{i}_of_2'/'process_list.csv')) for i in (1, 2)] == [3, 2]
    pd.testing.assert_frame_equal(tile_cohort(slides, tmp_path/'two'), whole)
    assert set(process(tmp_path/'two').status) == {'kept'}
    for f in files: np.testing.assert_array_equal(read_tiles(tmp_path/'one'/f'{f.stem}.h5')[0], read_tiles(tmp_path/'two'/f'{f.stem}.h5')[0])


@real
def test_contours_enclose_the_mask(tmp_path):
    with Slide(REAL/CMU) as s:
        mask, shapes = tissue_mask(s)[0], contours(tissue_mask(s)[0], s)
        dump = tile_slide(REAL/CMU, tmp_path/'a.h5', mpp=.998, pictures=tmp_path)
        assert json.loads((tmp_path/'contours_geojson'/'a.geojson').read_text()) == shapes and dump['n_tiles']
        def area(ring): x, y = np.array(ring).T; return abs(np.dot(x[:-1], y[1:]) - np.dot(x[1:], y[:-1]))/2
        total = sum(area(f['geometry']['coordinates'][0]) - sum(map(area, f['geometry']['coordinates'][1:])) for f in shapes['features'])
        assert abs(total/(s.dimensions[0]*s.dimensions[1]) - mask.mean()) < .05
    assert all(f['properties']['objectType'] == 'annotation' and f['geometry']['coordinates'][0][0] == f['geometry']['coordinates'][0][-1] for f in shapes['features'])
    n = dump_patches(REAL/CMU, tmp_path/'a.h5', tmp_path/'png')
    coords, attrs = read_tiles(tmp_path/'a.h5')
    with Slide(REAL/CMU) as s: np.testing.assert_array_equal(np.asarray(Image.open(tmp_path/'png'/f'{coords[-1][0]}_{coords[-1][1]}.png')), list(tile_images(s, coords[-1:], attrs))[0])
    assert n == len(coords) == len(list((tmp_path/'png').iterdir()))


COST = """
import sys
from gemmgan_nb.slides import Slide
from gemmgan_nb.tiling import low_picture, otsu_mask, tissue_mask
small, big = sys.argv[1:]
with Slide(small) as s: tissue_mask(s)
before = peak()
with Slide(big) as s:
    mask, _ = otsu_mask(low_picture(s))
    print(s.dimensions[0], s.reader, (peak() - before)/1e6, mask.mean(), sep=';')
"""


@pytest.mark.parametrize('levels', [1, 3])
def test_tissue_of_a_large_slide_in_little_memory(tmp_path, levels, in_a_process_of_its_own):
    "10,000 x 10,000 pixels: less than 300 MB more, with and without a pyramid."
    r = np.random.default_rng(0)
    glass, tissue = (imagecodecs.jpeg8_encode(r.normal(v, 6, (256, 256, 3)).clip(0, 255).astype(np.uint8), level=80) for v in (240, 150))
    with tifffile.TiffWriter(tmp_path/'big.tiff') as tif:
        for i in range(levels):
            n = 10_000 >> 2*i; k = -(-n//256)
            tif.write((tissue if k/4 < j % k < k/2 else glass for j in range(k*k)), shape=(n, n, 3), dtype=np.uint8, tile=(256, 256), photometric='ycbcr', subsampling=(2, 2), compression=7,
                      subfiletype=int(i > 0), **(dict(resolution=(4e4, 4e4), resolutionunit='CENTIMETER') if i == 0 else {}))
    tiny_slide(tmp_path/'small.tiff', (600, 600))
    width, reader, megabytes, share = in_a_process_of_its_own(COST, tmp_path/'small.tiff', tmp_path/'big.tiff').split(';')
    assert width == '10000' and reader == 'direct' and float(megabytes) < 300 and .1 < float(share) < .5
